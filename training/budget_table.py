"""Budget tables: one trained network for every budget, by weights between those of its static start and its own.

Blocks that were trained for a small budget have never seen the tokens that stay under a larger one, so a larger gate
center alone makes the predictions worse. Weights between the static model's and the trained ones serve them better (in
the spirit of Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022):

    weights = (1 - mixing) * start + mixing * trained

A table lists mixing and gate center for several budgets. They are chosen without labels: predictions come near the mean
of the static model's and the trained model's, as either of the two may be the better one. Accuracies are reported only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from macs import macs_per_image, static_macs
from models_act import AdaptiveTokens
from training.budget import MAX_POINTS, BudgetCurve, mean_over_images, measure_curve, measured_copy, min_cost
from training.parser import MAX_GATE

MIXINGS_BELOW = (1.25, 1.5)  # candidates, next to 1, below the budget that the network was trained for
MIXINGS_ABOVE = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0)
MAX_MIXING = 2.0  # a recorded table with a larger one is ignored
FEW_IMAGES = 256  # images on which mixings are compared
COARSE_GAP = 0.12  # largest cost difference of neighboring points, when mixings are compared
ROUND_BUDGETS = (  # rows of a table, closer where the cost changes fast with the center
    *(number / 40 for number in range(2, 12)),
    *(0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
)
NEAR = 0.0125  # budgets closer to the one trained for are taken for it
MIN_AGREEMENT = 0.5  # with fewer equal predictions, the start was no model of this task
FULL_COST = 0.99  # curves of the static weights are measured up to this cost
ROW_LENGTHS = (4, 7)  # of a recorded table; older ones have no accuracies


class BudgetPoint(NamedTuple):
    """One row of a table.

    cost: fraction of the static model's MACs, mean over images; mixing: see the module; center: of the gate;
    agreement: fraction of images whose predicted class is the static model's; accuracy: top-1, a fraction;
    change, change_error: the accuracy minus that at the budget of the training, and its standard error, paired by
    image. What was not measured is None.
    """

    cost: float
    mixing: float
    center: float
    agreement: float | None = None
    accuracy: float | None = None
    change: float | None = None
    change_error: float | None = None

    @property
    def change_text(self) -> str:
        """Return the change of the accuracy in points, with one standard error."""
        return f"{round(100 * self.change, 1) + 0.0:+.1f} ± {100 * self.change_error:.1f}"  # + 0.0: no minus zero

    @property
    def is_less_accurate(self) -> bool:
        """Return whether the change of the accuracy, rounded to 0.1 points as in the text, is negative."""
        return self.change is not None and round(self.change, 3) < 0

    @property
    def may_be_chance(self) -> bool:
        """Return whether the change of the accuracy is below two standard errors."""
        return abs(self.change) < 2 * self.change_error


class BudgetSettings(NamedTuple):
    """Settings at a budget, and what was measured near it.

    budget: fraction of the static model's MACs; mixing: see the module; center: of the gate;
    nearest: the row of the table that was measured at the nearest budget, None without a table.
    """

    budget: float
    mixing: float
    center: float
    nearest: BudgetPoint | None = None

    @property
    def is_static(self) -> bool:
        """Return whether this is the static model that training started from."""
        return self.budget == 1 and self.mixing == 0


class BudgetTable(NamedTuple):
    """Settings of a network by budget. points: strictly ascending in the cost."""

    points: tuple[BudgetPoint, ...]

    @classmethod
    def from_record(cls, record: object) -> BudgetTable | None:
        """Read a checkpoint's record, a list of rows. Returns None if it is not a valid table."""
        if not isinstance(record, list) or not 2 <= len(record) <= MAX_POINTS:
            return None
        if not all(isinstance(row, list) and len(row) == len(record[0]) for row in record):
            return None
        if len(record[0]) not in ROW_LENGTHS or not all(isinstance(value, float) for row in record for value in row):
            return None
        points = tuple(BudgetPoint(*row) for row in record)
        is_ascending = all(low.cost < high.cost for low, high in itertools.pairwise(points))
        return cls(points) if is_ascending and all(map(_is_valid, points)) else None

    def record(self) -> list[list[float]]:
        """Return the table as plain types, for a checkpoint."""
        return [[value for value in point if value is not None] for point in self.points]

    @property
    def min_cost(self) -> float:
        return self.points[0].cost

    @property
    def max_cost(self) -> float:
        return self.points[-1].cost

    def at(self, budget: float) -> BudgetSettings:
        """Return the settings for a budget, interpolated linearly; outside the table, those of its nearest end.

        Agreement and accuracy are not interpolated: weights between two measured ones may be better than both.
        """
        costs, mixings, centers = zip(*(point[:3] for point in self.points))
        mixing, center = (float(np.interp(budget, costs, values)) for values in (mixings, centers))
        return BudgetSettings(budget, mixing, center, min(self.points, key=lambda point: abs(point.cost - budget)))

    def __str__(self) -> str:
        """Return the table as text, one line for each budget."""
        rows = [("budget", "weights", "gate center", "agreement", "top-1", "change in points ± 1 SE")]
        for p in self.points:
            measured = ("", "") if p.accuracy is None else (f"{p.accuracy:.1%}", p.change_text)
            rows.append((f"{p.cost:.3f}", f"{p.mixing:.2f}", f"{p.center:.4g}", f"{p.agreement:.1%}", *measured))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _is_valid(point: BudgetPoint) -> bool:
    """Return whether the values of a row, read from a file, are in their ranges; NaN and infinity are not."""
    fractions = point.cost, point.agreement, point.accuracy or 0.0, point.change_error or 0.0
    in_range = all(0 <= value <= 1 for value in fractions) and abs(point.change or 0.0) <= 1
    return in_range and 0 <= point.mixing <= MAX_MIXING and abs(point.center) < MAX_GATE


# Weights -----------------------------------------------------------------------------------------


def half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the weights on the CPU, floating-point tensors in half precision if it can hold their values."""

    def copy_of(value: Tensor) -> Tensor:
        value = value.detach().cpu()
        half = value.half() if value.is_floating_point() else value
        return half if half is not value and bool(half.isfinite().all()) else value.clone()

    return {name: copy_of(value) for name, value in weights.items()}


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
    """Return whether a record read from a file holds finite, plain tensors of the same names, shapes and kinds."""
    return (
        isinstance(start, dict)
        and start.keys() == trained.keys()
        and all(utils.is_plain_tensor(value) and _is_like(value, trained[name]) for name, value in start.items())
    )


def _is_like(value: Tensor, trained: Tensor) -> bool:
    is_same_kind = value.is_floating_point() == trained.is_floating_point()
    return is_same_kind and value.shape == trained.shape and bool(value.float().isfinite().all())


# Measurement -------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Means over images, see `BudgetPoint`. divergence: KL from the mean of the two models' predictions."""

    cost: float
    divergence: float
    agreement: float
    accuracy: float
    change: float
    change_error: float

    def point(self, mixing: float, center: float) -> BudgetPoint:
        return BudgetPoint(self.cost, mixing, center, self.agreement, self.accuracy, self.change, self.change_error)


class Reference(NamedTuple):
    """Predictions with which those for a batch are compared.

    static: [B], the classes that the static model predicts; log_mean: [B, K], the logarithm of the mean of its
    probabilities and those of the trained model; correct: [B], whether the trained model is right, 0 or 1.
    """

    static: Tensor
    log_mean: Tensor
    correct: Tensor


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
    started from; curve: its budget curve; batches: tuples that start with images [B, 3, H, W] and labels [B], the same
    every time.
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
    rows = [mixable.measure_static(batches).point(0.0, curves[0.0][0].center(FULL_COST))]
    for mixing, group in itertools.groupby(reversed(settings), key=lambda setting: setting[0]):
        centers = [center for _, center in group]
        for center, measured in zip(centers, mixable.measure(batches, mixing, centers)):
            if measured.cost < rows[-1].cost - 1e-3:  # noise may swap neighbors
                rows.append(measured.point(mixing, center))
    return BudgetTable(tuple(reversed(rows)))


class _MixableModel:
    """A copy of a model whose weights can be mixed with those of its static start."""

    def __init__(self, model: AdaptiveTokens, start: dict[str, Tensor], device: torch.device, amp: str):
        self.model, self.trained_model, self.static = (measured_copy(model, device) for _ in range(3))
        self.static.load_state_dict(start)
        self.static.halting = False
        self.start, self.trained = start, self.trained_model.state_dict()
        self.device, self.amp, self.static_macs = device, amp, static_macs(model)
        self.references: list[Reference] = []  # of the first batches

    def measure(self, batches: Iterable, mixing: float, centers: Sequence[float]) -> list[Measured]:
        """Measure one mixing at several gate centers, over the images of all processes.

        batches: the same in every call, or their first ones.
        """
        self.model.load_state_dict(mixed_weights(self.start, self.trained, mixing))

        def outputs_of(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            for center in centers:
                self.model.gate_center = center
                logits, halting = self.model(images, return_halting=True)
                yield logits, macs_per_image(self.model, halting.depth) / self.static_macs

        return self._means(batches, outputs_of, len(centers))

    def measure_static(self, batches: Iterable) -> Measured:
        """Measure the static start."""

        def outputs_of(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            yield self.static(images), torch.ones(len(images), device=self.device)

        return self._means(batches, outputs_of, 1)[0]

    @torch.inference_mode()
    def _means(self, batches: Iterable, outputs_of: Callable[[Tensor], Iterable], count: int) -> list[Measured]:
        """Return the means over images. outputs_of: yields `count` times logits [B, K] and costs [B] of the images."""
        numbers = itertools.count()

        def values_of(images: Tensor, targets: Tensor, *_) -> Tensor:
            targets = targets.to(self.device)
            with utils.autocast(self.device, self.amp):
                reference = self._reference(next(numbers), images, targets)
                outputs = list(outputs_of(images))
            return torch.cat([_compare(reference, targets, *output) for output in outputs])

        num_values = len(Measured._fields) - 1  # the last one follows from the others
        values = mean_over_images(batches, self.device, values_of, num_values * count)
        means, errors = (of_all.view(count, num_values).tolist() for of_all in values)
        return [Measured(*mean, change_error=error[-1]) for mean, error in zip(means, errors)]

    def _reference(self, number: int, images: Tensor, targets: Tensor) -> Reference:
        """Return what the predictions for this batch are compared with, computed once."""
        if number == len(self.references):
            both = torch.stack([self.static(images).float(), self.trained_model(images).float()])
            log_mean = both.log_softmax(dim=-1).logsumexp(dim=0) - math.log(2)
            static, trained = both.argmax(dim=-1)
            self.references.append(Reference(static, log_mean, (trained == targets).double()))
        return self.references[number]


def _compare(reference: Reference, targets: Tensor, logits: Tensor, cost: Tensor) -> Tensor:
    """Return the values of `Measured` for each image, in its order and without the error: [5, B]."""
    log_found = F.log_softmax(logits.float(), dim=1)
    divergence = F.kl_div(log_found, reference.log_mean, reduction="none", log_target=True).sum(dim=1)
    predicted = logits.argmax(dim=1)
    correct = (predicted == targets).double()
    agreement = (predicted == reference.static).double()
    return torch.stack([cost.double(), divergence.double(), agreement, correct, correct - reference.correct])


def _first_batches(batches: Iterable, num_images: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first batches of at least `num_images` images over all processes, or all of them."""
    kept, count = [], 0
    for images, targets, *_ in batches:
        kept.append((images, targets))
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

    curves: by mixing, the candidates. budgets: ascending, with `trained` among them. Each choice bounds those of the
    budgets further away from it.
    """

    def divergence(mixing: float, budget: float) -> float:
        curve, divergences = curves[mixing]
        costs = [cost for _, cost in curve.points]
        return float(np.interp(budget, costs, divergences))

    def outward(budgets: Iterable[float], mixings: Sequence[float]) -> list[float]:
        """Choose for budgets ever further away; mixings: the candidates, in the direction of the budgets."""
        chosen = []
        for budget in budgets:
            chosen.append(min(mixings, key=lambda mixing: divergence(mixing, budget)))
            mixings = mixings[mixings.index(chosen[-1]) :]
        return chosen

    place = budgets.index(trained)
    below = outward(reversed(budgets[:place]), sorted(mixing for mixing in curves if mixing >= 1))
    above = outward(budgets[place + 1 :], sorted((mixing for mixing in curves if mixing <= 1), reverse=True))
    return [*reversed(below), 1.0, *above]
