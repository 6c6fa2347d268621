"""A whole training run: its epochs, what is saved and written down, and going on from there."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from pathlib import Path

from timm.scheduler.scheduler import Scheduler
from torch import nn

import utils
from engine_act import Epoch, Trainer, check_complete, evaluate, report, train_one_epoch
from training.checkpoints import (
    restore_optimizer,
    restore_plain,
    save_checkpoint,
)
from training.loaders import ImageLoader
from training.signals import Interrupted, StopRequest
from training.tensorboard import TensorBoardLogger
from utils import UserError, log, warn

WATCHED = ("acc1", "depth_mean")  # from one test to the next
COLLAPSED_DEPTH = 2.5  # mean depth under which hardly anything is computed any more


class TrainingRun:
    """Trains for `epochs` epochs and evaluates after each.

    output_dir: for checkpoint.pth, best.pth, log.txt and TensorBoard; None saves nothing;
    checkpoint_steps: also save after so many updates inside an epoch, 0 for not;
    keep: so many epochs' checkpoints stay, as checkpoint-EPOCH.pth;
    classes, flags: names, and plain values by name, kept in the checkpoint for whoever reads it.

    Everything random in training follows from the place in it, so that a run goes on exactly from a
    checkpoint that holds that place, the weights and what follows them.
    """

    def __init__(
        self,
        trainer: Trainer,
        schedule: Scheduler,
        train_loader: ImageLoader,
        test_loader: ImageLoader,
        *,
        epochs: int,
        output_dir: str | None,
        tensorboard: bool,
        classes: list[str],
        flags: dict,
        checkpoint_steps: int = 0,
        keep: int = 0,
    ):
        self.trainer, self.schedule = trainer, schedule
        self.train_loader, self.test_loader = train_loader, test_loader
        self.epochs, self.classes, self.flags = epochs, classes, flags
        self.output_dir = Path(output_dir) if output_dir else None
        self.tensorboard = tensorboard
        self.checkpoint_steps, self.keep = checkpoint_steps, keep
        self.updates_per_epoch = updates_per_epoch(train_loader, trainer.accum_steps)
        self.stop = StopRequest()
        self.board: TensorBoardLogger | None = None
        self.epoch = Epoch(0)  # the one that is being trained
        self.resumed = False
        self.best_acc1 = -math.inf
        self.previous_test: dict | None = None
        self.saving_seconds = 0.0

    def train(self) -> None:
        """UserError if the output folder cannot be written; Interrupted where a signal asked to stop."""
        utils.prepare_output_dir(self.output_dir)
        if utils.is_main() and self.output_dir is not None:
            self._prepare_logs()
        with self.stop.listening():
            while self.epoch.number < self.epochs:
                self._train_epoch()
        if self.best_acc1 >= 0:
            log(f"best top-1 {self.best_acc1:.2f} %")
        if self.board is not None:
            self.board.close()

    def start_at(self, epoch: int) -> None:
        """Goes on from the start of that epoch."""
        self.epoch = Epoch(epoch)

    def _prepare_logs(self) -> None:
        """Takes back what was logged after the checkpoint that the run goes on from."""
        with utils.writing(self.output_dir):
            path = self.output_dir / "log.txt"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if _epoch_of(line) < self.epoch.number]
            if lines and not self.resumed:
                warn(f"{self.output_dir} holds another run, which only --resume continues; log.txt goes on below it")
            elif kept != lines:
                utils.atomic_write(path, lambda file: file.write("".join(kept).encode()))
            if self.tensorboard:
                first_epoch = self.epoch.number if self.resumed else None
                self.board = TensorBoardLogger(self.output_dir, first_epoch, self.test_loader, self.classes)

    def _train_epoch(self) -> None:
        epoch = self.epoch
        self.train_loader.start_at(epoch.number, epoch.batches)
        self.schedule.step_update(self._updates())
        training = train_one_epoch(self.trainer, self.train_loader, epoch, self._after_update)
        training["bad_images"] = sum(utils.all_gather_objects(len(self.train_loader.bad_images)))
        self._save("checkpoint.pth")  # so that nothing is lost but the evaluation, if that is interrupted
        test = self._test()
        if self.schedule.t_in_epochs:  # plateau follows the accuracy; the others are stepped by updates
            self.schedule.step(epoch.number + 1, test["acc1"])
        self._warn_of_collapse(test)
        self.log_epoch(training, test)

    def _updates(self) -> int:
        """Done so far, over all epochs."""
        return self.epoch.number * self.updates_per_epoch + math.ceil(self.epoch.batches / self.trainer.accum_steps)

    def _after_update(self) -> None:
        self.schedule.step_update(self._updates())
        if self.stop.agreed(self.trainer.device):
            self._save("checkpoint.pth")
            self._interrupt(f"in epoch {self.epoch.number}, after batch {self.epoch.batches - 1}")
        if self.checkpoint_steps and self._updates() % self.checkpoint_steps == 0:
            self._save("checkpoint.pth")

    def _interrupt(self, place: str) -> None:
        asked = next(filter(None, utils.all_gather_objects(self.stop.signal)))
        saved = "to go on: the same command with --resume auto" if self.output_dir else "nothing was to be saved"
        log(f"stopped by {asked} {place}; {saved}")
        raise Interrupted

    def _test(self) -> dict:
        """Of the raw weights; where an average is kept, its accuracy beside them."""
        trainer = self.trainer
        test = self._evaluate(trainer.model_without_ddp)
        if trainer.ema is not None:
            averaged = copy.deepcopy(trainer.ema.module).to(trainer.device)  # it may be kept on the CPU
            test["ema_acc1"] = self._evaluate(averaged, title="Test EMA")["acc1"]
        report(test)
        return test

    def _evaluate(self, model: nn.Module, **options) -> dict:
        trainer = self.trainer
        test = evaluate(model, self.test_loader, trainer.device, trainer.amp, stop=self.stop, **options)
        if self.stop.agreed(trainer.device):
            self._interrupt(f"while evaluating epoch {self.epoch.number}")
        check_complete(test, self.test_loader)
        return test

    def _warn_of_collapse(self, test: dict) -> None:
        if not self.trainer.model_without_ddp.halting:
            return
        if test["depth_mean"] < COLLAPSED_DEPTH:
            mend = "a smaller --ponder_token_scale or another --gate_center keeps them going"
            warn(f"tokens collapse: their mean depth is {test['depth_mean']:.2f}; {mend}")
        before = self.previous_test
        if before and test["acc1"] < before["acc1"] - 1 and test["depth_mean"] < before["depth_mean"]:
            accuracy = f"{before['acc1']:.1f} % to {test['acc1']:.1f} %"
            warn(f"accuracy falls while depth does: {accuracy}, {before['depth_mean']:.2f} to {test['depth_mean']:.2f}")
        self.previous_test = {name: test[name] for name in WATCHED}

    def log_epoch(self, training: dict, test: dict) -> None:
        """best.pth where it is the best so far, a line in log.txt, TensorBoard's points, checkpoint.pth.

        The checkpoint comes last: until it is there, the epoch is not done, and is done again.
        """
        number = self.epoch.number
        is_best = test["acc1"] > self.best_acc1
        self.best_acc1 = max(self.best_acc1, test["acc1"])
        self.epoch = Epoch(number + 1)
        if is_best:
            self._save("best.pth")
        if utils.is_main() and self.output_dir is not None:
            parameters = sum(p.numel() for p in self.trainer.model_without_ddp.parameters())
            named = {f"train_{k}": v for k, v in training.items()} | {f"test_{k}": v for k, v in test.items()}
            line = {"epoch": number, "n_parameters": parameters, **named, "saving_seconds": self.saving_seconds}
            with utils.writing(self.output_dir):
                with (self.output_dir / "log.txt").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                if self.board is not None:
                    self.board.record(number, training, test, self.trainer)
        self.saving_seconds = 0.0
        if self.keep:
            self._save(f"checkpoint-{number}.pth")
            self.delete_old_checkpoints(number - self.keep)
        self._save("checkpoint.pth")

    def delete_old_checkpoints(self, last: int) -> None:
        """Removes the numbered checkpoints up to this one."""
        if not utils.is_main() or self.output_dir is None:
            return
        for path in self.output_dir.glob("checkpoint-*.pth"):
            number = path.stem.removeprefix("checkpoint-")
            if number.isdecimal() and int(number) <= last:
                with utils.writing(path):
                    path.unlink()

    def _save(self, name: str) -> None:
        """Every process must call it; the main one writes."""
        if self.output_dir is None:
            return
        start = time.perf_counter()
        state = self._state()
        if utils.is_main():
            with utils.writing(self.output_dir / name):
                save_checkpoint(state, self.output_dir / name)
        self.saving_seconds += time.perf_counter() - start

    def _state(self) -> dict:
        """Tensors and plain types only; every process must call it. A static network records no gate."""
        trainer = self.trainer
        model = trainer.model_without_ddp
        gate = {"gate_scale": model.gate_scale, "gate_center": model.gate_center, "halt_eps": model.halt_eps}
        plateau = getattr(self.schedule, "lr_scheduler", None)  # timm leaves it out of the schedule's state
        return {
            "model": model.state_dict(),
            "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
            "optimizer": trainer.optimizer.state_dict(),
            "plateau": plateau.state_dict() if plateau is not None else None,
            "scaler": trainer.scaler.state_dict(),
            "skipped_steps": [trainer.skipped_steps, trainer.skipped_in_a_row],
            "epoch": self.epoch.number - 1,  # the last that is done
            "batches": self.epoch.batches,  # done of the next
            "seconds": self.epoch.seconds,
            "averages": self.epoch.averages.state(),
            "bad_images": utils.all_gather_objects(self.train_loader.bad_images),
            "best_acc1": self.best_acc1,
            "previous_test": self.previous_test,
            "processes": utils.world_size(),
            "gate": gate if model.halting else None,
            "classes": self.classes,
            "args": self.flags,
        }

    def restore(self, checkpoint: dict, location: str) -> None:
        """Everything but the model's weights. UserError where that is missing, or of another run.

        Says which flags differ from those of the checkpoint.
        """
        trainer = self.trainer
        try:
            restore_optimizer(trainer.optimizer, checkpoint["optimizer"])
            if checkpoint["plateau"] is not None and hasattr(self.schedule, "lr_scheduler"):
                restore_plain(self.schedule.lr_scheduler, checkpoint["plateau"])
            if checkpoint["scaler"] and trainer.scaler.is_enabled():  # empty where mixed precision was off
                trainer.scaler.load_state_dict(checkpoint["scaler"])
            trainer.skipped_steps, trainer.skipped_in_a_row = map(int, checkpoint["skipped_steps"])
            if trainer.ema is not None and checkpoint["model_ema"] is not None:
                trainer.ema.module.load_state_dict(checkpoint["model_ema"])
            self.epoch = self._saved_epoch(checkpoint)
            bad_images = checkpoint["bad_images"]
            if utils.rank() < len(bad_images):
                self.train_loader.bad_images = list(map(str, bad_images[utils.rank()]))
            self.best_acc1 = float(checkpoint["best_acc1"])
            if math.isnan(self.best_acc1):
                raise ValueError("best_acc1 is nan")
            test = checkpoint["previous_test"]
            self.previous_test = test and {name: float(test[name]) for name in WATCHED}
            self.resumed = True
            self.warn_changed_flags(checkpoint["args"], int(checkpoint["processes"]))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise UserError(f"--resume {location}: no training state that fits ({error}); try --finetune") from error

    def _saved_epoch(self, checkpoint: dict) -> Epoch:
        epoch = Epoch(int(checkpoint["epoch"]) + 1, int(checkpoint["batches"]), float(checkpoint["seconds"]))
        known = 0 <= epoch.number <= MAX_EPOCHS and 0 <= epoch.batches <= MAX_BATCHES and 0 <= epoch.seconds < math.inf
        if not known:
            raise ValueError(f"epoch {epoch.number}, batch {epoch.batches}, {epoch.seconds} s")
        if utils.is_main():
            epoch.averages.restore(checkpoint["averages"])
            if epoch.batches and epoch.averages.sums["loss"].ndim:
                raise ValueError("the averaged loss is no number")
        return epoch

    def warn_changed_flags(self, flags: dict, processes: int) -> None:
        changes = [f"{processes} processes are now {utils.world_size()}"] if processes != utils.world_size() else []
        for name in self.flags.keys() - HARMLESS_FLAGS:
            if name in flags and flags[name] != self.flags[name]:
                before = flags[name] if isinstance(flags[name], str | int | float | None) else "another value"
                changes.append(f"--{name} was {str(before)[:80]!r}, is now {self.flags[name]!r}")
        if changes:
            warn(f"the resumed run changes: {'; '.join(sorted(changes))}")


MAX_EPOCHS, MAX_BATCHES = 10**6, 10**9  # a checkpoint with more is none of ours

# Flags that may differ without another outcome.
HARMLESS_FLAGS = {
    *("resume", "output_dir", "num_workers", "pin_mem", "tensorboard", "dist_url", "world_size"),
    *("checkpoint_steps", "keep", "max_bad_images"),
}


def _epoch_of(line: str) -> float:
    """Of a line of log.txt; infinity where it is broken."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def updates_per_epoch(loader: ImageLoader, accum_steps: int) -> int:
    return math.ceil(len(loader) / accum_steps)
