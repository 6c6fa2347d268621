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
from benchmarks.graphed import (
    VARIANTS,
    WHOLE_COMPILED,
    Preparation,
    build_graphed,
    eager_variant,
    hit_rate,
    prepare,
    same_form,
)
from benchmarks.planned import PlannedEager
from losses import AdaptiveLoss
from models_act import AdaptiveTokens
from zipping.planned import dispatch

MIN_SECONDS = 0.2  # calls are repeated until the slowest variant takes this long


def measure(case: Case, device: torch.device, amp: str, train: bool, rounds: int) -> list[dict]:
    """Measure the speed and memory of each variant.

    Returns one row per variant. Its numbers are medians over the rounds. A speedup is the median of the ratios that
    the rounds give. `speed_up` is relative to the static model, `ideal` is the ratio of the MACs, and
    `speed_of_floor` is relative to the floor. Where CUDA graphs run, there are more variants, see `_add_graphed`.
    """
    variants, make_call = _build_variants(case, train), training_call if train else inference_call
    calls = {name: make_call(model, case.batches, amp) for name, model in variants.items()}
    has_graphs = dispatch.supports_graphs(case.images)
    prepared = _add_graphed(variants, calls, case, amp, train) if has_graphs else {}
    before = {name: dispatch.graph_report(variants[name]) for name in prepared}
    seconds = utils.time_interleaved(calls, device, rounds, MIN_SECONDS)
    rows = [_row(name, seconds, case) for name in seconds]
    for row in rows:
        name = row["form"]
        row["memory_mib"] = _memory_mib(calls[name], variants[name], case, train)
        if has_graphs:
            row["speed_of_same_form"] = _speedup(seconds[name], seconds.get(same_form(name)))
            row["hit_rate"] = hit_rate(variants[name], before[name]) if name in prepared else None
        if name in prepared:
            row["memory_mib"] = (row["memory_mib"] or 0.0) + prepared[name].pool_mib
            row["preparation_s"] = prepared[name].seconds
    return rows


def _add_graphed(
    variants: dict[str, nn.Module], calls: dict[str, Callable[[], None]], case: Case, amp: str, train: bool
) -> dict[str, Preparation]:
    """Add the variants of graphed.py and their calls, and prepare them. One that fails is left out with a warning."""
    make_call, prepared = training_call if train else inference_call, {}
    for name, model in build_graphed(case.model, train, (WHOLE_COMPILED, *VARIANTS)).items():
        try:
            call = make_call(model, case.batches, amp)
            prepared[name] = prepare(call, len(case.batches), case.images.device)
        except Exception as error:  # torch.compile, for example, requires a compiler
            utils.warn(f"{name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        variants[name], calls[name] = model, call
    return prepared


def _row(name: str, seconds: dict[str, list[float]], case: Case) -> dict:
    """Return the speed of a variant. seconds: of each variant, one number per round."""
    times, macs = seconds[name], variant_macs(case.model, case.depth)
    speedup, own = _speedup(times, seconds[STATIC]), macs[eager_variant(name)]
    ideal = macs[STATIC] / own
    return {
        "form": name,
        "images_per_s": len(case.images) / statistics.median(times),
        "images_per_s_range": [len(case.images) / max(times), len(case.images) / min(times)],
        "speed_up": speedup,
        "gmacs": own / 1e9,
        "ideal": ideal,
        "speed_up_of_ideal": speedup / ideal,
        "speed_of_floor": _speedup(times, seconds[FLOOR]),
    }


def _speedup(times: list[float], baseline: list[float] | None) -> float | None:
    """Return the median of the rounds' ratios. None if the baseline was left out."""
    return None if baseline is None else statistics.median(map(truediv, baseline, times))


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
    is_cuda = batches[0].is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=is_cuda)
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
    is_adaptive = isinstance(model, AdaptiveTokens | PlannedEager)

    def compute_loss(images: Tensor) -> Tensor:
        with utils.autocast(images.device, amp):
            outputs = model(images, return_halting=True) if is_adaptive else (model(images),)
            return criterion(outputs[0], targets, *outputs[1:])[0]

    return compute_loss


def _memory_mib(call: Callable[[], None], model: nn.Module, case: Case, train: bool) -> float | None:
    """Return the memory of one call in MiB, without the weights.

    CUDA: the peak of the allocator. CPU: what autograd saves per training step, and None in inference.
    """
    if case.images.is_cuda:
        return peak_mib(call, case.images.device)
    return _saved_for_backward(call, model) / len(case.batches) / 2**20 if train else None


def peak_mib(call: Callable[[], None], device: torch.device) -> float:
    """Return the peak memory of a call on a CUDA device in MiB, minus the memory in use before it, such as weights."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


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
    """Format the rows of `measure` as a table, with two more columns where CUDA graphs run."""
    width = max(20, *(len(row["form"]) + 2 for row in rows))
    header = f"{'images/s':>10}{'range':>16}{'speedup':>10}{'GMACs':>9}{'ideal':>8}{'of ideal':>10}{'of floor':>10}"
    has_graphs = any("speed_of_same_form" in row for row in rows)
    lines = [f"{'':{width}}{header}{'MiB':>9}" + f"{'same form':>11}{'hits':>7}" * has_graphs]
    for row in rows:
        lowest, highest = row["images_per_s_range"]
        cells = (
            f"{row['form']:{width}}",
            f"{row['images_per_s']:>10.1f}",
            f"{f'{lowest:.1f}-{highest:.1f}':>16}",
            f"{row['speed_up']:>10.2f}",
            f"{row['gmacs']:>9.3f}",
            f"{row['ideal']:>8.2f}",
            f"{row['speed_up_of_ideal']:>10.2f}",
            f"{row['speed_of_floor']:>10.2f}",
            f"{format_optional(row['memory_mib'], '.0f'):>9}",
            f"{format_optional(row.get('speed_of_same_form'), '.2f'):>11}" * has_graphs,
            f"{format_optional(row.get('hit_rate'), '.0%'):>7}" * has_graphs,
        )
        lines.append("".join(cells))
    return "\n".join(lines)


def format_optional(value: float | None, form: str) -> str:
    """Format a number, or None as an empty cell."""
    return "" if value is None else format(value, form)
