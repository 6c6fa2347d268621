"""Weights of other programs: under any key and any prefix, next to anything else."""

import pytest
import timm
import torch
from conftest import halting_model
from hypothesis import assume, given
from hypothesis import strategies as st

from training.checkpoints import Checkpoint
from training.teacher import load_teacher_weights
from training.weights import load_weights
from utils import UserError

VIT = halting_model().state_dict()
BACKBONE = {name: value for name, value in VIT.items() if not name.startswith("head")}
HEAD = {"weight": VIT["head.weight"], "bias": VIT["head.bias"]}
PROJECTOR = {"projector.0.weight": torch.ones(5, 24), "projector.0.bias": torch.ones(5), "queue": torch.ones(3)}


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


PARTS = st.text(st.characters(codec="utf-8", exclude_characters="."), max_size=9)
PREFIXES = st.lists(PARTS | st.sampled_from(["module", "backbone", "blocks", "0", "patch_embed"]), max_size=4)


@given(PREFIXES, st.sampled_from(["model", "state_dict", "net", None, "backbone", "ünknown"]), st.booleans())
def test_any_prefix_is_taken_off(parts, key, has_others):
    prefix = "".join(f"{part}." for part in parts)
    weights = prefixed(VIT, prefix)
    if has_others and prefix:
        others = {name: value for name, value in PROJECTOR.items() if not name.startswith(prefix)}
        weights |= others
    content = weights if key is None else {key: weights, "epoch": 3}
    assert_equal(Checkpoint(content, "c").state_dict(), VIT)


@given(PREFIXES, PREFIXES)
def test_two_networks_are_never_mixed(one, two):
    first, second = ("".join(f"{part}." for part in parts) for parts in (one, two))
    assume(first and second and first != second)
    assume(not first.startswith(second) and not second.startswith(first))
    content = {"model": prefixed(VIT, first) | prefixed(VIT, second)}
    with pytest.raises(UserError, match="c has the weights of 2 models: "):
        Checkpoint(content, "c").state_dict()


def test_error_names_both_networks():
    content = {"state_dict": prefixed(VIT, "student.backbone.") | prefixed(VIT, "teacher.backbone.")}
    with pytest.raises(UserError, match=r"2 models: student\.backbone, teacher\.backbone; save those of one alone"):
        Checkpoint(content, "c").state_dict()
    content = {"student": prefixed(VIT, "module."), "teacher": VIT, "optimizer": {"state": {}}, "epoch": 3}
    with pytest.raises(UserError, match="2 models: student, teacher; "):
        Checkpoint(content, "c").state_dict()


def test_other_entries_are_counted_in_one_line(capsys):
    checkpoint = Checkpoint({"state_dict": prefixed(VIT, "model.backbone.") | PROJECTOR}, "c")
    assert_equal(checkpoint.state_dict(), VIT)
    assert_equal(checkpoint.state_dict(), VIT)
    (line,) = capsys.readouterr().err.splitlines()
    expected = (
        "c: the model is model.backbone; other entries are not used (3): projector.0.weight, projector.0.bias, queue"
    )
    assert line.endswith(expected)


@pytest.mark.parametrize("name", ["head", "fc", "classifier", "model.head", "head.fc"])
def test_linear_layer_outside_the_backbone_is_its_head(name, capsys):
    weights = prefixed(BACKBONE, "model.backbone.") | prefixed(HEAD, f"{name}.") | PROJECTOR
    assert_equal(Checkpoint({"state_dict": weights}, "c").state_dict(), VIT)
    assert f"{name} is used as its head; other entries are not used (3)" in capsys.readouterr().err


OTHER_HEADS = {
    "two": prefixed(HEAD, "head.") | prefixed(HEAD, "fc."),
    "another width": {"head.weight": torch.ones(7, 48), "head.bias": torch.ones(7)},
    "no bias": {"head.weight": torch.ones(7, 24)},
    "another name": prefixed(HEAD, "predictor."),
    "two layers": prefixed(HEAD, "head.0.") | prefixed(HEAD, "head.2."),
    "odd shapes": {"head.weight": torch.ones(()), "head.bias": torch.ones(())},
}


@pytest.mark.parametrize("head", OTHER_HEADS.values(), ids=OTHER_HEADS)
def test_other_layers_outside_the_backbone_are_no_head(head, capsys):
    found = Checkpoint({"model": prefixed(BACKBONE, "encoder.") | head}, "c").state_dict()
    assert_equal(found, BACKBONE)
    assert f"other entries are not used ({len(head)})" in capsys.readouterr().err


def test_own_head_of_the_network_is_kept(capsys):
    other = {name: value + 1 for name, value in prefixed(HEAD, "head.").items()}
    assert_equal(Checkpoint({"model": prefixed(VIT, "encoder.") | other}, "c").state_dict(), VIT)
    assert "other entries are not used (2): head.weight, head.bias" in capsys.readouterr().err


def test_entries_next_to_weights_without_a_prefix_are_an_error():
    with pytest.raises(UserError, match=r"projector\.0\.weight is not part of this model"):
        load_weights(halting_model(), Checkpoint({"model": VIT | PROJECTOR}, "c").state_dict(), "c", replace_head=False)


def test_hostile_names_are_printed_escaped_and_short(capsys):
    weights = prefixed(BACKBONE, "\x1b[2J\n.") | {"\x1b[31m" + "x" * 9999: torch.ones(1)}
    assert_equal(Checkpoint(weights, "c").state_dict(), BACKBONE)
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line.removeprefix("\x1b[33m")
    assert len(line) < 300


@pytest.mark.parametrize("prefix", ["", "module.", "student.net."])
def test_teacher_of_another_kind_has_no_prefix(prefix):
    teacher = timm.create_model("resnet10t", num_classes=3)
    weights = Checkpoint({"state_dict": prefixed(teacher.state_dict(), prefix)}, "c").state_dict()
    load_teacher_weights(teacher, weights, "c")


def test_averaged_weights_have_no_prefix():
    checkpoint = Checkpoint({"model": VIT, "model_ema": prefixed(VIT, "ema.module.")}, "c")
    assert_equal(checkpoint.state_dict(use_ema=True), VIT)
