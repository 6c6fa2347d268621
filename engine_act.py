"""Training of one epoch, and evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from timm.data.mixup import Mixup, mixup_target
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from losses import AdaptiveLoss, BudgetController
from macs import macs_counter
from models_act import Halting
from utils import MetricAverages, autocast
from zipping.planned.dispatch import count_graph_hits

MAX_START_SHARE = 0.5  # of the averaged weights; if more of the average is the starting weights, it moved too little
MAX_SKIPPED = 30  # steps in a row; the gradient scale has then fallen from 2^16 to 2^-14


class MicroBatchResult(NamedTuple):
    """Loss and metrics of one forward and backward pass.

    images: number of images; loss: the total; loss_parts: its parts by name;
    halting: see `halting_metrics`, empty for a static model; graph_hits: see `count_graph_hits`.
    """

    images: int
    loss: Tensor
    loss_parts: dict[str, Tensor]
    halting: dict[str, Tensor]
    graph_hits: dict[str, Tensor]

    @property
    def losses(self) -> dict[str, Tensor]:
        """The parts by name, then the total."""
        return {**self.loss_parts, "loss": self.loss}


class StepStatus(NamedTuple):
    """The state of a training step after its backward passes, reduced over all processes.

    loss_is_nonfinite, gradient_is_nonfinite, stop_requested: true if true in any process;
    cost: MACs of the step's images as a share of the static model's, averaged over processes.
    """

    loss_is_nonfinite: bool
    gradient_is_nonfinite: bool
    stop_requested: bool
    cost: float


@dataclass
class Trainer:
    """The model, possibly wrapped in DistributedDataParallel, and everything else a training step needs.

    budget: sets the weight of the ponder loss or the gate center when training to a compute target, else None;
    gate_jitter: each training image shifts the gate center by a random number from -gate_jitter to gate_jitter;
    ema_start_share: share of the starting weights in `ema`;
    skipped_steps: number of steps skipped by gradient scaling so far.
    """

    model: nn.Module
    criterion: AdaptiveLoss
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: str = "none"
    clip_grad: float | None = None
    accum_steps: int = 1
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    teacher: nn.Module | None = None
    budget: BudgetController | None = None
    gate_jitter: float = 0.0
    seed: int = 0
    scaler: torch.amp.GradScaler = field(init=False)
    ema_start_share: float = 1.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    @property
    def model_without_ddp(self) -> nn.Module:
        """The model without the DistributedDataParallel wrapper."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def accumulate_gradients(self, batches: Sequence[tuple]) -> list[MicroBatchResult]:
        """Run forward and backward passes on the micro-batches of one step.

        batches: tuples that start with images [B, 3, H, W] and targets [B]
        """
        results = []
        for number, (images, targets, *_) in enumerate(batches, start=1):
            with self._gradient_sync(number == len(batches)), count_graph_hits(self.model_without_ddp) as graph_hits:
                loss, parts, halting = self.micro_batch(images, targets)
                self.scaler.scale(loss / len(batches)).backward()
            metrics = halting_metrics(self.model_without_ddp, halting)
            results.append(MicroBatchResult(len(images), loss, parts, metrics, graph_hits))
        return results

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Return a context in which DDP averages gradients over processes only in the last micro-batch of a step."""
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def micro_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor], Halting | None]:
        """Compute the loss of one micro-batch.

        Returns the total, its parts by name, and the halting (None for a static model).
        """
        images, targets = (t.to(self.device, non_blocking=True) for t in (images, targets))
        images, targets = self._mix(images, targets)
        with autocast(self.device, self.amp):
            teacher_logits = None if self.teacher is None else self.teacher(images)
            halting = None
            if self.model_without_ddp.halting:
                logits, halting = self.model(images, return_halting=True, gate_offset=self._gate_offset(len(images)))
                halting = halting._replace(layer_scores=utils.mean_over_processes(halting.layer_scores))
            else:
                logits = self.model(images)
            ponder_scale = None if self.budget is None else self.budget.weight
            total, parts = self.criterion(logits, targets, halting, teacher_logits, ponder_scale)
        return total, parts, halting

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup and cutmix to pairs of images: an odd batch loses one image, a single one is not mixed."""
        if self.mixup is None:
            return images, targets
        if len(images) == 1:
            return images, mixup_target(targets, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        even = len(images) // 2 * 2
        return self.mixup(images[:even], targets[:even])

    def _gate_offset(self, batch: int) -> Tensor | None:
        """Return a random offset of the gate center for each image, [B] float32, or None without jitter."""
        if not self.gate_jitter:
            return None
        return torch.empty(batch, device=self.device).uniform_(-self.gate_jitter, self.gate_jitter)

    def update(self, step: str, results: Sequence[MicroBatchResult] = (), stop: bool = False) -> StepStatus:
        """Make one optimizer step with the accumulated gradients, with a single host-device sync.

        step: name of the step, for messages; results: one for each micro-batch;
        stop: whether this process was asked to stop.
        Gradient scaling skips a step with a non-finite loss or gradient, and lowers the scale if a gradient overflows.
        Raises FloatingPointError, in every process, for such a step without gradient scaling, or after too many in
        a row.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model_without_ddp.parameters() if p.grad is not None])
        status = self._reduce_step_status(results, norm, stop)
        if status.loss_is_nonfinite or status.gradient_is_nonfinite:
            self._handle_nonfinite(step, results)
        else:
            self._step(norm)
        if self.budget is not None and not status.loss_is_nonfinite:
            self.budget.observe(status.cost)
            for model in (self.model_without_ddp, *([self.ema.module] if self.ema is not None else [])):
                model.gate_center += self.budget.center_step(status.cost)
        self.scaler.update()
        self.optimizer.zero_grad()
        return status

    def _reduce_step_status(self, results: Sequence[MicroBatchResult], norm: Tensor, stop: bool) -> StepStatus:
        """Reduce the status over all processes, and read it from the device: the only sync of a step."""
        losses = [value.detach().float() for result in results for value in result.losses.values()]
        losses_are_finite = torch.stack([torch.zeros_like(norm), *losses]).isfinite().all()
        saved = [result.halting["macs_saved"] for result in results if result.halting]
        cost = 1 - torch.stack(saved).mean() if saved else torch.ones_like(norm)
        flags = (~losses_are_finite, ~norm.isfinite(), torch.full_like(norm, stop))
        reduced = torch.stack([*(flag.float() for flag in flags), cost.float()])
        if dist.is_initialized():
            dist.all_reduce(reduced)
        nonfinite_losses, nonfinite_gradients, stops, shares = reduced.tolist()
        return StepStatus(nonfinite_losses > 0, nonfinite_gradients > 0, stops > 0, shares / utils.world_size())

    def _step(self, norm: Tensor) -> None:
        """Clip the gradients, whose norm is `norm`, and update the weights and their average."""
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model_without_ddp.parameters(), self.clip_grad, norm)
        self.optimizer.step()  # scaler.step would sync again to check for finite gradients
        self.skipped_in_a_row = 0
        if self.ema is not None:
            self.ema.update(self.model_without_ddp)
            self.ema_start_share *= self.ema.decay

    def _handle_nonfinite(self, step: str, results: Sequence[MicroBatchResult]) -> None:
        """Count a step as skipped, or raise FloatingPointError if gradient scaling is off or has skipped too many."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.scaler.is_enabled() and self.skipped_in_a_row <= MAX_SKIPPED:
            return
        losses = ((name, value.item()) for result in results for name, value in result.losses.items())
        own = next((f"{name} is {value:g}" for name, value in losses if not math.isfinite(value)), None)
        loss = next((text for text in utils.all_gather_objects(own) if text), "the loss is finite")
        parameters = self.model_without_ddp.named_parameters()
        broken = next((name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()), None)
        gradient = f"the gradient of {broken} is not finite" if broken else "the gradient norm overflows"
        skipped = f"; {self.skipped_in_a_row} steps in a row were skipped" if self.scaler.is_enabled() else ""
        raise FloatingPointError(
            f"{step}: {loss}, {gradient}{skipped}. Resume from the last checkpoint, for example with a lower --lr."
        )

    def state_dict(self) -> dict:
        """Return this object's entries of a checkpoint: all but the optimizer's, see `training.optimizer_state`."""
        return {
            "model": self.model_without_ddp.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "ema_start_share": self.ema_start_share if self.ema is not None else None,
            "scaler": self.scaler.state_dict(),
            "skipped_steps": [self.skipped_steps, self.skipped_in_a_row],
            **(self.budget.state_dict() if self.budget is not None else {}),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore all but the model's weights, or raise KeyError, ValueError or similar if an entry is wrong."""
        if checkpoint["scaler"] and self.scaler.is_enabled():  # empty if the run had no gradient scaling
            scale, growth = float(checkpoint["scaler"]["scale"]), int(checkpoint["scaler"]["_growth_tracker"])
            if not (0 < scale < math.inf and growth >= 0):
                raise ValueError(f"the gradient scale must be positive and finite, got {scale}")
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": growth})
        self.skipped_steps, self.skipped_in_a_row = map(int, checkpoint["skipped_steps"])
        if self.ema is not None and checkpoint["model_ema"] is not None:  # else the average starts at the weights
            self.ema.module.load_state_dict(checkpoint["model_ema"])
            self.ema_start_share = float(checkpoint.get("ema_start_share") or 0.0)  # older checkpoints lack it
            if not all(value.isfinite().all() for value in self.ema.module.state_dict().values()):
                raise ValueError("the averaged weights (model_ema) are not finite")
        if self.budget is not None and "budget_controller" in checkpoint:  # missing if the run had no budget
            self.budget.load_state_dict(checkpoint)


MAX_EPOCHS, MAX_BATCHES, MAX_IMAGES = 10**6, 10**9, 10**12  # larger numbers in a checkpoint are invalid


@dataclass
class EpochState:
    """The progress of an epoch: what is done, seconds spent on it, and averages over it.

    batches: number of batches done by each process, which numbers the steps and their random numbers;
    images: number of images done over all processes, at which a resumed run continues;
    images_per_batch: number of images of the next batches over all processes;
    waiting_seconds: the part of `seconds` in which this process waited for its loader.
    """

    number: int
    batches: int = 0
    images: int = 0
    images_per_batch: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    averages: MetricAverages = field(default_factory=MetricAverages)

    @property
    def local_data_wait_share(self) -> float:
        """The share of the seconds in which this process waited for its loader."""
        return self.waiting_seconds / max(self.seconds, 1e-9)

    def advance(self, batches: int) -> None:
        """Count batches as done."""
        self.batches += batches
        self.images += batches * self.images_per_batch

    def data_wait(self) -> float:
        """Return the largest share of the time that any process waited for its loader.

        Every process must call this. All processes lose at least this share, because the all-reduce of the gradients
        waits for the slowest. They lose more if different processes are late at different steps.
        """
        return max(utils.all_gather_objects(self.local_data_wait_share))

    def state_dict(self) -> dict:
        """Return this object's entries of a checkpoint, in all processes together."""
        return {
            "epoch": self.number - 1,  # the last finished epoch
            "batches": self.batches,
            "images": self.images,
            "seconds": self.seconds,
            "data_wait": self.data_wait(),
            "averages": self.averages.state_dict(),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore the state, or raise KeyError, ValueError or similar if an entry is wrong."""
        number, batches, seconds = int(checkpoint["epoch"]) + 1, int(checkpoint["batches"]), checkpoint["seconds"]
        if not (0 <= number <= MAX_EPOCHS and 0 <= batches <= MAX_BATCHES and 0 <= seconds < math.inf):
            raise ValueError(f"out of range: epoch {number}, batch {batches} or {seconds} seconds")
        images = _images_done(checkpoint)
        data_wait = float(checkpoint.get("data_wait", 0))  # missing in older checkpoints
        if not 0 <= data_wait <= 1:
            raise ValueError(f"data_wait must be in [0, 1], got {data_wait}")
        self.number, self.batches, self.images, self.seconds = number, batches, images, float(seconds)
        self.waiting_seconds = data_wait * self.seconds
        if utils.is_main():
            self.averages.load_state_dict(checkpoint["averages"])
            if batches and self.averages.sums["loss"].ndim:
                raise ValueError("the averaged loss is not a scalar")


def _images_done(checkpoint: dict) -> int:
    """Return the number of images of the epoch that all processes have done.

    Older checkpoints record only batches, all of the size and the number of processes of that run.
    """
    if "images" in checkpoint:
        images = int(checkpoint["images"])
    elif checkpoint["batches"]:
        images = int(checkpoint["batches"]) * int(checkpoint["args"]["batch_size"]) * int(checkpoint["processes"])
    else:
        images = 0
    if not 0 <= images <= MAX_IMAGES:
        raise ValueError(f"images must be from 0 to {MAX_IMAGES:g}, got {images}")
    return images


def micro_batch_groups(batches: Iterable, accum_steps: int) -> Iterator[list]:
    """Yield lists of `accum_steps` batches, one list per optimizer step, of which the last may be shorter."""
    batches = iter(batches)
    while group := list(islice(batches, accum_steps)):
        yield group


def train_one_epoch(
    trainer: Trainer,
    loader: Iterable,
    epoch: EpochState,
    on_update: Callable[[bool], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, float | list[float]]:
    """Train on the remaining batches of an epoch.

    loader: yields tuples that start with images [B, 3, H, W] and targets [B];
    on_update: called after each optimizer step and the update of `epoch`, with whether any process was asked to stop;
    should_stop: returns whether this process was asked to stop.
    Returns means over the whole epoch by name, with `seconds` and `data_wait` of `EpochState`.
    The random numbers of a step depend only on its position in training. Errors are those of `Trainer.update`. A step
    whose loss is not finite is excluded from the means.
    """
    trainer.model.train()
    seconds_before, waiting_before, start = epoch.seconds, epoch.waiting_seconds, time.perf_counter()
    loader = utils.TimedLoader(loader)
    batches = utils.with_progress(loader, f"Epoch {epoch.number}", _progress(trainer, epoch), done=epoch.batches)
    for group in micro_batch_groups(batches, trainer.accum_steps):
        utils.seed_everything(trainer.seed, utils.rank(), epoch.number, epoch.batches, utils.SEEDS_OF_STEPS)
        results = trainer.accumulate_gradients(group)
        step = f"epoch {epoch.number}, batch {epoch.batches + len(group) - 1}"
        status = trainer.update(step, results, stop=should_stop is not None and should_stop())
        if not status.loss_is_nonfinite:
            for result in results:
                metrics = result.halting | result.graph_hits
                epoch.averages.add(result.images, loss=result.loss, **result.loss_parts, **metrics)
        epoch.advance(len(group))
        epoch.seconds = seconds_before + time.perf_counter() - start
        epoch.waiting_seconds = waiting_before + loader.seconds
        if on_update is not None:
            on_update(status.stop_requested)
    return _epoch_metrics(trainer, epoch)


def _epoch_metrics(trainer: Trainer, epoch: EpochState) -> dict[str, float | list[float]]:
    """Gather the metrics of a finished epoch from all processes, by name."""
    _, metrics = epoch.averages.reduced()
    if trainer.scaler.is_enabled():
        metrics["skipped_steps"] = trainer.skipped_steps
    metrics["lr"] = learning_rate(trainer.optimizer)
    metrics["seconds"] = epoch.seconds
    metrics["data_wait"] = epoch.data_wait()
    if trainer.budget is not None and trainer.budget.cost is not None:
        metrics |= trainer.budget.metrics() | {"gate_center": trainer.model_without_ddp.gate_center}
    return metrics


def _progress(trainer: Trainer, epoch: EpochState) -> Callable[[], dict[str, str]]:
    """Return a function that formats the current metrics for the progress line."""
    averages, start = epoch.averages, time.perf_counter()
    weight_before = averages.weight

    def metrics() -> dict[str, str]:
        means = averages.local()
        shown = {"loss": f"{means['loss']:.4f}"} if means else {}  # empty while every step was skipped
        shown["lr"] = f"{learning_rate(trainer.optimizer):.2e}"
        if "depth_mean" in means:
            shown["depth"] = f"{means['depth_mean']:.2f}"
            shown["saved"] = f"{means['macs_saved']:.0%}"
        if trainer.budget is not None and trainer.budget.cost is not None:
            shown |= {"cost": f"{trainer.budget.cost:.1%}", "goal": f"{trainer.budget.goal:.1%}"}
        if trainer.scaler.is_enabled():
            shown["skipped"] = str(trainer.skipped_steps)
        rate = (averages.weight - weight_before) / (time.perf_counter() - start)
        return {
            **shown,
            "data_wait": f"{epoch.local_data_wait_share:.0%}",
            "images/s": f"{rate * utils.world_size():.0f}",
        }

    return metrics


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the first parameter group."""
    return optimizer.param_groups[0]["lr"]


def halting_metrics(model: nn.Module, halting: Halting | None) -> dict[str, Tensor]:
    """Return the halting metrics of a batch as means over its images, or {} for a static model.

    live_share: [L], the share of tokens that each block processes; macs_saved: a share of the static model's MACs.
    """
    if halting is None:
        return {}
    depth, blocks, prefix = halting.depth, model.num_blocks, model.num_prefix_tokens
    per_block = torch.arange(blocks, device=depth.device)[:, None]
    count_macs = macs_counter(model, depth.shape[1])
    gmacs = count_macs(depth).mean() / 1e9
    gmacs_static = count_macs(torch.full_like(depth[:1], blocks)).mean() / 1e9
    class_token = {"class_token_depth": depth[:, 0].mean()} if model.cls_token is not None else {}
    return {
        "depth_mean": depth.mean(),
        "depth_max": depth.amax(dim=1).mean(),
        "depth_min": depth.amin(dim=1).mean(),
        "patch_depth_mean": depth[:, prefix:].mean(),
        **class_token,
        "live_share": (depth.flatten() > per_block).double().mean(dim=1),
        "layer_scores": halting.layer_scores,
        "gmacs": gmacs,
        "gmacs_static": gmacs_static,
        "macs_saved": 1 - gmacs / gmacs_static,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    amp: str = "none",
    title: str = "Test",
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[tuple, Tensor, Halting], None] | None = None,
) -> dict:
    """Evaluate a model on the images of all processes, each counted once.

    loader: yields tuples that start with images [B, 3, H, W] and targets [B];
    should_stop: called after each batch; this process stops if it returns true;
    on_batch: called with each batch, its logits [B, K] and halting.
    Returns means by name: loss, acc1 and acc5 (percent), `halting_metrics` and `count_graph_hits`. In addition
    `images`, the number of images, and `images_per_s`, the speed of the forward pass in this process.
    """
    model.eval()
    averages, seconds = MetricAverages(), 0.0
    for batch in utils.with_progress(loader, title, lambda: _evaluation_progress(averages, model.halting)):
        images, targets = (t.to(device, non_blocking=True) for t in batch[:2])
        start = utils.synchronized_time(device)
        with autocast(device, amp), count_graph_hits(model) as graph_hits:
            logits, halting = model(images, return_halting=True)
        seconds += utils.synchronized_time(device) - start
        logits = logits.float()
        utils.check_finite(logits)
        loss = nn.functional.cross_entropy(logits, targets)
        acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
        metrics = halting_metrics(model, halting) | graph_hits
        averages.add(len(images), loss=loss, acc1=acc1, acc5=acc5, **metrics)
        if on_batch is not None:
            on_batch(batch, logits, halting)
        if should_stop is not None and should_stop():
            break
    images, means = averages.reduced()
    return {**means, "images": int(images), "images_per_s": averages.weight / max(seconds, 1e-9)}


def _evaluation_progress(averages: MetricAverages, halting: bool) -> dict[str, str]:
    means = averages.local()
    depth = {"depth": f"{means['depth_mean']:.2f}"} if halting else {}
    return {"acc1": f"{means['acc1']:.2f}"} | depth
