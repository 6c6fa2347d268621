"""Correctness checks of cuda_check.py: attention, zipped against masked, training, the command line."""

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


# The command -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits_adaptive.args"


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
    """Run main_act.py in a process of its own; return its exit status. Only its warnings and errors are shown."""
    command = [sys.executable, ROOT / "main_act.py", *argv]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


PARTS = {
    "attention": attention,
    "parity": parity,
    "edges": edges,
    "training": training,
    "ddp": ddp,
    "command": command,
}
