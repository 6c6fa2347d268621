"""Plans: the number of rows of each block, chosen from the numbers of live rows in recent batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple


class Plan(NamedTuple):
    """Number of rows of each block.

    size: B, N;
    capacities: rows of each block that runs. The first is B * N, and none is above the one before.
    In inference a plan may have fewer blocks than the network.
    """

    size: tuple[int, int]
    capacities: tuple[int, ...]

    @classmethod
    def full(cls, size: tuple[int, int], num_blocks: int) -> Plan:
        """Return the plan with room for every token in every block, which nothing overflows."""
        return cls(size, (math.prod(size),) * num_blocks)

    @classmethod
    def for_counts(cls, size: tuple[int, int], counts: Sequence[float], grid: int, keep_all: bool) -> Plan:
        """Return the smallest plan for these counts whose capacities are multiples of `grid`, or B * N.

        counts: live rows before each block. A count above the one before is lowered to it;
        keep_all: keep blocks without live rows, as training must. Otherwise the plan ends before the first of them.
        """
        rows = math.prod(size)
        capacities = [rows]
        for count in counts[1:]:
            if count <= 0 and not keep_all:
                break
            steps = max(math.ceil(count / grid), 1)
            capacities.append(min(steps * grid, capacities[-1]))
        return cls(size, tuple(capacities))

    def overflows(self, counts: Sequence[int]) -> bool:
        """Return whether a block had more live rows than its capacity.

        counts: live rows before each block that ran, then after the last one if the network has further blocks.
        """
        return any(count > capacity for count, capacity in zip_longest(counts, self.capacities, fillvalue=0))


@dataclass
class Planner:
    """Chooses plans from the counts of recent batches, and keeps a plan while it fits.

    size: B, N; num_blocks: blocks of the network; keep_all: see `Plan.for_counts`;
    grid: capacities are multiples of this number. It is halved down to 16 while B * N has fewer than 32 steps;
    start: batches before the first plan;
    window: number of recent batches;
    spreads: margin above the largest recent count, in standard deviations of the block's recent counts. It doubles with
    each plan that replaces one with too few rows, until a plan lasts for `patience` batches: counts that keep
    growing would need a new capture every few batches;
    misses: overflows allowed among the recent batches of a plan. One more leads to a new plan;
    patience: batches between two checks whether the plan is too large;
    slack: fraction of rows by which a plan may exceed the one that recent batches need;
    plan: the current plan, None before the first one; num_plans: plans made so far.
    """

    size: tuple[int, int]
    num_blocks: int
    keep_all: bool = False
    grid: int = 128
    start: int = 8
    window: int = 64
    spreads: float = 2.0
    misses: int = 1
    patience: int = 512
    slack: float = 0.05
    plan: Plan | None = field(default=None, init=False)
    num_plans: int = field(default=0, init=False)
    _recent: list[tuple[int, ...]] = field(default_factory=list, init=False)
    _overflowed: list[bool] = field(default_factory=list, init=False)  # of recent batches under the current plan
    _age: int = field(default=0, init=False)  # batches under the current plan
    _margin: float = field(default=1.0, init=False)  # times `spreads`

    def observe(self, counts: Sequence[int], overflowed: bool = False) -> None:
        """Record one batch, and replace the plan if it does not fit.

        counts: true numbers of live rows before each block. Missing ones at the end are 0;
        overflowed: the batch overflowed the plan.
        """
        padded = (*counts, *[0] * self.num_blocks)[: self.num_blocks]
        self._recent = [*self._recent, padded][-self.window :]
        self._overflowed = [*self._overflowed, overflowed][-self.window :]
        self._age += 1
        if self._is_due():
            self.plan, self.num_plans = self._needed_plan(), self.num_plans + 1
            self._overflowed, self._age = [], 0

    def _is_due(self) -> bool:
        if self.plan is None:
            return self._age >= self.start
        if sum(self._overflowed) > self.misses:
            self._margin *= 2
            return True
        if self._age % self.patience:
            return False
        self._margin = 1.0
        return sum(self.plan.capacities) > (1 + self.slack) * sum(self._needed_plan().capacities)

    def _needed_plan(self) -> Plan:
        """Return the plan that fits the recent batches, with the margin."""
        grid = self.grid
        while grid > 16 and math.prod(self.size) < 32 * grid:
            grid //= 2
        counts = [max(block) + self._margin * self.spreads * statistics.pstdev(block) for block in zip(*self._recent)]
        return Plan.for_counts(self.size, counts, grid, self.keep_all)
