"""Train A-ViT with some parts of the gate by direction.

Usage: python -m experiments.gate_parts PART[,PART] KIND FLAGS

A gate by direction differs from a gate of one channel (--gate channel) in three parts: the direction, the class token,
which lives to the last block with scores of 0, and the controller, which moves the gate center. Each PART changes one:

stays   # --gate channel, but the class token has scores of 0; the search may find another channel then
center  # --gate channel, but the controller moves the center, and the ponder loss has weight 0
still   # gate by direction, but the center stays where it is until it is calibrated after training

KIND and FLAGS: see baselines.py. The checkpoint does not record the parts: resume and evaluate it with the same ones.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from unittest import mock

import torch

import losses
from experiments import baselines
from zipping.gate import Gate


def class_token_stays() -> AbstractContextManager:
    """Let the class token's halting scores be 0 for every gate. Exits with an error on a GPU."""
    if torch.cuda.is_available():
        raise SystemExit(
            "stays does not work with CUDA, whose kernels score the class token; set CUDA_VISIBLE_DEVICES="
        )
    for_rows = Gate.for_rows

    def without_prefix(gate: Gate, tokens, offset: torch.Tensor | None) -> Gate:
        rows = for_rows(gate, tokens, offset)
        return rows._replace(minus_center=torch.where(tokens.is_prefix, -torch.inf, rows.minus_center))

    return mock.patch.object(Gate, "for_rows", without_prefix)


def center_moves() -> AbstractContextManager:
    """Let the controller move the center of every gate."""
    return mock.patch.object(losses, "BudgetController", losses.CenterController)


def center_stays() -> AbstractContextManager:
    """Let the controller of gates by direction do nothing."""
    return mock.patch.object(losses.CenterController, "gain", 0.0)


PARTS = {"stays": class_token_stays, "center": center_moves, "still": center_stays}


def main(argv: list[str]) -> None:
    """Run baselines.py with these parts. Exits with an error if a part does not exist or does not suit the gate."""
    names, *rest = argv
    parts = names.split(",")
    if not set(parts) <= PARTS.keys():
        raise SystemExit(__doc__)
    is_channel = "--gate=channel" in rest or ("--gate", "channel") in pairwise(rest)
    if is_channel == ("still" in parts):
        raise SystemExit("stays and center need --gate channel; still is for a gate by direction, without that flag")
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(PARTS[part]())
        baselines.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
