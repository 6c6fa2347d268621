"""Train A-ViT with some parts of the gate by direction.

Usage: python -m experiments.gate_parts PART[,PART] KIND FLAGS

A gate by direction differs from a gate of one channel (--gate channel) in three parts: the direction, the class token,
which lives to the last block, and the controller, which moves the gate center instead of weighting the ponder loss.

stays   # the class token lives to the last block with a gate of one channel too
center  # the controller moves the gate center with a gate of one channel too
still   # with a gate by direction, the center stays where it is until it is calibrated after training

KIND and FLAGS: see baselines.py.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack
from unittest import mock

import torch

import losses
from experiments import baselines
from zipping.gate import Gate


def class_token_stays() -> AbstractContextManager:
    """Let the class token's halting scores be 0 for every gate. Exits with an error on a GPU."""
    if torch.cuda.is_available():
        raise SystemExit("stays needs a CPU: the kernels of a GPU compute the class token's scores themselves")
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
    """Run baselines.py with these parts. Exits with the usage text for others."""
    names, *rest = argv
    if not set(names.split(",")) <= PARTS.keys():
        raise SystemExit(__doc__)
    with ExitStack() as stack:
        for name in names.split(","):
            stack.enter_context(PARTS[name]())
        baselines.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
