"""The pipeline experiments/fashion_mnist/run.sh on a few images, the helpers of stages.py, and the tables."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_fashion, save_halting_micro
from warm_python import warm_python

import visualize
from datasets import build_dataset
from experiments import stages
from experiments.fashion_mnist import report as tables
from training.checkpoints import load_checkpoint

HERE = ROOT / "experiments" / "fashion_mnist"
EXPORTED = HERE / "avit_micro_fmnist.pth"
FASHION = Path("/usr/share/datasets/fashion-mnist")  # installed by Debian's package dataset-fashion-mnist
FLAGS = {"model": "avit_micro_patch4_32", "lr": 0.04, "output_dir": "private"}


def images_of(folder, train):
    data = build_dataset("FMNIST", str(folder), train, (28, 28))
    return {(image.numpy().tobytes(), int(target)) for image, target in zip(data.data, data.targets)}


def test_held_out_images_come_from_training_set_and_are_never_trained_on(tmp_path):
    data = make_fashion(tmp_path / "data")
    stages.split(data, tmp_path / "out")
    full, subset = (images_of(tmp_path / "out" / part, True) for part in ("full", "subset"))
    held_out = images_of(tmp_path / "out" / "full", False)
    assert (len(full), len(subset), len(held_out)) == (110, 40, 10)
    assert images_of(tmp_path / "out" / "subset", False) == held_out
    assert subset < full
    assert full | held_out == images_of(data, True)
    assert not full & held_out
    assert not held_out & images_of(data, False), "test images are not in the held-out set"


def test_export_drops_training_state_and_private_flags(tmp_path):
    checkpoint = save_halting_micro(tmp_path / "c.pth", 3, classes=["a", "b", "c"], args=FLAGS, optimizer={"lr": 1})
    stages.export(checkpoint, tmp_path / "exported.pth")
    exported, full = (load_checkpoint(str(path)) for path in (tmp_path / "exported.pth", checkpoint))
    assert exported.keys() == {"model", "gate", "classes", "args"}
    assert exported["args"] == {"model": "avit_micro_patch4_32", "lr": 0.04}
    assert exported["gate"] == full["gate"]
    assert (tmp_path / "exported.pth").stat().st_size < 0.6 * checkpoint.stat().st_size
    for name, value in full["model"].items():
        torch.testing.assert_close(exported["model"][name].float(), value, rtol=1e-3, atol=1e-6)


def training(acc1, macs_share, depth=6.0, seconds=100.0, **flags):
    metrics = {"test_acc1": acc1, "test_depth_mean": depth, "test_gmacs": 0.02 * macs_share, "test_gmacs_static": 0.02}
    metrics |= {"train_seconds": seconds, "train_macs_saved": 1 - macs_share}
    command = "c" + "".join(f" --{name} {value}" for name, value in flags.items())
    first = metrics | {"test_acc1": 1.0, "train_seconds": seconds + 2}
    return {**ORIGIN, "command": command, "epochs": [first, metrics]}


def evaluation(correct, macs_share, depth=6.0):
    metrics = {"acc1": 100 * correct.count("1") / len(correct), "depth_mean": depth, "gmacs": 0.02 * macs_share}
    return {**ORIGIN, "eval": metrics | {"gmacs_static": 0.02}, "correct": correct}


def gated(prior, ponder):
    return {"distr_prior_alpha": prior, "gate_scale": -1, "gate_center": 10, "ponder_token_scale": ponder}


ORIGIN = {"command": "c", "seconds": 60, "commit": "abc", "machine": "2 x CPU", "torch": "2"}
SPEEDS = {"images_per_s": 1500.4, "speed_up": 1.7, "ideal": 1.8, "speed_up_of_ideal": 0.944}
STAGES = {
    "static": training(90.0, 1.0, 12.0),
    "control_0": training(91.0, 1.0, 12.0),
    "control_1": training(91.5, 1.0, 12.0),
    "adaptive_0": training(90.7, 0.5, seconds=70.0, **gated(0.1, 0.001)),
    "adaptive_1": training(90.9, 0.6, seconds=80.0),
    "trial_0.1_-1_10_0.0005": training(91.1, 0.8, 10.0, **gated(0.1, 0.0005)),
    "trial_0.02_-1_10_0.0005": training(91.2, 0.9, 11.0, **gated(0.02, 0.0005)),
    "epoch_control": training(91.2, 1.0, 12.0),
    "epoch_adaptive": training(90.6, 0.55, seconds=70.0),
    "exported_weights": evaluation("1110", 0.55),
    "test_static": evaluation("1100", 1.0, 12.0),
    "test_control_0": evaluation("1110", 1.0, 12.0),
    "test_control_1": evaluation("1111", 1.0, 12.0),
    "test_adaptive_0": evaluation("1100", 0.5, 5.0),
    "test_adaptive_1": evaluation("1110", 0.6, 7.0),
    "search_static": training(89.0, 1.0, 12.0),
    "search_-1_30_0.0005": training(88.0, 0.9, 11.0),
    "search_-1_10_0.001": training(85.0, 0.4, 5.0),
    "gate_-1_30": evaluation("1000", 0.9, 11.5),
    "gate_-1_10": evaluation("1100", 0.7, 9.0),
    "ablation_prior": training(86.0, 0.45),
    "ablation_no_ponder": training(87.5, 0.8),
    "ablation_scratch_static": training(84.0, 1.0, 12.0),
    "ablation_scratch_halting": training(80.0, 0.3),
    "benchmark": [{"form": "zipped", "batch_size": 128, **SPEEDS}],
}
LINES = """
| (a) static | 1 | 50.00 | 12.00 | 20.00 M (0.0% saved) |
| (b) control | 2 | 87.50 ± 12.50 | 12.00 ± 0.00 | 20.00 M (0.0% saved) |
| (c) A-ViT | 2 | 62.50 ± 12.50 | 6.00 ± 1.00 | 11.00 M (45.0% saved) |
| 128 | zipped | 1500 | 1.70 | 1.80 | 0.94 |
| (a) static | 90.00 | 12.00 | 0.0% |
| (b) control, seed 1 | 91.50 | 12.00 | 0.0% |
| (c) A-ViT, seed 0 | 90.70 | 6.00 | 50.0% |
| (c) A-ViT, first seed, exported in half precision | 75.00 | 6.00 | 45.0% |
| static |  |  |  |  | 89.00 | 12.00 | 0.0% |
| -1 | 10 | 0.001 | 50.00 | 9.00 | 85.00 | 5.00 | 60.0% |
| -1 | 30 | 0.0005 | 25.00 | 11.50 | 88.00 | 11.00 | 10.0% |
| control |  |  |  | 91.00 | 12.00 | 0.0% |
| 0.02 | -1 | 10 | 0.0005 | 91.20 | 11.00 | 10.0% |
| 0.1 | -1 | 10 | 0.0005 | 91.10 | 10.00 | 20.0% |
| 0.1 | -1 | 10 | 0.001 | 90.70 | 6.00 | 50.0% |
| full recipe | 85.00 | 5.00 | 60.0% |
| with the prior, weight 0.001 | 86.00 | 6.00 | 55.0% |
| no ponder loss | 87.50 | 6.00 | 20.0% |
| from scratch, static | 84.00 | 12.00 | 0.0% |
| from scratch, halting | 80.00 | 6.00 | 70.0% |
"""


def test_report_contains_every_number(tmp_path):
    for name, stage in STAGES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(stage))
    tables.report(tmp_path, tmp_path / "report.md", "-1:10:0.001")
    text = (tmp_path / "report.md").read_text()
    missing = [line for line in LINES.strip().splitlines() if line not in text.splitlines()]
    assert not missing, text
    words = " ".join(text.split())
    assert "A-ViT minus control: * -25.00 ± 0.00 points over the seeds" in words
    assert "-25.00 ± 14.43 points paired by image, over the 4 test images" in words  # differences 0, 0, -1/2, -1/2
    assert "A-ViT takes 70.0 s, the control 100.0 s (30.0% shorter); 45.0% of the MACs are saved" in words
    assert "22 minutes of one core, two stages at a time, on 2 x CPU. Commits: abc." in words


def test_missing_seed_raises(tmp_path):
    for name, stage in STAGES.items():
        if name != "test_adaptive_1":
            (tmp_path / f"{name}.json").write_text(json.dumps(stage))
    with pytest.raises(ValueError, match=r"the control has seeds \['0', '1'\], A-ViT has \['0'\]"):
        tables.report(tmp_path, tmp_path / "report.md", "-1:10:0.001")


def test_chosen_setting_outside_search_raises(tmp_path):
    with pytest.raises(SystemExit, match=r"--chosen 10:10:0\.1: the search has no such setting"):
        tables.report(tmp_path, tmp_path / "report.md", "10:10:0.1")


# Weights and tables in the repository ----------------------------------------------------------------------


def test_exported_model_visualizes_image_of_repository(tmp_path):
    assert EXPORTED.stat().st_size < 2**20
    visualize.main(
        [str(HERE / "results/depths/class7_ref.jpg"), "--finetune", str(EXPORTED), "--output-dir", str(tmp_path)]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"class7_ref_panel.png", "class7_ref_halting.gif"}


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_exported_model_reproduces_measured_accuracy(tmp_path):
    network = ["--model", "avit_micro_patch4_32", "--data-set", "FMNIST", "--input-size", "28", "--num_workers", "0"]
    flags = [*network, "--data-path", FASHION, "--eval", "--finetune", EXPORTED, "--output_dir", tmp_path]
    subprocess.run([sys.executable, "main_act.py", *flags], cwd=ROOT, check=True)
    reproduced = json.loads((tmp_path / "eval.json").read_text())
    measured = json.loads((HERE / "results" / "test_adaptive_0.json").read_text())["eval"]
    assert reproduced["images"] == 10_000
    assert reproduced["acc1"] == pytest.approx(measured["acc1"], abs=0.1)  # half precision, different machine
    assert reproduced["gmacs"] == pytest.approx(measured["gmacs"], rel=0.01)


def test_tables_of_recipe_page_equal_report():
    rows = [line for line in (HERE / "recipe.md").read_text().splitlines() if line.startswith("|")]
    report = (HERE / "results" / "fashion_mnist.md").read_text().splitlines()
    assert rows
    assert [row for row in rows if row not in report] == []


@pytest.fixture
def python():
    with warm_python() as program:
        yield str(program)


def pipeline(tmp_path, python, train, **settings):
    """Copy the repository and make `train` random images; return the copy and a function that runs run.sh in it."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".*", "results", "*.pth"))
    data = make_fashion(tmp_path / "data", train=train)
    command = ["bash", str(repository / HERE.relative_to(ROOT) / "run.sh"), str(data)]

    def run(**more):
        environment = {**os.environ, **settings, **more, "PYTHON": python}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)

    return repository, run


def test_failed_stage_ends_pipeline(tmp_path, python):
    repository, run = pipeline(tmp_path, python, 120, STATIC_EPOCHS="-1", SCRATCH_EPOCHS="1000")
    done = run()
    assert done.returncode == 1
    assert "stage static failed, see experiments/fashion_mnist/results/runs/static.log" in done.stderr
    assert "--epochs" in done.stderr, "the end of the log is printed"
    assert "== gate" not in done.stdout, "no stage that depends on the failed one runs"
    assert not list((repository / HERE.relative_to(ROOT) / "results").glob("*.json"))


@pytest.mark.slow
def test_full_pipeline_runs_and_repeats_no_stage(tmp_path, python):
    setting = "10:10:0.005"  # some tokens halt by chance even after very few steps
    short = {"STATIC_EPOCHS": "2", "TUNING_EPOCHS": "1", "SEARCH_EPOCHS": "1", "SCRATCH_EPOCHS": "1", "SEEDS": "0"}
    short["ROUNDS"] = "1"  # rounds of the benchmark
    repository, run = pipeline(tmp_path, python, 240, **short, CHOSEN=setting, SEARCH=setting)
    first = run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("\n== ") > 10
    results = repository / HERE.relative_to(ROOT) / "results"
    table = (results / "fashion_mnist.md").read_text()
    assert "| (c) A-ViT | 1 |" in table
    tested = json.loads((results / "test_adaptive_0.json").read_text())
    assert len(tested["correct"]) == 20
    assert tested["correct"].count("1") / 20 == pytest.approx(tested["eval"]["acc1"] / 100)
    assert tested["eval"]["depth_mean"] < 12
    shutil.rmtree(results / "runs")  # as in a fresh clone
    assert "==" not in run().stdout
    curves = results / "final" / "accuracy_macs.png"
    curves.unlink()
    assert run().stdout.count("== ") == 1
    assert curves.exists()
    assert (results / "fashion_mnist.md").read_text() == table
    (results / "search_10_10_0.005.json").unlink()  # repeat one stage
    assert run().stdout.count("== ") == 1
    assert "was recorded by a different command" in run(SEARCH_EPOCHS="2").stderr
