"""Measurements of cuda_check.py: first calls, kernel launches, speed and memory."""

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

import models_act
import utils
from benchmarks.cases import EARLY_EXIT, STATIC, multiply_adds, static_twin
from benchmarks.gpu_checks import MODELS, PRECISION, Check
from benchmarks.timing import inference_call, training_call, training_loss

# What a pass costs -------------------------------------------------------------------------------

FIRST_SIGHT = 3.0, 5e-3  # times as long as a later pass, and seconds: what a first one may take


def lengths(check: Check) -> None:
    """Single images, three times over: a number of live tokens that was not seen before may cost a kernel's plan."""
    model = check.network(check.size).eval()
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
    factor, extra = FIRST_SIGHT
    figure = ", ".join(f"{1e3 * seconds:.1f} ms" for seconds in rounds)
    check.expect("a first sight costs little more", rounds[0] < factor * rounds[-1] + extra, figure)


EVENTS = {  # the profiler's names
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}


def launches(check: Check) -> None:
    """What one pass asks of the device, per block, and how long the host is busy with it. On a CPU all is 0."""
    networks = forms(check, check.size)
    images = check.images(networks[STATIC], 4 if check.small else 32)
    for name, network in networks.items():
        for train in (False, True):
            if train and name == EARLY_EXIT:
                continue
            call = (gradient_call if train else inference_call)(network, [images], check.amp)
            counts = profiled(call, check.device)
            start = utils.synchronized_time(check.device)
            call()
            host, blocks = time.perf_counter() - start, len(network.blocks)
            kind = "forward and backward" if train else "inference"
            per_block = ", ".join(f"{counts[event] / blocks:.1f} {event}" for event in EVENTS)
            times = f"{counts['to_device']} copies to the device; device {counts['device_ms']:.2f} ms, "
            times += f"until the call returns {1e3 * host:.2f} ms"
            check.tell(f"{name}, {kind}: per block {per_block}; {times}", form=name, train=train, host=host, **counts)
            if check.device.type == "cuda":
                check.expect(f"{name}, {kind}, launches are seen", counts["launches"] > 0, f"{counts['launches']:g}")
            if name != STATIC:
                passed = counts["waits"] <= blocks + 1
                check.expect(f"{name}, {kind}, at most a wait for each block", passed, f"{counts['waits']} waits")


def profiled(call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """How often each of EVENTS takes place in a call, its copies to the device, and the milliseconds there."""
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


# Speed -------------------------------------------------------------------------------------------

COMPILED = "static, compiled"
MIN_SECONDS = 0.05  # that each form is measured for, in each round
WARM_UP = 4  # calls of each form before the rounds
MIN_IMAGES = 8  # in one call, in batches
COMPILATION = 60.0  # seconds that one may take


class Case(NamedTuple):
    """One measurement of all forms. amp None: the one that the device is best at."""

    size: str
    batch: int
    train: bool = False
    amp: str | None = None
    compiled: bool = False

    def label(self, amp: str) -> str:
        return f"{self.size} {PRECISION[amp]} {'training' if self.train else 'inference'} {self.batch}"


BATCHES = (32, 128, 1, 512, 1024)
CASES = [  # the most important first
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
    """Each case that still fits in the time that is left."""
    print(f"  {'':46}  images/s  speed-up  ideal        ms        MiB")
    networks: dict[str, dict[str, nn.Module]] = {}
    paces = []  # seconds that a multiply-add took
    for case in SMALL_CASES if check.small else CASES:
        label = case.label(case.amp or check.amp) + " with the compiled network" * case.compiled
        work = static_multiply_adds(case.size) * max(case.batch, MIN_IMAGES) * (3 if case.train else 1)
        calls = 3 * (WARM_UP + check.rounds)  # of 3 forms
        needed = 2 + COMPILATION * case.compiled + calls * work * min(paces, default=0)
        if check.left < needed:
            check.tell(f"{label}: left out, {check.left:.0f} s are left and {needed:.0f} may be needed")
            continue
        with check.measuring(label):
            networks[case.size] = networks.get(case.size) or forms(check, case.size)
            seconds = measure(check, case, networks[case.size])
            paces += [seconds / work] if seconds else []


def forms(check: Check, size: str) -> dict[str, nn.Module]:
    model = check.network(size)
    found = {STATIC: static_twin(model), "zipped": copy.deepcopy(model), EARLY_EXIT: model}
    found["zipped"].early_exit = False
    return found


@cache
def static_multiply_adds(size: str) -> float:
    """Per image, where nothing halts."""
    model = timm.create_model(MODELS[size], device="meta")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return models_act.macs_per_image(model, torch.full((1, tokens), model.num_blocks)).item()


def measure(check: Check, case: Case, networks: dict[str, nn.Module]) -> float | None:
    """A line for each form; the seconds of the static one, if it had enough memory."""
    amp = case.amp or check.amp
    images = check.images(networks[STATIC], max(case.batch, MIN_IMAGES))
    batches = images.split(case.batch)
    with torch.inference_mode(), utils.autocast(images.device, amp):
        depth = networks["zipped"].eval()(images[:64], return_halting=True)[1].depth
    macs = multiply_adds(networks["zipped"], depth)
    calls, memory = {}, {}
    for form, network in _forms_of(case, networks).items():
        with check.measuring(f"{case.label(amp)}, {form}", is_judged=form != COMPILED):
            call = (training_call if case.train else inference_call)(network, batches, amp)
            memory[form] = peak_mib(call, check.device)
            calls[form] = call
    times = utils.time_interleaved(calls, check.device, check.rounds, MIN_SECONDS) if calls else {}
    seconds = {form: statistics.median(of_form) for form, of_form in times.items()}
    for form, own in seconds.items():
        row = {**case._asdict(), "amp": amp, "form": form, "images_per_s": len(images) / own}
        row |= {"speed_up": seconds[STATIC] / own if STATIC in seconds else None}
        row |= {"ideal": macs[STATIC] / macs.get(form, macs[STATIC])}
        row |= {"ms": 1e3 * own / len(batches), "memory_mib": memory[form]}
        check.tell(format_row(case.label(amp), row), **row)
    if case.compiled:
        torch.compiler.reset()  # frees the memory of its graphs
    return seconds.get(STATIC)


def _forms_of(case: Case, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    found = {form: network for form, network in networks.items() if not (case.train and form == EARLY_EXIT)}
    if case.compiled:  # with CUDA graphs in inference
        static, mode = copy.deepcopy(networks[STATIC]).train(case.train), "default" if case.train else "reduce-overhead"
        static.compile(mode=mode, dynamic=False)
        found[COMPILED] = static
    return found


COLUMNS = {"images_per_s": (10, 1), "speed_up": (10, 2), "ideal": (7, 2), "ms": (10, 2), "memory_mib": (11, 0)}


def format_row(label: str, row: dict) -> str:
    cells = [f"{'' if row[name] is None else f'{row[name]:.{digits}f}':>{w}}" for name, (w, digits) in COLUMNS.items()]
    return f"{label + ', ' + row['form']:46}{''.join(cells)}".rstrip()


def gradient_call(network: nn.Module, batches: Sequence[Tensor], amp: str) -> Callable[[], None]:
    """Forward, losses, backward."""
    loss_of = training_loss(network, batches[0], amp)

    def call() -> None:
        for images in batches:
            loss_of(images).backward()
            network.zero_grad()

    return call


def peak_mib(call: Callable[[], None], device: torch.device) -> float | None:
    """Of a second call, beyond what was there before; None where there is no count, on the CPU."""
    call()
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


PARTS = {"lengths": lengths, "launches": launches, "speed": speed}
