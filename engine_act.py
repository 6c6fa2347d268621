"""One training epoch, and one evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
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
from models_act import Halting, macs_per_image
from utils import MetricAverages, autocast

MAX_SKIPPED = 30  # steps in a row; by then gradient scaling has gone from 2^16 to 2^-14


class StepStatus(NamedTuple):
    """What holds in any process after the backward passes of a step; the same in all."""

    loss_is_nonfinite: bool  # some part of some loss is not finite
    gradient_is_nonfinite: bool
    stop_requested: bool  # the run was asked to stop
    cost: float  # of the step's images in all processes, as a share of the static network's multiply-adds


@dataclass
class Trainer:
    """What a training step needs; `model` may be wrapped in DistributedDataParallel.

    budget: sets the weight of the ponder loss, where a cost was asked for;
    gate_jitter: in training each image's gate center is shifted by a random number from -gate_jitter to gate_jitter.
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
    skipped_steps: int = 0  # that gradient scaling has skipped so far
    skipped_in_a_row: int = 0

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    @property
    def model_without_ddp(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def micro_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor], Halting | None]:
        """Forward and loss: the total, its parts by name, and the halting of an adaptive model."""
        images, targets = (t.to(self.device, non_blocking=True) for t in (images, targets))
        images, targets = self._mix(images, targets)
        with autocast(self.device, self.amp):
            teacher_logits = None if self.teacher is None else self.teacher(images)
            halting = None
            if self.model_without_ddp.halting:
                logits, halting = self.model(images, return_halting=True, gate_offset=self._gate_offset(len(images)))
                halting = halting._replace(layer_scores=mean_over_processes(halting.layer_scores))
            else:
                logits = self.model(images)
            ponder_scale = None if self.budget is None else self.budget.weight
            total, parts = self.criterion(logits, targets, halting, teacher_logits, ponder_scale)
        return total, parts, halting

    def _gate_offset(self, batch: int) -> Tensor | None:
        """A random one for each image, [batch] float32."""
        if not self.gate_jitter:
            return None
        return torch.empty(batch, device=self.device).uniform_(-self.gate_jitter, self.gate_jitter)

    def update(
        self,
        step: str,
        losses: Sequence[dict[str, Tensor]] = (),
        stop: bool = False,
        saved: Sequence[Tensor] = (),
    ) -> StepStatus:
        """One optimizer step with the gradients accumulated so far; its one wait for the device, but for zipping's.

        step: its name; losses: of each micro-batch, by name; stop: whether this process was asked to stop;
        saved: of each micro-batch of an adaptive model, the share of multiply-adds saved.
        FloatingPointError, in every process, where a loss or a gradient is not finite in any. With gradient scaling
        such a step is skipped, and the scale is lowered where a gradient overflows; too many in a row are an error.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model_without_ddp.parameters() if p.grad is not None])
        status = self._reduce_step_status(losses, norm, stop, saved)
        if status.loss_is_nonfinite or status.gradient_is_nonfinite:
            self._handle_nonfinite(step, losses)
        else:
            self._step(norm)
        if self.budget is not None and not status.loss_is_nonfinite:
            self.budget.observe(status.cost)
        self.scaler.update()
        self.optimizer.zero_grad()
        return status

    def _reduce_step_status(
        self, losses: Sequence[dict[str, Tensor]], norm: Tensor, stop: bool, saved: Sequence[Tensor]
    ) -> StepStatus:
        values = [value.detach().float() for parts in losses for value in parts.values()]
        all_finite = torch.stack([torch.zeros_like(norm), *values]).isfinite().all()
        cost = 1 - torch.stack([*saved]).mean() if saved else torch.ones_like(norm)
        found = torch.stack(
            [(~all_finite).float(), (~norm.isfinite()).float(), torch.full_like(norm, stop), cost.float()]
        )
        if dist.is_initialized():
            dist.all_reduce(found)
        *flags, cost = found.tolist()
        return StepStatus(*(flag > 0 for flag in flags), cost / utils.world_size())

    def _step(self, norm: Tensor) -> None:
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model_without_ddp.parameters(), self.clip_grad, norm)
        self.optimizer.step()  # not scaler.step, which would wait once more to learn what the status has told
        self.skipped_in_a_row = 0
        if self.ema is not None:
            self.ema.update(self.model_without_ddp)

    def _handle_nonfinite(self, step: str, losses: Sequence[dict[str, Tensor]]) -> None:
        """A step whose numbers are not finite: skipped by gradient scaling, else FloatingPointError."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.scaler.is_enabled() and self.skipped_in_a_row <= MAX_SKIPPED:
            return
        named = ((name, value.item()) for parts in losses for name, value in parts.items())
        own_part = next((f"{name} is {value:g}" for name, value in named if not math.isfinite(value)), None)
        part = next((part for part in utils.all_gather_objects(own_part) if part), "the loss is finite")
        parameters = self.model_without_ddp.named_parameters()
        wrong = (name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all())
        parameter = next(wrong, None)
        gradient = f"the gradient of {parameter} is not finite" if parameter else "the gradients' norm overflows"
        skipped = f"; {self.skipped_in_a_row} steps in a row were skipped" if self.scaler.is_enabled() else ""
        raise FloatingPointError(f"{step}: {part}, {gradient}{skipped}; the last checkpoint is from before")

    def state_dict(self) -> dict:
        """The entries of a checkpoint that this keeps up: weights, their average, and what follows them."""
        return {
            "model": self.model_without_ddp.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": [self.skipped_steps, self.skipped_in_a_row],
            **(self.budget.state_dict() if self.budget is not None else {}),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """All of that but the model's weights. KeyError, ValueError or the like where it does not fit."""
        restore_optimizer(self.optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"] and self.scaler.is_enabled():  # empty where mixed precision was off
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.skipped_steps, self.skipped_in_a_row = map(int, checkpoint["skipped_steps"])
        if self.ema is not None and checkpoint["model_ema"] is not None:
            self.ema.module.load_state_dict(checkpoint["model_ema"])
        if self.budget is not None and "budget_controller" in checkpoint:  # else of a run without a budget
            self.budget.load_state_dict(checkpoint)

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix, which pair images: an odd batch loses one, a single image is not mixed."""
        if self.mixup is None:
            return images, targets
        if len(images) == 1:
            return images, mixup_target(targets, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        even = len(images) // 2 * 2
        return self.mixup(images[:even], targets[:even])


OPTIONS_OF_FLAGS = {"params", "initial_lr", "weight_decay", "betas", "eps", "momentum"}  # of a group of parameters


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The state of each parameter, learning rates and counters; what flags say stays as they say it.

    ValueError where the state does not fit the parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor) and not (
                utils.is_plain_tensor(value) and _is_part(value.shape, parameters[index].shape)
            ):
                raise ValueError(f"{name} of parameter {index} has shape {tuple(value.shape)}")
    own = optimizer.state_dict()["param_groups"]
    groups = [group | _counters(old) for group, old in zip(own, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _is_part(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether these are sizes of the whole, in order: factored optimizers leave some out."""
    sizes = iter(whole)
    return all(size in sizes for size in shape)


def _counters(group: dict) -> dict:
    """Numbers that an optimizer or a schedule keeps in a group of parameters."""
    is_number = {k: isinstance(v, int | float) or (isinstance(v, Tensor) and v.ndim == 0) for k, v in group.items()}
    return {k: v for k, v in group.items() if is_number[k] and k not in OPTIONS_OF_FLAGS}


class _MeanOverProcesses(torch.autograd.Function):
    """Forward and backward are the same all-reduce, as in torch.distributed.nn, which is deprecated since 2.14."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        mean = value.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(ctx, grad)


def mean_over_processes(value: Tensor) -> Tensor:
    """Differentiable: with it, DDP's averaged gradient is that of the joint batch."""
    return _MeanOverProcesses.apply(value) if dist.is_initialized() else value


MAX_EPOCHS, MAX_BATCHES = 10**6, 10**9  # a checkpoint with more is none of ours


@dataclass
class EpochState:
    """How far an epoch has come: batches done, in how many seconds, and what has been averaged over them.

    waiting_seconds: of the seconds, those in which this process waited for its loader.
    """

    number: int
    batches: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    averages: MetricAverages = field(default_factory=MetricAverages)

    @property
    def local_data_wait_share(self) -> float:
        """Share of the seconds so far in which this process waited for its loader."""
        return self.waiting_seconds / max(self.seconds, 1e-9)

    def data_wait(self) -> float:
        """That of the process that has waited most; every process must call it.

        The others lose as much: they wait for it in the all-reduce of the gradients. Where now one process is late and
        now another, more is lost than this share.
        """
        return max(utils.all_gather_objects(self.local_data_wait_share))

    def state_dict(self) -> dict:
        """The entries of a checkpoint that this keeps up; every process must call it."""
        state = {"epoch": self.number - 1, "batches": self.batches, "seconds": self.seconds}  # the last that is done
        return state | {"data_wait": self.data_wait(), "averages": self.averages.state_dict()}

    def load_state_dict(self, checkpoint: dict) -> None:
        """KeyError, ValueError or the like where it does not fit."""
        number, batches, seconds = int(checkpoint["epoch"]) + 1, int(checkpoint["batches"]), checkpoint["seconds"]
        if not (0 <= number <= MAX_EPOCHS and 0 <= batches <= MAX_BATCHES and 0 <= seconds < math.inf):
            raise ValueError(f"epoch {number}, batch {batches}, {seconds} s")
        data_wait = float(checkpoint.get("data_wait", 0))  # older ones do not tell
        if not 0 <= data_wait <= 1:
            raise ValueError(f"data_wait is {data_wait}")
        self.number, self.batches, self.seconds = number, batches, float(seconds)
        self.waiting_seconds = data_wait * self.seconds
        if utils.is_main():
            self.averages.load_state_dict(checkpoint["averages"])
            if batches and self.averages.sums["loss"].ndim:
                raise ValueError("the averaged loss is no number")


def train_one_epoch(
    trainer: Trainer,
    loader: Iterable,
    epoch: EpochState,
    on_update: Callable[[bool], None] = lambda stop_requested: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | list[float]]:
    """Trains on the batches of the loader, the rest of the epoch; returns means over the whole of it, by name.

    Beside them `seconds`, and `data_wait`, the share of these that was spent waiting for the loader, see `EpochState`.

    loader: yields images [B, 3, H, W] and targets [B], and what else it likes;
    on_update: called after each optimizer step, when `epoch` is up to date, with whether any process was asked to
    stop; may raise to do so; stop: whether this process is asked.
    All random numbers of a step follow from its place in training. FloatingPointError, in every
    process, where a loss or a gradient is not finite; where gradient scaling skips such a step instead, one whose loss
    is not finite in some process counts in no mean.
    """
    trainer.model.train()
    seconds_before, waiting_before, start = epoch.seconds, epoch.waiting_seconds, time.perf_counter()
    loader = utils.TimedLoader(loader)
    batches = iter(utils.with_progress(loader, f"Epoch {epoch.number}", _progress(trainer, epoch), done=epoch.batches))
    while group := list(islice(batches, trainer.accum_steps)):
        utils.seed_everything(trainer.seed, utils.rank(), epoch.number, epoch.batches, utils.SEEDS_OF_STEPS)
        losses, metrics = [], []
        for number, (images, targets, *_) in enumerate(group, start=1):
            with _gradient_sync(trainer.model, number == len(group)):
                total, parts, halting = trainer.micro_batch(images, targets)
                trainer.scaler.scale(total / len(group)).backward()
            losses.append({**parts, "loss": total})
            metrics.append((len(images), halting_metrics(trainer.model_without_ddp, halting)))
        step = f"epoch {epoch.number}, batch {epoch.batches + len(group) - 1}"
        saved = [halting["macs_saved"] for _, halting in metrics if halting]
        status = trainer.update(step, losses, should_stop(), saved)
        if not status.loss_is_nonfinite:
            for (count, halting), parts in zip(metrics, losses):
                epoch.averages.add(count, loss=parts.pop("loss"), **parts, **halting)
        epoch.batches += len(group)
        epoch.seconds = seconds_before + time.perf_counter() - start
        epoch.waiting_seconds = waiting_before + loader.seconds
        on_update(status.stop_requested)
    _, means = epoch.averages.reduced()
    skipped = {"skipped_steps": trainer.skipped_steps} if trainer.scaler.is_enabled() else {}
    rate = {"lr": learning_rate(trainer.optimizer), "seconds": epoch.seconds, "data_wait": epoch.data_wait()}
    return {**means, **skipped, **rate, **_budget_metrics(trainer.budget)}


def _budget_metrics(budget: BudgetController | None) -> dict[str, float]:
    """Where the controller stands: cost and goal as shares of the static network's multiply-adds, and its weight."""
    if budget is None or budget.cost is None:
        return {}
    return {"budget_cost": budget.cost, "budget_goal": budget.goal, "ponder_weight": budget.weight}


def _progress(trainer: Trainer, epoch: EpochState) -> Callable[[], dict[str, str]]:
    """What the progress bar shows, as a function of nothing."""
    averages, start = epoch.averages, time.perf_counter()
    weight_before = averages.weight

    def metrics() -> dict[str, str]:
        means = averages.local()
        shown = {"loss": f"{means['loss']:.4f}"} if means else {}  # none while every step was skipped
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


def _gradient_sync(model: nn.Module, now: bool):
    """Gradients are averaged over the processes only in the last micro-batch of an update."""
    if now or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def halting_metrics(model: nn.Module, halting: Halting | None) -> dict[str, Tensor]:
    """What is reported of one batch's halting, as means over the batch; nothing for a static model."""
    if halting is None:
        return {}
    depth, blocks, prefix = halting.depth, model.num_blocks, model.num_prefix_tokens
    per_block = torch.arange(blocks, device=depth.device)[:, None]
    gmacs = macs_per_image(model, depth).mean() / 1e9
    gmacs_static = macs_per_image(model, torch.full_like(depth[:1], blocks)).mean() / 1e9
    class_token = {"class_token_depth": depth[:, 0].mean()} if model.has_class_token else {}
    return {
        "depth_mean": depth.mean(),
        "depth_max": depth.amax(dim=1).mean(),
        "depth_min": depth.amin(dim=1).mean(),
        "patch_depth_mean": depth[:, prefix:].mean(),
        **class_token,
        "live_share": (depth.flatten() > per_block).double().mean(dim=1),  # [L], of the tokens
        "layer_scores": halting.layer_scores,
        "gmacs": gmacs,
        "gmacs_static": gmacs_static,
        "macs_saved": 1 - gmacs / gmacs_static,  # share
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    amp: str = "none",
    title: str = "Test",
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[tuple, Tensor, Halting], None] | None = None,
) -> dict:
    """Evaluates on every image of the loader, all processes' together; each image counts once.

    loader: yields images [B, 3, H, W] and targets [B], and what else it likes;
    stop: where it says so, this process looks at no more images;
    on_batch: called with each batch, its logits [B, K] and halting.
    Returns means by name: loss, acc1, acc5 (in per cent), those of `halting_metrics`, `images`
    (how many), and `images_per_s`, of the forward pass in this process.
    """
    model.eval()
    averages, seconds = MetricAverages(), 0.0
    loss = nn.CrossEntropyLoss()

    def metrics() -> dict[str, str]:
        means = averages.local()
        return {"acc1": f"{means['acc1']:.2f}", "depth": f"{means['depth_mean']:.2f}"}

    for batch in utils.with_progress(loader, title, metrics):
        images, targets = (t.to(device, non_blocking=True) for t in batch[:2])
        start = utils.synchronized_time(device)
        with autocast(device, amp):
            logits, halting = model(images, return_halting=True)
        seconds += utils.synchronized_time(device) - start
        logits = logits.float()
        utils.check_finite(logits)
        acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
        averages.add(len(images), loss=loss(logits, targets), acc1=acc1, acc5=acc5, **halting_metrics(model, halting))
        if on_batch is not None:
            on_batch(batch, logits, halting)
        if should_stop():
            break
    images, means = averages.reduced()
    return {**means, "images": int(images), "images_per_s": averages.weight / max(seconds, 1e-9)}
