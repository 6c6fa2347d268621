"""Measurements of cuda_check.py: new sequence lengths, kernel launches, speed and memory.

Each part is a function of a `Check`, which prints and collects the results; PARTS lists them.
"""

from __future__ import annotations

import copy
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
from benchmarks.cases import EARLY_EXIT, STATIC, ZIPPED, static_twin, variant_macs
from benchmarks.gpu_checks import MODELS, PRECISION, Check
from benchmarks.timing import inference_call, training_call, training_loss
from macs import macs_at_depth

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
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}


def launches(check: Check) -> None:
    """Report kernel launches, host-device syncs and copies of one pass, and the times of host and device.

    Checks that zipping needs at most one sync per block. On a CPU all counts are 0.
    """
    models = build_variants(check, check.size)
    images = check.images(models[STATIC], 4 if check.small else 32)
    for name, model in models.items():
        for train in (False, True):
            if train and name == EARLY_EXIT:
                continue
            call = (gradient_call if train else inference_call)(model, [images], check.amp)
            counts = profiled(call, check.device)
            start = utils.synchronized_time(check.device)
            call()
            host, blocks = time.perf_counter() - start, len(model.blocks)
            label = f"{name}, {'forward and backward' if train else 'inference'}"
            check.report(
                f"{label}: per block {counts['launches'] / blocks:.1f} launches, {counts['waits'] / blocks:.1f} syncs; "
                f"{counts['to_device']} copies to the device; "
                f"device {counts['device_ms']:.2f} ms, host {1e3 * host:.2f} ms until the call returns",
                form=name,
                train=train,
                host=host,
                **counts,
            )
            if check.device.type == "cuda":
                passed = counts["launches"] > 0
                check.check(f"{label}, the profiler records launches", passed, f"{counts['launches']:g}")
            if name != STATIC:
                passed = counts["waits"] <= blocks + 1
                check.check(f"{label}, at most one sync per block", passed, f"{counts['waits']} syncs")


def profiled(call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return how often each of EVENTS occurs in a call, its copies to the device, and its milliseconds there."""
    call()
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    utils.synchronized_time(device)
    with profile(activities=activities) as profiler:
        call()
        utils.synchronized_time(device)
    events = profiler.key_averages()
    counts = {name: sum(event.count for event in events if event.key in keys) for name, keys in EVENTS.items()}
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    to_device = sum(event.count for event in kernels if event.key.startswith("Memcpy HtoD"))
    return counts | {"to_device": to_device, "device_ms": sum(e.self_device_time_total for e in kernels) / 1e3}


def gradient_call(model: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    """Return a function that computes the gradients of all batches: forward, losses and backward."""
    compute_loss = training_loss(model, batches[0], amp)

    def call() -> None:
        for images in batches:
            compute_loss(images).backward()
            model.zero_grad()

    return call


# Speed -------------------------------------------------------------------------------------------

COMPILED = "static, compiled"
MIN_SECONDS = 0.05  # calls are repeated until the slowest variant takes this long, in each round
WARM_UP = 4  # calls of each variant before the rounds
MIN_IMAGES = 8  # images of one call, at least, in batches
COMPILATION = 60.0  # seconds that one compilation may take


class Case(NamedTuple):
    """One measurement of all variants. amp: None for the type that `Check.amp` names."""

    size: str
    batch: int
    train: bool = False
    amp: str | None = None
    compiled: bool = False

    def label(self, amp: str) -> str:
        """Return model size, precision, mode and batch size as text."""
        return f"{self.size} {PRECISION[amp]} {'training' if self.train else 'inference'} {self.batch}"


BATCHES = (32, 128, 1, 512, 1024)
CASES = [  # in order of importance: later ones are skipped when time runs out
    *(Case("tiny", batch, train) for train in (False, True) for batch in BATCHES),
    *(Case(size, 128, train) for size in ("base", "small") for train in (False, True)),
    *(Case("tiny", batch, compiled=True) for batch in (128, 1)),
    Case("tiny", 128, train=True, compiled=True),
    *(
        Case(size, batch, train)
        for size in ("base", "small")
        for train in (False, True)
        for batch in (32, 1, 512, 1024)
    ),
    *(Case("tiny", batch, amp="fp16") for batch in BATCHES),
    *(
        Case(size, batch, compiled=True)
        for size, batch in (("base", 128), ("small", 128), ("tiny", 1024), ("small", 1))
    ),
]
SMALL_CASES = [Case("micro", 4), Case("micro", 4, train=True)]


def speed(check: Check) -> None:
    """Measure each case that fits in the remaining time."""
    print(f"  {'':46}  images/s   speedup  ideal        ms        MiB")
    models: dict[str, dict[str, nn.Module]] = {}  # variants by size
    seconds_per_mac = []
    for case in SMALL_CASES if check.small else CASES:
        label = case.label(case.amp or check.amp) + ", with the compiled model" * case.compiled
        macs = static_macs(case.size) * max(case.batch, MIN_IMAGES) * (3 if case.train else 1)
        calls = 3 * (WARM_UP + check.rounds)  # the static, zipped and early-exit models
        needed = 2 + COMPILATION * case.compiled + calls * macs * min(seconds_per_mac, default=0)
        if check.left < needed:
            check.report(f"{label}: skipped, needs up to {needed:.0f} s of the {check.left:.0f} s left")
            continue
        with check.measuring(label):
            models[case.size] = models.get(case.size) or build_variants(check, case.size)
            seconds = measure(check, case, models[case.size])
            seconds_per_mac += [seconds / macs] if seconds else []


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

    models: variants by name
    Returns the seconds of the static model, or None if it did not run.
    """
    amp = case.amp or check.amp
    images = check.images(models[STATIC], max(case.batch, MIN_IMAGES))
    batches = images.split(case.batch)
    with torch.inference_mode(), utils.autocast(images.device, amp):
        depth = models[ZIPPED].eval()(images[:64], return_halting=True)[1].depth
    macs = variant_macs(models[ZIPPED], depth)
    calls, memory = {}, {}
    for name, model in _variants_of_case(case, models).items():
        with check.measuring(f"{case.label(amp)}, {name}", may_fail=name == COMPILED):
            call = (training_call if case.train else inference_call)(model, batches, amp)
            memory[name] = peak_mib(call, check.device)
            calls[name] = call
    times = utils.time_interleaved(calls, check.device, check.rounds, MIN_SECONDS) if calls else {}
    seconds = {name: statistics.median(of_variant) for name, of_variant in times.items()}
    for name, own in seconds.items():
        row = {
            **case._asdict(),
            "amp": amp,
            "form": name,
            "images_per_s": len(images) / own,
            "speed_up": seconds[STATIC] / own if STATIC in seconds else None,
            "ideal": macs[STATIC] / macs.get(name, macs[STATIC]),
            "ms": 1e3 * own / len(batches),
            "memory_mib": memory[name],
        }
        check.report(format_row(case.label(amp), row), **row)
    if case.compiled:
        torch.compiler.reset()  # frees the memory of its graphs
    return seconds.get(STATIC)


def _variants_of_case(case: Case, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the models to measure: no early exit in training, and the compiled static model if asked for."""
    variants = {name: model for name, model in models.items() if not (case.train and name == EARLY_EXIT)}
    if case.compiled:
        static = copy.deepcopy(models[STATIC]).train(case.train)
        mode = "default" if case.train else "reduce-overhead"  # CUDA graphs in inference
        static.compile(mode=mode, dynamic=False)
        variants[COMPILED] = static
    return variants


COLUMNS = {"images_per_s": (10, 1), "speed_up": (10, 2), "ideal": (7, 2), "ms": (10, 2), "memory_mib": (11, 0)}


def format_row(label: str, row: dict) -> str:
    """Format a row of `measure` with the widths and digits of COLUMNS."""
    cells = [f"{'' if row[name] is None else f'{row[name]:.{digits}f}':>{w}}" for name, (w, digits) in COLUMNS.items()]
    return f"{label + ', ' + row['form']:46}{''.join(cells)}".rstrip()


def peak_mib(call: Callable[[], None], device: torch.device) -> float | None:
    """Return the peak memory of a second call in MiB, minus the memory in use before it. None on a CPU."""
    call()
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


PARTS = {"seqlens": seqlens, "launches": launches, "speed": speed}
