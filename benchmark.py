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

import argparse
import importlib
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from training.arguments import Parser, at_least_one, budget_share

if TYPE_CHECKING:
    import torch  # --help and mistakes are answered before it is imported


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


MOVED = {  # names that programs outside this repository import from here
    "STATIC": "cases",
    "FLOOR": "cases",
    "EARLY_EXIT": "cases",
    "Case": "cases",
    "Floor": "cases",
    "make_case": "cases",
    "multiply_adds": "cases",
    "static_twin": "cases",
    "measure": "timing",
    "inference_call": "timing",
    "training_call": "timing",
    "training_loss": "timing",
    "OperationCounter": "operations",
    "count": "operations",
    "measure_onnx": "onnx",
    "plot": "plots",
    "set_synthetic_depths": "synthetic",
    "impose_depths": "synthetic",
}


def __getattr__(name: str):
    """Import a name that now lives in benchmarks/ on first use, so that `import benchmark` does not import torch."""
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"benchmarks.{MOVED[name]}"), name)


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with status 2 if a flag or a file is invalid."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)

    import utils
    from training.launch import single_process

    try:
        with single_process("cpu" if args.onnx else args.device) as device:
            results = run(args, device)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
        if args.plot:
            from benchmarks.plots import plot

            plot(results, args.plot)
    except (utils.UserError, FloatingPointError, OSError) as error:
        parser.error(str(error))


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with status 2 if values of the flags exclude each other or cannot be used."""
    if args.count and (args.train or args.plot):
        parser.error("--count counts a forward pass: it goes with neither --train nor --plot")
    if not all(math.isfinite(depth) for depth in args.mean_depth):
        parser.error("--mean-depth must be a finite number")
    for flag in ("json", "plot"):
        place = getattr(args, flag) and Path(getattr(args, flag))
        if place and (place.is_dir() or not os.access(place.parent, os.W_OK)):
            parser.error(f"--{flag} {place}: cannot be written there")
    if args.plot:
        from matplotlib.backend_bases import FigureCanvasBase

        if Path(args.plot).suffix[1:].lower() not in FigureCanvasBase.filetypes:
            parser.error(f"--plot {args.plot}: expected one of {', '.join(sorted(FigureCanvasBase.filetypes))}")
    if args.onnx and (args.train or args.count or args.plot or args.amp != "none" or args.device == "cuda"):
        parser.error("--onnx is inference on the CPU: it goes with none of --train, --count, --plot, --amp and cuda")
    missing = [name for name in ("onnx", "onnxruntime") if args.onnx and importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{missing[0]} is missing: pip install -r requirements-export.txt onnxruntime")
    if args.budget is not None and not args.finetune:
        parser.error("--budget is that of a checkpoint: it needs --finetune")


def run(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure each case and print its table; return the rows of all tables."""
    from benchmarks import onnx, operations, timing
    from benchmarks.cases import cases
    from training.models import check_model_name

    check_model_name(args.model)
    results = []
    for case in cases(args, device):
        size = "x".join(map(str, case.images.shape[-2:]))
        mean_depth = case.depth.mean().item()
        title = f"{args.model}, {size}, batch {case.batch_size}, mean depth {mean_depth:.2f}, {args.amp}"
        if args.onnx:
            rows = onnx.onnx_tables(title, case, args.threads, args.runs)
        elif args.count:
            rows = operations.count(case, device, args.amp)
            table = operations.format_counts(rows)
            print(f"\n{title}: operations per block beyond a static block's\n{table}", flush=True)
        else:
            rows = timing.measure(case, device, args.amp, args.train, args.runs)
            mode, table = "training step" if args.train else "inference", timing.format_rows(rows)
            print(f"\n{title}, {mode}\n{table}", flush=True)
        about = {"model": args.model, "train": args.train, "amp": args.amp, "device": str(device)}
        results += [{**about, "batch_size": case.batch_size, "mean_depth": mean_depth, **row} for row in rows]
    return results


if __name__ == "__main__":
    main()
