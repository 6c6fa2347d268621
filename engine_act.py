"""One training epoch, and one evaluation."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.distributed as dist
from timm.data.mixup import Mixup, mixup_target
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from losses import AdaptiveLoss
from models_act import Halting, macs_per_image
from training.loaders import ImageLoader
from training.signals import StopRequest, any_rank
from utils import MetricAverages, UserError, autocast

MAX_SKIPPED = 30  # steps in a row; by then gradient scaling has gone from 2^16 to 2^-14


@dataclass
class Trainer:
    """What a training step needs; `model` may be wrapped in DistributedDataParallel."""

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
    seed: int = 0
    scaler: torch.amp.GradScaler = field(init=False)
    skipped_steps: int = 0  # that gradient scaling has skipped so far
    skipped_in_a_row: int = 0

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    @property
    def model_without_ddp(self) -> nn.Module:
        """The model without its DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def micro_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor], Halting | None]:
        """Forward and loss: the total, its parts by name, and the halting of an adaptive model."""
        images, targets = (t.to(self.device, non_blocking=True) for t in (images, targets))
        images, targets = self._mix(images, targets)
        with autocast(self.device, self.amp):
            teacher_logits = None if self.teacher is None else self.teacher(images)
            halting = None
            if self.model_without_ddp.halting:
                logits, halting = self.model(images, return_halting=True)
                halting = halting._replace(layer_scores=mean_over_processes(halting.layer_scores))
            else:
                logits = self.model(images)
            total, parts = self.criterion(logits, targets, halting, teacher_logits)
        return total, parts, halting

    def update(self, step: str = "", wrong_part: str | None = None) -> None:
        """One optimizer step with the gradients accumulated so far.

        step: its name; wrong_part: the part of this process's loss that is not finite, if one is.
        FloatingPointError, in every process, if there is one in any, or a gradient is not finite.
        With gradient scaling such a step is skipped; it is an error after too many in a row.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = {name: p.grad for name, p in self.model_without_ddp.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        wrong = any_rank(wrong_part is not None or not torch.isfinite(norm).item(), self.device)
        if wrong:
            self._refuse_or_skip(step, wrong_part, gradients)
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
            self.optimizer.zero_grad()
            return
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model_without_ddp.parameters(), self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.skipped_in_a_row = 0
        if self.ema is not None:
            self.ema.update(self.model_without_ddp)

    def _refuse_or_skip(self, step: str, wrong_part: str | None, gradients: dict[str, Tensor]) -> None:
        """A step whose numbers are not finite: skipped by gradient scaling, else FloatingPointError."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.scaler.is_enabled() and self.skipped_in_a_row <= MAX_SKIPPED:
            return
        parameter = next((name for name, grad in gradients.items() if not torch.isfinite(grad).all()), None)
        parts = next((part for part in utils.all_gather_objects(wrong_part) if part), "the loss is finite")
        gradient = f"the gradient of {parameter} is not finite" if parameter else "the gradients' norm overflows"
        skipped = f"; {self.skipped_in_a_row} steps in a row were skipped" if self.scaler.is_enabled() else ""
        raise FloatingPointError(f"{step}: {parts}, {gradient}{skipped}; the last checkpoint is from before")

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix, which pair images: an odd batch loses one, a single image is not mixed."""
        if self.mixup is None:
            return images, targets
        if len(images) == 1:
            return images, mixup_target(targets, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        even = len(images) // 2 * 2
        return self.mixup(images[:even], targets[:even])


class _MeanOverProcesses(torch.autograd.Function):
    """The mean is its own adjoint: forward and backward are the same all-reduce."""

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


@dataclass
class Epoch:
    """How far an epoch has come: batches done, in how many seconds, and what has been averaged over them."""

    number: int
    batches: int = 0
    seconds: float = 0.0
    averages: MetricAverages = field(default_factory=MetricAverages)


def train_one_epoch(
    trainer: Trainer, loader: Iterable, epoch: Epoch, after_update: Callable[[], None]
) -> dict[str, float | list[float]]:
    """Trains on the batches of the loader, the rest of the epoch; returns means over the whole of it, by name.

    after_update: called after each optimizer step, when `epoch` is up to date; may raise to stop.
    All random numbers of a step follow from its place in training. FloatingPointError, in every
    process, where a loss or a gradient is not finite.
    """
    trainer.model.train()
    averages, title = epoch.averages, f"Epoch {epoch.number}"
    weight_before, seconds_before = averages.weight, epoch.seconds

    def figures() -> dict[str, str]:
        means = averages.local()
        shown = {"loss": f"{means['loss']:.4f}"} if means else {}  # none while every step was skipped
        shown["lr"] = f"{learning_rate(trainer.optimizer):.2e}"
        if "depth_mean" in means:
            shown["depth"] = f"{means['depth_mean']:.2f}"
            shown["saved"] = f"{means['macs_saved']:.0%}"
        if trainer.scaler.is_enabled():
            shown["skipped"] = str(trainer.skipped_steps)
        rate = (averages.weight - weight_before) / (time.perf_counter() - start)
        return {**shown, "images/s": f"{rate * utils.world_size():.0f}"}

    start = time.perf_counter()
    batches = iter(utils.with_progress(loader, title, figures, done=epoch.batches))
    while group := list(islice(batches, trainer.accum_steps)):
        utils.seed_everything(trainer.seed, utils.rank(), epoch.number, epoch.batches, utils.RANDOM_OF_STEPS)
        wrong_part = None
        for number, (images, targets) in enumerate(group, start=1):
            with _synchronise(trainer.model, number == len(group)):
                total, parts, halting = trainer.micro_batch(images, targets)
                trainer.scaler.scale(total / len(group)).backward()
            wrong_part = wrong_part or _not_finite({**parts, "loss": total})
            if wrong_part is None:  # else the step is skipped, or the run stops
                averages.add(len(images), loss=total, **parts, **halting_metrics(trainer.model_without_ddp, halting))
        trainer.update(f"epoch {epoch.number}, batch {epoch.batches + len(group) - 1}", wrong_part)
        epoch.batches += len(group)
        epoch.seconds = seconds_before + time.perf_counter() - start
        after_update()
    _, means = averages.reduced()
    skipped = {"skipped_steps": trainer.skipped_steps} if trainer.scaler.is_enabled() else {}
    rate = {"lr": learning_rate(trainer.optimizer), "seconds": epoch.seconds}
    return {**means, **skipped, **rate}


def _not_finite(values: dict[str, Tensor]) -> str | None:
    """The first of the named values that is not finite, as text."""
    if torch.isfinite(torch.stack([value.detach() for value in values.values()])).all():
        return None
    return next(f"{name} is {value.item():g}" for name, value in values.items() if not torch.isfinite(value))


def _synchronise(model: nn.Module, now: bool):
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
    return {
        "depth_mean": depth.mean(),
        "depth_max": depth.amax(dim=1).mean(),
        "depth_min": depth.amin(dim=1).mean(),
        "patch_depth_mean": depth[:, prefix:].mean(),
        "class_token_depth": depth[:, 0].mean(),
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
    stop: StopRequest | None = None,
    on_batch: Callable[[Tensor, Tensor, Halting], None] | None = None,
) -> dict:
    """Evaluates on every image of the loader, all processes' together; each image counts once.

    stop: where it is asked for, this process looks at no more images;
    on_batch: called with the targets [B], logits [B, K] and halting of each batch.
    Returns means by name: loss, acc1, acc5 (in per cent), those of `halting_metrics`, `images`
    (how many), and `images_per_s`, of the forward pass in this process.
    """
    model.eval()
    averages, seconds = MetricAverages(), 0.0
    loss = nn.CrossEntropyLoss()

    def figures() -> dict[str, str]:
        means = averages.local()
        return {"acc1": f"{means['acc1']:.2f}", "depth": f"{means['depth_mean']:.2f}"}

    for images, targets in utils.with_progress(loader, title, figures):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        start = _now(device)
        with autocast(device, amp):
            logits, halting = model(images, return_halting=True)
        seconds += _now(device) - start
        logits = logits.float()
        acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
        averages.add(len(images), loss=loss(logits, targets), acc1=acc1, acc5=acc5, **halting_metrics(model, halting))
        if on_batch is not None:
            on_batch(targets, logits, halting)
        if stop is not None and stop.signal:
            break
    images, means = averages.reduced()
    return {**means, "images": int(images), "images_per_s": averages.weight / max(seconds, 1e-9)}


def check_complete(result: dict, loader: ImageLoader) -> None:
    """UserError where a whole evaluation has seen fewer images than there are."""
    if result["images"] < loader.num_images:
        raise UserError(f"only {result['images']} of {loader.num_images} validation images could be read")


@torch.inference_mode()
def zipping_speeds(
    model: nn.Module, images: Tensor, device: torch.device, amp: str, rounds: int = 5
) -> dict[str, float]:
    """Images/s of the logits alone, zipped and masked, on one batch: medians of interleaved rounds."""
    forms = {"images_per_s_zipped": True, "images_per_s_masked": False}
    seconds = {name: [] for name in forms}
    model = copy.deepcopy(model).eval()
    images = images.to(device)
    for number in range(rounds + 1):
        for name, zip_tokens in forms.items():
            model.zip_tokens = zip_tokens
            start = _now(device)
            with autocast(device, amp):
                model(images)
            if number > 0:  # the first round warms up
                seconds[name].append(_now(device) - start)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(result: dict) -> None:
    """Prints what `evaluate` measured, as a table."""
    depths = f"patches {result['patch_depth_mean']:.2f}, class token {result['class_token_depth']:.2f}"
    macs, static_macs = result["gmacs"], result["gmacs_static"]
    rows = [
        ("top-1", f"{result['acc1']:.2f} %"),
        ("top-5", f"{result['acc5']:.2f} %"),
        ("loss", f"{result['loss']:.4f}"),
        ("mean depth", f"{result['depth_mean']:.2f}  ({depths})"),
        ("live tokens per block", " ".join(f"{share:.2f}" for share in result["live_share"])),
        ("multiply-adds per image", f"{macs:.3f} G  (static {static_macs:.3f} G, {macs / static_macs:.1%})"),
        ("images/s", f"{result['images_per_s']:.1f}"),
    ]
    if "images_per_s_zipped" in result:
        zipped, masked = result["images_per_s_zipped"], result["images_per_s_masked"]
        rows.append(("images/s of logits alone", f"{zipped:.1f} zipped, {masked:.1f} masked"))
    if "ema_acc1" in result:
        rows.insert(1, ("top-1 of the averaged weights", f"{result['ema_acc1']:.2f} %"))
    utils.log(utils.table(rows))
    utils.log(f"Accuracy of the network on the {result['images']} test images: {result['acc1']:.1f}%")
