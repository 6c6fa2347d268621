"""Time and memory of each form of a case, in inference and in training."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from operator import truediv

import torch
from torch import Tensor, nn

import utils
from benchmarks.cases import EARLY_EXIT, FLOOR, STATIC, Case, Floor, multiply_adds, static_twin
from losses import AdaptiveLoss
from models_act import AdaptiveTokens
from utils import autocast

MIN_SECONDS = 0.2  # that one timing takes at least, by repetition


def measure(case: Case, device: torch.device, amp: str, train: bool, rounds: int) -> list[dict]:
    """A row for each form: images/s (median, lowest, highest), speed-up, multiply-adds, memory."""
    twin = static_twin(case.model)
    forms = {STATIC: twin, FLOOR: Floor(copy.deepcopy(twin), case), "masked": copy.deepcopy(case.model)}
    forms["masked"].zip_tokens = False
    forms["zipped"] = copy.deepcopy(case.model)
    forms["zipped"].early_exit = False
    if not train:
        forms[EARLY_EXIT] = copy.deepcopy(case.model)
    make_call = training_call if train else inference_call
    calls = {name: make_call(model, case.batches, amp) for name, model in forms.items()}
    seconds = utils.time_interleaved(calls, device, rounds, MIN_SECONDS)
    macs = multiply_adds(case.model, case.depth)
    rows = []
    for name, times in seconds.items():
        speed_up, of_floor = (statistics.median(map(truediv, seconds[other], times)) for other in (STATIC, FLOOR))
        ideal = macs[STATIC] / macs[name]
        rows.append(
            {
                "form": name,
                "images_per_s": len(case.images) / statistics.median(times),
                "images_per_s_range": [len(case.images) / max(times), len(case.images) / min(times)],
                "speed_up": speed_up,
                "gmacs": macs[name] / 1e9,
                "ideal": ideal,
                "speed_up_of_ideal": speed_up / ideal,
                "speed_of_floor": of_floor,
                "memory_mib": _memory(calls[name], forms[name], case, train),
            }
        )
    return rows


def inference_call(model: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        for images in batches:
            with autocast(images.device, amp):
                model(images)

    return call


def training_call(model: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    """Forward, losses, backward and AdamW, at learning rate 0, so that the depths stay those that were imposed."""
    loss_of = training_loss(model, batches[0], amp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler(batches[0].device.type, enabled=amp == "fp16")

    def call() -> None:
        for images in batches:
            scaler.scale(loss_of(images)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return call


def training_loss(model: nn.Module, images: Tensor, amp: str) -> Callable[[Tensor], Tensor]:
    """The loss of batches like this one, with those of halting where the model halts tokens."""
    model.train()
    criterion = AdaptiveLoss(nn.CrossEntropyLoss(), len(model.blocks)).to(images.device)
    targets = torch.arange(len(images), device=images.device) % model.num_classes
    is_adaptive = isinstance(model, AdaptiveTokens)

    def loss_of(images: Tensor) -> Tensor:
        with autocast(images.device, amp):
            outputs = model(images, return_halting=True) if is_adaptive else (model(images),)
            return criterion(outputs[0], targets, *outputs[1:])[0]

    return loss_of


def _memory(call: Callable[[], None], model: nn.Module, case: Case, train: bool) -> float | None:
    """MiB: on CUDA the allocator's peak; on the CPU what a training step keeps for backward."""
    device = case.images.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)  # the weights of all forms
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return _saved_for_backward(call, model) / len(case.batches) / 2**20 if train else None


def _saved_for_backward(call: Callable[[], None], model: nn.Module) -> int:
    """Bytes of the distinct storages that autograd saves in a call, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # the tensors stay alive, so that no address is seen twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in kept.values())


def format_rows(rows: list[dict]) -> str:
    columns = ("images/s", 10), ("spread", 16), ("speed-up", 10), ("GMACs", 9), ("ideal", 8), ("of ideal", 10)
    columns += ("of floor", 10), ("MiB", 9)
    header = " " * 20 + "".join(f"{name:>{width}}" for name, width in columns)
    lines = [header]
    for row in rows:
        spread = "{:.1f}-{:.1f}".format(*row["images_per_s_range"])
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        figures = f"{row['images_per_s']:>10.1f}{spread:>16}{row['speed_up']:>10.2f}{row['gmacs']:>9.3f}"
        shares = f"{row['ideal']:>8.2f}{row['speed_up_of_ideal']:>10.2f}{row['speed_of_floor']:>10.2f}"
        lines.append(f"{row['form']:20}{figures}{shares}{memory:>9}")
    return "\n".join(lines)
