"""By what the images of a class are chosen for a picture: --demo-by, and the measure of each, largest first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visualization.records import ImageRecord  # imports torch, which --help does not wait for

CRITERIA: dict[str, Callable[[ImageRecord], float | None]] = {  # None: never chosen
    "std": lambda record: record.depth_spread,
    "deepest": lambda record: record.mean_depth,
    "shallowest": lambda record: -record.mean_depth,
    "wrong": lambda record: record.confidence if record.is_wrong and math.isfinite(record.confidence) else None,
    "random": lambda record: random.Random(record.index).random(),
}
