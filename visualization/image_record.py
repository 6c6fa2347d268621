"""Record of what the model did with one image, and the criteria (--demo-by) that select images.

This module does not import torch or numpy, so that commands print --help immediately.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ImageRecord:
    """An image and what the model did with it.

    index: position in the dataset; name: file name, or that position
    pixels: [H, W, 3] uint8 as the model received them, or None if not requested
    depth: [grid height, grid width] uint8, 1..L, patch depths; prefix_depth: [P], depths of the prefix tokens
    prediction, target: class indices; target is -1 if unknown; confidence: probability of the prediction
    macs, static_macs: MACs of this image, and of the static model
    """

    index: int
    name: str
    pixels: np.ndarray | None
    depth: np.ndarray
    prefix_depth: np.ndarray
    prediction: int
    confidence: float
    target: int
    macs: float
    static_macs: float

    @property
    def token_depth(self) -> float:
        """Mean depth of all tokens."""
        total = self.prefix_depth.sum() + self.depth.sum()
        return float(total / (self.prefix_depth.size + self.depth.size))

    @property
    def mean_depth(self) -> float:
        """Mean depth of the patches."""
        return float(self.depth.mean())

    @property
    def depth_spread(self) -> float:
        """Standard deviation of the patch depths."""
        return float(self.depth.std())

    @property
    def saved(self) -> float:
        """Fraction of the static model's MACs saved."""
        return 1 - self.macs / self.static_macs

    @property
    def is_wrong(self) -> bool:
        """Return whether the prediction differs from a known target."""
        return self.target not in (-1, self.prediction)


# The images with the largest value are selected. An image with the value None is never selected.
CRITERIA: dict[str, Callable[[ImageRecord], float | None]] = {
    "std": lambda record: record.depth_spread,
    "deepest": lambda record: record.mean_depth,
    "shallowest": lambda record: -record.mean_depth,
    "wrong": lambda record: record.confidence if record.is_wrong and math.isfinite(record.confidence) else None,
    "random": lambda record: random.Random(record.index).random(),
}
