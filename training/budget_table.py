"""Budget tables: one trained network for every budget, by weights between those of its static start and its own.

Blocks that were trained for a small budget have never seen the tokens that stay under a larger one, so a larger gate
center alone makes the predictions worse. Weights between the static model's and the trained ones keep them close to
the static model's (in the spirit of Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022):

    weights = (1 - mixing) * start + mixing * trained

A table lists for several budgets the mixing, the gate center and how often the predictions agree with the static
model's. It is measured on images, without labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from macs import macs_per_image, static_macs
from models_act import AdaptiveTokens, Halting
from training.budget import MAX_POINTS, BudgetCurve, mean_over_images, measure_curve, measured_copy, min_cost

MIXINGS_BELOW = (1.25, 1.5)  # candidates, next to 1, below the budget that the network was trained for
MIXINGS_ABOVE = (0.75, 0.5, 0.25, 0.0)
MAX_MIXING = 2.0  # a recorded table with a larger one is ignored
FEW_IMAGES = 256  # images on which mixings are compared
COARSE_GAP = 0.12  # largest cost difference of neighboring points, when mixings are compared
ROUND_BUDGETS = (*(number / 20 for number in range(1, 10)), 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # rows of a table
NEAR = 0.025  # round budgets closer to the one trained for are left out
MIN_AGREEMENT = 0.5  # with fewer equal predictions, the start was no model of this task
FULL_COST = 0.99  # curves of the static weights are measured up to this cost


class BudgetPoint(NamedTuple):
    """One row of a table.

    cost: fraction of the static model's MACs, mean over images; mixing: see the module; center: of the gate;
    agreement: fraction of images whose predicted class is the static model's; None if it was not measured.
    """

    cost: float
    mixing: float
    center: float
    agreement: float | None = None

    @property
    def is_static(self) -> bool:
        """Return whether this is the static model that training started from."""
        return self.cost == 1 and self.mixing == 0


class BudgetTable(NamedTuple):
    """Settings of a network by budget. points: strictly ascending in the cost."""

    points: tuple[BudgetPoint, ...]

    @classmethod
    def from_record(cls, record: object) -> BudgetTable | None:
        """Read a checkpoint's record, a list of rows. Returns None if it is not a valid table."""
        if not isinstance(record, list) or not 2 <= len(record) <= MAX_POINTS:
            return None
        if not all(isinstance(row, list) and len(row) == 4 and _are_valid(*row) for row in record):
            return None
        points = tuple(BudgetPoint(*row) for row in record)
        return cls(points) if all(low.cost < high.cost for low, high in itertools.pairwise(points)) else None

    def record(self) -> list[list[float]]:
        """Return the table as plain types, for a checkpoint."""
        return [list(point) for point in self.points]

    @property
    def min_cost(self) -> float:
        return self.points[0].cost

    @property
    def max_cost(self) -> float:
        return self.points[-1].cost

    def at(self, budget: float) -> BudgetPoint:
        """Return the settings for a budget, interpolated linearly; outside the table, those of its nearest end."""
        costs, *columns = zip(*self.points)
        return BudgetPoint(budget, *(float(np.interp(budget, costs, values)) for values in columns))

    def __str__(self) -> str:
        """Return the table as text, one line for each budget."""
        head = f"{'budget':>6}  {'weights':>7}  {'gate center':>11}  {'agreement with the static model':>31}"
        lines = (f"{p.cost:6.3f}  {p.mixing:7.2f}  {p.center:11.4g}  {p.agreement:31.1%}" for p in self.points)
        return "\n".join([head, *lines])


def _are_valid(cost: object, mixing: object, center: object, agreement: object) -> bool:
    """Return whether the values of a row, read from a file, are finite floats in their ranges."""
    values = (cost, mixing, center, agreement)
    if not all(isinstance(value, float) and math.isfinite(value) for value in values):
        return False
    return 0 <= cost <= 1 and 0 <= mixing <= MAX_MIXING and 0 <= agreement <= 1


# Weights -----------------------------------------------------------------------------------------


def half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the weights on the CPU, floating-point tensors in half precision."""
    weights = {name: value.detach().cpu() for name, value in weights.items()}
    return {name: value.half() if value.is_floating_point() else value.clone() for name, value in weights.items()}


def mixed_weights(start: dict[str, Tensor], trained: dict[str, Tensor], mixing: float) -> dict[str, Tensor]:
    """Return the weights between the start (0) and the trained ones (1), beyond these for a mixing above 1.

    start, trained: tensors of the same names and shapes. Floating-point results are float32.
    """
    if mixing == 1:
        return trained

    def mix(old: Tensor, new: Tensor) -> Tensor:
        return torch.lerp(old.to(new.device).float(), new.float(), mixing) if new.is_floating_point() else new

    return {name: mix(start[name], value) for name, value in trained.items()}


def fits_weights(start: object, trained: dict[str, Tensor]) -> bool:
    """Return whether a record read from a file holds finite tensors of the same names and shapes."""
    return (
        isinstance(start, dict)
        and start.keys() == trained.keys()
        and all(
            isinstance(value, Tensor) and value.shape == trained[name].shape and bool(value.isfinite().all())
            for name, value in start.items()
        )
    )


# Measurement -------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Means over images: cost, KL divergence from the static model's predictions, and agreement with them."""

    cost: float
    divergence: float
    agreement: float


def measure_table(
    model: AdaptiveTokens,
    start: dict[str, Tensor],
    curve: BudgetCurve,
    batches: Iterable,
    device: torch.device,
    amp: str,
) -> BudgetTable | None:
    """Measure the table of a trained model, or return None if its predictions have little to do with the start's.

    Every process must call it.

    model: with its trained weights and the gate of its budget; start: weights of the static model that its training
    started from; curve: its budget curve; batches: tuples that start with images [B, 3, H, W], the same every time.
    """
    mixable, trained = _MixableModel(model, start, device, amp), model.gate_center
    few = _first_batches(batches, FEW_IMAGES)
    lowest, budget = min_cost(model), curve.cost(model.gate_center)
    if mixable.measure(few, 1.0, [trained])[0].agreement < MIN_AGREEMENT:
        return None
    curves = {1.0: _divergence_curve(mixable, 1.0, few, trained, (lowest, FULL_COST))}
    for mixing in MIXINGS_BELOW:
        curves[mixing] = _divergence_curve(mixable, mixing, few, trained, (lowest, budget))
    for mixing in MIXINGS_ABOVE:
        curves[mixing] = _divergence_curve(mixable, mixing, few, trained, (budget, FULL_COST))
    budgets = _budgets(max(lowest, curve.min_cost), budget)
    chosen = _choose_mixings(curves, budgets, budget)
    settings = [(mixing, curves[mixing][0].center(cost)) for mixing, cost in zip(chosen, budgets)]
    settings[budgets.index(budget)] = 1.0, trained
    rows = [BudgetPoint(cost=1.0, mixing=0.0, center=curves[0.0][0].center(FULL_COST), agreement=1.0)]
    for mixing, center in reversed(settings):
        cost, _, agreement = mixable.measure(batches, mixing, [center])[0]
        if cost < rows[-1].cost - 1e-3:  # noise may swap neighbors
            rows.append(BudgetPoint(cost, mixing, center, agreement))
    return BudgetTable(tuple(reversed(rows)))


class _MixableModel:
    """A copy of a model whose weights can be mixed with those of its static start."""

    def __init__(self, model: AdaptiveTokens, start: dict[str, Tensor], device: torch.device, amp: str):
        self.model, self.static = measured_copy(model, device), measured_copy(model, device)
        self.static.load_state_dict(start)
        self.static.halting = False
        self.start, self.trained = start, {name: value.clone() for name, value in self.model.state_dict().items()}
        self.device, self.amp, self.static_macs = device, amp, static_macs(model)
        self.expected: list[Tensor] = []  # logits of the static start for the first batches, [B, K] each

    @torch.inference_mode()
    def measure(self, batches: Iterable, mixing: float, centers: Sequence[float]) -> list[Measured]:
        """Measure one mixing at several gate centers, over the images of all processes.

        batches: the same in every call, or their first ones.
        """
        self.model.load_state_dict(mixed_weights(self.start, self.trained, mixing))
        numbers = itertools.count()

        def sums_of(images: Tensor) -> Tensor:
            expected = self._static_logits(next(numbers), images)
            sums = []
            for center in centers:
                self.model.gate_center = center
                with utils.autocast(self.device, self.amp):
                    logits, halting = self.model(images, return_halting=True)
                sums.append(self._compare(expected, logits, halting))
            return torch.cat(sums)

        means = mean_over_images(batches, self.device, sums_of, 3 * len(centers))
        return [Measured(*row) for row in means.view(-1, 3).tolist()]

    def _static_logits(self, number: int, images: Tensor) -> Tensor:
        """Return the logits of the static start for the images of this batch, computed once."""
        if number == len(self.expected):
            with utils.autocast(self.device, self.amp):
                self.expected.append(self.static(images).float())
        return self.expected[number]

    def _compare(self, expected: Tensor, logits: Tensor, halting: Halting) -> Tensor:
        """Return the sums of cost, divergence and agreement over the images, [3]."""
        cost = macs_per_image(self.model, halting.depth) / self.static_macs
        log_expected, log_found = (F.log_softmax(x.float(), dim=1) for x in (expected, logits))
        divergence = F.kl_div(log_found, log_expected, reduction="sum", log_target=True)
        agreement = (logits.argmax(1) == expected.argmax(1)).sum()
        return torch.stack([cost.sum().double(), divergence.double(), agreement.double()])


def _first_batches(batches: Iterable, num_images: int) -> list[tuple[Tensor]]:
    """Return the first batches of at least `num_images` images over all processes, or all of them."""
    kept, count = [], 0
    for images, *_ in batches:
        kept.append((images,))
        count += len(images) * utils.world_size()
        if count >= num_images:
            break
    return kept


def _divergence_curve(
    mixable: _MixableModel, mixing: float, batches: list, center: float, costs: tuple[float, float]
) -> tuple[BudgetCurve, list[float]]:
    """Return the budget curve of a mixing between two costs, and the divergence at each of its points."""
    divergences = {}

    def costs_of(centers: list[float]) -> list[float]:
        measured = mixable.measure(batches, mixing, centers)
        divergences.update(zip(centers, (each.divergence for each in measured)))
        return [each.cost for each in measured]

    curve = measure_curve(costs_of, center, *costs, gaps=(COARSE_GAP, COARSE_GAP))
    return curve, [divergences[center] for center, _ in curve.points]


def _budgets(lowest: float, trained: float) -> list[float]:
    """Return the budgets of a table: `trained` and round ones above `lowest`."""
    return sorted([trained, *(b for b in ROUND_BUDGETS if b > lowest and abs(b - trained) > NEAR)])


def _choose_mixings(
    curves: dict[float, tuple[BudgetCurve, list[float]]], budgets: Sequence[float], trained: float
) -> list[float]:
    """Return the mixing of least divergence for each budget: never rising, 1 at the budget trained for.

    budgets: ascending, with `trained` among them. Each choice bounds those of the budgets further away from it.
    """

    def divergence(mixing: float, budget: float) -> float:
        curve, divergences = curves[mixing]
        costs = [cost for _, cost in curve.points]
        return float(np.interp(budget, costs, divergences))

    def outward(budgets: Iterable[float], mixings: tuple[float, ...]) -> list[float]:
        """Choose for budgets ever further away; mixings: the candidates, in the direction of the budgets."""
        chosen = []
        for budget in budgets:
            chosen.append(min(mixings, key=lambda mixing: divergence(mixing, budget)))
            mixings = mixings[mixings.index(chosen[-1]) :]
        return chosen

    place = budgets.index(trained)
    below = outward(reversed(budgets[:place]), (1.0, *MIXINGS_BELOW))
    return [*reversed(below), 1.0, *outward(budgets[place + 1 :], (1.0, *MIXINGS_ABOVE))]
