"""Correctness checks of cuda_check.py: attention, zipped against masked, training and main_act.py.

Each part is a function of a `Check`, which prints and collects the results; PARTS lists them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import models_act
import utils
import zipping
from benchmarks.synthetic import set_synthetic_depths
from engine_act import Trainer
from losses import AdaptiveLoss

MODELS = {"micro": "avit_micro_patch4_32"}
MODELS |= {size: f"avit_{size}_patch16_224" for size in ("tiny", "tiny_distilled", "small", "base")}
MODELS["avit3_small"] = "avit3_small_patch16_224"
MODELS |= {"eva02_tiny": "eva02_tiny_patch14_224", "rope_mixed": "vit_small_patch16_rope_mixed_224"}
MEAN_DEPTH, SPREAD = 7.3, 2.0  # imposed token depths, mean and standard deviation in blocks


class Check:
    """Settings of a run, its remaining time, and the results so far.

    size: key of MODELS that most parts use
    amps: mixed-precision types that the device supports
    amp: mixed-precision type of the speed measurements
    rounds: number of rounds of the speed measurements
    part: name of the current part
    checks: results that passed or failed
    measured: results without a limit
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
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds left for speed measurements."""
        return self.seconds - self.elapsed

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [f"{check['part']}: {check['what']}" for check in self.checks if not check["passed"]]

    def check(self, what: str, passed: bool, figure: str) -> None:
        """Print and record a result that passed or failed."""
        print(f"  {'ok  ' if passed else 'FAIL'}  {what}: {figure}", flush=True)
        self.checks.append({"part": self.part, "what": what, "passed": bool(passed), "figure": figure})

    def compare(self, what: str, errors: dict[str, float], limits: dict[str, float]) -> None:
        """Check that no error exceeds the limit of the same name. NaN exceeds every limit."""
        wrong = {name for name, error in errors.items() if not error <= limits[name]}
        numbers = [f"{name} {errors[name]:.1e}{f' (at most {limits[name]:g})' * (name in wrong)}" for name in errors]
        self.check(what, not wrong, ", ".join(numbers))

    def report(self, line: str, **numbers) -> None:
        """Print and record a result that cannot fail: its numbers, or the line if there are none."""
        print(f"  {line}", flush=True)
        self.measured.append({"part": self.part, **(numbers or {"told": line.strip()})})

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn an exception in the body into a failed check, so that the run continues."""
        try:
            yield
        except Exception:  # kernels, drivers and compilers raise many types
            self.check(f"{what} completes", False, traceback.format_exc(limit=-4))

    @contextlib.contextmanager
    def measuring(self, what: str, may_fail: bool = False) -> Iterator[None]:
        """Run a measurement as `guarded` does, but only report when it runs out of memory.

        may_fail: only report other exceptions too; torch.compile, for example, requires a compiler.
        """
        with self.guarded(what):
            try:
                yield
            except torch.OutOfMemoryError:
                self.report(f"{what}: out of memory")
            except Exception as error:
                if not may_fail:
                    raise
                self.report(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        torch.cuda.empty_cache()  # does nothing without CUDA

    def model(self, size: str, mean: float = MEAN_DEPTH, spread: float = SPREAD, **kwargs) -> nn.Module:
        """Build a model of random weights with imposed token depths.

        size: key of MODELS; mean, spread: see `set_synthetic_depths`; kwargs: for `timm.create_model`
        """
        torch.manual_seed(0)
        model = timm.create_model(MODELS[size], **kwargs)
        if not isinstance(model, models_act.AdaptiveTokens):
            models_act.adapt_(model)
            with torch.no_grad():  # timm's layer scale and head are nearly zero, which would hide differences
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        set_synthetic_depths(model, mean, spread)
        return model.to(self.device)

    def images(self, model: nn.Module, count: int) -> Tensor:
        """Return images of Gaussian noise, [count, 3, H, W], in the model's input size."""
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator, device=self.device)


def environment(device: torch.device) -> dict[str, object]:
    """Return the device's name and the versions of the libraries."""
    about = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return {"device": "cpu", **about}
    gpu = torch.cuda.get_device_properties(device)
    name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    return {"device": name, **about, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def save(path: str | None, about: dict[str, object], check: Check) -> None:
    """Write the results to a JSON file, if there is a path. Raises RankError if it cannot be written."""
    if path:
        report = {"about": about, "seconds": check.elapsed, "checks": check.checks, "measured": check.measured}
        utils.write_bytes(Path(path), json.dumps(report, indent=2).encode() + b"\n")


def _supports(device: torch.device, amp: str) -> bool:
    if device.type != "cuda":
        return amp != "fp16"
    return amp != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)


def distance(result: Tensor, expected: Tensor) -> float:
    """Return ||result - expected|| / ||expected||; NaN if either contains NaN, or if both are empty."""
    result, expected = result.detach().double(), expected.detach().double()
    return ((result - expected).norm() / expected.norm()).item()


def largest(values: Sequence[float]) -> float:
    """Return the largest value, or NaN if one is NaN."""
    return torch.tensor(values).max().item()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32, so that float32 matrix products and convolutions keep full precision."""
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
# Limits of `distance` by mixed-precision type. The limit of depths is the fraction of tokens that may differ. Attention
# is compared with float64, everything else with the masked model.
LIMITS = {
    "none": {
        "attention": 5e-5,
        "its gradient": 5e-5,
        "depths": 1e-4,
        "logits": 2e-5,
        "early exit": 2e-5,
        "ponder costs": 1e-5,
        "gradients": 2e-4,
    },
    "bf16": {
        "attention": 2e-2,
        "its gradient": 2e-2,
        "depths": 2e-2,
        "logits": 3e-2,
        "early exit": 3e-2,
        "ponder costs": 1e-2,
        "gradients": 6e-2,
    },
    "fp16": {
        "attention": 3e-3,
        "its gradient": 3e-3,
        "depths": 1e-2,
        "logits": 5e-3,
        "early exit": 5e-3,
        "ponder costs": 1e-3,
        "gradients": 2e-2,
    },
}
SEQLENS = (  # live tokens of each image
    [1],
    [5, 5, 5],
    [3, 1, 40, 7, 1, 7],
    [197, 64, 130, 129, 1, 128, 127, 63, 65, 1] * 2,
    [40, 0, 197, 3, 0],  # with images that have none left
    [0, 0, 7, 0],
    [0, 1],
)


def attention(check: Check) -> None:
    """Compare packed attention with float64 attention on each image alone, forward and backward."""
    has_kernels = zipping.uses_kernels(torch.zeros(1, device=check.device))
    check.report(f"Triton kernels: {'used' if has_kernels else 'not used'}")
    for amp in check.amps:
        for width in (64, 16, 60):
            errors = [attention_errors(check.device, seqlens, width, amp) for seqlens in SEQLENS]
            worst = {name: largest([error[name] for error in errors]) for name in errors[0]}
            check.compare(f"{PRECISION[amp]}, heads of {width}", worst, LIMITS[amp])


def attention_errors(device: torch.device, seqlens: list[int], width: int, amp: str) -> dict[str, float]:
    """Return the `distance` of output and gradient, for q, k and v that are strided parts of one tensor."""
    dtype = utils.AMP_DTYPES[amp] or torch.float32
    generator = torch.Generator(device).manual_seed(len(seqlens))
    qkv = torch.randn(sum(seqlens), 3, 3, width, generator=generator, device=device).to(dtype).requires_grad_()
    out = attend(qkv, seqlens)
    weights = torch.randn(out.shape, generator=generator, device=device).to(dtype)
    (gradient,) = torch.autograd.grad(out, qkv, weights)
    exact = qkv.detach().double().requires_grad_()
    expected = torch.cat([attend_one(image) for image in exact.split(seqlens)])
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    return {"attention": distance(out, expected), "its gradient": distance(gradient, expected_gradient)}


def attend(qkv: Tensor, seqlens: list[int]) -> Tensor:
    """Compute attention within each image as zipping does on this device.

    qkv: [T, 3, H, D]; seqlens: tokens of each image -> [T, H, D]
    """
    q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, T, D]
    if zipping.uses_device_form(qkv):
        starts = torch.tensor([0, *itertools.accumulate(seqlens)], dtype=torch.int32, device=qkv.device)
        upper_bound = max(seqlens) + 3  # the kernel accepts any upper bound of the lengths
        out = zipping.varlen_attention(q, k, v, starts, upper_bound)
    else:
        out = zipping.ragged_attention(q, k, v, list(filter(None, seqlens)))
    return out.squeeze(0).transpose(0, 1)


def attend_one(qkv: Tensor) -> Tensor:
    """Compute the attention of one image, [T, 3, H, D] -> [T, H, D]."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v).transpose(0, 1)


# Zipped against masked ---------------------------------------------------------------------------

CONFIGS = {  # options of models; the name starts with a key of MODELS
    "tiny": {},
    "small": {},
    "tiny_distilled": {},
    "tiny, 384 x 384": {"img_size": 384},
    "eva02_tiny": {"global_pool": "token"},
    "rope_mixed": {},
    "tiny, registers, 180 wide": {"reg_tokens": 4, "embed_dim": 180},
}
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "num_heads": 3}
SMALL_CONFIGS = {
    "micro": {},
    "eva02_tiny, small": SMALL,
    "rope_mixed, small": SMALL,
    "micro, registers": {"reg_tokens": 4},
}


def parity(check: Check) -> None:
    """Compare zipped with masked in inference and training, with stochastic depth, and with half-precision weights.

    The last model also runs with a gate that reads directions near channel 0, in which all channels count.
    """
    for name, options in (SMALL_CONFIGS if check.small else CONFIGS).items():
        model = check.model(name.partition(",")[0], drop_path_rate=0.1, **options)
        images = check.images(model, 4 if check.small else 16 if options else 64)
        depth = zipped_against_masked(check, name, model, images)
        check.check(f"{name}, depths vary", bool(depth.std() > 0.5), f"{depth.mean():.2f} ± {depth.std():.2f}")
    directed, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    directions = 0.03 * torch.randn(model.num_blocks, model.embed_dim + 1, generator=generator)
    directions[:, 0] += 1
    directed.set_gate_directions(directions)
    zipped_against_masked(check, f"{name}, gate by direction", directed, images)
    for amp in check.amps:
        if dtype := utils.AMP_DTYPES[amp]:
            half = copy.deepcopy(model).eval().to(dtype)
            masked = copy.deepcopy(half)
            masked.zip_tokens = False
            what = f"{name}, weights in {PRECISION[amp]}"
            with check.guarded(what):
                check.compare(what, output_errors(half, masked, images.to(dtype), "none"), LIMITS[amp])


EDGES = {  # mean depth, number of images, condition that the depths must meet
    "every token halts in block 1": (-5.0, 3, lambda depth: depth.max() == 1),
    "no token halts": (30.0, 3, lambda depth: depth.min() == 12),
    "one image": (6.0, 1, lambda depth: len(depth) == 1),
}


def edges(check: Check) -> None:
    """Compare zipped with masked if all tokens halt in block 1, if none halts, and on a single image."""
    for name, (mean, count, holds) in EDGES.items():
        model = check.model(check.size, mean, 0.5)
        depth = zipped_against_masked(check, name, model, check.images(model, count))
        check.check(f"{name}, as set up", bool(holds(depth)), f"depths {depth.min():g} to {depth.max():g}")


def zipped_against_masked(check: Check, name: str, model: nn.Module, images: Tensor) -> Tensor:
    """Compare the model with its masked version in each precision, with and without the Triton kernels.

    Returns the token depths of the masked model, [B, N].
    """
    masked = copy.deepcopy(model)
    masked.zip_tokens = False
    backends = {"torch ops": False}
    if zipping.uses_kernels(images):
        backends["Triton kernels"] = True
    with without_tf32():
        with torch.inference_mode():
            depth = masked.eval()(images, return_halting=True)[1].depth
        for (backend, by_kernels), amp in itertools.product(backends.items(), check.amps):
            what = f"{name}, {backend}, {PRECISION[amp]}"
            with check.guarded(what), patch.object(models_act, "uses_kernels", lambda x, answer=by_kernels: answer):
                errors = output_errors(model.eval(), masked.eval(), images, amp)
                gradient, expected = (gradients(m.train(), images, amp) for m in (model, masked))
                errors["gradients"] = distance(gradient, expected)
                check.compare(what, errors, LIMITS[amp])
    return depth


@torch.inference_mode()
def output_errors(model: nn.Module, masked: nn.Module, images: Tensor, amp: str) -> dict[str, float]:
    """Return the errors of depths, ponder costs and logits.

    Rounding may change the depth of a token. Logits are compared on the images without such a token, if there are any.
    """
    with utils.autocast(images.device, amp):
        early = model(images)
        logits, halting = model(images, return_halting=True)
        expected, expected_halting = masked(images, return_halting=True)
    same = halting.depth == expected_halting.depth  # [B, N]
    compared = same.all(dim=1)
    compared |= ~compared.any()
    return {
        "depths": 1 - same.double().mean().item(),
        "logits": distance(logits[compared], expected[compared]),
        "early exit": distance(early[compared], expected[compared]),
        "ponder costs": distance(halting.ponder_cost[same], expected_halting.ponder_cost[same]),
    }


def gradients(model: nn.Module, images: Tensor, amp: str, gate_offset: Tensor | None = None) -> Tensor:
    """Return the gradient of a loss that depends on every output of the model, [number of weights]."""
    torch.manual_seed(3)  # stochastic depth draws the same blocks each time
    with utils.autocast(images.device, amp):
        logits, halting = model(images, return_halting=True, gate_offset=gate_offset)
    loss = F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device))
    loss = loss + 0.01 * halting.ponder_cost.mean() + halting.layer_scores.square().sum()
    scaled = torch.autograd.grad(1024 * loss, list(model.parameters()))  # without the factor, fp16 gradients underflow
    return torch.cat([gradient.flatten() for gradient in scaled])


# Training ----------------------------------------------------------------------------------------

MAX_SKIPPED = 10  # steps that gradient scaling may skip until its scale is low enough


def training(check: Check) -> None:
    """Check that training steps on one batch reduce its loss."""
    for amp in check.amps:
        trainer = make_trainer(check, amp)
        losses = train(check, trainer, 4 if check.small else 30)
        passed = losses[-1] < losses[0] and trainer.skipped_steps <= MAX_SKIPPED
        skipped = f"{trainer.skipped_steps} steps skipped, scale {trainer.scaler.get_scale():g}"
        check.check(f"{PRECISION[amp]}, loss decreases", passed, f"{losses[0]:.3f} to {losses[-1]:.3f}, {skipped}")


def ddp(check: Check) -> None:
    """Check that one process of DistributedDataParallel has the losses of an unwrapped model."""
    expected = train(check, make_trainer(check, "none"), 3)
    is_cuda = check.device.type == "cuda"
    wrap = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)  # as in training
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.TCPStore("127.0.0.1", 0, is_master=True),  # 0: a free port
        rank=0,
        world_size=1,
        **({"device_id": check.device} if is_cuda else {}),
    )
    try:
        losses = train(check, make_trainer(check, "none", wrap), 3)
        gathered = utils.all_gather_objects({"losses": losses})
    finally:
        dist.destroy_process_group()
    error = largest([abs(a - b) / b for a, b in zip(losses, expected)])
    check.check("losses of 3 steps", error < 1e-2, f"{error:.1e}")
    check.check("objects are gathered", gathered == [{"losses": losses}], f"{len(gathered)} process")


def make_trainer(check: Check, amp: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Trainer:
    """Build a trainer of a model with 10 classes. wrap: wraps the model, for example for DDP."""
    model = check.model(check.size, num_classes=10).train()
    criterion = AdaptiveLoss(nn.CrossEntropyLoss(), model.num_blocks).to(check.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Trainer(wrap(model), criterion, optimizer, check.device, amp=amp, clip_grad=1.0)


def train(check: Check, trainer: Trainer, steps: int) -> list[float]:
    """Take steps on one batch of noise; return the classification loss of each."""
    images = check.images(trainer.model_without_ddp, 8 if check.small else 32)
    targets = torch.arange(len(images), device=check.device) % 10
    losses = []
    for number in range(steps):
        results = trainer.accumulate_gradients([(images, targets)])
        trainer.update(f"step {number}", results)
        losses.append(results[0].loss_parts["classification_loss"].item())
    return losses


# main_act.py -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits_adaptive.args"


def command(check: Check) -> None:
    """Train on scikit-learn's digits with main_act.py, then resume for one more epoch, in its default precision."""
    epochs, workers, size = (1, 0, 16) if check.small else (3, 2, 32)
    flags = f"--model-ema --mixup 0.8 --warmup-epochs 0 --num-workers {workers} --input-size {size}"
    flags += f" --device {check.device} --resume auto"
    with tempfile.TemporaryDirectory() as folder:
        for last in (epochs, epochs + 1):
            start = time.perf_counter()
            status = run_main_act([f"@{RECIPE}", *flags.split(), "--output-dir", folder, "--epochs", str(last)])
            figure = f"status {status}, {time.perf_counter() - start:.0f} s"
            check.check(f"to epoch {last}", status == 0, figure)
        lines = [json.loads(line) for line in Path(folder, "log.txt").read_text().splitlines()]
    accuracy = ", ".join(f"{line['test_acc1']:.1f}%" for line in lines)
    check.check("log.txt has each epoch once", [line["epoch"] for line in lines] == list(range(last)), accuracy)


def run_main_act(argv: list[str]) -> int:
    """Run main_act.py and return its exit status. Its output is discarded, except for warnings and errors."""
    process = [sys.executable, ROOT / "main_act.py", *argv]
    return subprocess.run(process, stdout=subprocess.DEVNULL, check=False).returncode


PARTS = {
    "attention": attention,
    "parity": parity,
    "edges": edges,
    "training": training,
    "ddp": ddp,
    "command": command,
}
