"""A training run: its epochs, checkpoints and logs, and how it is resumed."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

import utils
from datasets import Preprocessing
from engine_act import EpochState, Trainer, evaluate, train_one_epoch
from training.budget import BudgetCurve, CalibrationBatches, budget_curve, measure_costs
from training.budget_table import fits_weights, measure_table
from training.checkpoints import Checkpoint, save_checkpoint
from training.evaluation import check_complete, report
from training.loaders import ImageLoader
from training.optimizer_state import OptimizerState
from training.resume import OrderChanges, check_optimizer, data_record, warn_changed_flags, warn_skipped_images
from training.schedule import Schedule
from training.signals import Interrupted, StopRequest
from utils import UserError, log, warn

WATCHED = ("acc1", "depth_mean")  # metrics that are compared with the previous epoch's
MAX_COST = 0.9  # a budget curve is measured up to this fraction of the static model's MACs
COLLAPSED_DEPTH = 2.5  # blocks; a warning is printed if the mean depth is lower


@dataclass
class RunOptions:
    """Length and outputs of a run.

    output_dir: folder of checkpoint.pth, best.pth, log.txt and TensorBoard logs; None saves nothing;
    checkpoint_steps: number of updates between checkpoints inside an epoch; 0 saves after epochs only;
    keep: number of last epochs kept as checkpoint-EPOCH.pth;
    flags: plain values by name, recorded in the checkpoint.
    """

    epochs: int
    output_dir: Path | None = None
    tensorboard: bool = False
    checkpoint_steps: int = 0
    keep: int = 0
    flags: dict = field(default_factory=dict)


class TrainingRun:
    """A run that trains and evaluates epoch after epoch.

    All random numbers follow from the seed and the position in training. A checkpoint stores the position, the weights
    and the state of the optimizer, so a resumed run continues exactly.
    """

    def __init__(
        self,
        trainer: Trainer,
        schedule: Schedule,
        train_loader: ImageLoader,
        test_loader: ImageLoader,
        options: RunOptions,
        calibration: CalibrationBatches | None = None,
        static_start: dict[str, Tensor] | None = None,
    ):
        """Build a run.

        calibration: images that training does not see, on which budgets are measured; see `build.calibration_batches`;
        static_start: weights of the static model that training to a budget starts from, in half precision.
        """
        self.trainer, self.schedule = trainer, schedule
        self.train_loader, self.test_loader = train_loader, test_loader
        self.options, self.calibration, self.static_start = options, calibration, static_start
        self.classes = getattr(train_loader.images, "classes", None)
        self.stop = StopRequest()
        self.tensorboard = None
        self.epoch = EpochState(0)  # the current epoch
        self.last_batch = 0  # number of batches of the current epoch, once it has started
        self.resumed = False
        self.order_changes = OrderChanges()  # since the checkpoint that the run resumes from
        self.best_acc1 = -math.inf
        self.previous_test: dict | None = None
        self.saving_seconds = 0.0
        self.budget_curves: dict[str, list] = {}  # records by name of the weights, after the last epoch
        self.budget_tables: dict[str, list] = {}

    def train(self) -> None:
        """Train all remaining epochs.

        Raises UserError if the output folder cannot be written, and Interrupted if a signal asked to stop.
        """
        if self.resumed:
            self._report_place()
        utils.prepare_output_dir(self.options.output_dir)
        if utils.is_main() and self.options.output_dir is not None:
            self._prepare_logs()
        if self.epoch.number >= self.options.epochs:
            log(f"all {self.options.epochs} epochs are done; nothing to train")
        with self.stop.listening():
            for epoch in range(self.epoch.number, self.options.epochs):
                self._start_epoch()
                training = train_one_epoch(
                    self.trainer, self.train_loader, self.epoch, self._on_update, should_stop=self.stop.asked
                )
                training["bad_images"] = sum(utils.all_gather_objects(len(self.train_loader.bad_images)))
                self.save("checkpoint.pth")  # an interrupted evaluation loses nothing else
                if self.trainer.budget is not None and epoch + 1 == self.options.epochs:
                    self._calibrate()
                test = self._test()
                self.schedule.step_epoch(epoch + 1, test["acc1"])
                self._warn_about_collapse(test)
                self.log_epoch(training, test)
        if self.best_acc1 >= 0:
            log(f"best top-1: {self.best_acc1:.2f}%")
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _report_place(self) -> None:
        """Print where the run resumes, and a warning if it cannot continue the epoch exactly."""
        epoch, loader = self.epoch, self.train_loader
        log(
            f"resuming at epoch {epoch.number} (the first is 0), after {epoch.batches} of its batches "
            f"({epoch.images} images)"
        )
        if epoch.number < self.options.epochs:
            self.order_changes.warn(epoch.number, epoch.images, loader.batches_per_epoch * loader.images_per_batch)
            warn_skipped_images(loader, epoch.number, epoch.images)

    def _start_epoch(self) -> None:
        """Make the loader continue where the epoch was left, possibly with batches of another size."""
        self.epoch.images_per_batch = self.train_loader.images_per_batch
        self.train_loader.start_at(self.epoch.number, self.epoch.images)
        self.last_batch = self.epoch.batches + len(self.train_loader)
        self._step_schedules()

    @cached_property
    def data(self) -> dict:
        """The record of the training data."""
        return data_record(self.train_loader)

    def start_at(self, epoch: int) -> None:
        """Continue from the start of an epoch. Raises UserError if it is beyond --epochs."""
        if epoch >= self.options.epochs:
            raise UserError(f"--start-epoch {epoch} leaves no epoch to train; --epochs is {self.options.epochs}")
        self.epoch = EpochState(epoch)

    def _prepare_logs(self) -> None:
        """Open the logs, and remove lines that were written after the checkpoint that the run resumes from."""
        folder = self.options.output_dir
        with utils.writing(folder):
            path = folder / "log.txt"
            lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if _epoch_of(line) < self.epoch.number]
            if lines and not self.resumed:
                warn(
                    f"{folder} already contains a run. This run overwrites its checkpoints and appends to its log.txt; "
                    "to continue the earlier run instead, stop and pass --resume auto"
                )
                if not lines[-1].endswith("\n"):  # the last line is incomplete after a crash
                    utils.atomic_write(path, lambda file: file.write(("".join(lines) + "\n").encode()))
            elif kept != lines:
                log(f"{path}: removed {len(lines) - len(kept)} line(s) that are later than the checkpoint")
                utils.atomic_write(path, lambda file: file.write("".join(kept).encode()))
            if self.options.tensorboard:
                from training.tensorboard import TensorBoardLogger  # slow to import

                first_epoch = self.epoch.number if self.resumed else None
                self.tensorboard = TensorBoardLogger(folder, first_epoch, self.test_loader, self.classes)

    def _updates(self) -> int:
        """Return the number of optimizer steps done so far, over all epochs, as if all had the current batch size."""
        accum_steps = self.trainer.accum_steps
        left = math.ceil(max(self.last_batch - self.epoch.batches, 0) / accum_steps)
        return (self.epoch.number + 1) * updates_per_epoch(self.train_loader, accum_steps) - left

    def _step_schedules(self) -> None:
        updates = self._updates()
        self.schedule.step_update(updates)
        if self.trainer.budget is not None:
            total = self.options.epochs * updates_per_epoch(self.train_loader, self.trainer.accum_steps)
            self.trainer.budget.progress = updates / total

    def _on_update(self, stop: bool) -> None:
        budget = self.trainer.budget
        if budget is not None and budget.is_stuck:
            self._warn_about_stuck_budget()
        self._step_schedules()
        if stop:
            self.save("checkpoint.pth")
            self._interrupt(f"in epoch {self.epoch.number} after batch {self.epoch.batches - 1}")
        if self.options.checkpoint_steps and self._updates() % self.options.checkpoint_steps == 0:
            self.save("checkpoint.pth")

    def _interrupt(self, place: str) -> None:
        asked = next(filter(None, utils.all_gather_objects(self.stop.signal)))
        if self.options.output_dir:
            hint = "run the same command with --resume auto to continue"
        else:
            hint = "nothing is saved without --output-dir"
        log(f"stopped by {asked} {place}; {hint}")
        raise Interrupted

    def _warn_about_stuck_budget(self) -> None:
        """Warn if the cost is off its goal in evaluation too: augmented images may cost more or less."""
        model, budget = self.trainer.model_without_ddp, self.trainer.budget
        cost, _ = self._cost_at(model, model.gate_center)
        if abs(cost - budget.goal) > budget.band:
            warn(
                f"--target-macs: this gate may not reach {budget.budget:.3f} of the static model's MACs. They stay at "
                f"{cost:.3f} in evaluation (current goal {budget.goal:.3f}), and do not come closer; try another gate "
                "(--gate, --gate-scale, --gate-center)"
            )

    def _cost_at(self, model: nn.Module, center: float) -> tuple[float, float]:
        """Measure the cost at a gate center on the calibration images. Returns it and its standard error."""
        costs, errors = measure_costs(model, self.calibration, self.trainer.device, self.trainer.amp, [center])
        return costs[0], errors[0]

    def _calibrate(self) -> None:
        """Measure the budget curves of the weights and of the EMA weights, and set both gates to the budget."""
        trainer = self.trainer
        models = {"model": trainer.model_without_ddp}
        if trainer.ema is not None:
            models["model_ema"] = trainer.ema.module
        for name, model in models.items():
            budget = trainer.budget.budget
            max_cost = max(MAX_COST, budget)
            curve = budget_curve(model, self.calibration, trainer.device, trainer.amp, max_cost)
            before, model.gate_center = model.gate_center, curve.center(budget)
            cost, error = self._cost_at(model, model.gate_center)  # the curve may jump between its points
            log(
                f"calibration of {name}: gate_center {before:g} -> {model.gate_center:g} changes the MACs from "
                f"{curve.cost(before):.3f} to {cost:.3f} ± {error:.3f} of the static model's (one standard error); "
                f"without mixed weights, --budget accepts {curve.min_cost:.2f} to {curve.max_cost:.2f}"
            )
            if abs(cost - budget) > trainer.budget.band:
                warn(
                    f"--target-macs: {name} uses {cost:.3f} of the static model's MACs, not {budget:.3f}: no gate "
                    "center comes closer. Train longer, or with another gate (--gate, --gate-scale)"
                )
            self.budget_curves[name] = curve.record()
            if self.static_start is not None:
                self._measure_table(name, model, curve)

    def _measure_table(self, name: str, model: nn.Module, curve: BudgetCurve) -> None:
        """Measure the budget table of a calibrated model, and print it."""
        trainer = self.trainer
        table = measure_table(model, self.static_start, curve, self.calibration, trainer.device, trainer.amp)
        if table is None:
            warn(
                f"{name} predicts other classes than the weights that training started from, so --budget will change "
                "the gate only. Start from a static model of this dataset to mix its weights in"
            )
            return
        log(f"budgets of {name}, on validation images; no label was used to choose weights and gate:\n{table}")
        self.budget_tables[name] = table.record()

    def _test(self) -> dict:
        """Evaluate the weights, and the accuracy of the EMA weights if there are any."""
        trainer = self.trainer
        test = self._evaluate(trainer.model_without_ddp)
        if trainer.ema is not None:
            averaged = copy.deepcopy(trainer.ema.module).to(trainer.device)  # EMA weights may be on the CPU
            test["ema_acc1"] = self._evaluate(averaged, title="Test EMA")["acc1"]
        report(test, trainer.model_without_ddp.halting)
        return test

    def _evaluate(self, model: nn.Module, **options) -> dict:
        trainer = self.trainer
        test = evaluate(model, self.test_loader, trainer.device, trainer.amp, should_stop=self.stop.asked, **options)
        if utils.any_rank(self.stop.asked(), trainer.device):
            self._interrupt(f"while evaluating epoch {self.epoch.number}")
        check_complete(test, self.test_loader)
        return test

    def _warn_about_collapse(self, test: dict) -> None:
        if not self.trainer.model_without_ddp.halting or self.trainer.budget is not None:
            return  # a budget keeps the depth
        if test["depth_mean"] < COLLAPSED_DEPTH:
            warn(
                f"tokens collapse: their mean depth is {test['depth_mean']:.2f} blocks; "
                "reduce --ponder-token-scale or change --gate-center"
            )
        before = self.previous_test
        if before and test["acc1"] < before["acc1"] - 1 and test["depth_mean"] < before["depth_mean"]:
            warn(
                f"accuracy and depth fall together: {before['acc1']:.1f}% to {test['acc1']:.1f}%, "
                f"{before['depth_mean']:.2f} to {test['depth_mean']:.2f} blocks; "
                "reduce --ponder-token-scale or change --gate-center"
            )
        self.previous_test = {name: test[name] for name in WATCHED}

    def log_epoch(self, training: dict, test: dict) -> None:
        """Write best.pth if this epoch is the best so far, log.txt, TensorBoard points and checkpoint.pth.

        With a budget, the best epoch is the last one, which is calibrated to it.
        The checkpoint comes last. A run that is killed earlier repeats the evaluation and all of this.
        """
        number = self.epoch.number
        is_best = test["acc1"] > self.best_acc1 if self.trainer.budget is None else bool(self.budget_curves)
        self.best_acc1 = test["acc1"] if is_best else self.best_acc1
        self.epoch = EpochState(number + 1)
        if is_best:
            self.save("best.pth")
        if utils.is_main() and self.options.output_dir is not None:
            self._write_line(number, training, test)
        self.saving_seconds = 0.0
        if self.options.keep:
            self.save(f"checkpoint-{number}.pth")
            self.delete_old_checkpoints(number - self.options.keep)
        self.save("checkpoint.pth")

    def _write_line(self, number: int, training: dict, test: dict) -> None:
        parameters = sum(p.numel() for p in self.trainer.model_without_ddp.parameters())
        named = {f"train_{k}": v for k, v in training.items()} | {f"test_{k}": v for k, v in test.items()}
        line = {"epoch": number, "n_parameters": parameters, **named, "saving_seconds": self.saving_seconds}
        with utils.writing(self.options.output_dir):
            with (self.options.output_dir / "log.txt").open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self.tensorboard is not None:
                self.tensorboard.record(number, training, test, self.trainer)

    def delete_old_checkpoints(self, last: int) -> None:
        """Delete the numbered checkpoints up to this epoch."""
        if not utils.is_main() or self.options.output_dir is None:
            return
        for path in self.options.output_dir.glob("checkpoint-*.pth"):
            number = path.stem.removeprefix("checkpoint-")
            if number.isdecimal() and int(number) <= last:
                with utils.writing(path):
                    path.unlink()

    def save(self, name: str) -> None:
        """Save a checkpoint. Every process must call it; the main process writes."""
        if self.options.output_dir is None:
            return
        start = time.perf_counter()
        state = self.state_dict()
        if utils.is_main():
            path = self.options.output_dir / name
            with utils.writing(path):
                save_checkpoint(state, path)
        self.saving_seconds += time.perf_counter() - start

    def _parts(self) -> tuple:
        """Return the parts that write and read entries of a checkpoint."""
        optimizer = OptimizerState(self.trainer.optimizer, self.trainer.model_without_ddp)
        return self.trainer, optimizer, self.schedule, self.epoch, self.train_loader

    def state_dict(self) -> dict:
        """Return a checkpoint of tensors and plain types, see `Checkpoint`. Every process must call it."""
        model, ema = self.trainer.model_without_ddp, self.trainer.ema
        calibrated = {"budget_curves": self.budget_curves} if self.budget_curves else {}
        calibrated |= {"budget_tables": self.budget_tables} if self.budget_tables else {}
        calibrated |= {"start": self.static_start} if self.static_start is not None else {}
        if "model_ema" in self.budget_curves:
            calibrated["gate_ema"] = _gate(ema.module)
        return {name: value for part in self._parts() for name, value in part.state_dict().items()} | {
            "best_acc1": self.best_acc1,
            "previous_test": self.previous_test,
            "processes": utils.world_size(),
            "gate": _gate(model) if model.halting else None,
            **calibrated,
            "classes": self.classes,
            "preprocessing": Preprocessing.from_model(model).record(),
            "data": self.data,
            "args": dict(self.options.flags),
        }

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Restore everything except the model's weights, and warn about changed flags.

        Raises UserError if the training state is missing, belongs to another run or to another optimizer.
        """
        content, flags = checkpoint.content, self.options.flags
        try:
            recorded = dict(content["args"])
            check_optimizer(flags, recorded, checkpoint.location)
            for part in self._parts():
                part.load_state_dict(content)
            self._check_averages(content)
            self.static_start = content.get("start")
            if self.static_start is not None:
                self._check_start()
            self.best_acc1 = float(content["best_acc1"])
            if math.isnan(self.best_acc1):
                raise ValueError("best_acc1 must be a number, got nan")
            test = content["previous_test"]
            self.previous_test = test and {name: float(test[name]) for name in WATCHED}
            if recorded.get("target_macs") != flags.get("target_macs"):
                self.best_acc1 = -math.inf  # at another compute
            warn_changed_flags(flags, recorded, int(content["processes"]))
            data, images = content.get("data"), self.epoch.images
            self.order_changes = OrderChanges.between(recorded, flags, data, self.train_loader, images)
            self.resumed = True
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(
                f"--resume {checkpoint.location}: the training state is missing or does not fit this run ({error}); "
                "pass the file with --finetune to start a new run from its weights"
            ) from error

    def _check_start(self) -> None:
        """Raise ValueError if the starting weights of a budget are not finite or do not fit the model."""
        if not fits_weights(self.static_start, self.trainer.model_without_ddp.state_dict()):
            raise ValueError("the starting weights (start) are not finite tensors of the model's names and shapes")

    def _check_averages(self, content: dict) -> None:
        """Drop the averages of an epoch that began with another halting.

        Raises ValueError if their shapes differ from the model's.
        """
        model, epoch = self.trainer.model_without_ddp, self.epoch
        if (content["gate"] is not None) != model.halting:
            epoch.averages = utils.MetricAverages()
        if any(value.ndim and len(value) != model.num_blocks for value in epoch.averages.sums.values()):
            raise ValueError("the averages of the epoch have another number of blocks")


def _gate(model: nn.Module) -> dict[str, float]:
    gate = {"gate_scale": model.gate_scale, "gate_center": model.gate_center, "halt_eps": model.halt_eps}
    return gate | ({} if model.gate_directions is None else {"gate_directions": model.gate_directions.cpu()})


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of log.txt; infinity if the line is broken."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def updates_per_epoch(loader: ImageLoader, accum_steps: int) -> int:
    """Return the number of optimizer steps of a complete epoch."""
    return math.ceil(loader.batches_per_epoch / accum_steps)
