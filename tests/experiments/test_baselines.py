"""The static baselines of the experiments, their tables, and the pipeline on a few images."""

import json
import os
import shutil
import subprocess
from unittest.mock import patch

import pytest
import timm
import torch
from conftest import ROOT, images, make_fashion, save_halting_micro
from matplotlib.axes import Axes
from timm.models import _registry
from torch.testing import assert_close
from warm_python import warm_python

import models_act
from experiments import baselines_report, stages
from experiments.baselines import register
from experiments.baselines_report import METHODS, Point
from macs import macs_per_image
from training.checkpoints import Checkpoint, load_checkpoint


@pytest.fixture(autouse=True)
def registry():
    """Restore the registry afterwards: other tests must not find the baselines among the registered models."""
    with patch.dict(_registry._model_entrypoints), patch.dict(models_act.default_cfgs):
        yield


SIZE = {"img_size": 32, "num_classes": 3}


def static(kind, **weights):
    torch.manual_seed(0)
    model = timm.create_model(register(kind), halting=False, **SIZE).eval()
    model.load_state_dict(weights or model.state_dict())
    return model


def test_kind_of_another_model_has_its_sizes():
    name = register("avit_mini_patch16_224/shallow:5")
    model = timm.create_model(name)
    assert name == "avit_mini_shallow_5_patch16_224"
    assert (len(model.blocks), model.embed_dim, model.patch_embed.num_patches) == (5, 96, 196)
    assert register("avit_mini_patch16_224/full") == "avit_mini_patch16_224"
    assert register("shallow:5") == "avit_micro_shallow_5_patch4_32"
    with pytest.raises(SystemExit):
        register("no_model/full")


def weights():
    torch.manual_seed(1)
    return timm.create_model("avit_micro_patch4_32", **SIZE).state_dict()


@pytest.mark.parametrize("rule", ["evit", "random"])
@torch.no_grad()
def test_pruning_keeps_fixed_number_of_patches_after_fixed_block(rule):
    model, x = static(f"{rule}:3:20", **weights()), images(4, 32)
    logits, halting = model(x, return_halting=True)
    depth = halting.depth
    assert sorted(depth[2].unique().tolist()) == [3, 12]
    assert ((depth == 12).sum(dim=1) == 21).all()
    assert (depth[:, 0] == 12).all()
    assert macs_per_image(model, depth)[0] < macs_per_image(model, torch.full_like(depth, 12))[0] / 2
    tokens, _ = model._embed(x)
    for number, block in enumerate(model.blocks, start=1):
        tokens = torch.stack([block(t[None])[0] for t in tokens])
        if number == 3:
            tokens = torch.stack([t[d == 12] for t, d in zip(tokens, depth)])
    assert_close(logits, model.forward_head(model.norm(tokens)), rtol=1e-4, atol=1e-5)
    assert_close(model(x), logits)


@torch.no_grad()
def test_evit_keeps_patches_with_highest_class_token_attention():
    model, x = static("evit:2:5", **weights()), images(3, 32)
    block, entering = model.blocks[1], model.blocks[0](model._embed(x)[0])
    attention = {}
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, args, out: attention.update(weights=out))
    block(entering)
    expected = attention["weights"].mean(dim=1)[:, 0, 1:].topk(5, dim=1).indices.sort(dim=1).values
    depth = model(x, return_halting=True)[1].depth
    assert torch.equal(torch.stack([(row[1:] == 12).nonzero()[:, 0] for row in depth]), expected)


@torch.no_grad()
def test_pruning_that_keeps_all_patches_equals_full_model():
    x = images(3, 32)
    assert_close(static("random:3:64", **weights())(x), static("full", **weights())(x), rtol=1e-4, atol=1e-5)


def test_random_patches_are_fixed_in_evaluation_and_vary_in_training():
    model, x = static("random:3:20", **weights()), images(3, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_truncated_model_has_first_blocks_of_full_model(tmp_path):
    path = save_halting_micro(tmp_path / "full.pth", num_classes=3, classes=["a", "b", "c"], args={"model": "x"})
    stages.truncate(path, 5, tmp_path / "shallow.pth")
    full = load_checkpoint(str(path))["model"]
    shallow = Checkpoint.load(str(tmp_path / "shallow.pth")).build_model(register("shallow:5"), img_size=(32, 32))
    assert len(shallow.blocks) == 5
    for name, value in shallow.state_dict().items():
        assert_close(value, full[name], rtol=1e-3, atol=1e-3)


def test_narrow_model_has_given_width_and_invalid_kind_raises():
    assert static("narrow:27").blocks[0].attn.qkv.weight.shape == (81, 27)
    for kind in ("wide:3", "shallow:1:2", "random:3"):
        with pytest.raises((SystemExit, ValueError)):
            register(kind)


# Tables ------------------------------------------------------------------------------------------


def put_test(folder, name, acc1, gmacs):
    (folder / f"test_{name}.json").write_text(json.dumps({"eval": {"acc1": acc1, "gmacs": gmacs}}))


def test_report_contains_every_number(tmp_path):
    for seed, better in {"0": 0.0, "1": 1.0}.items():
        put_test(tmp_path, f"full_{seed}", 80.0 + better, 0.1)
        put_test(tmp_path, f"halting0.45_{seed}", 79.0 + better, 0.045)
        put_test(tmp_path, f"shallow5_{seed}", 74.0 + better, 0.04)
        put_test(tmp_path, f"shallow7_{seed}", 78.0, 0.06)
        put_test(tmp_path, f"random0.45_{seed}", 70.0, 0.05)
        put_test(tmp_path, f"direction0.3_{seed}", 78.0, 0.03)
        put_test(tmp_path, f"direction0.6_{seed}", 79.5, 0.06)
        put_test(tmp_path, f"otherbudget0.45_{seed}", 78.5, 0.045)
        put_test(tmp_path, f"otherbudget0.6_{seed}", 79.0 + better, 0.061)
        put_test(tmp_path, f"otherbudget1_{seed}", 80.0 + better, 0.1)
    measured = {"machine": "4 x CPU", "images_per_s": {"full": 100.0, "halting0.45": 200.0}}
    (tmp_path / "throughput.json").write_text(json.dumps(measured))
    for stage, machine in {"full_0": "a GPU", "full_1": "2 x CPU", "shallow5_0": "a GPU"}.items():
        (tmp_path / f"{stage}.json").write_text(json.dumps({"epochs": [], "machine": machine, "seconds": 5400}))
    steps = [{"form": "static (timm)"}, {"form": "zipped", "ideal": 2.0, "speed_up": 1.6}]
    (tmp_path / "step_0.45.json").write_text(json.dumps(steps))
    baselines_report.report(tmp_path, "Title")
    text = (tmp_path / "baselines.md").read_text()
    for line in (
        "| A-ViT, gate of one channel | 0.45 | 2 | 55.0% | 79.50 ± 0.50 | 2.00 | 2.22 |",
        "| shallower | 5 | 2 | 60.0% | 74.50 ± 0.50 |  | 2.50 |",
        "| static, full |  | 2 | 0.0% | 80.50 ± 0.50 | 1.00 | 1.00 |",
        "| 0.45 | 50.0% | 37.5% |",
        "| 0.3 | 0.300 | 78.00 ± 0.00 |  | -2.50 ± 0.50 |",
        "| 0.45 | 0.450 | 78.50 ± 0.00 | -1.00 ± 0.50 | -2.00 ± 0.50 |",  # minus the gate of one channel
        "| 0.6 | 0.610 | 79.50 ± 0.50 | +0.00 ± 0.50 | -1.00 ± 0.00 |",
        "| 1 | 1.000 | 80.50 ± 0.50 |  | +0.00 ± 0.00 |",
        # At 0.045 GMACs, the shallower models interpolate to 75 and 75.75. Random patches has no model that small.
        "| A-ViT, gate of one channel | 55.0% | +4.12 ± 0.12 |  | -1.00 ± 0.00 |",
        # The model of random patches, at 0.05, is too far below for a line from there to the full model.
        "| A-ViT, gate by direction | 40.0% | +1.50 ± 0.00 |  | -1.00 ± 0.50 |",
    ):
        assert line in text.splitlines(), text
    assert "\nTraining stages by the machine where they ended: a GPU (2 stages) and 2 x CPU (1 stages)." in text
    assert "Time of all stages: a GPU (3.0 hours) and 2 x CPU (1.5 hours).\n" in text
    assert "first seed, batch size 256, 4 x CPU\n" in text
    assert (tmp_path / "accuracy_macs.png").stat().st_size > 5000
    assert (tmp_path / "accuracy_speed.png").stat().st_size > 5000


def put_training(folder, name, acc1, gmacs):
    stage = {"machine": "2 x CPU", "epochs": [{}, {"test_acc1": acc1, "test_gmacs": gmacs}]}
    (folder / f"{name}.json").write_text(json.dumps(stage))


def test_report_without_test_results_has_held_out_images(tmp_path):
    put_training(tmp_path, "full_0", 80.0, 0.1)
    put_training(tmp_path, "tome0.3_0", 77.0, 0.03)
    baselines_report.main([str(tmp_path), "Title"])
    text = (tmp_path / "baselines.md").read_text()
    assert "| ToMe | 0.3 | 1 | 70.0% | 77.00 |  | 3.33 |" in text.splitlines()
    assert "| static, full |  | 1 | 0.0% | 80.00 |  | 1.00 |" in text.splitlines()
    assert text.count("## ") == 1
    assert not list(tmp_path.glob("*.png"))


def test_report_compares_models_of_equal_seeds_only(tmp_path):
    """The second seed has the better static model, so a mean with it is higher."""
    for seed, better in {"0": 0.0, "1": 5.0}.items():
        put_training(tmp_path, f"tome0.3_{seed}", 77.0 + better, 0.03)
        put_training(tmp_path, f"tome0.6_{seed}", 78.0 + better, 0.06)
        put_training(tmp_path, f"direction0.3_{seed}", 77.5 + better, 0.03)
        put_training(tmp_path, f"halting0.3_{seed}", 76.0 + better / 5, 0.03)
        put_training(tmp_path, f"direction0.8_{seed}", 79.5 + better, 0.08)
    put_training(tmp_path, "full_0", 80.0, 0.1)
    baselines_report.main([str(tmp_path), "Title"])
    lines = (tmp_path / "baselines.md").read_text().splitlines()
    first = lines.index("## First seed, held-out images")
    both = "| A-ViT, gate by direction | 0.3 | 2 | 70.0% | 80.00 ± 2.50 |  | 3.33 |"
    assert lines.index(both) < lines.index("| A-ViT, gate by direction | 70.0% | +0.50 ± 0.00 |") < first
    assert lines.index("| 0.3 | +3.50 ± 2.00 |") < first, "gate by direction minus gate of one channel"
    assert "| A-ViT, gate by direction | 20.0% |  |" in lines, "no model of ToMe has that many MACs"
    assert lines.index("| A-ViT, gate by direction | 0.3 | 1 | 70.0% | 77.50 |  | 3.33 |") > first
    assert lines.index("| static, full |  | 1 | 0.0% | 80.00 |  | 1.00 |") > first


def test_differences_have_errors_over_seeds_and_over_images(tmp_path):
    """Both models have seeds 0 and 1 with images, and seed 2 of one of them is left out."""
    answers = {
        "full": ("1111", "1111", "1111"),
        "direction0.3": ("1110", "1100", None),
        "tome0.3": ("1000", "1100", "0000"),
        "tome0.2": ("0000", "0000", "0000"),
        "otherbudget0.3": ("0000", "0000"),
    }
    for name, of_seeds in answers.items():
        for seed, correct in enumerate(of_seeds):
            stage = {"eval": {"acc1": 25.0 * (correct or "").count("1"), "gmacs": 0.1}}
            stage |= {"correct": correct} if correct else {}
            (tmp_path / f"test_{name}_{seed}.json").write_text(json.dumps(stage))
    baselines_report.main([str(tmp_path), "Title"])
    lines = (tmp_path / "baselines.md").read_text().splitlines()
    start = lines.index(f"## {baselines_report.IMAGES}")
    # Differences by image, means over the seeds: (0, 0.5, 0.5, 0) to ToMe and (0, 0, -0.5, -1) to the full model.
    assert lines[start + 4 : start + 7] == [
        "| ToMe | 0.3 | 2 | +25.00 ± 25.00 | +25.00 ± 14.43 |",
        "| static, full | 0.3 | 2 | -37.50 ± 12.50 | -37.50 ± 23.94 |",
        "",
    ]


def test_report_without_full_model_takes_its_macs_from_a_vit(tmp_path):
    for name, top1, gmacs in (("direction0.3", 77.0, 0.03), ("otherbudget0.6", 79.0, 0.06), ("tome0.3", 76.0, 0.03)):
        numbers = {"acc1": top1, "gmacs": gmacs, "gmacs_static": 0.1}
        (tmp_path / f"test_{name}_0.json").write_text(json.dumps({"eval": numbers}))
    trained = {"test_acc1": 75.0, "test_gmacs": 0.04, "test_gmacs_static": 0.1}
    for name in ("direction0.4", "shallow4"):
        (tmp_path / f"{name}_0.json").write_text(json.dumps({"machine": "2 x CPU", "epochs": [trained]}))
    baselines_report.main([str(tmp_path), "Title"])
    lines = (tmp_path / "baselines.md").read_text().splitlines()
    held_out = lines.index("## Held-out images")
    assert lines.index("| ToMe | 0.3 | 1 | 70.0% | 76.00 |  | 3.33 |") < held_out
    assert lines.index("| A-ViT, gate by direction | 70.0% | +1.00 |") < held_out
    assert lines.index("| 0.6 | 0.600 | 79.00 |  |  |") < held_out
    assert lines.index("| shallower | 4 | 1 | 60.0% | 75.00 |  | 2.50 |") > held_out


def test_baseline_is_not_extrapolated_without_full_model():
    smaller, larger = (Point("tome", "", {"0": macs}, {"0": 100 * macs}, {}) for macs in (0.2, 0.3))
    at = baselines_report.accuracy_at([smaller, larger], "tome", "0")
    assert (at(0.25), at(0.32)) == (pytest.approx(25), None)
    full = Point("full", "", {"0": 1.0}, {"0": 100.0}, {})
    assert baselines_report.accuracy_at([larger, full], "tome", "0")(0.32) == pytest.approx(32)


def test_difference_to_baseline_of_fewer_seeds_is_left_out():
    trained = Point("direction", "0.3", {"0": 0.3, "1": 0.3}, {"0": 80.0, "1": 90.0}, {})
    tome = Point("tome", "0.3", {"0": 0.3, "1": 0.3}, {"0": 79.0, "1": 89.0}, {})
    evit = Point("evit", "0.3", {"1": 0.3}, {"1": 80.0}, {})
    row = baselines_report.differences_table([trained, tome, evit]).splitlines()[-1]
    assert row == "| A-ViT, gate by direction | 70.0% |  | +1.00 ± 0.00 |"


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_line_of_other_budgets_passes_through_the_trained_one(monkeypatch, tmp_path):
    budgets = {"direction": ("0.3", "0.6"), "otherbudget": ("0.2", "1")}
    points = [
        Point(method, setting, {"0": float(setting)}, {"0": 80.0}, {})
        for method, settings in budgets.items()
        for setting in settings
    ]
    lines = {}
    monkeypatch.setattr(Axes, "errorbar", lambda _, x, y, error, *, label, **style: lines.update({label: x}))
    baselines_report.chart(points, lambda point: point.macs["0"], "MACs", "Title", tmp_path / "chart.png")
    assert lines == {METHODS["direction"]: [0.3, 0.6], METHODS["otherbudget"]: [0.2, 0.3, 1.0]}


@pytest.mark.parametrize("epochs", [0, 1])
def test_recording_incomplete_training_raises(tmp_path, epochs):
    (tmp_path / "log.txt").write_text('{"train_seconds": 1.0}\n' * epochs)
    if not epochs:
        (tmp_path / "log.txt").unlink()
    with pytest.raises(SystemExit, match=f"{epochs} of 2 epochs: training is incomplete"):
        stages.record(tmp_path, tmp_path / "stage.json", seconds=1, command="python main_act.py --epochs 2")
    assert not (tmp_path / "stage.json").exists()


# The pipeline ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pipeline_runs_from_scratch_and_repeats_no_stage(tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".*", "results", "*.pth"))
    data = make_fashion(tmp_path / "data", train=60)
    settings = {
        "SEEDS": "0",
        "TUNING_EPOCHS": "1",
        "PRETRAINING_EPOCHS": "1",
        "STATIC_EPOCHS": "1",
        "ROUNDS": "1",
        "STEP_ROUNDS": "1",
        "BLOCKS": "7",
        "BUDGETS": "0.6",
        "DIRECTION_BUDGETS": "0.6",
        "OTHER_BUDGETS": "0.8",
        "SHALLOW_BUDGETS": "0.77",
        "WIDTHS": "27",
    }
    command = ["bash", str(repository / "experiments/cluttered/run.sh"), str(data)]

    def run():
        with warm_python() as python:
            environment = {**os.environ, **settings, "PYTHON": str(python)}
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    results = repository / "experiments/cluttered/results"
    assert "| shallower | 7 | 1 |" in (results / "baselines.md").read_text()
    images_per_s = json.loads((results / "throughput.json").read_text())["images_per_s"]
    assert set(images_per_s) >= {"full", "direction0.6", "fused0.6", "halting0.6", "shallow7", "random0.6"}
    assert json.loads((results / "step_0.6.json").read_text())[0]["train"]
    again = run()
    assert again.returncode == 0, again.stderr
    assert "==" not in again.stdout
