"""The network of a run: its image size."""

from __future__ import annotations

import argparse


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Return height and width."""
    return args.input_size[0], args.input_size[-1]
