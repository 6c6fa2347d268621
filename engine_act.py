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
from utils import Averages, autocast


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
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def micro_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor], Halting | None]:
        """Forward and loss: the total, its parts by name, and the halting of an adaptive model."""
        images, targets = (t.to(self.device, non_blocking=True) for t in (images, targets))
        images, targets = self._mix(images, targets)
        with autocast(self.device, self.amp):
            teacher_logits = None if self.teacher is None else self.teacher(images)
            halting = None
            if self.bare_model.halting:
                logits, halting = self.model(images, return_halting=True)
                halting = halting._replace(layer_scores=mean_over_processes(halting.layer_scores))
            else:
                logits = self.model(images)
            total, parts = self.criterion(logits, targets, halting, teacher_logits)
        return total, parts, halting

    def update(self) -> None:
        """One optimizer step with the gradients accumulated so far."""
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.bare_model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.bare_model)

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


def train_one_epoch(
    trainer: Trainer, loader: Iterable, title: str, after_update: Callable[[], None]
) -> dict[str, float | list[float]]:
    """Trains on every batch of the loader; returns means over the epoch and all processes, by name.

    after_update: called after each optimizer step, for the schedule. FloatingPointError if the loss is not finite.
    """
    trainer.model.train()
    averages = Averages()

    def figures() -> dict[str, str]:
        means = averages.local()
        shown = {"loss": f"{means['loss']:.4f}", "lr": f"{learning_rate(trainer.optimizer):.2e}"}
        if "depth_mean" in means:
            shown["depth"] = f"{means['depth_mean']:.2f}"
            shown["saved"] = f"{means['macs_saved']:.0%}"
        seconds = time.perf_counter() - start
        return {**shown, "images/s": f"{averages.weight * utils.world_size() / seconds:.0f}"}

    start = time.perf_counter()
    batches = iter(utils.with_progress(loader, title, figures))
    while group := list(islice(batches, trainer.accum_steps)):
        for number, (images, targets) in enumerate(group, start=1):
            with _synchronise(trainer.model, number == len(group)):
                total, parts, halting = trainer.micro_batch(images, targets)
                _check_finite(total, parts, title)
                trainer.scaler.scale(total / len(group)).backward()
            averages.add(len(images), loss=total, **parts, **halting_figures(trainer.bare_model, halting))
        trainer.update()
        after_update()
    _, means = averages.reduced()
    return {**means, "lr": learning_rate(trainer.optimizer), "seconds": time.perf_counter() - start}


def _check_finite(total: Tensor, parts: dict[str, Tensor], title: str) -> None:
    if not torch.isfinite(total):
        shown = ", ".join(f"{name} {value.item():g}" for name, value in parts.items())
        raise FloatingPointError(f"{title}: the loss is not finite: {shown}")


def _synchronise(model: nn.Module, now: bool):
    """Gradients are averaged over the processes only in the last micro-batch of an update."""
    if now or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def halting_figures(model: nn.Module, halting: Halting | None) -> dict[str, Tensor]:
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
def evaluate(model: nn.Module, loader: Iterable, device: torch.device, amp: str = "none", title: str = "Test") -> dict:
    """Evaluates on every image of the loader, all processes' together; each image counts once.

    Returns means by name: loss, acc1, acc5 (in per cent), those of `halting_figures`, `images`
    (how many), and `images_per_s`, of the forward pass in this process.
    """
    model.eval()
    averages, seconds = Averages(), 0.0
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
        averages.add(len(images), loss=loss(logits, targets), acc1=acc1, acc5=acc5, **halting_figures(model, halting))
    images, means = averages.reduced()
    return {**means, "images": int(images), "images_per_s": averages.weight / max(seconds, 1e-9)}


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
