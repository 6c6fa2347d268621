import json

import pytest
import torch
from conftest import halting_model, images
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import TensorDataset

import losses
from engine_act import EpochState, Trainer
from training import loop
from training.checkpoints import Checkpoint, load_checkpoint
from training.loaders import evaluation_loader, training_loader
from training.loop import RunOptions, TrainingRun
from training.schedule import Schedule


def make_run(output_dir=None, epochs=2, sched="cosine", accum_steps=1, batch_size=4, **kwargs):
    model = halting_model()
    data = TensorDataset(images(12), torch.arange(12) % 7)
    data.classes = list("abcdefg")
    loading = {"num_workers": 0, "pin_memory": False}
    loader = training_loader(data, batch_size, seed=0, repeated_aug=False, max_bad_images=0, **loading)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updates = loop.updates_per_epoch(loader, accum_steps)
    options = {"step_on_epochs": sched == "plateau", "updates_per_epoch": updates}
    schedule, _ = create_scheduler_v2(optimizer, sched, num_epochs=epochs, warmup_epochs=1, warmup_lr=0.01, **options)
    criterion = losses.AdaptiveLoss(nn.CrossEntropyLoss(), 8, 0.01, 0.01)
    ema = ModelEmaV3(model, 0.9)
    trainer = Trainer(model, criterion, optimizer, torch.device("cpu"), accum_steps=accum_steps, ema=ema)
    options = RunOptions(epochs, output_dir, **{"flags": {"lr": 0.1}, **kwargs})
    return TrainingRun(trainer, Schedule(schedule), loader, evaluation_loader(data, 5, **loading), options)


def test_run_trains_logs_and_saves_the_number_of_epochs(tmp_path):
    make_run(tmp_path, epochs=3).train()
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[0]["n_parameters"] == sum(p.numel() for p in halting_model().parameters())
    checkpoint, best = (load_checkpoint(str(tmp_path / name)) for name in ("checkpoint.pth", "best.pth"))
    assert checkpoint["epoch"] == 2
    assert checkpoint["args"] == {"lr": 0.1}
    assert checkpoint["gate"]["gate_center"] == 12.0
    assert best["best_acc1"] == checkpoint["best_acc1"]


def test_lines_after_the_checkpoint_are_removed_and_counted(tmp_path, capsys):
    make_run(tmp_path, epochs=1).train()
    log = tmp_path / "log.txt"
    log.write_text(log.read_text() + '{"epoch": 1}\n{"epoch": 2}\n')
    resumed = make_run(tmp_path, epochs=1)
    resumed.load_state_dict(Checkpoint.load(str(tmp_path / "checkpoint.pth")))
    resumed.train()
    assert "log.txt: removed 2 line(s) that are later than the checkpoint" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize(("accum_steps", "updates"), [(1, 3), (2, 2)])
def test_schedule_steps_with_every_update(accum_steps, updates):
    run = make_run(accum_steps=accum_steps)
    seen = []
    step_update = run.schedule.step_update

    def recorded_step_update(number):
        seen.append(number)
        step_update(number)

    run.schedule.step_update = recorded_step_update
    run.train()
    assert sorted(set(seen)) == list(range(2 * updates + 1))
    assert run.trainer.optimizer.param_groups[0]["lr"] < 0.1


def test_progress_after_a_change_of_batch_size_ends_with_the_epoch():
    """After 1 of 3 batches of 4 images, 4 batches of 2 remain. The schedule counts as if all batches had 2 images."""
    run, seen = make_run(batch_size=2), []
    run.epoch = EpochState(0, batches=1, images=4)
    step_update = run.schedule.step_update
    run.schedule.step_update = lambda number: (seen.append(number), step_update(number))
    run.train()
    assert list(dict.fromkeys(seen)) == list(range(2, 13))


def test_plateau_schedule_gets_the_accuracy():
    run = make_run(sched="plateau")
    seen = []
    run.schedule.scheduler.step = lambda epoch, metric: seen.append((epoch, metric))
    run.train()
    assert [epoch for epoch, _ in seen] == [1, 2]
    assert all(0 <= metric <= 100 for _, metric in seen)


@pytest.mark.parametrize(
    ("acc1", "depth", "message"),
    [
        ((50, 50), (2.4, 2.4), "tokens collapse: their mean depth is 2.40"),
        ((50, 40), (6.0, 5.0), "accuracy and depth fall together: 50.0% to 40.0%, 6.00 to 5.00 blocks"),
        ((50, 40), (5.0, 6.0), None),
        ((40, 50), (6.0, 5.0), None),
    ],
)
def test_collapse_warns(acc1, depth, message, capsys, monkeypatch):
    run, evaluate, values = make_run(), loop.evaluate, iter(zip(acc1, depth))
    run.trainer.ema = None

    def evaluate_to_given_values(*args, **options):
        return evaluate(*args, **options) | dict(zip(("acc1", "depth_mean"), next(values)))

    monkeypatch.setattr(loop, "evaluate", evaluate_to_given_values)
    run.train()
    warnings = capsys.readouterr().err
    assert (message in warnings) if message else not warnings
