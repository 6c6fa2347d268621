"""Speed, multiply-adds and memory of A-ViT against timm's static network of the same size.

    python benchmark.py --model avit_tiny_patch16_224 --batch-size 1 32 --mean-depth 7.3
    python benchmark.py --train --batch-size 32 --mean-depth 12 7.3 --json out.json
    python benchmark.py --finetune CKPT --data-path DATA             # depths of real images
    python benchmark.py --count --batch-size 1 6                     # operations, not seconds
    python benchmark.py --onnx --batch-size 1 8 32 --threads 1 2     # ONNX Runtime beside PyTorch, on the CPU

Every round times each form once, in turn; figures are medians over the rounds, of ratios too.
Speed-up is over timm's network; ideal is the ratio of the multiply-adds. The floor is timm's
network again, whose images lose as many tokens before each block as halt in A-ViT, without a score,
a sum or an index: what blocks of these sizes cost on this machine. Of several images each keeps as
many as they do on average, rounded up.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from training.arguments import Parser, at_least_one, budget_share


def make_parser() -> Parser:
    parser = Parser(prog="benchmark.py", description="A-ViT against timm's static network of the same size.")
    add = parser.add_argument
    add("--model", default="avit_tiny_patch16_224", metavar="NAME", help="of ours, or of a plain ViT of timm's")
    add(
        "--input-size",
        type=at_least_one,
        metavar="PIXELS",
        help="image size (default: the checkpoint's, or the model's)",
    )
    add("--batch-size", type=at_least_one, nargs="+", default=[32], metavar="N", help="images per batch")
    add("--mean-depth", type=float, nargs="+", default=[7.3], metavar="D", help="imposed, with a spread of 2")
    add("--finetune", metavar="FILE", help="a checkpoint, for the depths of real images")
    add("--budget", type=budget_share, metavar="SHARE", help="share of the multiply-adds that the checkpoint is to use")
    add("--data-path", metavar="DIR", help="the images' folder")
    add("--data-set", default="IMNET", metavar="NAME", help="see main_act.py --help")
    add("--train", action="store_true", help="time training steps (forward, backward, AdamW)")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--amp", choices=("none", "fp16", "bf16"), default="none", help="mixed precision")
    add("--count", action="store_true", help="count the operations that halting adds to a block, instead of timing")
    add(
        "--onnx",
        action="store_true",
        help="compare graphs of export_onnx.py, in ONNX Runtime, with PyTorch, on the CPU",
    )
    add("--threads", type=at_least_one, nargs="+", default=[1, 2], metavar="N", help="of --onnx")
    add("--runs", type=at_least_one, default=7, metavar="N", help="rounds")
    add("--json", metavar="FILE", help="write the figures there")
    add("--plot", metavar="FILE", help="draw speed-up against mean depth, and time against batch size, there")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the imports below, which take seconds

import copy
import importlib.util
import itertools
import os
import time
from collections import Counter
from operator import truediv
from unittest.mock import patch

import torch
from matplotlib.backend_bases import FigureCanvasBase
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models_act
import utils
import zipping
from datasets import Preprocessing, build_dataset, spread_sample
from losses import AdaptiveLoss
from models_act import AdaptiveTokens, macs_per_image
from training.checkpoints import Checkpoint
from training.models import check_model_name, create_model, default_image_size
from utils import autocast

STATIC, FLOOR, EARLY_EXIT = "static (timm)", "floor", "zipped, early exit"  # rows of a table

MIN_SECONDS = 0.2  # that one timing takes at least, by repetition
MIN_IMAGES = 32  # that one timing sees at least, in batches: single images differ in depth


class Case(NamedTuple):
    """What one table is about."""

    batch_size: int
    depth: Tensor  # [number of images, N], measured
    images: Tensor  # [number of images, 3, H, W]
    model: nn.Module

    @property
    def batches(self) -> tuple[Tensor, ...]:
        return self.images.split(self.batch_size)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.count and (args.train or args.plot):
        parser.error("--count counts a forward pass: it goes with neither --train nor --plot")
    if not all(math.isfinite(depth) for depth in args.mean_depth):
        parser.error("--mean-depth must be a finite number")
    for flag in ("json", "plot"):
        place = getattr(args, flag) and Path(getattr(args, flag))
        if place and (place.is_dir() or not os.access(place.parent, os.W_OK)):
            parser.error(f"--{flag} {place}: cannot be written there")
    if args.plot and Path(args.plot).suffix[1:].lower() not in FigureCanvasBase.filetypes:
        parser.error(f"--plot {args.plot}: expected one of {', '.join(sorted(FigureCanvasBase.filetypes))}")
    if args.onnx and (args.train or args.count or args.plot or args.amp != "none" or args.device == "cuda"):
        parser.error("--onnx is inference on the CPU: it goes with none of --train, --count, --plot, --amp and cuda")
    missing = [name for name in ("onnx", "onnxruntime") if args.onnx and importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{missing[0]} is missing: pip install -r requirements-export.txt onnxruntime")
    if args.budget is not None and not args.finetune:
        parser.error("--budget is that of a checkpoint: it needs --finetune")
    try:
        with utils.single_process("cpu" if args.onnx else args.device) as device:
            results = run(args, device)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
        if args.plot:
            plot(results, args.plot)
    except (utils.UserError, FloatingPointError, OSError) as error:
        parser.error(str(error))


def run(args, device: torch.device) -> list[dict]:
    """Prints a table for each case; returns the rows of all."""
    check_model_name(args.model)
    results = []
    for case in cases(args, device):
        size = "x".join(map(str, case.images.shape[-2:]))
        mean_depth = case.depth.mean().item()
        title = f"{args.model}, {size}, batch {case.batch_size}, mean depth {mean_depth:.2f}, {args.amp}"
        if args.onnx:
            rows = onnx_tables(title, case, args.threads, args.runs)
        elif args.count:
            rows = count(case, device, args.amp)
            print(f"\n{title}: operations per block beyond a static block's\n{format_counts(rows)}", flush=True)
        else:
            rows = measure(case, device, args.amp, args.train, args.runs)
            print(f"\n{title}, {'training step' if args.train else 'inference'}\n{format_rows(rows)}", flush=True)
        about = {"model": args.model, "train": args.train, "amp": args.amp, "device": str(device)}
        results += [{**about, "batch_size": case.batch_size, "mean_depth": mean_depth, **row} for row in rows]
    return results


def cases(args, device: torch.device) -> Iterator[Case]:
    """Imposed depths on normal noise, or a checkpoint's on real images."""
    for batch_size in args.batch_size:
        count = batch_size * math.ceil(MIN_IMAGES / batch_size)
        if args.finetune:
            yield make_case(batch_size, *_real(args, count, device))
            continue
        for mean_depth in args.mean_depth:
            size = (args.input_size,) * 2 if args.input_size else default_image_size(args.model)
            model = create_model(args.model, size)
            _impose(args.model, model, mean_depth)
            images = torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
            yield make_case(batch_size, model.to(device), images.to(device))


def _impose(name: str, model: nn.Module, mean_depth: float) -> None:
    try:
        set_synthetic_depths(model, mean_depth, spread=2.0)
    except ValueError as error:
        raise utils.UserError(f"--model {name}: {error}; give a trained network with --finetune") from error


def _real(args, count: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    checkpoint = Checkpoint.load(args.finetune)
    model = checkpoint.build_model(args.model, img_size=args.input_size and (args.input_size,) * 2, budget=args.budget)
    known = {"num_classes": model.num_classes} if "/" in args.data_set else {}  # timm's data sets may not know it
    known |= {"preprocessing": Preprocessing.from_model(model)}
    data = build_dataset(args.data_set, args.data_path, False, model.patch_embed.img_size, **known)
    return model.to(device), spread_sample(data, count)[0].to(device)


@torch.no_grad()
def make_case(batch_size: int, model: nn.Module, images: Tensor) -> Case:
    model.eval()
    answers = [model(batch, return_halting=True) for batch in images.split(batch_size)]
    for logits, _ in answers:
        utils.check_finite(logits)
    depth = torch.cat([halting.depth for _, halting in answers])
    return Case(batch_size, depth, images, model)


def static_twin(model: AdaptiveTokens) -> VisionTransformer:
    """timm's own network of the same size, with the same weights: what `adapt` was given."""
    twin = copy.deepcopy(model)
    bases = type(model).__mro__
    twin.__class__ = next(b for b in bases if issubclass(b, VisionTransformer) and not issubclass(b, AdaptiveTokens))
    return twin


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


class Floor(nn.Module):
    """A static network that runs each block on the first tokens alone: as many, on average, as live in the case."""

    def __init__(self, network: VisionTransformer, case: Case):
        super().__init__()
        self.network, self.blocks, self.num_classes = network, network.blocks, network.num_classes
        blocks = torch.arange(case.model.num_blocks)[:, None, None]
        live = [(depth.cpu() > blocks).sum(dim=(1, 2)) for depth in case.depth.split(case.batch_size)]  # [L] per batch
        counts = [-(-live_rows // case.batch_size) for live_rows in torch.stack(live)]
        self.num_tokens = itertools.cycle([c.tolist() for c in counts])

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        x = network.norm_pre(network._pos_embed(network.patch_embed(images)))
        for block, count in zip(network.blocks, next(self.num_tokens)):
            if count:
                x = block(x[:, :count])
        return network.forward_head(network.norm(x))


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


def multiply_adds(model: nn.Module, depth: Tensor) -> dict[str, float]:
    """depth: [B, N] -> per image, of each form, as computed.

    With early exit no token goes on after those of its image that the head reads.
    """
    prefix = model.num_prefix_tokens if model.reads_prefix else depth.shape[1]
    last_needed = depth[:, :prefix].amax(dim=1, keepdim=True)
    static = macs_per_image(model, torch.full_like(depth, model.num_blocks)).mean().item()
    adaptive = macs_per_image(model, depth).mean().item()
    early = macs_per_image(model, depth.minimum(last_needed)).mean().item()
    return {STATIC: static, FLOOR: adaptive, "masked": static, "zipped": adaptive, EARLY_EXIT: early}


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


# ONNX Runtime ------------------------------------------------------------------------------------

SETTLE = 0.02  # seconds, after which the threads of another library do not spin any more
ONE_BY_ONE = ", one by one"  # a batch, by the graph of one image


def onnx_tables(title: str, case: Case, threads: Sequence[int], rounds: int) -> list[dict]:
    """Prints a table for each number of threads; returns the rows of all."""
    results = []
    before = torch.get_num_threads()
    for number in threads:
        torch.set_num_threads(number)
        try:
            rows = measure_onnx(case, number, rounds)
        except ValueError as error:  # of a network that cannot be written
            raise utils.UserError(str(error)) from error
        finally:
            torch.set_num_threads(before)
        clock = "CPU time" if number == 1 else "wall time"
        print(f"\n{title}, {number} thread{'s' * (number > 1)}, {clock}\n{format_onnx_rows(rows)}", flush=True)
        results += [{"threads": number, **row} for row in rows]
    return results


def measure_onnx(case: Case, threads: int, rounds: int) -> list[dict]:
    """A row for each form: milliseconds an image, speed-up over the faster static form of its library, ideal.

    Forms take turns at every batch, so that a machine that is now fast, now slow is so for all; ratios are of the sums
    of a round, and medians over the rounds. Of one thread the processor's time counts, of several the clock's.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    calls = _onnx_calls(case, threads)
    batches = [batch.numpy() for batch in case.batches]
    rounds_of = {name: [] for name in calls}
    for number in range(rounds + 1):
        seconds = Counter()
        for batch in batches:
            for name, call in calls.items():
                time.sleep(SETTLE * (threads > 1))
                start = clock()
                call(batch)
                seconds[name] += clock() - start
        for name in calls if number else ():  # the first round warms up
            rounds_of[name].append(seconds[name] / len(case.images))
    macs, rows = multiply_adds(case.model, case.depth), []
    ideal = macs[STATIC] / macs[EARLY_EXIT]
    for name, times in rounds_of.items():
        library = name.partition(" ")[0]
        static = zip(*(rounds_of[other] for other in calls if other.startswith(f"{library} static")))
        speed_up = statistics.median(min(statics) / own for statics, own in zip(static, times))
        own_ideal = 1.0 if "static" in name else ideal
        row = {"form": name, "milliseconds": 1e3 * statistics.median(times), "speed_up": speed_up}
        rows.append(row | {"ideal": own_ideal, "speed_up_of_ideal": speed_up / own_ideal})
    return rows


def _onnx_calls(case: Case, threads: int) -> dict[str, Callable]:
    """Each takes a batch, [B, 3, H, W] of NumPy's."""
    from deployment.onnx_graph import write_graph

    networks = {"static": copy.deepcopy(case.model), "zipped": case.model}
    networks["static"].halting = False

    def in_torch(model: nn.Module) -> Callable:
        @torch.inference_mode()
        def run(batch) -> None:
            model(torch.from_numpy(batch))

        return run

    calls = {"PyTorch static": in_torch(static_twin(case.model).eval()), "PyTorch zipped": in_torch(case.model)}
    for name, model in networks.items():
        one = _onnx_call(write_graph(model, "single"), threads)
        if case.batch_size == 1:
            calls[f"ONNX {name}"] = one
            continue
        calls[f"ONNX {name}"] = _onnx_call(write_graph(model, "batch"), threads)
        calls[f"ONNX {name}{ONE_BY_ONE}"] = lambda batch, one=one: [one(batch[i : i + 1]) for i in range(len(batch))]
    return calls


def _onnx_call(graph, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads spin in others' time
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["logits"], {"images": batch})


def format_onnx_rows(rows: list[dict]) -> str:
    lines = [f"{'':24}{'ms/image':>10}{'speed-up':>10}{'ideal':>8}{'of ideal':>10}"]
    for row in rows:
        shares = f"{row['speed_up']:>10.2f}{row['ideal']:>8.2f}{row['speed_up_of_ideal']:>10.2f}"
        lines.append(f"{row['form']:24}{row['milliseconds']:>10.2f}{shares}")
    return "\n".join(lines)


# Operations --------------------------------------------------------------------------------------


class OperationCounter(TorchDispatchMode):
    """Counts the operations that torch is asked for, by name, and apart `waits` for the device and `copies` to it.

    Left out are views, and what gives a tensor memory or a name and does no work. On a CPU, other
    operators stand in for CUDA's attention.
    """

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view", "promote_types")
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave")
    VARLEN = ("_flash_attention_forward", "_efficient_attention_forward")

    def __init__(self):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits = self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in self.WAITS:
            self.waits += 1
        elif name == "lift_fresh":  # a tensor of numbers that the host has
            self.copies += 1
        elif not function.is_view and name not in self.FREE:
            self.operations["attention" if "attention" in name else name] += 1
        if name in self.VARLEN and not args[0].is_cuda:
            q, k, v = (x.view(1, *x.shape[-3:]).transpose(1, 2) for x in args[:3])
            out = zipping.ragged_attention(q, k, v, list(filter(None, args[4].diff().tolist())))
            others = [torch.empty(0) if "Tensor" in str(r.type) else 0 for r in function._schema.returns[1:]]
            return out.transpose(1, 2).view_as(args[0]), *others
        return function(*args, **(kwargs or {}))


def count(case: Case, device: torch.device, amp: str) -> list[dict]:
    """A row for each form, and for logits alone and with halting: operations per block beyond a static block's.

    CUDA's form without Triton's kernels, which are no operations.
    """
    model, images = copy.deepcopy(case.model).eval(), case.batches[0]
    model.early_exit = False
    static = _operations(static_twin(model).eval(), images, amp)
    rows = []
    for form in ("device",) if device.type == "cuda" else ("CPU", "device"):
        with (
            patch.object(zipping, "uses_device_form", lambda x, form=form: form == "device"),
            patch.object(models_act, "uses_kernels", lambda x: False),
        ):
            for what, options in {"logits": {}, "with halting": {"return_halting": True}}.items():
                found = _operations(model, images, amp, **options)
                names = (found.operations | static.operations).keys()
                beyond = {n: (found.operations[n] - static.operations[n]) / model.num_blocks for n in names}
                row = {"form": f"{form} form, {what}", "operations": sum(beyond.values()), "by_name": beyond}
                if form == "device":  # on a CPU nothing is waited for, and numbers need no copy
                    row |= {"waits": found.waits / model.num_blocks, "copies": found.copies / model.num_blocks}
                rows.append(row)
    return rows


@torch.no_grad()
def _operations(model: nn.Module, images: Tensor, amp: str, **options) -> OperationCounter:
    with autocast(images.device, amp), OperationCounter() as counter:
        model(images, **options)
    return counter


def format_counts(rows: list[dict]) -> str:
    lines = [f"{'':28}{'operations':>11}{'waits':>7}{'copies':>8}  by name"]
    for row in rows:
        by_name = sorted(row["by_name"].items(), key=lambda item: -abs(item[1]))
        names = ", ".join(f"{name} {value:.1f}" for name, value in by_name if abs(value) >= 0.05)
        waits, copies = (f"{row[key]:.1f}" if key in row else "" for key in ("waits", "copies"))
        lines.append(f"{row['form']:28}{row['operations']:>11.1f}{waits:>7}{copies:>8}  {names}")
    return "\n".join(lines)


def plot(results: list[dict], path: str) -> None:
    """Speed-up against mean depth, with the ideal as a line; time against batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_depth, by_batch = figure.subplots(1, 2)
    largest = max(row["batch_size"] for row in results)
    zipped = [row for row in results if row["form"] == "zipped"]
    at_largest = sorted((row for row in zipped if row["batch_size"] == largest), key=lambda row: row["mean_depth"])
    depths = [row["mean_depth"] for row in at_largest]
    by_depth.plot(depths, [row["ideal"] for row in at_largest], "--", color="gray", label="ideal (multiply-adds)")
    by_depth.plot(depths, [row["speed_up"] for row in at_largest], "o-", color="tab:blue", label="measured")
    by_depth.axhline(1, color="black", linewidth=0.8)
    by_depth.set(xlabel="mean depth of a token", ylabel=f"speed-up over static, batch {largest}", ylim=(0, None))
    by_depth.legend()
    for form, color in ((STATIC, "black"), ("zipped", "tab:blue")):
        shallowest = min(row["mean_depth"] for row in results if row["batch_size"] == largest)
        rows = [r for r in results if r["form"] == form and abs(r["mean_depth"] - shallowest) < 1]
        rows.sort(key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in rows]
        milliseconds = [1e3 * row["batch_size"] / row["images_per_s"] for row in rows]
        by_batch.plot(sizes, milliseconds, "o-", color=color, label=form)
    by_batch.set(xlabel="batch size", ylabel="milliseconds per batch", xlim=(0, None), ylim=(0, None))
    by_batch.legend()
    figure.savefig(path, dpi=150)


# Weights that make tokens halt where one wants them, for tests and benchmarks ------------------------


@torch.no_grad()
def set_synthetic_depths(model: VisionTransformer, mean: float, spread: float) -> None:
    """Set weights so that tokens halt around depth `mean` with standard deviation `spread`, in blocks.

    For tests and benchmarks. Channel 0 then grows by the same step in every block and starts, for
    each token, from its position (half of the variance), its content (a quarter) and its image (a
    quarter; the only part for prefix tokens), which the first head of block 1 brings to all of the
    image's tokens. The shares hold for images of standard normal noise. Other weights, and so the
    rest of the computation, stay as they are.

    ValueError for a model whose projections have no bias, or whose stem has no projection.
    """
    blocks, grid, channels = model.blocks, model.patch_embed.num_patches, model.embed_dim
    if blocks[0].mlp.fc2.bias is None:
        raise ValueError("depths are imposed by the bias of projections, and it has none")
    if isinstance(model.patch_embed.proj, nn.Identity):
        raise ValueError("depths are imposed by the projection of patches, and it has none")
    slope = 6.0  # rise of the gate's logit per block: steep enough to halt within one or two
    step = slope / model.gate_scale  # the same in units of channel 0
    crossing = mean - _halting_lag(slope)  # the block where the logit of an average token crosses 0
    start = (model.gate_center / slope - crossing) * step  # in channel 0; + l * step after block l

    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        block.attn.proj.weight[0], block.attn.proj.bias[0] = 0, 0
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = 0, step
        for scale in (block.ls1, block.ls2):
            if not isinstance(scale, nn.Identity):
                scale.gamma[0] = 1

    kernel = model.patch_embed.proj.weight
    content, shared = torch.randn(2, *kernel.shape[1:], generator=generator).to(kernel)
    content, shared = content / content.norm(), shared / shared.norm()  # of unit variance on normal noise
    kernel[0], kernel[1], kernel[2] = 0.5 * spread * step * content, shared, -shared
    if model.patch_embed.proj.bias is not None:
        model.patch_embed.proj.bias[:3] = 0

    is_normed = not isinstance(model.norm_pre, nn.Identity)
    _set_start(model, 0.0 if is_normed else start, math.sqrt(0.5) * spread * step, generator)
    if is_normed:
        _set_norm(model, start, generator)
    _set_image_term(blocks[0], 0.5 * spread * step * math.sqrt(grid), start, channels)


def _set_start(model: VisionTransformer, start: float, position_std: float, generator: torch.Generator) -> None:
    """Channels 0 to 2 before the first block: `start` plus a term of the position; 0, 0."""
    prefix = [t for t in (model.cls_token, model.reg_token, getattr(model, "dist_token", None)) if t is not None]
    for token in prefix:
        token[..., :3] = 0
        token[..., 0] = start
    if model.pos_embed is None:
        model.patch_embed.proj.bias[0] = start
        return
    model.pos_embed[..., :3] = 0
    patches = model.pos_embed[:, -model.patch_embed.num_patches :, 0]
    quantiles = torch.linspace(0, 1, patches.numel() + 2)[1:-1][torch.randperm(patches.numel(), generator=generator)]
    patches.copy_(start + position_std * math.sqrt(2) * torch.erfinv(2 * quantiles - 1))


def _set_norm(model: VisionTransformer, start: float, generator: torch.Generator) -> None:
    """Lets the norm before the blocks leave channels 0 to 2 about as they are, but for `start`."""
    embed, weight = model.patch_embed, model.norm_pre.weight
    noise = torch.randn(4, 3, *embed.img_size, generator=generator)
    weight[:3] = model._pos_embed(embed(noise.to(weight))).std(dim=2).mean()
    model.norm_pre.bias[:3] = 0
    model.norm_pre.bias[0] = start


def _set_image_term(block: Block, std: float, start: float, channels: int) -> None:
    """Block 1's attention adds the image's mean content (channel 1 - channel 2) to channel 0.

    `std` is that of the term times the square root of the number of patches.
    """
    attn = block.attn
    queries, value = slice(attn.head_dim), 2 * attn.attn_dim  # of the first head; its first value channel
    for parameter in attn.qkv.parameters():
        parameter[queries] = 0  # the first head attends evenly
        parameter[value] = 0
    attn.qkv.weight[value, 1], attn.qkv.weight[value, 2] = 1, -1
    block.norm1.weight[1:3] = 1
    if block.norm1.bias is not None:
        block.norm1.bias[1:3] = 0
    norm = math.sqrt((start**2 + 2) / channels + 1 / 3)  # what norm1 divides by, roughly
    attn.proj.weight[0, 0] = std * norm / 2


def _halting_lag(slope: float) -> float:
    """Mean blocks between a logit's crossing of 0 and the halting of its token."""
    crossing = 20 + torch.linspace(0, 1, 101)[:-1]
    cumulative = torch.sigmoid(slope * (torch.arange(1, 41)[:, None] - crossing)).cumsum(0)  # [l, crossing]
    depth = (cumulative < 0.99).sum(0) + 1
    return (depth - crossing).mean().item()


impose_depths = set_synthetic_depths  # its old name


if __name__ == "__main__":
    main()
