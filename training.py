"""A whole training run: its epochs, what is saved and written down, and going on from there."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

from timm.scheduler.scheduler import Scheduler
from torch.utils.data import DataLoader, IterableDataset

import utils
from checkpoints import prepare_output_dir, save_checkpoint
from engine_act import Trainer, evaluate, report, train_one_epoch
from utils import UserError, log, warn

COLLAPSED_DEPTH = 2.5  # mean depth under which hardly anything is computed any more


class TrainingRun:
    """Trains for `epochs` epochs and evaluates after each.

    output_dir: for checkpoint.pth, best.pth, log.txt and TensorBoard; None saves nothing.
    flags: plain values by name, kept in the checkpoint for whoever reads it.
    """

    def __init__(
        self,
        trainer: Trainer,
        schedule: Scheduler,
        train_loader: DataLoader,
        test_loader: DataLoader,
        *,
        epochs: int,
        output_dir: str | None,
        tensorboard: bool,
        flags: dict,
    ):
        self.trainer, self.schedule = trainer, schedule
        self.train_loader, self.test_loader = train_loader, test_loader
        self.epochs, self.flags = epochs, flags
        self.output_dir = Path(output_dir) if output_dir else None
        self.tensorboard = tensorboard
        self.updates_per_epoch = updates_per_epoch(train_loader, trainer.accum_steps)
        self.writer = None
        self.first_epoch = 0
        self.best_acc1 = -math.inf
        self.previous_test: dict | None = None

    def train(self) -> None:
        """UserError if the output folder cannot be written."""
        prepare_output_dir(self.output_dir)
        if self.tensorboard and utils.is_main():
            self.writer = _summary_writer(self.output_dir)
        for epoch in range(self.first_epoch, self.epochs):
            self._shuffle(epoch)
            training = self._train_epoch(epoch)
            test = self._test()
            self._step_plateau(epoch, test["acc1"])
            self._warn_of_collapse(test)
            self._record(epoch, training, test)
        if self.best_acc1 >= 0:
            log(f"best top-1 {self.best_acc1:.2f} %")
        if self.writer is not None:
            self.writer.close()

    def _shuffle(self, epoch: int) -> None:
        streams = isinstance(self.train_loader.dataset, IterableDataset)
        (self.train_loader.dataset if streams else self.train_loader.sampler).set_epoch(epoch)

    def _train_epoch(self, epoch: int) -> dict:
        updates = epoch * self.updates_per_epoch
        self.schedule.step_update(updates)

        def after_update() -> None:
            nonlocal updates
            updates += 1
            self.schedule.step_update(updates)

        return train_one_epoch(self.trainer, self.train_loader, f"Epoch {epoch}", after_update)

    def _test(self) -> dict:
        """Of the raw weights; where an average is kept, its accuracy beside them."""
        trainer = self.trainer
        test = evaluate(trainer.bare_model, self.test_loader, trainer.device, trainer.amp)
        if trainer.ema is not None:
            averaged = copy.deepcopy(trainer.ema.module).to(trainer.device)  # it may be kept on the CPU
            average = evaluate(averaged, self.test_loader, trainer.device, trainer.amp, title="Test EMA")
            test["ema_acc1"] = average["acc1"]
        report(test)
        return test

    def _step_plateau(self, epoch: int, acc1: float) -> None:
        """The plateau schedule follows the accuracy; the others are stepped by updates."""
        if self.schedule.t_in_epochs:
            self.schedule.step(epoch + 1, acc1)

    def _warn_of_collapse(self, test: dict) -> None:
        if not self.trainer.bare_model.halting:
            return
        if test["depth_mean"] < COLLAPSED_DEPTH:
            mend = "a smaller --ponder_token_scale or another --gate_center keeps them going"
            warn(f"tokens collapse: their mean depth is {test['depth_mean']:.2f}; {mend}")
        before = self.previous_test
        if before and test["acc1"] < before["acc1"] - 1 and test["depth_mean"] < before["depth_mean"]:
            accuracy = f"{before['acc1']:.1f} % to {test['acc1']:.1f} %"
            warn(f"accuracy falls while depth does: {accuracy}, {before['depth_mean']:.2f} to {test['depth_mean']:.2f}")
        self.previous_test = test

    def _record(self, epoch: int, training: dict, test: dict) -> None:
        """checkpoint.pth, best.pth where it is the best so far, a line in log.txt, TensorBoard's points."""
        is_best = test["acc1"] > self.best_acc1
        self.best_acc1 = max(self.best_acc1, test["acc1"])
        if not utils.is_main() or self.output_dir is None:
            return
        state = self._state(epoch)
        save_checkpoint(state, self.output_dir / "checkpoint.pth")
        if is_best:
            save_checkpoint(state, self.output_dir / "best.pth")
        parameters = sum(p.numel() for p in self.trainer.bare_model.parameters())
        named = {f"train_{k}": v for k, v in training.items()} | {f"test_{k}": v for k, v in test.items()}
        with (self.output_dir / "log.txt").open("a") as file:
            file.write(json.dumps({"epoch": epoch, "n_parameters": parameters, **named}) + "\n")
        if self.writer is not None:
            _write_scalars(self.writer, epoch, training, test)

    def _state(self, epoch: int) -> dict:
        """Tensors and plain types only. A static network records no gate."""
        trainer = self.trainer
        model = trainer.bare_model
        gate = {"gate_scale": model.gate_scale, "gate_center": model.gate_center, "halt_eps": model.halt_eps}
        return {
            "model": model.state_dict(),
            "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "epoch": epoch,
            "best_acc1": self.best_acc1,
            "gate": gate if model.halting else None,
            "args": self.flags,
        }

    def restore(self, checkpoint: dict, location: str) -> None:
        """Everything but the model's weights. UserError where that is missing, or of another run."""
        trainer = self.trainer
        try:
            trainer.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.schedule.t_in_epochs:  # the others follow from the count of updates
                self.schedule.load_state_dict(checkpoint["schedule"])
            if checkpoint["scaler"]:  # empty where mixed precision was off
                trainer.scaler.load_state_dict(checkpoint["scaler"])
            if trainer.ema is not None and checkpoint["model_ema"] is not None:
                trainer.ema.module.load_state_dict(checkpoint["model_ema"])
            self.first_epoch, self.best_acc1 = int(checkpoint["epoch"]) + 1, float(checkpoint["best_acc1"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"--resume {location}: no training state that fits ({error}); try --finetune") from error


def updates_per_epoch(loader: DataLoader, accum_steps: int) -> int:
    return math.ceil(len(loader) / accum_steps)


# TensorBoard -------------------------------------------------------------------------------------

ORIGINAL_NAMES = {"depth_mean": "cnt_token_mean", "depth_max": "cnt_token_max", "depth_min": "cnt_token_min"}
PER_BLOCK = ("live_share", "layer_scores")


def _summary_writer(folder: Path):
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder))


def _write_scalars(writer, epoch: int, training: dict, test: dict) -> None:
    """One point per epoch: the original's names, and everything else under its own."""
    scalars = {ORIGINAL_NAMES.get(name, name): value for name, value in training.items() if name not in PER_BLOCK}
    for series in PER_BLOCK:
        scalars |= {f"{series}/block_{i:02d}": value for i, value in enumerate(training.get(series, ()), start=1)}
    if "depth_mean" in training:
        scalars["expected_depth_ratio"] = training["depth_mean"] / len(training["live_share"])
    for name, value in scalars.items():
        writer.add_scalar(f"train/{name}", value, epoch)
    for name, shown in {"acc1": "acc_top1", "acc5": "acc_top5"}.items():
        writer.add_scalar(f"test/{shown}", test[name], epoch)
    for name in ("loss", "depth_mean", "class_token_depth", "gmacs", "ema_acc1"):
        if name in test:
            writer.add_scalar(f"test/{name}", test[name], epoch)
