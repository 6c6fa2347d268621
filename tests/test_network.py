"""The settings of a network: which source decides, and the lines that name sources that differ."""

import argparse
import contextlib
import io
from functools import cache

import pytest
import timm
import torch
from conftest import save_halting_micro
from hypothesis import given
from hypothesis import strategies as st

import benchmark
import export_onnx
import main_act
import visualize
from datasets import Preprocessing
from training.arguments import parse_args
from training.build import resolve_settings
from training.checkpoints import Checkpoint
from training.gate_settings import gate_in_name
from training.models import build_on_meta, run_preprocessing
from training.network import (
    DEFAULT_MODEL,
    DEFAULT_SIZE,
    NetworkFlags,
    Purpose,
    differences,
    resolve_network,
    size_text,
)
from utils import UserError

SMALL, SAME, OTHER = "avit_small_patch16_224", "deit_small_patch16_224", "flexivit_small"  # three of the same shapes
SIZES = [(160, 160), (224, 224)]
EVALUATION, NEW_TASK, RESUME = Purpose


@pytest.fixture(scope="module", autouse=True)
def models_built_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.weights.build_on_meta", cache(build_on_meta))
        yield


@cache
def weights_of(model: str = SMALL, side: int = 224, head: bool = True) -> dict[str, torch.Tensor]:
    """Return weights with the shapes of a model that take no memory."""
    shapes = timm.create_model(model, device="meta", img_size=side, num_classes=2 if head else 0).state_dict()
    return {name: torch.zeros(()).expand(value.shape) for name, value in shapes.items()}


def resolve(checkpoint, purpose=EVALUATION, **flags):
    """Return the settings, or the error, with the lines that were printed."""
    pretrained = flags.pop("pretrained", False)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            result = resolve_network(checkpoint, NetworkFlags(**flags), purpose, pretrained)
        except UserError as error:
            result = error
    return result, [*out.getvalue().splitlines(), *err.getvalue().splitlines()]


def foreign(name="c.pth", side=224, model=SMALL, **args):
    return Checkpoint({"model": weights_of(model, side), "args": argparse.Namespace(**args)}, name)


def native(gate=None, name="c.pth", side=224, model=SMALL, **args):
    return Checkpoint({"model": weights_of(model, side), "gate": gate, "args": args}, name)


def warnings_in(lines):
    return [line for line in lines if line.startswith("warning")]


# Pairs of sources ---------------------------------------------------------------------------------

GATES = st.sampled_from([None, 5.0, 10.0, 40.0])
RECORDS = st.sampled_from([{}, {"gate_scale": 5.0, "gate_center": 20.0}, {"gate_scale": 8.0}, {"gate_center": 40.0}])


def assert_named(values, lines, texts=str):
    """Assert that, if values of sources differ, the first is named with each other one in a line."""
    given_values = [value for value in values if value is not None]
    for other in given_values[1:]:
        if other != given_values[0]:
            both = (texts(given_values[0]), texts(other))
            assert any(all(text in line for text in both) for line in lines), (both, lines)


@given(
    st.sampled_from([None, SMALL, SAME, OTHER]),
    st.sampled_from([None, SMALL, SAME, OTHER, "avit_micro_patch4_32", "my_vit"]),
    st.sampled_from(Purpose),
    st.booleans(),
)
def test_model_is_that_of_the_flag_then_the_record_then_the_shapes(flag, recorded, purpose, is_native):
    checkpoint = (native if is_native else foreign)(**({"model": SMALL} if recorded is None else {}))
    if recorded is not None:
        checkpoint.content["args"] = {"model": recorded}
    result, lines = resolve(checkpoint, purpose, model=flag)
    usable = recorded if recorded in (SMALL, SAME, OTHER) else None
    expected = flag or usable or SMALL
    is_other = usable is not None and (usable == OTHER) != (expected == OTHER)
    assert isinstance(result, UserError) == (is_other and purpose is not NEW_TASK)
    if isinstance(result, UserError):
        lines.append(str(result))
        assert str(result).endswith(f"pass --model {recorded}")
    else:
        assert result.model == expected
        assert bool(is_other) == any("computes other results" in line for line in warnings_in(lines))
    assert_named([expected, recorded], lines)


@given(
    st.sampled_from([None, *SIZES]),
    st.sampled_from([None, *SIZES]),
    st.sampled_from([160, 224]),
    st.sampled_from(Purpose),
    st.booleans(),
)
def test_size_is_that_of_the_flag_then_the_record_then_the_embedding(flag, recorded, side, purpose, is_native):
    checkpoint = (native if is_native else foreign)(side=side)
    checkpoint.content["args"] = {"input_size": list(recorded)} if recorded else {}
    result, lines = resolve(checkpoint, purpose, img_size=flag)
    expected, embedded = flag or recorded or (side, side), (side, side)
    if purpose is RESUME and expected != (recorded or embedded):
        assert isinstance(result, UserError)
        lines.append(str(result))
        assert_named([expected, recorded or embedded], lines, size_text)
        return
    assert result.img_size == expected
    assert_named([flag, recorded, embedded], lines, size_text)
    assert bool(warnings_in(lines)) >= (purpose is EVALUATION and flag not in (None, recorded or embedded))


@given(GATES, GATES, RECORDS, st.sampled_from(["c.pth", "c-5-40.pth"]), RECORDS, st.sampled_from(Purpose))
def test_gate_is_that_of_the_flags_then_the_records(scale, center, own, name, foreign_args, purpose):
    is_native = bool(own)
    checkpoint = native(gate=own, name=name) if is_native else foreign(name, **foreign_args)
    result, lines = resolve(checkpoint, purpose, gate_scale=scale, gate_center=center)
    in_name = {"gate_scale": 5.0, "gate_center": 40.0} if "-" in name else {}
    has_gate = bool(own or in_name or foreign_args or scale is not None or center is not None)
    assert result.halting == (has_gate or purpose is not EVALUATION)
    for term, flag, default in (("gate_scale", scale, 10.0), ("gate_center", center, 30.0)):
        sources = [flag, own.get(term), in_name.get(term), None if is_native else foreign_args.get(term)]
        values = [value for value in sources if value is not None] or [default]
        assert result.gate[term] == values[0]
        if result.halting:
            assert sum(line.startswith(f"{term} {values[0]:g}, from") for line in lines) == 1
            assert_named(values, [line for line in lines if term in line], "{:g}".format)


@given(
    st.sampled_from([None, {"gate_scale": 5.0, "gate_center": 20.0}]),
    st.booleans(),
    st.sampled_from(["c.pth", "c-5-40.pth"]),
    st.booleans(),
    st.sampled_from([None, 20.0]),
    st.sampled_from(Purpose),
)
def test_network_that_was_not_trained_to_halt_is_evaluated_static(gate, is_native, name, halting, center, purpose):
    checkpoint = native(gate, name) if is_native else foreign(name, **(gate or {}))
    result, lines = resolve(checkpoint, purpose, halting=halting, gate_center=center)
    knows_gate = gate is not None or (not is_native and "-" in name) or center is not None
    assert result.halting == (halting and (knows_gate or purpose is not EVALUATION))
    assert (result.halting != halting) == any("static model" in line for line in warnings_in(lines))


@given(
    st.sampled_from([None, "IMNET", "DIGITS"]),
    st.sampled_from([None, "IMNET", "DIGITS"]),
    st.sampled_from([None, Preprocessing(crop_pct=0.5), Preprocessing()]),
    st.booleans(),
    st.sampled_from([EVALUATION, NEW_TASK]),
)
def test_preprocessing_is_the_recorded_one_or_named(data_set, recorded_set, entry, is_native, purpose):
    checkpoint = (native if is_native else foreign)()
    checkpoint.content["args"] = {"model": SMALL, "input_size": [224], "data_set": recorded_set}
    checkpoint.content["preprocessing"] = entry and entry.record()
    result, lines = resolve(checkpoint, purpose, data_set=data_set)
    own = run_preprocessing(SMALL, (224, 224), data_set or str(recorded_set))
    recorded = checkpoint.recorded_preprocessing()
    assert result.preprocessing == (recorded if recorded and purpose is EVALUATION else own)
    if recorded is not None and recorded != own and data_set not in (None, recorded_set):
        assert any("preprocess" in line and "crop_pct" in line for line in lines)


# Without a checkpoint ------------------------------------------------------------------------------


def test_defaults_without_a_checkpoint_are_those_of_the_original():
    settings, lines = resolve(None, NEW_TASK, pretrained=True)
    assert (settings.model, settings.img_size) == (DEFAULT_MODEL, DEFAULT_SIZE) == ("avit_tiny_patch16_224", (224, 224))
    assert settings.halting
    assert lines == ["gate_scale 10, from the defaults", "gate_center 30, from the defaults"]


def test_default_size_of_a_model_of_another_size_is_named():
    settings, lines = resolve(None, EVALUATION, pretrained=True, model="avit_base_patch16_384", gate_scale=10.0)
    assert settings.img_size == (224, 224)
    (line,) = warnings_in(lines)
    assert "224 x 224" in line
    assert "384 x 384" in line


def test_other_size_than_that_of_pretrained_weights_is_named():
    lines = resolve(None, EVALUATION, pretrained=True, img_size=(160, 160), gate_scale=10.0)[1]
    expected = "the image size is 160 x 160 in the command line but 224 x 224 in avit_tiny_patch16_224; using 160 x 160"
    assert warnings_in(lines) == [f"warning: {expected}"]
    assert expected in resolve(None, NEW_TASK, pretrained=True, img_size=(160, 160))[1]
    assert not any("size" in line for line in resolve(None, NEW_TASK, img_size=(160, 160))[1])


def test_pretrained_weights_are_evaluated_static_unless_a_gate_is_given():
    settings, lines = resolve(None, EVALUATION, pretrained=True)
    assert not settings.halting
    assert lines == [
        "warning: the --pretrained weights were not trained to halt, so they run as a static model. "
        "Pass --gate-scale and --gate-center to halt anyway, or train it"
    ]
    assert resolve(None, EVALUATION, pretrained=True, gate_center=20.0)[0].halting
    assert resolve(None, EVALUATION)[0].halting  # random weights


# Records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["tiny-10-30", "small-10-75", "avit_tiny_patch16_224-10-30", "x-100-3", "t-2.5-30.5"])
def test_gate_in_a_file_name(stem):
    scale, center = map(float, stem.rsplit("-", 2)[1:])
    assert gate_in_name(f"dir/{stem}.pth") == {"gate_scale": scale, "gate_center": center}


@pytest.mark.parametrize(
    "stem",
    [
        "clothes-2024-05",
        "net-05-24",
        "net-2024-05-17",
        "net-24-12-31",
        "net_2024-10-17",
        "20241017-10-30",
        "vit-b-16-224",
        "net-v1-2-3",
        "net-1.0-2-3",
        "run-7-10-30",
        "deit_tiny_patch16_224-a1311bcf",
        "10-30",
        "net-0-5",
        "net-10--30",
    ],
)
def test_dates_versions_and_sizes_in_a_file_name_are_not_gates(stem):
    assert gate_in_name(f"2024-10-30/{stem}.pth") == {}


def test_gate_in_the_name_of_a_static_checkpoint_is_ignored_with_a_warning():
    settings, lines = resolve(native(None, "c-10-30.pth"))
    assert not settings.halting
    assert lines == [
        "warning: c-10-30.pth was trained without halting, so it runs as a static model; "
        "the gate in its file name is not used"
    ]
    assert native(None, "c-10-30.pth").gate_sources()[1] == ("the file name", {})


@pytest.mark.parametrize(
    ("name", "args", "flags", "warns"),
    [
        ("net-5-24.pth", {}, {}, True),
        ("net-5-24.pth", {}, {"gate_scale": 4.0}, False),
        ("net-5-24.pth", {"gate_scale": 5.0, "gate_center": 24.0}, {}, False),
        ("tiny-10-30.pth", {}, {}, False),
    ],
)
def test_gate_that_only_a_file_name_has_is_named(name, args, flags, warns):
    lines = resolve(foreign(name, **args), **flags)[1]
    line = (
        f"warning: {name} records no gate; gate_scale 5 and gate_center 24 are only in its name. "
        "Rename the file if the numbers mean something else"
    )
    assert [line for line in lines if "only in its name" in line] == ([line] if warns else [])


@pytest.mark.parametrize(
    ("args", "used", "line"),
    [
        (
            {"mean": [0.5] * 3, "std": [0.25] * 3},
            {"mean": (0.5,) * 3, "std": (0.25,) * 3},
            "mean (0.5, 0.5, 0.5) instead",
        ),
        (
            {"crop_pct": 1.0, "interpolation": "bilinear"},
            {"crop_pct": 1.0, "interpolation": "bilinear"},
            "crop_pct 1.0",
        ),
        ({"eval_crop_ratio": 0.95}, {"crop_pct": 0.95}, "crop_pct 0.95 instead"),
        ({"mean": None, "std": None, "interpolation": "", "crop_pct": None}, {}, None),
        ({"mean": [float("nan")] * 3}, {}, None),
        ({"interpolation": ["x"]}, {}, None),
        ({"crop_pct": torch.ones(3)}, {}, None),
        ({"crop_pct": 1.2, "eval_crop_ratio": 0.95}, {"crop_pct": 0.95}, "crop_pct 0.95 instead"),
    ],
)
def test_preprocessing_in_args_of_another_program_is_used_and_named(args, used, line):
    settings, lines = resolve(foreign(gate_scale=5.0, gate_center=20.0, **args))
    assert settings.preprocessing == run_preprocessing(SMALL, (224, 224))._replace(**used)
    assert [line in one for one in warnings_in(lines)] == ([True] if line else [])


@pytest.mark.parametrize(("known", "missing", "default"), [("scale", "center", 30), ("center", "scale", 10)])
def test_half_a_gate_names_what_is_missing(known, missing, default):
    lines = resolve(foreign(**{f"gate_{known}": 7}))[1]
    assert warnings_in(lines) == [
        f"warning: c.pth records gate_{known} 7 but no gate_{missing}; using the default {default}. "
        f"Pass --gate-{missing}"
    ]
    assert not warnings_in(resolve(foreign(**{f"gate_{known}": 7}), **{f"gate_{missing}": 3.0})[1])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_size": 160}, (160, 160)),
        ({"input_size": [160, 96]}, (160, 96)),
        ({"input_size": (3, 96, 160)}, (96, 160)),
        ({"input_size": None, "img_size": 96}, (96, 96)),
        ({"input_size": "160"}, None),
        ({"input_size": [True]}, None),
        ({"input_size": [0, 160]}, None),
        ({"img_size": 10**6}, None),
        ({}, None),
    ],
)
def test_image_size_that_other_programs_record(record, expected):
    assert foreign(**record).image_size() == expected


def test_size_of_weights_alone_follows_from_the_position_embedding():
    weights = dict(weights_of(side=160))
    assert resolve(Checkpoint(weights, "c"))[0].img_size == (160, 160)
    weights["pos_embed"] = weights["pos_embed"][:, :60]  # 59 patches are no square
    assert resolve(Checkpoint(weights, "c"))[0].img_size == (224, 224)
    weights["pos_embed"] = torch.zeros(()).expand(1, 1 + 10**8, 384)
    assert resolve(Checkpoint(weights, "c"))[0].img_size == (224, 224)


def test_record_of_a_size_that_is_no_square_needs_no_line():
    weights = weights_of("avit_small_patch16_224") | {"pos_embed": torch.zeros(()).expand(1, 1 + 4 * 16, 384)}
    checkpoint = Checkpoint({"model": weights, "gate": None, "args": {"input_size": [64, 256]}}, "c")
    settings, lines = resolve(checkpoint, halting=False)
    assert settings.img_size == (64, 256)
    assert lines == []


def test_weights_without_a_head_choose_their_model():
    settings, _ = resolve(Checkpoint(weights_of("avit_micro_patch4_32", 28, head=False), "c"), NEW_TASK)
    assert settings[:2] == ("avit_micro_patch4_32", (28, 28))


@pytest.mark.parametrize(
    ("recorded", "purpose", "report"),
    [
        ("deit_small_patch16_224", EVALUATION, "log"),  # another crop
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", EVALUATION, "warning"),  # another mean
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", NEW_TASK, "log"),
    ],
)
def test_normalization_of_another_programs_model_is_named(recorded, purpose, report):
    checkpoint = foreign(gate_scale=5.0, gate_center=20.0)
    checkpoint.content["args"].model = recorded
    lines = resolve(checkpoint, purpose, model=SMALL)[1]
    (line,) = [line for line in lines if "preprocessing" in line]
    assert recorded in line
    assert f"as {SMALL}" in line
    assert "crop_pct 0.875 instead of 0.9" in line
    assert line.startswith("warning") == (report == "warning") == bool(warnings_in(lines))


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [
        ("avit_tiny_patch16_224", "vit_tiny_patch16_384", []),
        ("avit3_small_patch16_224", "deit3_small_patch16_384", []),
        ("vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_clip_224", "module GELU instead of QuickGELU"),
        ("vit_base_patch16_gap_224", "vit_base_patch16_siglip_gap_224", "num_heads 12 instead of 16"),
        (SMALL, OTHER, "no_embed_class True instead of False"),
    ],
)
def test_differences_of_models_with_the_same_parameters(name, other, expected):
    found = differences(name, other, (224, 224))
    assert found == [] if expected == [] else expected in found


# Commands ------------------------------------------------------------------------------------------


def test_error_about_a_recorded_size_does_not_name_a_flag():
    checkpoint = foreign(side=224, input_size=29)
    assert str(resolve(checkpoint)[0]).startswith("the image size 29 29 is not a multiple of the patch size 16 x 16 of")
    assert str(resolve(checkpoint, img_size=(30, 30))[0]).startswith("--input-size 30 30 is not a multiple of")


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "a"], [1, 2], torch.ones(2)])
def test_class_names_that_do_not_fit_the_head_are_named(names):
    checkpoint = Checkpoint({"model": weights_of(), "classes": names}, "c.pth")
    _, lines = resolve(checkpoint)
    assert [line for line in lines if "but its head has 2 classes; the names are not used" in line]
    assert list(checkpoint.names_by_class()) == ["class 0", "class 1"]
    assert not any("names" in line for line in resolve(Checkpoint({"model": weights_of()}, "c.pth"))[1])


def test_commands_use_the_recorded_model_and_size(tmp_path, image_folder, capsys):
    micro = timm.create_model("avit_micro_patch4_32", img_size=28, num_classes=3).state_dict()
    args = {"model": "avit_micro_patch4_32", "input_size": [28]}
    path = save_halting_micro(tmp_path / "c.pth", 3, args=args)
    torch.save(torch.load(path) | {"model": micro}, path)
    data = ["--data-path", str(image_folder), "--batch-size", "9"]
    main_act.main([*data, "--num_workers", "0", "--eval", "--finetune", str(path)])
    printed = capsys.readouterr()
    assert "of the static model's 0.020G)" in printed.out
    assert "warning" not in printed.err
    benchmark.main([*data, "--finetune", str(path), "--rounds", "1", "--json", str(tmp_path / "b.json")])
    assert '"model": "avit_micro_patch4_32"' in (tmp_path / "b.json").read_text()
    printed = capsys.readouterr()
    assert "avit_micro_patch4_32, 28x28" in printed.out
    assert printed.out.count("gate_scale") == 1


@pytest.mark.parametrize("command", ["eval", "demo", "files", "summary", "export", "benchmark"])
def test_every_command_refuses_another_network_of_the_same_shapes(command, tmp_path, image_folder, capsys):
    path, out, data = str(tmp_path / "c.pth"), str(tmp_path / "out"), ["--data-path", str(image_folder)]
    torch.save(native(model=SMALL).content | {"args": {"model": SMALL, "input_size": [224]}}, path)
    main, flags = {
        "eval": (main_act.main, ["--eval", *data, "--finetune", path]),
        "demo": (main_act.main, ["--demo", *data, "--finetune", path]),
        "files": (visualize.main, [str(image_folder / "val"), "--finetune", path, "--output-dir", out]),
        "summary": (visualize.main, ["--summary", *data, "--finetune", path, "--output-dir", out]),
        "export": (export_onnx.main, [path, f"{out}.onnx"]),
        "benchmark": (benchmark.main, [*data, "--finetune", path]),
    }[command]
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--model", OTHER])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"was trained as {SMALL}" in line
    assert OTHER in line
    assert line.endswith(f"pass --model {SMALL}")


@pytest.mark.parametrize(("size", "flag"), [((28, 28), [28]), ((28, 40), [28, 40])])
def test_resolved_model_and_size_are_recorded_by_the_run(size, flag):
    args, micro = parse_args([]), "avit_micro_patch4_32"
    weights = timm.create_model(micro, img_size=size, num_classes=3).state_dict()
    recorded = {"model": micro, "input_size": [*size]}
    start = Checkpoint({"model": weights, "gate": None, "args": recorded}, "c", flag="pretrained_path")
    assert resolve_settings(args, start)[:2] == (micro, size)
    assert (args.model, args.input_size) == (micro, flag)


@pytest.mark.parametrize("start", ["--pretrained", "--pretrained-path"])
def test_self_teacher_of_other_classes_is_an_error_before_any_work(start, tmp_path, image_folder, capsys, monkeypatch):
    path = save_halting_micro(tmp_path / "c.pth", 10)
    weights = timm.create_model("avit_tiny_patch16_224").state_dict() if start == "--pretrained" else None
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: weights)
    monkeypatch.setattr("training.build.choose_gate", lambda *_: pytest.fail("the gate search has started"))
    value = [] if start == "--pretrained" else [str(path)]
    flags = ["--data-path", str(image_folder), "--distillation-type", "self", "--target-macs", "0.6"]
    with pytest.raises(SystemExit) as stopped:
        main_act.main([*flags, "--num_workers", "0", start, *value])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "classes but the dataset has 3" in line
