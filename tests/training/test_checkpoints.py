import argparse
import os
import random
import re

import hostile_checkpoints
import pytest
import timm
import torch
from conftest import halting_model, save_halting_micro
from hostile_checkpoints import torch_bytes
from safetensors.torch import save_file

from models_act import HALTING_DEFAULTS
from training import checkpoints
from training.arguments import GATE_DEFAULTS
from training.checkpoints import Checkpoint
from training.gate_settings import resolve_gate
from training.weights import load_teacher_weights
from training.weights import load_weights as load_weights_from
from utils import UserError


def load_weights(model, weights, replace_head=False, **options):
    load_weights_from(model, weights, "c", replace_head=replace_head, **options)
    return model


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hostile_checkpoints.KINDS)
def test_broken_and_hostile_files_are_refused(tmp_path, kind, monkeypatch):
    """hostile_checkpoints.py can try more files."""
    monkeypatch.setattr("training.weights.fitting_models", lambda weights: [])  # slow
    kinds = hostile_checkpoints.Kinds(tmp_path / "trap")
    assert [hostile_checkpoints.try_file(kinds, kind, random.Random(seed)) for seed in range(5)] == ["refused"] * 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a checkpoint"),
        (torch_bytes({"model": torch.ones(1000)})[:3000], "truncated or not a checkpoint"),
        (torch_bytes({"args": random.Random(3)}), "which are never executed"),
        (torch_bytes([1, 2]), "expected a dictionary, found list"),
        (torch_bytes({"model": {"a": 1}}), "has no weights"),
        (torch_bytes({"a": torch.ones(1, device="meta")}), "has no weights"),
    ],
    ids=["empty", "truncated", "code", "list", "numbers", "meta"],
)
def test_invalid_file_error_names_the_reason(tmp_path, content, message):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Checkpoint.load(str(tmp_path / "c.pth")).state_dict()


def test_missing_file_error_suggests_similar_names(tmp_path):
    (tmp_path / "tiny-10-30.pth").touch()
    with pytest.raises(UserError, match=r"no such file \(did you mean tiny-10-30\.pth\?\)"):
        checkpoints.load_checkpoint(str(tmp_path / "tiny-10-3.pth"))


def test_https_url_is_downloaded(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "c.pth")
    asked = []

    def download(url, **_):
        asked.append(url)
        return tmp_path / "c.pth"

    monkeypatch.setattr(checkpoints, "download_cached_file", download)
    checkpoints.load_checkpoint("https://example.org/c.pth")
    ((url, name),) = asked
    assert url == "https://example.org/c.pth"
    assert name.endswith("-c.pth")
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load_checkpoint("http://example.org/c.pth")


def test_cached_copy_of_a_url_is_named(tmp_path, monkeypatch, capsys):
    torch.save({}, tmp_path / "c.pth")
    os.utime(tmp_path / "c.pth", (0, 86_400))
    monkeypatch.setattr(checkpoints, "download_cached_file", lambda *_, **__: tmp_path / "c.pth")
    checkpoints.load_checkpoint("https://example.org/c.pth")
    line = r"https://example\.org/c\.pth: using the copy of 1970-01-0\d in .*c\.pth; delete it to download .*\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_safetensors_file_loads(tmp_path):
    weights = halting_model().state_dict()
    save_file(weights, str(tmp_path / "w.safetensors"))
    loaded = Checkpoint.load(str(tmp_path / "w.safetensors")).state_dict()
    assert torch.equal(load_weights(halting_model(mean=2.0), loaded).pos_embed, weights["pos_embed"])


def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint({"epoch": 1}, path)

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save_checkpoint({"epoch": 2}, path)
    assert checkpoints.load_checkpoint(str(path)) == {"epoch": 1}


# Weights -----------------------------------------------------------------------------------------


def test_ema_weights_load_only_with_use_ema():
    model, average = {"head.bias": torch.zeros(7)}, {"head.bias": torch.ones(7)}
    checkpoint = Checkpoint({"model": model, "model_ema": average}, "c")
    assert torch.equal(checkpoint.state_dict()["head.bias"], model["head.bias"])
    assert torch.equal(checkpoint.state_dict(use_ema=True)["head.bias"], average["head.bias"])
    with pytest.raises(UserError, match="no averaged weights"):
        Checkpoint({"model": model}, "c").state_dict(use_ema=True)


def test_weights_of_a_wrapped_model_fit():
    weights = {f"module.{name}": value for name, value in halting_model().state_dict().items()}
    model = load_weights(halting_model(mean=2.0), Checkpoint({"model": weights}, "c").state_dict())
    assert torch.equal(model.pos_embed, halting_model().pos_embed)


def test_head_of_another_class_count_needs_replace_head(capsys):
    model, weights = halting_model(num_classes=5), halting_model().state_dict()
    own_head = model.head.weight.clone()
    with pytest.raises(UserError, match="c predicts 7 classes but the dataset has 5"):
        load_weights(model, weights)
    load_weights(model, weights, replace_head=True)
    assert "predicts 7 classes but the dataset has 5; training starts with a new head" in capsys.readouterr().err
    assert torch.equal(model.head.weight, own_head)
    assert torch.equal(model.cls_token, weights["cls_token"])


def test_subset_of_classes_selects_head_rows():
    weights = halting_model(num_classes=3, distilled=True).state_dict()
    found = Checkpoint({"model": weights, "classes": ["a", "b", "c"]}, "c").weights_for(["c", "a"])
    for name in ("head.weight", "head_dist.bias"):
        assert torch.equal(found[name], weights[name][[2, 0]])
    assert torch.equal(found["cls_token"], weights["cls_token"])
    nameless = [None, ["a", "a", "b"], ["a", 1, "c"], "abc", [], [*"abcd"], ["class 0", "class 1", "class 2"]]
    for recorded in nameless:
        found = Checkpoint({"model": weights, "classes": recorded}, "c").weights_for(["c", "a"])
        assert torch.equal(found["head.bias"], weights["head.bias"])


def test_class_names_are_printed_escaped_and_short(capsys):
    weights = halting_model(num_classes=2).state_dict()
    Checkpoint({"model": weights, "classes": ["\x1b[2J", "a" * 500]}, "c").weights_for(["x", "y"])
    warning = capsys.readouterr().err
    assert r"\x1b[2J" in warning
    assert len(warning) < 200


def test_teacher_classes_are_matched_by_name():
    teacher, weights = halting_model(num_classes=2), halting_model(num_classes=3).state_dict()
    checkpoint = Checkpoint({"model": weights, "classes": ["a", "b", "c"]}, "c")
    load_teacher_weights(teacher, checkpoint.weights_for(["c", "a"]), "c")
    assert torch.equal(teacher.head.weight, weights["head.weight"][[2, 0]])


def test_weights_without_a_head_need_replace_head(capsys):
    weights = {name: value for name, value in halting_model().state_dict().items() if not name.startswith("head")}
    model = halting_model(num_classes=5)
    own_head = model.head.weight.clone()
    with pytest.raises(UserError, match=r"head\.weight is missing"):
        load_weights(model, weights)
    load_weights(model, weights, replace_head=True)
    assert "no head for these classes; training starts with a new head of 5" in capsys.readouterr().err
    assert torch.equal(model.head.weight, own_head)


def test_position_embeddings_are_resampled():
    square, wide = halting_model().state_dict(), halting_model(img_size=(8, 32)).state_dict()  # 4 x 4, 2 x 8 patches
    larger = load_weights(halting_model(img_size=24), square)
    assert larger.pos_embed.shape == (1, 37, 24)
    assert torch.equal(larger.pos_embed[:, 0], square["pos_embed"][:, 0])
    other = load_weights(halting_model(), wide, trained_size=(8, 32))
    assert not torch.equal(other.pos_embed, wide["pos_embed"])
    assert torch.equal(load_weights(halting_model(img_size=(8, 32)), wide).pos_embed, wide["pos_embed"])
    with pytest.raises(UserError, match="pos_embed has 8 patches, which do not form a grid of 2 x 2"):
        load_weights(halting_model(), halting_model(img_size=(8, 16)).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.weight"), r"blocks\.1\.attn\.qkv\.weight is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "extra is not part of this model"),
        (lambda w: w.update({"norm.weight": torch.ones(5)}), r"norm\.weight has shape \(5,\), expected \(24,\)"),
        (lambda w: w.update({"pos_embed": torch.ones(17, 24)}), r"pos_embed has shape \(17, 24\)"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 17, 20)}), r"pos_embed has shape \(1, 17, 20\)"),
        (lambda w: w.update({"head.weight": torch.ones(7, 20)}), r"head\.weight has shape \(7, 20\)"),
        (
            lambda w: w.update({"patch_embed.proj.weight": torch.ones(24, 3, 8, 8)}),
            r"has shape \(24, 3, 8, 8\)",
        ),
    ],
)
def test_mismatched_weights_are_named_and_not_loaded(change, message):
    weights = dict(halting_model().state_dict())
    change(weights)
    model = halting_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(model, weights, replace_head=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("avit_small_patch16_224", {"num_classes": 3}, "use --model avit_small_patch16_224"),
        ("avit_base_patch16_384", {}, "use --model avit_base_patch16_384 or avit_base_patch16_224"),
        ("avit_tiny_distilled_patch16_224", {}, "use --model avit_tiny_distilled_patch16_224"),
        ("deit3_small_patch16_224", {}, "use --model avit3_small_patch16_224 or avit3_small_patch16_384"),
        ("avit_tiny_patch16_224", {"depth": 3}, "and 105 more$"),
    ],
)
def test_weights_of_another_model_suggest_it(name, options, hint):
    model = timm.create_model("avit_tiny_patch16_224", depth=12)
    weights = timm.create_model(name, device="meta", **options).state_dict()
    with pytest.raises(UserError, match="does not fit the model: .*" + hint):
        load_weights(model, weights, replace_head=True)


# The gate ----------------------------------------------------------------------------------------

NO_FLAGS = {"gate_scale": None, "gate_center": None}
NAMESPACE = argparse.Namespace(gate_scale=100, gate_center=3)
ODD = argparse.Namespace(gate_scale="rm -rf", gate_center=float("nan"))


@pytest.mark.parametrize(
    ("flags", "checkpoint", "location", "expected", "source"),
    [
        (NO_FLAGS, {"model": {}}, "dir/small-10-75.pth", (10, 75), "the file name"),
        (NO_FLAGS, {"model": {}}, "dir/tiny-2.5-30.5.pth", (2.5, 30.5), "the file name"),
        (NO_FLAGS, {"model": {}}, "visualization-tiny.pth", (5, 50), "the file name"),
        (NO_FLAGS, {"args": NAMESPACE}, "foreign.pth", (100, 3), "the checkpoint's args"),
        (NO_FLAGS, {"args": NAMESPACE}, "tiny-10-30.pth", (10, 30), "the file name"),
        (NO_FLAGS, {"gate": {"gate_scale": 4.0, "gate_center": 16.0}}, "tiny-10-30.pth", (4, 16), "the checkpoint"),
        (NO_FLAGS, {"gate": None, "args": {"gate_scale": 7, "gate_center": 8}}, "static.pth", (10, 30), "the defaults"),
        (NO_FLAGS, {"args": ODD}, "f.pth", (10, 30), "the defaults"),
        ({"gate_scale": 1.0, "gate_center": 2.0}, {"args": NAMESPACE}, "tiny-10-30.pth", (1, 2), "the command line"),
        (NO_FLAGS, {}, "deit_tiny_patch16_224-a1311bcf.pth", (10, 30), "the defaults"),
    ],
)
def test_gate_comes_from_the_first_source(flags, checkpoint, location, expected, source, capsys):
    gate = resolve_gate(flags, Checkpoint(checkpoint, location).gate_sources())
    assert (gate["gate_scale"], gate["gate_center"]) == expected
    assert capsys.readouterr().out.count(f"from {source}") == 2


def test_defaults_of_flags_equal_those_of_models():
    assert {name: HALTING_DEFAULTS[name] for name in GATE_DEFAULTS} == GATE_DEFAULTS


def test_gate_sources_that_disagree_warn(capsys):
    sources = Checkpoint({"args": NAMESPACE}, "tiny-10-30.pth").gate_sources()
    resolve_gate({"gate_scale": 5.0, "gate_center": None}, sources)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert "gate_scale is 5 in the command line but 10 in the file name; using 5" in warnings[0]


# Records -----------------------------------------------------------------------------------------


def test_native_checkpoint_records_model_size_and_classes(tmp_path):
    entries = {"args": {"model": "avit_micro_patch4_32", "input_size": [16, 40]}, "classes": ["a", "b", "c"]}
    checkpoint = Checkpoint.load(str(save_halting_micro(tmp_path / "c.pth", 3, **entries)))
    assert checkpoint.model_name() == "avit_micro_patch4_32"
    assert checkpoint.image_size() == (16, 40)
    assert checkpoint.names_by_class() == {"a": "a", "b": "b", "c": "c"}
    assert not checkpoint.is_static
    assert Checkpoint(checkpoint.content | {"gate": None}, "c").is_static


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"args": argparse.Namespace(model="deit_tiny")},
        {"args": {"model": ["avit_micro_patch4_32"], "input_size": "32"}, "classes": "abc"},
        {"args": 7, "classes": ["a", "b"]},
        {"args": {"model": "resnet50", "input_size": [1, 2, 3]}, "classes": ["a", "b", 3]},
        {"args": {"input_size": [10**6]}, "classes": ["a", "b", "a"]},
    ],
)
def test_invalid_records_are_ignored(tmp_path, entries):
    checkpoint = Checkpoint.load(str(save_halting_micro(tmp_path / "c.pth", 3, **entries)))
    assert checkpoint.model_name() == "avit_micro_patch4_32"
    assert checkpoint.image_size() is None
    assert list(checkpoint.names_by_class()) == ["class 0", "class 1", "class 2"]


def test_published_checkpoint_has_model_name_and_imagenet_classes():
    weights = timm.create_model("avit_tiny_patch16_224").state_dict()
    checkpoint = Checkpoint({"model": weights, "args": argparse.Namespace(model="avit_tiny")}, "tiny-10-30.pth")
    assert checkpoint.model_name() == "avit_tiny_patch16_224"
    assert checkpoint.names_by_class()["n01443537"].startswith("goldfish")
    assert len(checkpoint.names_by_class()) == 1000


def test_weights_that_fit_no_registered_model_raise():
    with pytest.raises(UserError, match="c fits no registered model"):
        Checkpoint({"model": timm.create_model("resnet10t").state_dict()}, "c").model_name()


@pytest.mark.parametrize(
    "head", [None, torch.zeros(()), torch.zeros(3), torch.zeros(0, 48), torch.zeros(1).expand(3 * 10**7, 48)]
)
def test_names_by_class_without_a_head_raises(tmp_path, head):
    path = save_halting_micro(tmp_path / "c.pth", 3)
    checkpoint = torch.load(path)
    del checkpoint["model"]["head.weight"]
    checkpoint["model"] |= {} if head is None else {"head.weight": head}
    with pytest.raises(UserError, match="has no head"):
        Checkpoint(checkpoint, str(path)).names_by_class()
