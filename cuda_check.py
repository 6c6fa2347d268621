"""What only a GPU can tell: whether A-ViT is right on CUDA, and how fast it is there.

    python cuda_check.py --output cuda_check.json    # everything; made to end in 6 minutes on one GPU
    python cuda_check.py --only parity speed         # some of the parts, see --help
    python cuda_check.py --device cpu --small        # seconds: whether the command itself works

Needs no data and no network. Prints a line for each check, and goes on after one that fails. Exit status 1 where a
check failed, 2 for a mistake on the command line.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from training.arguments import Parser, at_least_one

if TYPE_CHECKING:  # --help and mistakes are answered before torch is imported
    import torch

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


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 1 where a check failed, 2 for a mistake on the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)

    import utils
    from training.launch import process_group

    try:
        with process_group(args.device) as device:
            failed = run(args, device)
    except utils.UserError as error:
        parser.error(str(error))
    if failed:
        raise SystemExit(1)


def run(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Run the parts, print and save their results; return the names of the failed checks."""
    import torch

    from benchmarks import gpu_checks, gpu_speed

    functions = gpu_checks.PARTS | gpu_speed.PARTS
    check, about = gpu_checks.Check(device, args.small, args.seconds), gpu_checks.environment(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    gpu_checks.save(args.output, about, check)
    for name, part_about in PARTS.items():
        if args.only and name not in args.only:
            continue
        print(f"[{name}] {part_about}; {check.elapsed:.0f} s", flush=True)
        check.part = name
        with check.guarded("part"):
            functions[name](check)
            torch.cuda.empty_cache()  # does nothing without CUDA
        gpu_checks.save(args.output, about, check)
    failed = check.failed
    print(f"{len(check.checks) - len(failed)} checks passed, {len(failed)} failed, in {check.elapsed:.0f} s")
    print("".join(f"  FAIL  {what}\n" for what in failed), end="", flush=True)
    return failed


if __name__ == "__main__":
    main()
