"""Speed, MACs and memory of A-ViT, compared with timm's static model of the same size.

    python benchmark.py --model avit_tiny_patch16_224 --batch-size 1 32 --mean-depth 7.3
    python benchmark.py --train --batch-size 32 --mean-depth 12 7.3 --json out.json
    python benchmark.py --finetune CKPT --data-path DATA             # token depths of real images
    python benchmark.py --count-ops --batch-size 1 6                 # count ops instead of seconds
    python benchmark.py --onnx --batch-size 1 8 32 --threads 1 2     # ONNX Runtime and PyTorch on the CPU

Each row of a table is a variant (see benchmarks/cases.py and benchmarks/graphed.py). Its columns:

    images/s, range     median over the rounds, lowest and highest
    speedup             over the static model
    GMACs, ideal        multiply-accumulates per image, and the speedup if time were proportional to them
    of ideal            speedup / ideal
    of floor            speed relative to the floor: the static model on sequences as short as A-ViT's
    MiB                 peak memory of a call without the weights (CPU: what a training step saves for backward)
    same form, hits     on CUDA: speed over the static model in the same form (eager, graphed, compiled and graphed),
                        and the fraction of batches that replayed a CUDA graph

Ratios are medians over the rounds as well.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from training import flag_effects
from training.arguments import Parser, add_budget_flag, at_least_one
from training.parser import finite

if TYPE_CHECKING:
    import torch  # imported where it is used, so that --help and errors in flags do not wait for it

    from benchmarks.cases import Case


def make_parser() -> Parser:
    """Build the parser of the flags."""
    parser = Parser(prog="benchmark.py", description="Measure A-ViT against timm's static model of the same size.")
    add = parser.add_argument
    _add_model_flags(add)
    add("--train", action="store_true", help="training steps (forward, backward, AdamW) instead of inference")
    add("--device", help="cuda or cpu (default: cuda if available)")
    add("--amp", choices=("none", "fp16", "bf16"), default="none", help="mixed-precision type")
    add("--count-ops", action="store_true", help="number of ops that halting adds to a block, instead of times")
    add(
        "--onnx",
        action="store_true",
        help="ONNX graphs in ONNX Runtime next to PyTorch, in inference on the CPU",
    )
    add(
        "--threads",
        type=at_least_one,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="numbers of CPU threads to measure with --onnx",
    )
    add("--rounds", type=at_least_one, default=7, metavar="N", help="number of rounds; results are medians")
    add("--json", metavar="FILE", help="JSON file to write the results to")
    add("--plot", metavar="FILE", help="image file to draw speedup by mean depth and time by batch size to")
    earlier = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}  # spellings of earlier versions
    add("--runs", dest="rounds", type=at_least_one, metavar="N", **earlier)
    add("--count", dest="count_ops", action="store_true", **earlier)
    return parser


def _add_model_flags(add) -> None:
    add(
        "--model",
        metavar="NAME",
        help="model name: a registered avit_* model or any plain timm ViT (default: the checkpoint's, else "
        "avit_tiny_patch16_224)",
    )
    add(
        "--input-size",
        type=at_least_one,
        metavar="PIXELS",
        help="side of the square input images in pixels (default: that of the checkpoint or the model)",
    )
    add("--batch-size", type=at_least_one, nargs="+", default=[32], metavar="N", help="batch sizes to measure")
    add(
        "--mean-depth",
        type=finite,
        nargs="+",
        default=[7.3],
        metavar="D",
        help="mean token depths to impose, in blocks; their standard deviation is 2 blocks",
    )
    add("--finetune", metavar="FILE", help="checkpoint to measure on real images, instead of imposed depths")
    add_budget_flag(add)
    add("--data-path", metavar="DIR", help="dataset folder for --finetune")
    add("--data-set", default="IMNET", metavar="NAME", help="dataset name for --finetune, see main_act.py --help")


MOVED = {  # public names of earlier versions, and where they are now
    "STATIC": "cases.STATIC",
    "FLOOR": "cases.FLOOR",
    "EARLY_EXIT": "cases.EARLY_EXIT",
    "Case": "cases.Case",
    "Floor": "cases.Floor",
    "cases": "cases.cases",
    "make_case": "cases.make_case",
    "multiply_adds": "cases.variant_macs",
    "static_twin": "cases.static_twin",
    "measure": "timing.measure",
    "inference_call": "timing.inference_call",
    "training_call": "timing.training_call",
    "training_loss": "timing.training_loss",
    "OperationCounter": "operations.OperationCounter",
    "count": "operations.count_ops",
    "measure_onnx": "onnx.measure_onnx",
    "plot": "plots.plot",
    "set_synthetic_depths": "synthetic.set_synthetic_depths",
    "impose_depths": "synthetic.set_synthetic_depths",
}


def __getattr__(name: str):
    """Import a name of MOVED when it is used, so that importing this module does not import torch."""
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = MOVED[name].partition(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), attribute)


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with status 2 if a flag or a file is invalid, or if logits are not finite."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)

    args.device = "cpu" if args.onnx else args.device

    from training.command import run_cli

    run_cli(parser, args, run_and_save, alone=True)


def run_and_save(args: argparse.Namespace, device: torch.device) -> int:
    """Measure all cases, and write what the flags ask for. Returns the exit status."""
    import utils

    try:
        results = run(args, device)
    except FloatingPointError as error:
        raise utils.UserError(str(error)) from error
    if args.json:
        utils.write_bytes(Path(args.json), json.dumps(results, indent=2).encode() + b"\n")
    if args.plot:
        from benchmarks.plots import plot

        plot(results, args.plot)
    return 0


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with status 2 if flags exclude each other, or if their values cannot be used."""
    if args.count_ops and (args.train or args.plot):
        parser.error("--count-ops counts the ops of a forward pass. Remove --train and --plot.")
    for flag in ("json", "plot"):
        file = getattr(args, flag) and Path(getattr(args, flag))
        if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            parser.error(f"--{flag} {file}: cannot be written. Name a file in a writable folder.")
    if args.plot:
        _check_image_format(parser, args.plot)
    if args.onnx:
        _check_onnx_flags(parser, args)
    if args.budget is not None and not args.finetune:
        parser.error("--budget needs a checkpoint. Pass one with --finetune.")


def _check_image_format(parser: Parser, path: str) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.filetypes)
    if Path(path).suffix[1:].lower() not in known:
        parser.error(f"--plot {path}: unknown image format; expected one of {', '.join(known)}")


def _check_onnx_flags(parser: Parser, args: argparse.Namespace) -> None:
    given = {
        "--train": args.train,
        "--count-ops": args.count_ops,
        "--plot": args.plot,
        "--amp": args.amp != "none",
        "--device cuda": args.device == "cuda",
    }
    excluded = [flag for flag, is_given in given.items() if is_given]
    if excluded:
        parser.error(f"--onnx measures float32 inference on the CPU. Remove {', '.join(excluded)}.")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        install = "pip install -r requirements-export.txt onnxruntime"
        parser.error(f"--onnx needs the package {missing[0]}. Install it with: {install}")


def run(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure each case, print its tables and return the rows of all of them."""
    from benchmarks.cases import cases
    from training.models import check_model_name

    flag_effects.report(args, flag_effects.BENCHMARK)
    if args.model:
        check_model_name(args.model)
    results = []
    for case in cases(args, device):
        rows = measure_case(case, args, device)
        about = {
            "model": case.name,
            "train": args.train,
            "amp": args.amp,
            "device": str(device),
            "batch_size": case.batch_size,
            "mean_depth": case.depth.mean().item(),
        }
        results += [about | row for row in rows]
    return results


def measure_case(case: Case, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure one case, print its tables and return their rows."""
    from benchmarks import onnx, operations, timing

    size = "x".join(map(str, case.images.shape[-2:]))
    precision = "float32" if args.amp == "none" else args.amp
    title = f"{case.name}, {size}, batch {case.batch_size}, mean depth {case.depth.mean().item():.2f}, {precision}"
    if args.count_ops:
        rows = operations.count_ops(case, device, args.amp)
        print(f"\n{title}: ops per block added to the static model\n{operations.format_counts(rows)}", flush=True)
        return rows
    if not args.onnx:
        rows = timing.measure(case, device, args.amp, args.train, args.rounds)
        kind = "training step" if args.train else "inference"
        print(f"\n{title}, {kind}\n{timing.format_rows(rows)}", flush=True)
        return rows
    all_rows = []
    for threads in args.threads:
        rows = onnx.measure_onnx(case, threads, args.rounds)
        clock = "1 thread, CPU time" if threads == 1 else f"{threads} threads, wall time"
        print(f"\n{title}, {clock}\n{onnx.format_onnx_rows(rows)}", flush=True)
        all_rows += rows
    return all_rows


if __name__ == "__main__":
    main()
