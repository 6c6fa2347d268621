"""Checks of cuda_check.py for the planned mode with CUDA graphs, and the costs of captures.

The part `graphs` is a function of a `Check`, which prints and collects the results. The first batches run without a
plan, so each check runs more batches than that.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import utils
import zipping
from benchmarks.gpu_checks import (
    LIMITS,
    PRECISION,
    Check,
    distance,
    gradients,
    largest,
    make_trainer,
    output_errors,
    train,
    without_tf32,
)
from benchmarks.graphed import pool_mib
from benchmarks.synthetic import LOGIT_SLOPE
from benchmarks.timing import inference_call, training_call
from zipping.planned import dispatch
from zipping.planned.plans import Planner

NUM_BATCHES = Planner.start + 3  # batches of a check: those before the first plan, then replays
MAX_LOSS_ERROR = {"none": 1e-2, "bf16": 5e-2, "fp16": 5e-2}  # relative, over the steps of a training run


def graphs(check: Check) -> None:
    """Compare replayed passes with masked ones, and report what captures cost and how often plans hold."""
    if not dispatch.supports_graphs(torch.zeros(1, device=check.device)):
        check.report("not run: CUDA graphs require CUDA and Triton kernels")
        return
    with without_tf32():
        cases = [(check.size, amp) for amp in check.amps]
        cases += [] if check.small else [(name, check.amp) for name in ("tiny_distilled", "avit3_small", "rope_mixed")]
        for (name, amp), part in itertools.product(cases, (inference, training)):
            with check.measuring(f"{name}, {part.__name__}, {PRECISION[amp]}"):
                part(check, name, amp)
        with check.measuring("single images"):
            single_images(check)
    for amp in check.amps:
        with check.measuring(f"training run, {PRECISION[amp]}"):
            training_run(check, amp)
    for report in (captures, plans, dummy_sequences):
        with check.measuring(report.__name__):
            report(check)


# Correctness -------------------------------------------------------------------------------------


def inference(check: Check, name: str, amp: str) -> None:
    """Compare outputs with those of the masked model: usual, with other weights, and with tokens that halt later."""
    graphed, masked, batches = _graphed_and_masked(check, name)
    graphed.eval(), masked.eval()
    what = f"{name}, inference, {PRECISION[amp]}"

    def compare(case: str, batches: Iterable[Tensor]) -> None:
        errors = [output_errors(graphed, masked, images, amp) for images in batches]
        worst = {error: largest([e[error] for e in errors]) for error in errors[0]}
        check.compare(f"{what}{case}", worst, LIMITS[amp])

    poison(check.device)
    compare("", batches)
    _check_replays(check, what, graphed)
    compare(", smaller last batch", [batches[0][:-1]])
    for model in (graphed, masked):
        model.head.weight.data.mul_(-2)
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight.mul_(1.5)
    compare(", other weights", batches[:2])
    _halt_later(graphed, masked)
    with _checking_overflows(check, what, graphed):
        compare(", tokens halt later", batches[:2])


def training(check: Check, name: str, amp: str) -> None:
    """Compare gradients with those of the masked model, with stochastic depth and with gate offsets."""
    graphed, masked, batches = _graphed_and_masked(check, name, drop_path_rate=0.1)
    graphed.train(), masked.train()
    what, offset = f"{name}, training, {PRECISION[amp]}", torch.linspace(-3, 3, len(batches[0]), device=check.device)

    def compare(case: str, batches: Iterable[Tensor], offsets: list[Tensor | None]) -> None:
        pairs = [[gradients(m, x, amp, o) for m in (graphed, masked)] for x, o in zip(batches, offsets, strict=True)]
        check.compare(f"{what}{case}", {"gradients": largest([distance(*pair) for pair in pairs])}, LIMITS[amp])

    poison(check.device)
    compare("", batches, [None] * len(batches))
    _check_replays(check, what, graphed)
    compare(", gate offsets", batches[:2], [offset, -offset])
    _halt_later(graphed, masked)
    with _checking_overflows(check, what, graphed):
        compare(", tokens halt later", batches[:2], [None] * 2)


def single_images(check: Check) -> None:
    """Compare single images, whose blocks are captured in stages with early exit, in float32."""
    graphed, masked, _ = _graphed_and_masked(check, check.size)
    graphed.eval(), masked.eval()
    images = check.images(masked, NUM_BATCHES if check.small else 24)
    errors = [output_errors(graphed, masked, image, "none") for image in images.split(1)]
    worst = {name: largest([error[name] for error in errors]) for name in errors[0]}
    check.compare("single images, float32", worst, LIMITS["none"])
    _check_replays(check, "single images", graphed)


def training_run(check: Check, amp: str) -> None:
    """Compare the losses of a training run with those of a run without CUDA graphs."""
    steps, trainer = NUM_BATCHES if check.small else 30, make_trainer(check, amp)
    expected = train(check, make_trainer(check, amp), steps)
    trainer.model_without_ddp.cuda_graphs = True
    losses = train(check, trainer, steps)
    error = largest([abs(a - b) / b for a, b in zip(losses, expected)])
    figure = f"{error:.1e}, last loss {losses[-1]:.4f}, without graphs {expected[-1]:.4f}"
    check.check(f"{PRECISION[amp]}, losses of {steps} steps", error < MAX_LOSS_ERROR[amp], figure)
    _check_replays(check, f"{PRECISION[amp]}, {steps} steps", trainer.model_without_ddp)


def _graphed_and_masked(check: Check, name: str, **options) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """Return a model with CUDA graphs, its masked copy and batches of different images."""
    graphed = check.model(name, num_classes=10, **options)
    masked = copy.deepcopy(graphed)
    graphed.cuda_graphs, masked.zip_tokens = True, False
    batch = 2 if check.small else 16
    return graphed, masked, check.images(graphed, NUM_BATCHES * batch).split(batch)


def _halt_later(*models: nn.Module) -> None:
    """Let every token halt two blocks later."""
    for model in models:
        model.gate_center += 2 * LOGIT_SLOPE


def _check_replays(check: Check, what: str, model: nn.Module) -> None:
    report = dispatch.graph_report(model)
    check.check(f"{what}, graphs are replayed", report.replayed > 0, f"{report}")


@contextlib.contextmanager
def _checking_overflows(check: Check, what: str, model: nn.Module) -> Iterator[None]:
    """Check that a batch of the model overflows its plan inside the context."""
    before = dispatch.graph_report(model)
    yield
    overflows = dispatch.graph_report(model).since(before).overflows
    check.check(f"{what}, batches overflow their plan", overflows > 0, f"{overflows}")


def poison(device: torch.device) -> None:
    """Fill free memory with NaN, so that a kernel that leaves rows unwritten is noticed."""
    torch.cuda.empty_cache()  # does nothing without CUDA
    sizes = (2**8, 2**12, 2**16, *(2**20 * n for n in (1, 4, 16, 64, 256)))
    waste = [torch.full((size,), math.nan, device=device) for size in sizes for _ in range(2)]
    utils.synchronized_time(device)
    del waste


# Costs of captures -------------------------------------------------------------------------------


def captures(check: Check) -> None:
    """Report the seconds of a capture, and the memory that the pools of its graphs reserve."""
    for train_mode, batch in itertools.product((False, True), (2,) if check.small else (32, 128)):
        model = check.model(check.size, num_classes=10)
        model.cuda_graphs = True
        images = check.images(model, batch)
        call = (training_call if train_mode else inference_call)(model, [images], check.amp)
        before, seconds = pool_mib(check.device), []
        for _ in range(NUM_BATCHES):
            start = utils.synchronized_time(check.device)
            call()
            seconds.append(utils.synchronized_time(check.device) - start)
        reserved, report = pool_mib(check.device) - before, dispatch.graph_report(model)
        mode = "training" if train_mode else "inference"
        check.report(
            f"{mode} {batch}: {report.captures} captures, slowest call {max(seconds[1:]):.2f} s, "
            f"last call {1e3 * seconds[-1]:.2f} ms, pools {reserved:.0f} MiB",
            train=train_mode,
            batch=batch,
            slowest_s=max(seconds[1:]),  # the first call compiles kernels
            last_s=seconds[-1],
            pool_mib=reserved,
        )


@torch.inference_mode()
def plans(check: Check) -> None:
    """Report how often plans hold for batches that never recur."""
    for batch in (2,) if check.small else (1, 32, 128):
        model = check.model(check.size).eval()
        model.cuda_graphs = True
        for _ in range(NUM_BATCHES if check.small else 100):
            images = torch.randn(batch, 3, *model.patch_embed.img_size, device=check.device)
            with utils.autocast(check.device, check.amp):
                model(images)
        report = dispatch.graph_report(model)
        check.report(f"batch {batch}, early exit: {report}", batch=batch, **vars(report))


def dummy_sequences(check: Check) -> None:
    """Report the time of attention with and without dummy sequences over surplus rows, by CUDA graphs."""
    batch, length, heads, width = (2, 65, 3, 16) if check.small else (128, 197, 3, 64)
    lengths = torch.randint(length // 4, length, (batch,), generator=torch.Generator().manual_seed(0))
    count, dtype = int(lengths.sum()), utils.AMP_DTYPES[check.amp] or torch.float32
    capacity = -(-int(1.05 * count) // 128) * 128
    surplus = torch.arange(count, capacity, length)[1:]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    qkv = torch.randn(3, 1, heads, capacity, width, device=check.device, dtype=dtype)
    cases = {
        "live rows only": (starts, count),
        "with dummy sequences": (torch.cat([starts, surplus, torch.tensor([capacity])]), capacity),
    }
    for name, (bounds, rows) in cases.items():
        q, k, v = qkv[:, :, :, :rows]
        cu_seqlens = bounds.to(check.device, torch.int32)
        seconds = _replayed_seconds(check, partial(zipping.varlen_attention, q, k, v, cu_seqlens, length))
        check.report(
            f"attention of {batch} images, {name}: {rows} rows, {1e6 * seconds:.1f} us", rows=rows, seconds=seconds
        )


@torch.no_grad()
def _replayed_seconds(check: Check, function: Callable[[], object], calls: int = 10) -> float:
    """Return the seconds of a call, as one of several in a CUDA graph, so that the host takes no part."""
    from zipping.planned import capture  # imported here because Triton may be missing

    capture.warm_up(function)
    _, replay = capture.capture(lambda: [function() for _ in range(calls)], capture.new_pool())
    times = utils.time_interleaved({"": replay}, check.device, check.rounds)[""]
    return statistics.median(times) / calls


PARTS = {"graphs": graphs}
