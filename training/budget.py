"""What a network costs: by its gate center, and whether it can cost what was asked for."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import utils
from models_act import AdaptiveTokens, macs_per_image
from training.loaders import ImageLoader
from utils import UserError

CALIBRATION_IMAGES = 1000
MAX_ROUNDS = 16  # of looking at all images; a smooth curve is done after three or four
GAP, FAR_GAP = 0.06, 0.03  # in cost, from which a curve is straight enough between neighbours, or far ones
NEAR = 1.0  # centers; a score is a sigmoid of its center, so costs hardly bend on less
MAX_POINTS = 1000  # a curve with more is none of ours


class BudgetCurve(NamedTuple):
    """What a network costs by its gate center.

    points: (center, cost), ascending in both; cost: share of the static network's multiply-adds, mean over images.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, record: object) -> BudgetCurve | None:
        """From what a checkpoint holds, a list of pairs; None where that is no curve."""
        if not isinstance(record, list) or not 2 <= len(record) <= MAX_POINTS:
            return None
        for point in record:
            is_pair = isinstance(point, list) and len(point) == 2 and all(isinstance(v, float) for v in point)
            if not is_pair or not all(map(math.isfinite, point)) or not 0 <= point[1] <= 1:
                return None
        return cls(tuple((center, cost) for center, cost in record)) if sorted(record) == record else None

    def record(self) -> list[list[float]]:
        return [list(point) for point in self.points]

    @property
    def min_cost(self) -> float:
        return self.points[0][1]

    @property
    def max_cost(self) -> float:
        return self.points[-1][1]

    def cost(self, center: float) -> float:
        """At that gate center; linear between points."""
        return float(np.interp(center, *zip(*self.points)))

    def center(self, budget: float) -> float:
        """The gate center of that cost, or of the nearest that the curve has; linear between points."""
        centers, costs = zip(*self.points)
        return float(np.interp(budget, costs, centers))


def budget_curve(
    model: AdaptiveTokens, batches: Iterable, device: torch.device, amp: str, dearest: float = 0.9
) -> BudgetCurve:
    """Of a network, see `measure_costs` and `measure_curve`; every process must call it."""

    def costs_of(centers: list[float]) -> list[float]:
        return measure_costs(model, batches, device, amp, centers)

    return measure_curve(costs_of, model.gate_center, min_cost(model), dearest)


def measure_curve(
    costs_of: Callable[[list[float]], list[float]], center: float, cheapest: float, dearest: float
) -> BudgetCurve:
    """Measures at more and more centers, until neighbours differ in cost by at most `GAP`, far ones by less.

    costs_of: cost at each of some centers, see `measure_costs`; center: where to begin; cheapest: the least possible
    cost; dearest: up to which cost it is measured.
    """
    points: dict[float, float] = {}
    wanted = [center + step for step in (-4, -2, -1, 0, 1, 2, 4)]
    for _ in range(MAX_ROUNDS):
        points |= zip(wanted, costs_of(wanted))
        wanted = _missing_centers(sorted(points.items()), cheapest, dearest)
        if not wanted:
            break
    centers = sorted(points)
    costs = np.maximum.accumulate([points[c] for c in centers])  # noise may turn neighbours around
    return BudgetCurve(tuple(zip(centers, costs.tolist())))


def _missing_centers(points: list[tuple[float, float]], cheapest: float, dearest: float) -> list[float]:
    """points: (center, cost), ascending in the center."""
    wanted = [
        (low + high) / 2
        for (low, cost), (high, next_cost) in itertools.pairwise(points)
        if cost < dearest and next_cost - cost > (GAP if high - low <= NEAR else FAR_GAP)
    ]
    (first, low_cost), (last, high_cost) = points[0], points[-1]
    wanted += [first - (last - first)] if low_cost > cheapest + GAP else []
    wanted += [last + (last - first)] if high_cost < dearest else []
    return wanted


class CalibrationBatches:
    """The first batches of a training loader's first epoch, each time the same ones."""

    def __init__(self, loader: ImageLoader, num_images: int):
        """num_images: over all processes, in whole batches."""
        self.loader = loader
        self.num_batches = math.ceil(num_images / (loader.batch_size * utils.world_size()))

    def __iter__(self) -> Iterator:
        self.loader.start_at(0)
        return itertools.islice(self.loader, self.num_batches)


@torch.inference_mode()
def measure_costs(
    model: AdaptiveTokens, batches: Iterable, device: torch.device, amp: str, centers: list[float]
) -> list[float]:
    """Cost at each gate center: share of the static network's multiply-adds, mean over the images of all processes.

    batches: each begins with images [B, 3, H, W]; every process must call it.
    """
    model = copy.deepcopy(model).to(device).eval()
    sums, count = torch.zeros(len(centers), dtype=torch.float64, device=device), 0
    for images, *_ in batches:
        images = images.to(device, non_blocking=True)
        count += len(images)
        for number, center in enumerate(centers):
            model.gate_center = center
            with utils.autocast(device, amp):
                depth = model(images, return_halting=True)[1].depth
            sums[number] += macs_per_image(model, depth).sum()
    total = torch.cat([sums, sums.new_tensor([count])])
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total[:-1] / total[-1] / static_macs(model)).tolist()


def static_macs(model: AdaptiveTokens) -> float:
    """Multiply-adds of an image through every block."""
    return _macs_of_depth(model, model.num_blocks)


def min_cost(model: AdaptiveTokens) -> float:
    """Where every token halts in the first block: share of the static network's multiply-adds."""
    return _macs_of_depth(model, 1) / static_macs(model)


def _macs_of_depth(model: AdaptiveTokens, depth: int) -> float:
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return macs_per_image(model, torch.full((1, tokens), float(depth))).item()


def resolve_budget(model: AdaptiveTokens, target: float) -> float:
    """target: a share of the static network's multiply-adds, or above 1 an amount -> the share.

    UserError where no tokens' depths reach it.
    """
    static, cheapest = static_macs(model), min_cost(model)
    budget = target / static if target > 1 else target
    range_of = f"between {cheapest:.3g} (every token halts in the first block) and 1 ({static / 1e9:.4g}G)"
    if not cheapest < budget <= 1:
        raise UserError(f"--target-macs {target:g}: out of reach of this network, which costs {range_of}")
    return budget
