"""Check that A-ViT is correct on this GPU, and measure its speed.

    python cuda_check.py --output cuda_check.json    # all parts; designed to end within 6 minutes on one GPU
    python cuda_check.py --only parity speed         # some parts, see --help
    python cuda_check.py --device cpu --small        # the same code on a CPU, in less than a minute

Needs no dataset and no internet access. Prints one line per check and continues after a failed one. The exit status
is 1 if a check failed, and 2 if a flag is invalid.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from training import flag_effects
from training.arguments import Parser, at_least_one

if TYPE_CHECKING:
    import torch  # imported where it is used, so that --help and errors in flags do not wait for it

PARTS = {
    "attention": "packed attention against float64, forward and backward",
    "parity": "zipped against masked: logits, depths, ponder costs, gradients",
    "edges": "the same if all tokens halt in block 1, if none halts, and on one image",
    "training": "training steps in each precision, with gradient scaling in fp16",
    "ddp": "DistributedDataParallel in one process, with NCCL on CUDA",
    "command": "main_act.py from start to end and resumed, in fp16 on CUDA",
    "seqlens": "latency of new sequence lengths",
    "graphs": "CUDA graphs against masked, overflows, a training run; seconds and memory of captures",
    "launches": "kernel launches, host-device syncs and copies of a pass",
    "speed": "speed and memory against static: eager, by CUDA graphs and compiled; limited by --seconds",
}
RENAMED = {"lengths": "seqlens"}  # earlier names of parts


def make_parser() -> Parser:
    """Build the parser of the flags."""
    parser = Parser(prog="cuda_check.py", description="Check that A-ViT is correct on this GPU, and measure its speed.")
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cpu")
    add("--small", action="store_true", help="use sizes that take seconds on a CPU")
    add(
        "--only",
        nargs="+",
        type=lambda name: RENAMED.get(name, name),
        choices=tuple(PARTS),
        metavar="PART",
        help="parts to run: " + "; ".join(f"{name} ({about})" for name, about in PARTS.items()) + " (default: all)",
    )
    add(
        "--seconds",
        type=at_least_one,
        default=340,
        metavar="S",
        help="time limit in seconds; speed measurements that may exceed it are skipped",
    )
    add("--output", metavar="FILE", help="JSON file to write the results to, after each part")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with status 1 if a check failed, and with status 2 if a flag is invalid."""
    parser = make_parser()
    args = parser.parse_args(argv)

    from training.command import one_line_errors

    with one_line_errors(parser, args):
        from training.launch import process_group

        with process_group(args.device) as device:
            failed = run(args, device)
        if failed:
            raise SystemExit(1)


def run(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Run the parts, print and save their results, and return the names of the failed checks."""
    import torch

    from benchmarks import gpu_checks, gpu_graphs, gpu_speed

    flag_effects.report(args, flag_effects.CUDA_CHECK)
    functions = gpu_checks.PARTS | gpu_graphs.PARTS | gpu_speed.PARTS
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
