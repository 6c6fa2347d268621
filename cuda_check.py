"""What only a GPU can tell: whether A-ViT is right on CUDA, and how fast it is there.

    python cuda_check.py --output cuda_check.json    # everything; made to end in 6 minutes on one GPU
    python cuda_check.py --only parity speed         # some of the parts, see --help
    python cuda_check.py --device cpu --small        # seconds: whether the command itself works

Needs no data and no network. Prints a line for each check, and goes on after one that fails. Exit status 1 where a
check failed, 2 for a mistake on the command line.
"""

from __future__ import annotations

import json
from pathlib import Path

from training.arguments import Parser, at_least_one

PARTS = {
    "attention": "attention within images against float64, forward and backward",
    "parity": "zipped against masked: logits, depths, ponder costs, gradients",
    "edges": "the same where all halts at once, where nothing halts, with one image",
    "training": "training steps, with gradient scaling in fp16",
    "ddp": "one process of DistributedDataParallel, NCCL on CUDA",
    "command": "main_act.py from start to end, and resumed, in fp16 on CUDA",
    "lengths": "what the first sight of a number of tokens costs",
    "launches": "launches and waits per block, copies to the device, and how long a call takes",
    "speed": "against timm's network, eager and compiled, and memory; what no longer fits in --seconds is left out",
}


def make_parser() -> Parser:
    parser = Parser(prog="cuda_check.py", description="Whether A-ViT is right on this GPU, and how fast.")
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cpu")
    add("--small", action="store_true", help="sizes that take seconds on a CPU")
    parts = "parts to run: " + "; ".join(f"{name} ({about})" for name, about in PARTS.items())
    add("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=parts)
    seconds = "measurements of speed that may not end by then are left out"
    add("--seconds", type=at_least_one, default=340, metavar="S", help=seconds)
    add("--output", metavar="FILE", help="write what was found there, as JSON, after each part")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the imports below, which take seconds

import contextlib
import copy
import io
import itertools
import math
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple
from unittest.mock import patch

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import main_act
import models_act
import utils
import zipping
from benchmark import (
    EARLY_EXIT,
    STATIC,
    inference_call,
    multiply_adds,
    set_synthetic_depths,
    static_twin,
    training_call,
    training_loss,
)
from engine_act import Trainer
from losses import AdaptiveLoss

MODELS = {"micro": "avit_micro_patch4_32"}
MODELS |= {size: f"avit_{size}_patch16_224" for size in ("tiny", "tiny_distilled", "small", "base")}
MEAN_DEPTH, SPREAD = 7.3, 2.0  # of the tokens, in blocks


class Check:
    """What the parts share: the device, the time that is left, and what has been found so far.

    size: of the network in most parts; amps: the kinds of mixed precision that the device has; amp: the one that
    speed is measured in; rounds: of these measurements.
    """

    def __init__(self, device: torch.device, small: bool, seconds: float):
        self.device, self.small, self.size = device, small, "micro" if small else "tiny"
        self.start, self.seconds, self.rounds = time.perf_counter(), seconds, 2 if small else 5
        self.amps = [amp for amp in utils.AMP_DTYPES if _supports(device, amp)]
        self.amp = "none" if small else "bf16" if "bf16" in self.amps else "fp16"
        self.part = ""
        self.checks: list[dict] = []
        self.measured: list[dict] = []

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed

    @property
    def failed(self) -> list[str]:
        return [f"{check['part']}: {check['what']}" for check in self.checks if not check["passed"]]

    def expect(self, what: str, passed: bool, figure: str) -> None:
        """Notes and prints one check."""
        print(f"  {'ok  ' if passed else 'FAIL'}  {what}: {figure}", flush=True)
        self.checks.append({"part": self.part, "what": what, "passed": bool(passed), "figure": figure})

    def compare(self, what: str, errors: dict[str, float], limits: dict[str, float]) -> None:
        """One check of several errors, by name. NaN passes no limit."""
        wrong = {name for name, error in errors.items() if not error <= limits[name]}
        figures = [f"{name} {errors[name]:.1e}{f' (at most {limits[name]:g})' * (name in wrong)}" for name in errors]
        self.expect(what, not wrong, ", ".join(figures))

    def tell(self, line: str, **figures) -> None:
        """Notes and prints what is not judged."""
        print(f"  {line}", flush=True)
        self.measured.append({"part": self.part, **(figures or {"told": line.strip()})})

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """An error inside is a failed check, and what follows goes on."""
        try:
            yield
        except Exception:  # whatever a kernel, a driver or a compiler raises
            self.expect(f"{what} runs to its end", False, traceback.format_exc(limit=-4))

    @contextlib.contextmanager
    def measuring(self, what: str, is_judged: bool = True) -> Iterator[None]:
        """`guarded`, but too little memory is no fault, nor is what is not judged: a compiler may be missing."""
        with self.guarded(what):
            try:
                yield
            except torch.OutOfMemoryError:
                self.tell(f"{what}: out of memory")
            except Exception as error:
                if is_judged:
                    raise
                self.tell(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        torch.cuda.empty_cache()  # does nothing without CUDA

    def network(self, size: str, mean: float = MEAN_DEPTH, spread: float = SPREAD, **kwargs) -> nn.Module:
        """With random weights, and tokens that halt around depth `mean`."""
        torch.manual_seed(0)
        model = timm.create_model(MODELS[size], **kwargs)
        set_synthetic_depths(model, mean, spread)
        return model.to(self.device)

    def images(self, model: nn.Module, count: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator, device=self.device)


def _supports(device: torch.device, amp: str) -> bool:
    if device.type != "cuda":
        return amp != "fp16"
    return amp != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN where either has one, or where there is nothing."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def largest(values: Sequence[float]) -> float:
    """NaN where one is."""
    return torch.tensor(values).max().item()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """float32 is multiplied as float32."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


# Attention ---------------------------------------------------------------------------------------

PRECISION = {"none": "float32", "bf16": "bf16", "fp16": "fp16"}
LIMITS = {  # of `distance`, but for depths, of which a share may differ; zipped against masked, but for attention
    "none": {"attention": 5e-5, "its gradient": 5e-5, "depths": 1e-4, "logits": 2e-5, "early exit": 2e-5},
    "bf16": {"attention": 2e-2, "its gradient": 2e-2, "depths": 2e-2, "logits": 3e-2, "early exit": 3e-2},
    "fp16": {"attention": 3e-3, "its gradient": 3e-3, "depths": 1e-2, "logits": 5e-3, "early exit": 5e-3},
}
LIMITS["none"] |= {"ponder costs": 1e-5, "gradients": 2e-4}
LIMITS["bf16"] |= {"ponder costs": 1e-2, "gradients": 6e-2}
LIMITS["fp16"] |= {"ponder costs": 1e-3, "gradients": 2e-2}
LENGTHS = ([1], [5, 5, 5], [3, 1, 40, 7, 1, 7], [197, 64, 130, 129, 1, 128, 127, 63, 65, 1] * 2)  # rows of each image
LENGTHS += ([40, 0, 197, 3, 0], [0, 0, 7, 0], [0, 1])  # images that have left as a whole


def attention(check: Check) -> None:
    """Attention within images against that of each image by itself in float64, forward and backward."""
    has_kernels = zipping.uses_kernels(torch.zeros(1, device=check.device))
    check.tell(f"Triton's kernels {'' if has_kernels else 'do not '}run")
    for amp in check.amps:
        for width in (64, 16, 60):
            errors = [attention_errors(check.device, lengths, width, amp) for lengths in LENGTHS]
            worst = {name: largest([of_one[name] for of_one in errors]) for name in errors[0]}
            check.compare(f"{PRECISION[amp]}, heads of {width}", worst, LIMITS[amp])


def attention_errors(device: torch.device, lengths: list[int], width: int, amp: str) -> dict[str, float]:
    """`distance` of output and gradient, where q, k and v are strided parts of one tensor."""
    dtype = utils.AMP_DTYPES[amp] or torch.float32
    generator = torch.Generator(device).manual_seed(len(lengths))
    qkv = torch.randn(sum(lengths), 3, 3, width, generator=generator, device=device).to(dtype).requires_grad_()
    out = attend(qkv, lengths)
    weights = torch.randn(out.shape, generator=generator, device=device).to(dtype)
    (gradient,) = torch.autograd.grad(out, qkv, weights)
    exact = qkv.detach().double().requires_grad_()
    expected = torch.cat([attend_one(image) for image in exact.split(lengths)])
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    return {"attention": distance(out, expected), "its gradient": distance(gradient, expected_gradient)}


def attend(qkv: Tensor, lengths: list[int]) -> Tensor:
    """qkv: [T, 3, H, D], lengths: rows of each image -> [T, H, D], as zipping computes it on this device."""
    q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, T, D]
    if zipping.uses_device_form(qkv):
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=qkv.device)
        out = zipping.varlen_attention(q, k, v, bounds, longest=max(lengths) + 3)  # a bound is enough
    else:
        out = zipping.ragged_attention(q, k, v, list(filter(None, lengths)))
    return out.squeeze(0).transpose(0, 1)


def attend_one(qkv: Tensor) -> Tensor:
    """qkv: [T, 3, H, D] of one image -> [T, H, D]"""
    q, k, v = qkv.permute(1, 2, 0, 3)
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v).transpose(0, 1)


# The network -------------------------------------------------------------------------------------


VARIANTS = {  # networks, and options of them
    "tiny": {},
    "small": {},
    "tiny_distilled": {},
    "tiny, 384 x 384": {"img_size": 384},
    "tiny, registers, 180 wide": {"reg_tokens": 4, "embed_dim": 180},
}
SMALL_VARIANTS = {"micro": {}, "micro, registers": {"reg_tokens": 4}}


def parity(check: Check) -> None:
    """Zipped against masked, in inference and in training, with stochastic depth; and with weights of 16 bits."""
    for name, options in (SMALL_VARIANTS if check.small else VARIANTS).items():
        model = check.network(name.partition(",")[0], drop_path_rate=0.1, **options)
        images = check.images(model, 4 if check.small else 16 if options else 64)
        depth = zipped_against_masked(check, name, model, images)
        check.expect(f"{name}, depths vary", bool(depth.std() > 0.5), f"{depth.mean():.2f} ± {depth.std():.2f}")
    for amp in check.amps:
        if dtype := utils.AMP_DTYPES[amp]:
            halved = copy.deepcopy(model).eval().to(dtype)
            masked = copy.deepcopy(halved)
            masked.zip_tokens = False
            what = f"{name}, weights in {PRECISION[amp]}"
            with check.guarded(what):
                check.compare(what, output_errors(halved, masked, images.to(dtype), "none"), LIMITS[amp])


EDGES = {  # mean depth, images, what holds of the depths
    "every token halts in block 1": (-5.0, 3, lambda depth: depth.max() == 1),
    "no token halts": (30.0, 3, lambda depth: depth.min() == 12),
    "one image": (6.0, 1, lambda depth: len(depth) == 1),
}


def edges(check: Check) -> None:
    """`parity` where there is nothing left to do, nothing to leave out, or no other image."""
    for name, (mean, count, holds) in EDGES.items():
        model = check.network(check.size, mean, 0.5)
        depth = zipped_against_masked(check, name, model, check.images(model, count))
        check.expect(f"{name}, so it is", bool(holds(depth)), f"depths {depth.min():g} to {depth.max():g}")


def zipped_against_masked(check: Check, name: str, model: nn.Module, images: Tensor) -> Tensor:
    """A check for each precision, with Triton's kernels, where they run, and without; the masked network's depths."""
    masked = copy.deepcopy(model)
    masked.zip_tokens = False
    ways = {"operations": False} | ({"kernels": True} if zipping.uses_kernels(images) else {})
    with without_tf32():
        with torch.inference_mode():
            depth = masked.eval()(images, return_halting=True)[1].depth  # [B, N]
        for (way, by_kernels), amp in itertools.product(ways.items(), check.amps):
            what = f"{name}, {way}, {PRECISION[amp]}"
            with check.guarded(what), patch.object(models_act, "uses_kernels", lambda x, answer=by_kernels: answer):
                errors = output_errors(model.eval(), masked.eval(), images, amp)
                found, expected = (gradients(network.train(), images, amp) for network in (model, masked))
                errors["gradients"] = distance(found, expected)
                check.compare(what, errors, LIMITS[amp])
    return depth


@torch.inference_mode()
def output_errors(model: nn.Module, masked: nn.Module, images: Tensor, amp: str) -> dict[str, float]:
    """Of depths, ponder costs, and logits of images in which no depth differs, by rounding, if there are such."""
    with utils.autocast(images.device, amp):
        early = model(images)
        logits, halting = model(images, return_halting=True)
        expected, expected_halting = masked(images, return_halting=True)
    same = halting.depth == expected_halting.depth
    kept = same.all(dim=1)
    kept |= ~kept.any()
    errors = {"depths": 1 - same.double().mean().item()}
    errors |= {"logits": distance(logits[kept], expected[kept]), "early exit": distance(early[kept], expected[kept])}
    errors["ponder costs"] = distance(halting.ponder_cost[same], expected_halting.ponder_cost[same])
    return errors


def gradients(network: nn.Module, images: Tensor, amp: str) -> Tensor:
    """[number of weights], of a loss in which every output of the network has a part."""
    torch.manual_seed(3)  # of stochastic depth
    with utils.autocast(images.device, amp):
        logits, halting = network(images, return_halting=True)
    loss = F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device))
    loss = loss + 0.01 * halting.ponder_cost.mean() + halting.layer_scores.square().sum()
    found = torch.autograd.grad(1024 * loss, list(network.parameters()))  # scaled, for fp16
    return torch.cat([gradient.flatten() for gradient in found])


# Training ----------------------------------------------------------------------------------------


MAX_SKIPPED = 10  # steps that gradient scaling may skip until it has found its scale


def training(check: Check) -> None:
    """Steps on one batch, which the network is to learn by heart."""
    for amp in check.amps:
        trainer = make_trainer(check, amp)
        losses = train(check, trainer, 4 if check.small else 30)
        passed = losses[-1] < losses[0] and trainer.skipped_steps <= MAX_SKIPPED
        skipped = f"{trainer.skipped_steps} steps skipped, scale {trainer.scaler.get_scale():g}"
        check.expect(f"{PRECISION[amp]}, the loss falls", passed, f"{losses[0]:.3f} to {losses[-1]:.3f}, {skipped}")


def ddp(check: Check) -> None:
    """The losses of some steps are those of a network that is not wrapped."""
    expected = train(check, make_trainer(check, "none"), 3)
    is_cuda = check.device.type == "cuda"
    options = {"device_id": check.device} if is_cuda else {}
    wrap = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)  # as in training
    options |= {"store": dist.TCPStore("127.0.0.1", 0, is_master=True), "rank": 0, "world_size": 1}  # 0: a free port
    dist.init_process_group("nccl" if is_cuda else "gloo", **options)
    try:
        found = train(check, make_trainer(check, "none", wrap), 3)
        gathered = utils.all_gather_objects({"losses": found})
    finally:
        dist.destroy_process_group()
    error = largest([abs(a - b) / b for a, b in zip(found, expected)])
    check.expect("losses of 3 steps", error < 1e-2, f"{error:.1e}")
    check.expect("objects are gathered", gathered == [{"losses": found}], f"{len(gathered)} process")


def make_trainer(check: Check, amp: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Trainer:
    model = check.network(check.size, num_classes=10).train()
    criterion = AdaptiveLoss(nn.CrossEntropyLoss(), model.num_blocks).to(check.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Trainer(wrap(model), criterion, optimizer, check.device, amp=amp, clip_grad=1.0)


def train(check: Check, trainer: Trainer, steps: int) -> list[float]:
    """The classification loss of each step."""
    images = check.images(trainer.model_without_ddp, 8 if check.small else 32)
    targets = torch.arange(len(images), device=check.device) % 10
    losses = []
    for number in range(steps):
        total, parts, _ = trainer.micro_batch(images, targets)
        trainer.scaler.scale(total).backward()
        trainer.update(f"step {number}", [{**parts, "loss": total}])
        losses.append(parts["classification_loss"].item())
    return losses


RECIPE = Path(__file__).parent / "recipes" / "digits_adaptive.args"


def command(check: Check) -> None:
    """main_act.py on scikit-learn's digits in its own precision, fp16 on CUDA, and its resumption for an epoch more."""
    epochs, workers, size = (1, 0, 16) if check.small else (3, 2, 32)
    flags = f"--model-ema --mixup 0.8 --warmup-epochs 0 --num-workers {workers} --input-size {size}"
    flags += f" --device {check.device} --resume auto"
    with tempfile.TemporaryDirectory() as folder:
        for last in (epochs, epochs + 1):
            start = time.perf_counter()
            status = status_of_main_act([f"@{RECIPE}", *flags.split(), "--output_dir", folder, "--epochs", str(last)])
            figure = f"status {status}, {time.perf_counter() - start:.0f} s"
            check.expect(f"to epoch {last}", status == 0, figure)
        lines = [json.loads(line) for line in Path(folder, "log.txt").read_text().splitlines()]
    accuracy = ", ".join(f"{line['test_acc1']:.1f} %" for line in lines)
    check.expect("its log has every epoch once", [line["epoch"] for line in lines] == list(range(last)), accuracy)


def status_of_main_act(argv: list[str]) -> int:
    """What it prints is dropped, but for warnings and errors."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main_act.main(argv)
    except SystemExit as stopped:
        return stopped.code
    return 0


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


# The command -------------------------------------------------------------------------------------

FUNCTIONS = dict(zip(PARTS, (attention, parity, edges, training, ddp, command, lengths, launches, speed), strict=True))


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 1 where a check failed, 2 for a mistake on the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        with utils.process_group(args.device) as device:
            failed = run(args, device)
    except utils.UserError as error:
        parser.error(str(error))
    if failed:
        raise SystemExit(1)


def run(args, device: torch.device) -> list[str]:
    """Which checks failed."""
    check, about = Check(device, args.small, args.seconds), environment(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    save(args.output, about, check)
    for name, part_about in PARTS.items():
        if args.only and name not in args.only:
            continue
        print(f"[{name}] {part_about}; {check.elapsed:.0f} s", flush=True)
        check.part = name
        with check.guarded("part"):
            FUNCTIONS[name](check)
            torch.cuda.empty_cache()  # does nothing without CUDA
        save(args.output, about, check)
    failed = check.failed
    print(f"{len(check.checks) - len(failed)} checks passed, {len(failed)} failed, in {check.elapsed:.0f} s")
    print("".join(f"  FAIL  {what}\n" for what in failed), end="", flush=True)
    return failed


def environment(device: torch.device) -> dict[str, object]:
    about = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return {"device": "cpu", **about}
    gpu = torch.cuda.get_device_properties(device)
    name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    return {"device": name, **about, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def save(path: str | None, about: dict[str, object], check: Check) -> None:
    """RankError, naming the file, where it cannot be written."""
    if path:
        found = {"about": about, "seconds": check.elapsed, "checks": check.checks, "measured": check.measured}
        utils.write_bytes(Path(path), json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
