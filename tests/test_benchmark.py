import copy
import json

import pytest
import timm
import torch
from conftest import halting_model, images, save_halting_micro
from timm.models import VisionTransformer

import benchmark
from benchmarks import cases, operations, synthetic, timing
from models_act import AdaptiveVisionTransformer


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(cases, "MIN_IMAGES", 2)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)


@pytest.mark.parametrize("train", [False, True])
def test_rows_are_relative_to_the_static_model(tmp_path, train, capsys):
    flags = ["--model", "avit_micro_patch4_32", "--batch-size", "2", "3", "--mean-depth", "4", "7", "--rounds", "1"]
    flags += ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")] + ["--train"] * train
    benchmark.main(flags)
    rows = json.loads((tmp_path / "b.json").read_text())
    forms = ["static (timm)", "floor", "masked", "zipped"] + ["zipped, early exit"] * (not train)
    assert [row["form"] for row in rows] == forms * 4
    for row in rows:
        assert row["images_per_s_range"][0] <= row["images_per_s"] <= row["images_per_s_range"][1]
        assert row["speed_up_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
        if row["form"] == "floor":
            assert row["speed_of_floor"] == 1
        assert (row["memory_mib"] is not None) == train
    by_form = {row["form"]: row for row in rows[: len(forms)]}
    assert by_form["zipped"]["gmacs"] < by_form["static (timm)"]["gmacs"]
    if train:
        assert by_form["zipped"]["memory_mib"] < by_form["static (timm)"]["memory_mib"]
    else:
        assert by_form["zipped, early exit"]["gmacs"] <= by_form["zipped"]["gmacs"]
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert "of ideal" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_floor_runs_static_blocks_on_as_many_tokens(batch_size):
    model = halting_model(early_exit=False).eval()
    case = cases.make_case(batch_size, model, images(6))
    floor = cases.Floor(cases.static_twin(model), case).eval()
    tokens = {"floor": [], "zipped": []}  # in each block that runs

    def count_tokens(variant, qkv_forward):
        def forward(x):
            tokens[variant].append(x.shape[:2].numel())
            return qkv_forward(x)

        return forward

    for variant, blocks in (("floor", floor.static.blocks), ("zipped", model.blocks)):
        for block in blocks:
            block.attn.qkv.forward = count_tokens(variant, block.attn.qkv.forward)
    for batch in case.batches:
        floor(batch)
        model(batch)
    assert tokens["floor"] == [-(-n // batch_size) * batch_size for n in tokens["zipped"]]  # rounded up per image


def test_overflowing_fp16_gradients_leave_weights_unchanged():
    """Without gradient scaling, one infinite gradient makes AdamW write NaN even at learning rate 0."""
    model = halting_model()
    model.head.weight.data *= 3e4
    before = copy.deepcopy(model.state_dict())
    timing.training_call(model, [images(2)], "fp16")()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_call_requests_halting(monkeypatch):
    model, requested = halting_model(), []
    model_forward = model.forward

    def forward(x, **options):
        requested.append(options)
        return model_forward(x, **options)

    monkeypatch.setattr(model, "forward", forward)
    timing.training_call(model, [images(2)], "none")()
    assert requested == [{"return_halting": True}]


def test_halting_adds_few_ops(tmp_path, capsys):
    """The limits are design targets: on a GPU every op is at least one kernel launch."""
    flags = ["--count-ops", "--batch-size", "1", "6", "--input-size", "112", "--json", str(tmp_path / "counts.json")]
    benchmark.main([*flags, "--mean-depth", "6", "9"])
    assert "ops per block added to the static model" in capsys.readouterr().out
    rows = json.loads((tmp_path / "counts.json").read_text())
    assert [row["form"] for row in rows[:2]] == ["CPU store, logits", "CPU store, with halting"]
    for row in rows:
        if row["form"].startswith("planned"):
            continue
        limit = 26 if row["form"].startswith("CUDA") else 8 if row["batch_size"] == 1 else 20
        assert 0 < row["operations"] < limit, row
        if row["form"].startswith("CUDA"):
            assert row["waits"] <= 1
            assert row["copies"] == 0


@pytest.mark.parametrize(("amp", "limits"), [("none", (-0.5, 1.0)), ("bf16", (-10.5, -9.0))])
def test_planned_mode_has_few_ops_and_no_syncs(amp, limits):
    """The sums and norms of a block are fused. In half precision all weights are cast in one op."""
    model = timm.create_model("avit_tiny_patch16_224", img_size=64)
    case = cases.make_case(2, model, torch.randn(2, 3, 64, 64))
    before = [parameter.clone() for parameter in model.parameters()]
    rows = [row for row in operations.count_ops(case, torch.device("cpu"), amp) if row["form"].startswith("planned")]
    assert [row["form"] for row in rows] == ["planned mode, logits", "planned mode, with halting"]
    for row, limit in zip(rows, limits):
        assert row["operations"] < limit
        assert row["waits"] == row["copies"] == 0
        assert row["by_name"]["move_kernel"] == 11 / 12
    torch.testing.assert_close(list(model.parameters()), before)


def test_syncs_and_copies_are_counted():
    x = torch.randn(5)
    with operations.OperationCounter() as counter:
        x.sum().item()
        x.nonzero()
        x.masked_select(x > 0)
        torch.tensor([1.0, 2.0])
    assert counter.waits == 3
    assert counter.copies == 1


def test_count_ops_excludes_train_and_plot(capsys):
    for flags in (["--train"], ["--plot", "p.png"]):
        with pytest.raises(SystemExit):
            benchmark.main(["--count-ops", *flags])
        assert "Remove --train and --plot." in capsys.readouterr().err


def test_ops_are_counted_in_half_precision(capsys):
    benchmark.main(["--count-ops", "--model", "avit_micro_patch4_32", "--batch-size", "2", "--amp", "bf16"])
    assert "CUDA store" in capsys.readouterr().out


def test_finetune_measures_depths_of_real_images(image_folder, tmp_path):
    flags = ["--model", "avit_micro_patch4_32", "--finetune", str(save_halting_micro(tmp_path / "c.pth", 3))]
    flags += ["--data-path", str(image_folder), "--batch-size", "4", "--rounds", "1"]
    benchmark.main([*flags, "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())[0]["mean_depth"] < 12


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_static_twin_is_timms_model_with_the_same_weights(distilled):
    model = halting_model(distilled=distilled).eval()
    twin = cases.static_twin(model).eval()
    assert type(twin).__module__.startswith("timm.")
    model.halting = False
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(twin(x), model(x))


class Mixin:
    """Methods that a user adds to an adaptive model."""


class MixedIn(Mixin, AdaptiveVisionTransformer):
    """An adaptive model with these methods."""


def test_static_twin_of_a_class_with_a_mixin_is_timms_class():
    model = MixedIn(embed_dim=24, num_heads=3, depth=1, img_size=16)
    assert type(cases.static_twin(model)) is VisionTransformer


def test_missing_checkpoint_exits_with_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--finetune", "missing.pth"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "benchmark.py: error: missing.pth: no such file\n"


def test_earlier_spellings_are_accepted():
    parse = benchmark.make_parser().parse_args
    assert parse(["--runs", "3", "--count"]) == parse(["--rounds", "3", "--count-ops"])
    assert "--runs" not in benchmark.make_parser().format_help()
    assert "--count " not in benchmark.make_parser().format_help()


def test_earlier_names_are_importable():
    namespace = {}
    exec(f"from benchmark import {', '.join(benchmark.MOVED)}", namespace)
    assert namespace["impose_depths"] is namespace["set_synthetic_depths"] is synthetic.set_synthetic_depths
    assert namespace["multiply_adds"] is cases.variant_macs
    assert namespace["count"] is operations.count_ops
    with pytest.raises(AttributeError, match="module 'benchmark' has no attribute 'no_such_name'"):
        _ = benchmark.no_such_name


def test_onnx_is_compared_with_pytorch(capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    threads = torch.get_num_threads()
    argv = ["--model", "avit_micro_patch4_32", "--onnx", "--mean-depth", "5", "--rounds", "2", "--json"]
    benchmark.main([*argv, str(tmp_path / "out.json"), "--batch-size", "1", "4"])
    rows = json.loads((tmp_path / "out.json").read_text())
    one = ["PyTorch static", "PyTorch zipped", "ONNX static", "ONNX zipped"]
    four = [*one[:3], "ONNX static, one by one", "ONNX zipped", "ONNX zipped, one by one"]
    assert [row["form"] for row in rows] == one * 2 + four * 2
    assert [row["threads"] for row in rows] == [1] * 4 + [2] * 4 + [1] * 6 + [2] * 6
    for row in rows:
        is_static = "static" in row["form"]
        assert row["ideal"] == 1 if is_static else row["ideal"] > 1.5
        assert row["speed_up"] <= 1 or not is_static
        assert row["speed_up_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
    assert torch.get_num_threads() == threads
    assert "2 threads, wall time" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--train"], ["--count-ops"], ["--amp", "bf16"], ["--device", "cuda"]])
def test_onnx_excludes_training_counting_and_amp(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--onnx", *flags])
    assert stopped.value.code == 2
    assert "--onnx measures float32 inference on the CPU. Remove --" in capsys.readouterr().err


def test_onnx_with_unsupported_model_exits(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--onnx", "--model", "vit_tiny_r_s16_p8_224", "--batch-size", "1"])
    assert stopped.value.code == 2
    assert "patch_embed is a HybridEmbed" in capsys.readouterr().err
