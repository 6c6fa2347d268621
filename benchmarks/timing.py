"""Speed and memory of the variants of a case, in inference and in training.

Every round times each variant once, in turn, so that a change of the machine's speed affects all of them alike.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from operator import truediv

import torch
from torch import Tensor, nn

import utils
from benchmarks.cases import EARLY_EXIT, FLOOR, MASKED, STATIC, ZIPPED, Case, Floor, static_twin, variant_macs
from losses import AdaptiveLoss
from models_act import AdaptiveTokens

MIN_SECONDS = 0.2  # calls are repeated until the slowest variant takes this long


def measure(case: Case, device: torch.device, amp: str, train: bool, rounds: int) -> list[dict]:
    """Measure the speed and memory of each variant.

    Returns one row per variant. Its numbers are medians over the rounds. A speedup is the median of the ratios that
    the rounds give. `speed_up` is relative to the static model, `ideal` is the ratio of the MACs, and
    `speed_of_floor` is relative to the floor.
    """
    variants = _build_variants(case, train)
    make_call = training_call if train else inference_call
    calls = {name: make_call(model, case.batches, amp) for name, model in variants.items()}
    seconds = utils.time_interleaved(calls, device, rounds, MIN_SECONDS)
    macs = variant_macs(case.model, case.depth)
    rows = []
    for name, times in seconds.items():
        speedup, of_floor = (statistics.median(map(truediv, seconds[other], times)) for other in (STATIC, FLOOR))
        ideal = macs[STATIC] / macs[name]
        rows.append(
            {
                "form": name,
                "images_per_s": len(case.images) / statistics.median(times),
                "images_per_s_range": [len(case.images) / max(times), len(case.images) / min(times)],
                "speed_up": speedup,
                "gmacs": macs[name] / 1e9,
                "ideal": ideal,
                "speed_up_of_ideal": speedup / ideal,
                "speed_of_floor": of_floor,
                "memory_mib": _memory_mib(calls[name], variants[name], case, train),
            }
        )
    return rows


def _build_variants(case: Case, train: bool) -> dict[str, nn.Module]:
    """Build one model per row of the table. Training has no early exit."""
    static = static_twin(case.model)
    masked, zipped = copy.deepcopy(case.model), copy.deepcopy(case.model)
    masked.zip_tokens = False
    zipped.early_exit = False
    variants = {STATIC: static, FLOOR: Floor(copy.deepcopy(static), case), MASKED: masked, ZIPPED: zipped}
    return variants if train else variants | {EARLY_EXIT: copy.deepcopy(case.model)}


def inference_call(model: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    """Return a function that computes the logits of all batches."""
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        for images in batches:
            with utils.autocast(images.device, amp):
                model(images)

    return call


def training_call(model: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    """Return a function that takes one training step per batch: forward, losses, backward and AdamW.

    The learning rate is 0, so that the weights and the imposed depths do not change.
    """
    compute_loss = training_loss(model, batches[0], amp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler(batches[0].device.type, enabled=amp == "fp16")

    def call() -> None:
        for images in batches:
            scaler.scale(compute_loss(images)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return call


def training_loss(model: nn.Module, images: Tensor, amp: str) -> Callable[[Tensor], Tensor]:
    """Return a function from a batch of this size to its loss, with the halting losses if the model is adaptive."""
    model.train()
    criterion = AdaptiveLoss(nn.CrossEntropyLoss(), len(model.blocks)).to(images.device)
    targets = torch.arange(len(images), device=images.device) % model.num_classes
    is_adaptive = isinstance(model, AdaptiveTokens)

    def compute_loss(images: Tensor) -> Tensor:
        with utils.autocast(images.device, amp):
            outputs = model(images, return_halting=True) if is_adaptive else (model(images),)
            return criterion(outputs[0], targets, *outputs[1:])[0]

    return compute_loss


def _memory_mib(call: Callable[[], None], model: nn.Module, case: Case, train: bool) -> float | None:
    """Return the memory of one call in MiB, without the weights.

    CUDA: the peak of the allocator. CPU: what autograd saves per training step, and None in inference.
    """
    device = case.images.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)  # the weights of all variants
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return _saved_for_backward(call, model) / len(case.batches) / 2**20 if train else None


def _saved_for_backward(call: Callable[[], None], model: nn.Module) -> int:
    """Return the bytes of the distinct storages that autograd saves during a call, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}  # keeps the tensors alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in saved.values())


def format_rows(rows: list[dict]) -> str:
    """Format the rows of `measure` as a table."""
    header = f"{'images/s':>10}{'range':>16}{'speedup':>10}{'GMACs':>9}{'ideal':>8}{'of ideal':>10}{'of floor':>10}"
    lines = [f"{'':20}{header}{'MiB':>9}"]
    for row in rows:
        lowest, highest = row["images_per_s_range"]
        cells = (
            f"{row['form']:20}",
            f"{row['images_per_s']:>10.1f}",
            f"{f'{lowest:.1f}-{highest:.1f}':>16}",
            f"{row['speed_up']:>10.2f}",
            f"{row['gmacs']:>9.3f}",
            f"{row['ideal']:>8.2f}",
            f"{row['speed_up_of_ideal']:>10.2f}",
            f"{row['speed_of_floor']:>10.2f}",
            f"{'' if row['memory_mib'] is None else format(row['memory_mib'], '.0f'):>9}",
        )
        lines.append("".join(cells))
    return "\n".join(lines)
