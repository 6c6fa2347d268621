"""Measurements of cuda_check.py: new sequence lengths, kernel launches, speed and memory.

Each part is a function of a `Check`, which prints and collects the results; PARTS lists them.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import utils
from benchmarks.aims import report_aims
from benchmarks.cases import EARLY_EXIT, STATIC, ZIPPED, static_twin, variant_macs
from benchmarks.gpu_checks import MODELS, PRECISION, Check
from benchmarks.graphed import (
    COMPILED_GRAPHED,
    GRAPHED,
    PLANNED,
    VARIANTS,
    WHOLE_COMPILED,
    Preparation,
    build_graphed,
    eager_variant,
    hit_rate,
    prepare,
    same_form,
)
from benchmarks.timing import format_optional, inference_call, peak_mib, training_call, training_loss
from macs import macs_at_depth
from zipping.planned import dispatch

MAX_FIRST_RATIO, MAX_FIRST_EXTRA = 3.0, 5e-3  # limit of a first pass: ratio to a later pass, plus seconds


def seqlens(check: Check) -> None:
    """Check that sequence lengths that are new to the device cost little: kernels may be planned for each length.

    Single images are run in three rounds. Only the first round meets new lengths.
    """
    model = check.model(check.size).eval()
    images = check.images(model, 5 if check.small else 25)
    rounds = []
    for _ in range(3):
        seconds = []
        for image in images.split(1):
            start = utils.synchronized_time(check.device)
            with torch.inference_mode(), utils.autocast(check.device, check.amp):
                model(image)
            seconds.append(utils.synchronized_time(check.device) - start)
        rounds.append(statistics.median(seconds[1:]))
    figure = ", ".join(f"{1e3 * seconds:.1f} ms" for seconds in rounds)
    passed = rounds[0] < MAX_FIRST_RATIO * rounds[-1] + MAX_FIRST_EXTRA
    check.check("a first pass is not much slower than a later one", passed, figure)


# Kernel launches ---------------------------------------------------------------------------------

EVENTS = {  # names that the profiler gives
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}
TOP_KERNELS = 8  # kernels that `launches` lists by their time on the device


def launches(check: Check) -> None:
    """Report kernel launches, host-device syncs and copies of one pass, and the times of host and device.

    Checks that zipping needs at most one sync per block. On a CPU all counts are 0.
    """
    models = build_variants(check, check.size)
    images = check.images(models[STATIC], 4 if check.small else 32)
    for train in (False, True):
        graphed = _graphed(images, models[EARLY_EXIT], train, PLANNED, GRAPHED)
        for name, model in (models | graphed).items():
            if not (train and name == EARLY_EXIT):
                with check.measuring(name):
                    _report_launches(check, name, model, images, train)
    images = check.images(models[STATIC], 4 if check.small else 128)
    for name, model in _graphed(images, models[EARLY_EXIT], False, GRAPHED).items():
        with check.measuring(f"{name}, device time by kernel"):
            _report_kernels(check, name, model, images)


def _graphed(images: Tensor, model: nn.Module, train: bool, *forms: str) -> dict[str, nn.Module]:
    """Build the variants in these forms, if the device of the images supports CUDA graphs."""
    if not dispatch.supports_graphs(images):
        return {}
    return build_graphed(model, train, (name for name, variant in VARIANTS.items() if variant.form in forms))


def _report_launches(check: Check, name: str, model: nn.Module, images: Tensor, train: bool) -> None:
    call, blocks = (gradient_call if train else inference_call)(model, [images], check.amp), len(model.blocks)
    if name in VARIANTS:
        prepare(call, 1, check.device)
    counts = profiled(call, check.device)
    start = utils.synchronized_time(check.device)
    call()
    host = time.perf_counter() - start
    label = f"{name}, {'forward and backward' if train else 'inference'}"
    check.report(
        f"{label}: per block {counts['launches'] / blocks:.1f} launches, {counts['kernels'] / blocks:.1f} kernels, "
        f"{counts['waits'] / blocks:.1f} syncs; {counts['to_device']} copies to the device; "
        f"device {counts['device_ms']:.2f} ms, host {1e3 * host:.2f} ms until the call returns",
        form=name,
        train=train,
        host=host,
        **counts,
    )
    if check.device.type == "cuda":
        passed = counts["launches"] > 0
        check.check(f"{label}, the profiler records launches", passed, f"{counts['launches']:g}")
    if eager_variant(name) != STATIC:
        passed = counts["waits"] <= blocks + 1
        check.check(f"{label}, at most one sync per block", passed, f"{counts['waits']} syncs")


def _report_kernels(check: Check, name: str, model: nn.Module, images: Tensor) -> None:
    """Report the kernels that take most of the device's time in one pass."""
    call = inference_call(model, [images], check.amp)
    if name in VARIANTS:
        prepare(call, 1, check.device)
    kernels = sorted(
        kernel_events(profiler_events(call, check.device)), key=lambda event: -event.self_device_time_total
    )
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    top = {event.key: (event.count, event.self_device_time_total / 1e3) for event in kernels[:TOP_KERNELS]}
    lines = [f"{ms:8.3f} ms, {count:3} x {key[:90]}" for key, (count, ms) in top.items()]
    check.report(
        "\n    ".join([f"{name}, {len(images)} images: device {total:.3f} ms", *lines]),
        form=name,
        batch=len(images),
        device_ms=total,
        top_kernels=top,
    )


def profiled(call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return how often each of EVENTS occurs in a call, its kernels and copies to the device, and its time there."""
    events = profiler_events(call, device)
    counts = {name: sum(event.count for event in events if event.key in keys) for name, keys in EVENTS.items()}
    kernels = kernel_events(events)
    to_device = sum(event.count for event in kernels if event.key.startswith("Memcpy HtoD"))
    counts |= {"kernels": sum(event.count for event in kernels), "to_device": to_device}
    return counts | {"device_ms": sum(event.self_device_time_total for event in kernels) / 1e3}


def profiler_events(call: Callable[[], None], device: torch.device) -> list:
    """Return the profiler's events of one call, summed by name, after two calls without it."""
    call()
    call()
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # before CUDA 12.6, its second start crashes if a CUDA graph has run
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    utils.synchronized_time(device)
    with profile(activities=activities) as profiler:
        call()
        utils.synchronized_time(device)
    return profiler.key_averages()


def kernel_events(events: list) -> list:
    """Return the events of the device: kernels and copies."""
    return [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def gradient_call(model: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    """Return a function that computes the gradients of all batches: forward, losses and backward."""
    compute_loss = training_loss(model, batches[0], amp)

    def call() -> None:
        for images in batches:
            compute_loss(images).backward()
            model.zero_grad()

    return call


# Speed -------------------------------------------------------------------------------------------

MIN_SECONDS = 0.05  # calls are repeated until the slowest variant takes this long, in each round
WARM_UP = 6  # calls of each variant before the rounds
MIN_IMAGES = 8  # images of one call, at least, in batches
MAX_BATCHES = 8  # batches of one call on CUDA, at most. They differ, so that a plan must hold for different batches
COMPILATION = 30.0  # seconds that the compiled forms of a case may take to compile


class Case(NamedTuple):
    """One measurement of all variants.

    amp: None for the type that `Check.amp` names;
    compiled: also the forms with compiled blocks; whole: also the static model compiled as a whole.
    """

    size: str
    batch: int
    train: bool = False
    amp: str | None = None
    compiled: bool = False
    whole: bool = False

    def label(self, amp: str) -> str:
        """Return model size, precision, mode and batch size as text."""
        return f"{self.size} {PRECISION[amp]} {'training' if self.train else 'inference'} {self.batch}"

    def num_images(self, small: bool) -> int:
        """Return the number of images of one call."""
        batches = math.ceil(MIN_IMAGES / self.batch) if small else min(max(512 // self.batch, 2), MAX_BATCHES)
        return batches * self.batch


SIZES = ("tiny", "base", "small")
CASES = [  # in order of importance: later ones are skipped when time runs out
    *(Case(size, 128, train) for train in (True, False) for size in SIZES),
    *(Case(size, 32) for size in SIZES),
    *(Case(size, 1) for size in SIZES),
    *(Case(size, 128, train, compiled=True) for size in SIZES for train in (False, True)),
    *(Case(size, 32, compiled=True) for size in ("tiny", "base")),
    Case("tiny", 1, compiled=True),
    *(Case(size, 512, train) for train in (False, True) for size in SIZES),
    *(Case("tiny", batch, compiled=True, whole=True) for batch in (128, 1)),
    *(Case(size, 32, True) for size in SIZES),
    *(Case(size, 1024, train) for train in (False, True) for size in SIZES),
    *(Case("tiny", batch, amp="fp16") for batch in (128, 32)),
    *(Case(size, 128, compiled=True, whole=True) for size in ("base", "small")),
]
SMALL_CASES = [Case("micro", 4), Case("micro", 4, train=True)]


def speed(check: Check) -> None:
    """Measure each case that fits in the remaining time, and compare the ratios with the aims."""
    print(f"  {'':56}  images/s   speedup  same form  ideal        ms  device ms       MiB   hits")
    models: dict[str, dict[str, nn.Module]] = {}  # variants by size
    seconds_per_mac = []
    for case in SMALL_CASES if check.small else CASES:
        label = case.label(case.amp or check.amp) + ", with compiled models" * (case.compiled or case.whole)
        macs = static_macs(case.size) * case.num_images(check.small) * (3 if case.train else 1)
        calls = 3 * (1 + 2 * (case.compiled or case.whole)) * (WARM_UP + check.rounds)
        needed = 3 + COMPILATION * (case.compiled + case.whole) + calls * macs * min(seconds_per_mac, default=0)
        if check.left < needed:
            check.report(f"{label}: skipped, needs up to {needed:.0f} s of the {check.left:.0f} s left")
            continue
        with check.measuring(label):
            models[case.size] = models.get(case.size) or build_variants(check, case.size)
            seconds = measure(check, case, models[case.size])
            seconds_per_mac += [seconds / macs] if seconds else []
    report_aims(check)


def build_variants(check: Check, size: str) -> dict[str, nn.Module]:
    """Build the static, the zipped and the early-exit model, with the same weights."""
    model = check.model(size)
    zipped = copy.deepcopy(model)
    zipped.early_exit = False
    return {STATIC: static_twin(model), ZIPPED: zipped, EARLY_EXIT: model}


@cache
def static_macs(size: str) -> float:
    """Return the MACs of the static model per image."""
    model = timm.create_model(MODELS[size], device="meta")
    return macs_at_depth(model, model.num_blocks)


def measure(check: Check, case: Case, models: dict[str, nn.Module]) -> float | None:
    """Report speed and memory of each variant.

    models: variants by name.
    Returns the seconds of the static model, or None if it did not run.
    """
    amp = case.amp or check.amp
    images = check.images(models[STATIC], case.num_images(check.small))
    batches = images.split(case.batch)
    with torch.inference_mode(), utils.autocast(images.device, amp):
        depth = models[ZIPPED].eval()(images[:64], return_halting=True)[1].depth
    macs = variant_macs(models[ZIPPED], depth)
    variants, calls, about = _variants_of_case(case, models, images), {}, {}
    for name, model in variants.items():
        with check.measuring(f"{case.label(amp)}, {name}", may_fail="compiled" in name):
            call = (training_call if case.train else inference_call)(model, batches, amp)
            about[name] = _prepare(check, name, call, len(batches))
            calls[name] = call
    before = {name: dispatch.graph_report(variants[name]) for name in calls}
    times = utils.time_interleaved(calls, check.device, check.rounds, MIN_SECONDS) if calls else {}
    seconds = {name: statistics.median(of_variant) for name, of_variant in times.items()}
    for name, own in seconds.items():
        row = {
            **case._asdict(),
            "amp": amp,
            "form": name,
            "images_per_s": len(images) / own,
            "speed_up": _ratio(seconds, STATIC, name),
            "speed_of_same_form": _ratio(seconds, same_form(name), name),
            "ideal": macs[STATIC] / macs[eager_variant(name)],
            "ms": 1e3 * own / len(batches),
            "hit_rate": hit_rate(variants[name], before[name]) if name in VARIANTS else None,
            **about[name],
        }
        check.report(format_row(case.label(amp), row), **row)
    torch.compiler.reset()  # frees the memory of its graphs
    return seconds.get(STATIC)


def _variants_of_case(case: Case, models: dict[str, nn.Module], images: Tensor) -> dict[str, nn.Module]:
    """Return the models to measure: no early exit in training, and the compiled ones if asked for."""
    forms = (PLANNED, GRAPHED, *([COMPILED_GRAPHED] if case.compiled or case.whole else []))
    variants = {name: model for name, model in models.items() if not (case.train and name == EARLY_EXIT)}
    variants |= _graphed(images, models[EARLY_EXIT], case.train, *forms)
    return variants | (build_graphed(models[EARLY_EXIT], case.train, [WHOLE_COMPILED]) if case.whole else {})


def _prepare(check: Check, name: str, call: Callable[[], None], num_batches: int) -> dict[str, float | None]:
    """Run a call until it is ready to be timed. Returns its memory, time of preparation and time on the device."""
    prepared = prepare(call, num_batches, check.device) if name != eager_variant(name) else Preparation(0.0, 0.0)
    call()  # a first call may allocate more
    is_cuda = check.device.type == "cuda"
    return {
        "memory_mib": peak_mib(call, check.device) + prepared.pool_mib if is_cuda else None,
        "preparation_s": prepared.seconds,
        "device_ms": profiled(call, check.device)["device_ms"] / num_batches if is_cuda else None,
    }


def _ratio(seconds: dict[str, float], baseline: str, name: str) -> float | None:
    """Return how many times as fast as the baseline a variant is. None if the baseline did not run."""
    return seconds[baseline] / seconds[name] if baseline in seconds else None


COLUMNS = {  # width and format
    "images_per_s": (10, ".1f"),
    "speed_up": (10, ".2f"),
    "speed_of_same_form": (11, ".2f"),
    "ideal": (7, ".2f"),
    "ms": (10, ".2f"),
    "device_ms": (11, ".2f"),
    "memory_mib": (10, ".0f"),
    "hit_rate": (7, ".0%"),
}


def format_row(label: str, row: dict) -> str:
    """Format a row of `measure` with the widths and digits of COLUMNS."""
    cells = [f"{format_optional(row[name], form):>{width}}" for name, (width, form) in COLUMNS.items()]
    return f"{label + ', ' + row['form']:56}{''.join(cells)}".rstrip()


PARTS = {"seqlens": seqlens, "launches": launches, "speed": speed}
