"""MACs budgets: measuring a model's MACs by gate center, and checking that a budget is possible.

The cost of a model is its MACs per image as a fraction of the static model's, averaged over images.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import utils
from macs import macs_per_image, static_macs
from models_act import AdaptiveTokens
from training.loaders import ImageLoader
from training.parser import MAX_GATE
from utils import UserError

CALIBRATION_IMAGES = 1000
MAX_ROUNDS = 16  # measurements on all images; a smooth curve needs three or four
GAP, FAR_GAP = 0.06, 0.03  # largest cost difference of neighboring points: if they are near, and otherwise
NEAR = 1.0  # distance in centers: a score is a sigmoid of its center, so costs are almost linear within it
MAX_POINTS = 1000  # a recorded curve with more points is ignored


class BudgetCurve(NamedTuple):
    """Cost of a model by gate center.

    points: (center, cost), ascending in both; cost: fraction of the static model's MACs, mean over images.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def from_record(cls, record: object) -> BudgetCurve | None:
        """Read a checkpoint's record, a list of pairs. Returns None if it is not a valid curve."""
        if not isinstance(record, list) or not 2 <= len(record) <= MAX_POINTS:
            return None
        for point in record:
            is_pair = isinstance(point, list) and len(point) == 2 and all(isinstance(v, float) for v in point)
            if not is_pair or not abs(point[0]) < MAX_GATE or not 0 <= point[1] <= 1:
                return None
        centers, costs = zip(*record)
        is_ascending = sorted(centers) == [*centers] and sorted(costs) == [*costs]
        return cls(tuple(zip(centers, costs))) if is_ascending else None

    def record(self) -> list[list[float]]:
        """Return the curve as plain types, for a checkpoint."""
        return [list(point) for point in self.points]

    @property
    def min_cost(self) -> float:
        return self.points[0][1]

    @property
    def max_cost(self) -> float:
        return self.points[-1][1]

    def cost(self, center: float) -> float:
        """Return the cost at a gate center, interpolated linearly."""
        return float(np.interp(center, *zip(*self.points)))

    def center(self, budget: float) -> float:
        """Return the gate center of a cost, interpolated linearly; outside the curve, its nearest end."""
        centers, costs = zip(*self.points)
        return float(np.interp(budget, costs, centers))


def budget_curve(
    model: AdaptiveTokens, batches: Iterable, device: torch.device, amp: str, max_cost: float = 0.9
) -> BudgetCurve:
    """Measure the budget curve of a model, see `measure_costs` and `measure_curve`. Every process must call it."""

    def costs_of(centers: list[float]) -> list[float]:
        return measure_costs(model, batches, device, amp, centers)[0]

    return measure_curve(costs_of, model.gate_center, min_cost(model), max_cost)


def measure_curve(
    costs_of: Callable[[list[float]], list[float]],
    center: float,
    min_cost: float,
    max_cost: float,
    gaps: tuple[float, float] = (GAP, FAR_GAP),
) -> BudgetCurve:
    """Measure costs at more and more centers, until neighbors differ by at most `gaps`: if near, and otherwise.

    costs_of: returns the cost at each of some centers, see `measure_costs`. center: where the search starts.
    min_cost, max_cost: costs between which the curve is measured.
    """
    points: dict[float, float] = {}
    missing = [center + step for step in (-4, -2, -1, 0, 1, 2, 4)]
    for _ in range(MAX_ROUNDS):
        points |= zip(missing, costs_of(missing))
        missing = _missing_centers(sorted(points.items()), (min_cost, max_cost), gaps)
        if not missing:
            break
    centers = sorted(points)
    costs = np.maximum.accumulate([points[c] for c in centers])  # noise may swap neighbors
    return BudgetCurve(tuple(zip(centers, costs.tolist())))


def _missing_centers(
    points: list[tuple[float, float]], costs: tuple[float, float], gaps: tuple[float, float]
) -> list[float]:
    """Return centers to measure next; points: (center, cost), ascending in the center."""
    (min_cost, max_cost), (near_gap, far_gap) = costs, gaps
    missing = [
        (low + high) / 2
        for (low, cost), (high, next_cost) in itertools.pairwise(points)
        if cost < max_cost and next_cost > min_cost and next_cost - cost > (near_gap if high - low <= NEAR else far_gap)
    ]
    (first, low_cost), (last, high_cost) = points[0], points[-1]
    missing += [first - (last - first)] if low_cost > min_cost + GAP else []
    missing += [last + (last - first)] if high_cost < max_cost else []
    return [center for center in missing if abs(center) < MAX_GATE]


class CalibrationBatches:
    """The first batches of a loader's first epoch, the same in every iteration."""

    def __init__(self, loader: ImageLoader, num_images: int):
        """num_images: over all processes, rounded up to whole batches."""
        self.loader = loader
        self.num_batches = math.ceil(num_images / (loader.batch_size * utils.world_size()))

    def __iter__(self) -> Iterator:
        self.loader.start_at(0)
        return itertools.islice(self.loader, self.num_batches)


@torch.inference_mode()
def measure_costs(
    model: AdaptiveTokens, batches: Iterable, device: torch.device, amp: str, centers: list[float]
) -> tuple[list[float], list[float]]:
    """Return the cost at each gate center, a mean over the images of all processes, and its standard errors.

    batches: tuples that start with images [B, 3, H, W]. Every process must call it.
    """
    model, static = measured_copy(model, device), static_macs(model)

    def costs_of(images: Tensor, *_) -> Tensor:
        depths = []
        for center in centers:
            model.gate_center = center
            with utils.autocast(device, amp):
                depths.append(model(images, return_halting=True)[1].depth)
        return macs_per_image(model, torch.cat(depths)).view(len(centers), -1) / static

    costs, errors = mean_over_images(batches, device, costs_of, len(centers))
    return costs.tolist(), errors.tolist()


def measured_copy(model: AdaptiveTokens, device: torch.device) -> AdaptiveTokens:
    """Return a copy of a model on a device, in evaluation mode, whose gate and weights a measurement may change."""
    model = copy.deepcopy(model).to(device).eval()
    model.cuda_graphs = False  # a plan fits the counts of one center
    return model


def mean_over_images(
    batches: Iterable, device: torch.device, values_of: Callable[..., Tensor], num_values: int
) -> tuple[Tensor, Tensor]:
    """Return the means of some values over the images of all processes, and the standard errors of these means.

    batches: tuples that start with images [B, 3, H, W]; values_of: is called with the entries of a batch, images on the
    device, and returns the values of its images, [num_values, B]. Both results: [num_values] float64 on the device.
    Every process must call it.
    """
    sums = torch.zeros(2, num_values, dtype=torch.float64, device=device)  # of values and of their squares
    count = torch.zeros((), dtype=torch.float64, device=device)
    for images, *rest in batches:
        values = values_of(images.to(device, non_blocking=True), *rest).double()
        sums += torch.stack([values.sum(dim=1), values.square().sum(dim=1)])
        count += len(images)
    if dist.is_initialized():
        for total in (sums, count):
            dist.all_reduce(total)
    mean, mean_square = sums / count
    return mean, ((mean_square - mean.square()).clamp(min=0) / count).sqrt()


def min_cost(model: AdaptiveTokens, by_direction: bool | None = None) -> float:
    """Return the lowest possible cost: every token halts in the first block, or lives to the last if it never halts.

    by_direction: whether the gate reads directions; None: as the model's gate does.
    """
    if by_direction is None:
        by_direction = model.gate_directions is not None
    depth = torch.ones(1, model.num_prefix_tokens + model.patch_embed.num_patches)
    if by_direction:
        depth[:, : model.num_prefix_tokens] = model.num_blocks
    return macs_per_image(model, depth).item() / static_macs(model)


def resolve_budget(model: AdaptiveTokens, target: float, by_direction: bool | None = None) -> float:
    """Convert a compute target to a fraction of the static model's MACs.

    target: a fraction in (0, 1], or a number of MACs if above 1. by_direction: see `min_cost`.
    Returns the fraction. Raises UserError if no token depths can reach it.
    """
    static, lowest = static_macs(model), min_cost(model, by_direction)
    budget = target / static if target > 1 else target
    if not lowest < budget <= 1:
        raise UserError(
            f"--target-macs {target:g} is out of reach: this model uses between {lowest:.3g} "
            f"(tokens halt as early as they can) and 1 of the static model's {static / 1e9:.4g}G MACs"
        )
    return budget
