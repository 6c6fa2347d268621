"""Which gate a network starts from, and which gate center costs how much."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import utils
from models_act import AdaptiveTokens, macs_per_image
from training.loaders import ImageLoader
from utils import UserError, log

CALIBRATION_IMAGES = 2000
DEAREST = 0.9  # so far a curve is measured
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
    def cheapest(self) -> float:
        return self.points[0][1]

    @property
    def dearest(self) -> float:
        return self.points[-1][1]

    def cost(self, center: float) -> float:
        """At that gate center; linear between points."""
        return float(np.interp(center, *zip(*self.points)))

    def center(self, budget: float) -> float:
        """The gate center of that cost, or of the nearest that the curve has; linear between points."""
        centers, costs = zip(*self.points)
        return float(np.interp(budget, costs, centers))


def budget_curve(model: AdaptiveTokens, batches: Iterable, device: torch.device, amp: str) -> BudgetCurve:
    """Of a network, see `costs_at`; every process must call it."""

    def costs_of(centers: list[float]) -> list[float]:
        return costs_at(model, batches, device, amp, centers)

    return measure_curve(costs_of, model.gate_center, cheapest_cost(model))


def measure_curve(
    costs_of: Callable[[list[float]], list[float]], center: float, cheapest: float, gap: float = 0.06, rounds: int = 8
) -> BudgetCurve:
    """Measures at more and more centers, until neighbours differ in cost by at most `gap`, from cheap to `DEAREST`.

    costs_of: cost at each of some centers, see `costs_at`; center: where to begin; cheapest: the least possible cost.
    """
    points: dict[float, float] = {}
    wanted = [center + step for step in (-4, -2, -1, 0, 1, 2, 4)]
    for _ in range(rounds):
        points |= zip(wanted, costs_of(wanted))
        wanted = _missing_centers(sorted(points.items()), cheapest, gap)
        if not wanted:
            break
    centers = sorted(points)
    costs = np.maximum.accumulate([points[c] for c in centers])  # noise may turn neighbours around
    return BudgetCurve(tuple(zip(centers, costs.tolist())))


def _missing_centers(points: list[tuple[float, float]], cheapest: float, gap: float) -> list[float]:
    """points: (center, cost), ascending in the center."""
    pairs = itertools.pairwise(points)
    wanted = [(low + high) / 2 for (low, cost), (high, next_cost) in pairs if min(next_cost, DEAREST) - cost > gap]
    (first, low_cost), (last, high_cost) = points[0], points[-1]
    wanted += [first - (last - first)] if low_cost > cheapest + gap else []
    wanted += [last + (last - first)] if high_cost < DEAREST else []
    return wanted


class FirstBatches:
    """The first batches of a training loader's first epoch, each time the same ones."""

    def __init__(self, loader: ImageLoader, num_images: int):
        """num_images: over all processes, in whole batches."""
        self.loader = loader
        self.num_batches = math.ceil(num_images / (loader.batch_size * utils.world_size()))

    def __iter__(self) -> Iterator:
        self.loader.start_at(0)
        return itertools.islice(self.loader, self.num_batches)


@torch.inference_mode()
def costs_at(
    model: AdaptiveTokens, batches: Iterable, device: torch.device, amp: str, centers: list[float]
) -> list[float]:
    """Cost at each gate center: share of the static network's multiply-adds, mean over the images of all processes.

    batches: each begins with images [B, 3, H, W]; every process must call it.
    """
    model = copy.deepcopy(model).eval()
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


def cheapest_cost(model: AdaptiveTokens) -> float:
    """Where every token halts in the first block: share of the static network's multiply-adds."""
    return _macs_of_depth(model, 1) / static_macs(model)


def _macs_of_depth(model: AdaptiveTokens, depth: int) -> float:
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return macs_per_image(model, torch.full((1, tokens), float(depth))).item()


def resolve_budget(model: AdaptiveTokens, target: float) -> float:
    """target: a share of the static network's multiply-adds, or above 1 an amount -> the share.

    UserError where no tokens' depths reach it.
    """
    static, cheapest = static_macs(model), cheapest_cost(model)
    budget = target / static if target > 1 else target
    range_of = f"between {cheapest:.3g} (every token halts in the first block) and 1 ({static / 1e9:.4g}G)"
    if not cheapest < budget <= 1:
        raise UserError(f"--target-macs {target:g}: out of reach of this network, which costs {range_of}")
    return budget


# The gate to start from --------------------------------------------------------------------------

SPREAD = 4.0  # standard deviation of the gate's argument over tokens and blocks


class GateChoice(NamedTuple):
    """A gate, by the KL divergence of the network's answers from the static network's, and what it costs."""

    divergence: float
    channel: int
    scale: float
    center: float
    cost: float

    def apply(self, model: AdaptiveTokens) -> None:
        model.halt_by(self.channel)
        model.gate_scale, model.gate_center = self.scale, self.center


@torch.inference_mode()
def choose_gate(model: AdaptiveTokens, images: Tensor, device: torch.device, amp: str, cost: float) -> GateChoice:
    """The channel and gate by which halting changes a static network's answers least, where it costs so much.

    For each channel of the tokens and each sign, the center is found on the states of the static network, which tell
    well when tokens would halt. images: [B, 3, H, W]; every process gets the main one's choice.
    """
    static, images = copy.deepcopy(model).to(device).eval(), images.to(device)
    static.halting = False
    options = {"intermediates_only": True, "output_fmt": "NLC", "return_prefix_tokens": True}
    with utils.autocast(device, amp):
        states = [torch.cat(parts[::-1], dim=1).float() for parts in static.forward_intermediates(images, **options)]
    states = torch.stack(states)  # [L, B, N, C]
    choices = []
    for channel in range(states.shape[-1]):
        values = states[..., channel]
        for sign in (1, -1):
            scale = sign * float(f"{SPREAD / values.std().clamp(min=1e-6).item():.2g}")
            center = _center_of_cost(static, scale * values, cost)
            choices.append(GateChoice(0.0, channel, scale, center, cost))
    with utils.autocast(device, amp):
        expected = F.log_softmax(static(images).float(), dim=1)
    choices = [_judged(choice, static, images, expected, amp) for choice in choices]
    best, worst = min(choices), max(choices)
    best = utils.all_gather_objects(best)[0]
    log(
        f"gate auto: channel {best.channel}, scale {best.scale:g}, center {best.center:g}: before training, "
        f"{best.cost:.0%} of the multiply-adds for a KL divergence of {best.divergence:.2g} from the static network's "
        f"answers (the worst of {len(choices)} gates: {worst.divergence:.2g})"
    )
    return best


def _center_of_cost(model: AdaptiveTokens, argument: Tensor, cost: float) -> float:
    """The center at which tokens with these scale * x, [L, B, N], would halt so that the network costs that share."""
    middle = argument.mean().item()
    low, high = middle - 32, middle + 32
    for _ in range(12):
        center = float(f"{(low + high) / 2:.4g}")
        halts = torch.sigmoid(argument - center).cumsum(dim=0) >= 1 - model.halt_eps
        halts[-1] = True
        depth = halts.float().argmax(dim=0) + 1.0  # [B, N]
        found = macs_per_image(model, depth).mean().item() / static_macs(model)
        low, high = (center, high) if found < cost else (low, center)
    return center


def _judged(choice: GateChoice, static: AdaptiveTokens, images: Tensor, expected: Tensor, amp: str) -> GateChoice:
    """The same with its divergence and cost as measured; expected: the static network's log-probabilities, [B, K]."""
    model = copy.deepcopy(static)
    model.halting = True
    choice.apply(model)
    with utils.autocast(images.device, amp):
        logits, halting = model(images, return_halting=True)
    found = F.log_softmax(logits.float(), dim=1)
    divergence = F.kl_div(found, expected, reduction="batchmean", log_target=True).item()
    cost = macs_per_image(model, halting.depth).mean().item() / static_macs(model)
    return choice._replace(divergence=divergence, cost=cost)
