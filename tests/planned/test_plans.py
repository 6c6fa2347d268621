"""Plans have room for the counts that they are made for, and change when batches change."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipping.planned.plans import Plan, Planner

SIZE, GRID = (8, 50), 16


@st.composite
def sizes_and_counts(draw):
    """Draw B, N and the live rows before each block, which never increase."""
    size = draw(st.integers(1, 9)), draw(st.integers(1, 60))
    rows = math.prod(size)
    return size, [rows, *sorted(draw(st.lists(st.integers(0, rows), max_size=12)), reverse=True)]


@given(sizes_and_counts(), st.sampled_from([1, 16, 128]), st.booleans())
def test_plan_has_room_for_its_counts(case, grid, keep_all):
    size, counts = case
    plan = Plan.for_counts(size, counts, grid, keep_all)
    capacities = plan.capacities
    assert capacities[0] == math.prod(size)
    assert all(0 < b <= a for a, b in pairwise(capacities))
    assert all(capacity % grid == 0 or capacity == math.prod(size) for capacity in capacities)
    assert all(capacity - count < grid or count == 0 for count, capacity in zip(counts, capacities))
    assert len(capacities) == (len(counts) if keep_all else sum(count > 0 for count in counts))
    assert not plan.overflows(counts)
    assert not Plan.full(size, len(counts)).overflows(counts)


@given(sizes_and_counts(), st.data())
def test_one_row_too_many_overflows(case, data):
    size, counts = case
    plan = Plan.for_counts(size, counts, GRID, keep_all=False)
    block = data.draw(st.integers(0, len(plan.capacities) - 1))
    assert plan.overflows([*plan.capacities[:block], plan.capacities[block] + 1])


def test_rows_after_the_end_of_the_plan_overflow():
    plan = Plan(SIZE, (400, 112))
    assert plan.overflows([400, 100, 1])
    assert not plan.overflows([400, 100, 0])
    assert not plan.overflows([400, 100])


@given(st.lists(sizes_and_counts(), min_size=1, max_size=20), st.booleans())
def test_planner_fits_every_recent_batch(cases, keep_all):
    size, num_blocks = cases[0][0], 13
    rows = math.prod(size)
    planner = Planner(size, num_blocks, keep_all, start=len(cases))
    batches = [[rows, *(min(count, rows) for count in counts[1:])] for _, counts in cases]
    for counts in batches:
        assert planner.plan is None
        planner.observe(counts)
    assert not any(planner.plan.overflows(counts) for counts in batches)
    assert len(planner.plan.capacities) == num_blocks or not keep_all


def planner_after(num_batches: int, **options) -> Planner:
    """Return a planner after equal batches: 400, 200, 90 rows in 3 blocks."""
    planner = Planner(SIZE, 3, **options)
    for _ in range(num_batches):
        planner.observe([400, 200, 90])
    return planner


def test_first_plan_follows_start():
    assert planner_after(7).plan is None
    assert planner_after(8).plan == Plan(SIZE, (400, 208, 96))
    assert planner_after(8).num_plans == 1


@pytest.mark.parametrize(
    ("grid", "size", "capacity"), [(128, (64, 64), 128), (128, (63, 65), 64), (64, (64, 64), 64), (128, (1, 50), 16)]
)
def test_grid_has_at_least_32_steps(grid, size, capacity):
    planner = Planner(size, 2, grid=grid, start=1)
    planner.observe([math.prod(size), 1])
    assert planner.plan.capacities[1] == capacity


def test_margin_is_added_to_varying_counts():
    planner = Planner(SIZE, 2, start=2)
    planner.observe([400, 100])
    planner.observe([400, 140])  # standard deviation 20
    assert planner.plan.capacities == (400, 192)


def test_second_overflow_leads_to_a_new_plan():
    planner = planner_after(8)
    planner.observe([400, 300, 90], overflowed=True)
    assert planner.num_plans == 1
    planner.observe([400, 310, 90], overflowed=True)
    assert planner.num_plans == 2
    assert not planner.plan.overflows([400, 310, 90])
    planner.observe([400, 390, 90], overflowed=True)
    assert planner.num_plans == 2, "overflows of the plan before count"


def test_overflows_outside_the_window_do_not_count():
    planner = planner_after(8, window=4)
    for _ in range(3):
        planner.observe([400, 300, 90], overflowed=True)
        for _ in range(4):
            planner.observe([400, 200, 90])
    assert planner.num_plans == 1


@pytest.mark.parametrize(("later", "num_plans"), [(197, 1), (100, 2)])
def test_large_plan_is_replaced_after_patience(later, num_plans):
    planner = planner_after(8, window=4, patience=10)
    for _ in range(9):
        planner.observe([400, later, 90])
    assert planner.num_plans == 1
    planner.observe([400, later, 90])
    assert planner.num_plans == num_plans


def test_blocks_that_did_not_run_have_no_rows():
    planner = Planner(SIZE, 5, start=1)
    planner.observe([400, 30])
    assert planner.plan == Plan(SIZE, (400, 32))
    planner = Planner(SIZE, 5, keep_all=True, start=1)
    planner.observe([400, 30])
    assert planner.plan == Plan(SIZE, (400, 32, 16, 16, 16))


def test_counts_that_keep_growing_need_few_plans():
    planner = Planner((64, 200), 2, start=8)
    for number in range(1000):
        counts = [12800, 2000 + 10 * number]
        planner.observe(counts, overflowed=planner.plan is not None and planner.plan.overflows(counts))
    assert planner.num_plans <= 12
    for _ in range(1024):
        planner.observe([12800, 2000])
    assert planner.plan.capacities[1] == 2048, "the margin is the usual one again"
