"""Warnings about settings whose numbers do not fit the run: moving average, learning rate, budget."""

import re

import pytest
import torch
from conftest import ROOT, halting_model, images, save_halting_micro
from hypothesis import given
from hypothesis import strategies as st
from test_loop import make_run
from torch.utils.data import TensorDataset

import losses
import main_act
from training import loop, run_warnings
from training.arguments import parse_args
from training.budget import BudgetCurve
from training.checkpoints import Checkpoint
from training.loaders import training_loader

# The moving average --------------------------------------------------------------------------------


def warnings_of(monkeypatch, module, function, *args) -> list[str]:
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "warn", found.append)
        function(*args)
    return found


@given(st.integers(1, 10**6), st.sampled_from([0.9, 0.999, 0.9999, 0.99996, 1.0]))
def test_average_close_to_its_start_warns_with_a_decay_that_does(updates, decay):
    with pytest.MonkeyPatch.context() as patch:
        found = warnings_of(patch, run_warnings, run_warnings.warn_about_average, decay, updates)
        assert len(found) == (decay**updates > 0.5)
        for warning in found:
            assert f"{decay:g} and {updates} optimizer steps, {decay**updates:.0%} of the average" in warning
            advised = re.search(r"Pass --model-ema-decay ([\d.]+) or --no-model-ema", warning)
            assert (advised is None) == (updates < run_warnings.MIN_UPDATES)
            if advised:
                assert float(advised[1]) ** updates < 0.05


def test_published_run_has_an_average_that_moves(monkeypatch):
    updates = 100 * (1_281_167 // (4 * 128))  # ImageNet on four GPUs
    assert warnings_of(monkeypatch, run_warnings, run_warnings.warn_about_average, 0.99996, updates) == []


def test_checkpoint_records_the_share_of_the_start_in_its_average(tmp_path):
    run = make_run(tmp_path)
    run.train()
    content = torch.load(tmp_path / "checkpoint.pth")
    assert content["ema_start_share"] == pytest.approx(0.9**6)  # two epochs of three batches
    again = make_run(tmp_path)
    again.load_state_dict(Checkpoint(content, "c.pth"))
    assert again.trainer.ema_start_share == content["ema_start_share"]
    del content["ema_start_share"]  # as in older checkpoints
    again.load_state_dict(Checkpoint(content, "c.pth"))
    assert again.trainer.ema_start_share == 0


@pytest.mark.parametrize(("share", "warns"), [(0.97, True), (0.4, False), (None, False), (float("nan"), False)])
def test_use_ema_of_an_average_close_to_its_start_warns_once(tmp_path, share, warns, capsys):
    path = save_halting_micro(tmp_path / "c.pth", num_classes=3)
    content = torch.load(path)
    checkpoint = Checkpoint(content | {"model_ema": content["model"], "ema_start_share": share}, "c.pth")
    for use_ema in (False, True):
        checkpoint.build_model(use_ema=use_ema)
        assert capsys.readouterr().err.count("97% of the averaged weights of c.pth") == (warns and use_ema)


# The learning rate ---------------------------------------------------------------------------------


def batch_warnings(monkeypatch, num_images: int, flags: str, **options) -> list[str]:
    args = parse_args(flags.split())
    data = TensorDataset(images(num_images), torch.zeros(num_images).long())
    loading = {"repeated_aug": False, "num_workers": 0, "pin_memory": False, "max_bad_images": 0}
    loader = training_loader(data, args.batch_size, seed=0, **loading | options)
    return warnings_of(monkeypatch, run_warnings, run_warnings.warn_about_batches, args, 0.01, loader)


@pytest.mark.parametrize(
    ("flags", "scaled", "seen", "fix"),
    [
        ("--batch-size 512", 512, 16, "--batch-size 16"),
        ("--batch-size 8 --accum-steps 64", 512, 16, "--accum-steps 2"),
        ("--batch-size 20 --accum-steps 3", 60, 16, "--batch-size 16 and --accum-steps 1"),
    ],
)
def test_rate_for_batches_that_are_never_full_warns_with_both_numbers(flags, scaled, seen, fix, monkeypatch):
    (warning,) = batch_warnings(monkeypatch, 16, flags)
    assert f"is scaled to {scaled} images per optimizer step" in warning
    assert f"a step has at most {seen}. Pass {fix}" in warning
    assert batch_warnings(monkeypatch, 16, f"{flags} {fix}".replace(" and", "")) == []


@pytest.mark.parametrize("flags", ["--batch-size 16", "--batch-size 5 --accum-steps 3"])
def test_rate_of_full_batches_does_not_warn(flags, monkeypatch):
    assert batch_warnings(monkeypatch, 16, flags) == []


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("--sched step --epochs 10 --warmup-epochs 0", "--decay-epochs 30 is not below --epochs 10"),
        ("--sched step --epochs 10 --warmup-epochs 0 --decay-epochs 4 --min-lr 1", None),  # step has no lowest rate
        ("--epochs 10 --warmup-epochs 0 --min-lr 1", "--min-lr 1 is above the learning rate 0.01"),
    ],
)
def test_rates_that_contradict_each_other_warn(flags, warning, monkeypatch):
    found = warnings_of(monkeypatch, run_warnings, run_warnings.warn_about_rates, parse_args(flags.split()), 0.01)
    assert len(found) == (warning is not None)
    assert (warning or "") in "".join(found)


def test_training_command_prints_each_warning_once(image_folder, capsys):
    flags = "--model avit_micro_patch4_32 --input-size 32 --num_workers 0 --epochs 1 --warmup-epochs 0 --min-lr 0"
    main_act.main([*flags.split(), "--no-repeated-aug", "--data-path", str(image_folder)])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("(")[0] for line in lines] == [
        "warning: the learning rate 6.25e-05 is scaled to 64 images per optimizer step ",
        "warning: the averaged weights ",
    ]


def test_recipe_of_the_quickstart_prints_no_warning(tmp_path, capsys, monkeypatch):
    start = save_halting_micro(tmp_path / "start.pth", num_classes=10, gate=None)
    monkeypatch.setattr(loop.TrainingRun, "train", lambda run: None)
    main_act.main([f"@{ROOT / 'recipes' / 'digits_adaptive.args'}", "--pretrained-path", str(start)])
    assert capsys.readouterr().err == ""


# The budget ----------------------------------------------------------------------------------------


def run_with_budget(monkeypatch, training_cost: float, evaluation_cost: float) -> list[str]:
    """Return the warnings of a run whose cost in training never changes."""
    run = make_run()
    run.calibration = []
    run.trainer.budget = losses.BudgetController(0.3, updates_per_epoch=3)
    run.trainer.budget.observe = lambda cost: losses.BudgetController.observe(run.trainer.budget, training_cost)
    monkeypatch.setattr(loop, "measure_costs", lambda *args: ([evaluation_cost], [0.01]))
    monkeypatch.setattr(loop, "budget_curve", lambda *args: BudgetCurve(((0.0, 0.1), (5.0, 0.9))))
    found = warnings_of(monkeypatch, loop, run.train)
    return [warning for warning in found if warning.startswith("--target-macs")]


def test_budget_that_evaluation_meets_does_not_warn(monkeypatch):
    assert run_with_budget(monkeypatch, training_cost=0.9, evaluation_cost=0.32) == []


def test_budget_that_evaluation_misses_warns_during_training_and_after_calibration(monkeypatch):
    during, after, averaged = run_with_budget(monkeypatch, training_cost=0.9, evaluation_cost=0.8)
    assert "this gate may not reach 0.300 of the static model's MACs. They stay at 0.800 in evaluation" in during
    assert "model uses 0.800 of the static model's MACs, not 0.300" in after
    assert "model_ema uses 0.800" in averaged


def test_short_epochs_leave_time_to_reach_the_budget():
    from training.build import MIN_PATIENCE, build_budget

    args = parse_args(["--target-macs", "0.5"])
    assert build_budget(args, halting_model(), 3).updates_per_epoch == MIN_PATIENCE
    assert build_budget(args, halting_model(), 1000).updates_per_epoch == 1000
