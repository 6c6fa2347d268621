"""The kernels of the planned mode, interpreted on the CPU, compute the same as a dense reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from zipping.planned.tokens import PlannedGate, PlannedTokens

kernels = pytest.importorskip(
    "zipping.planned.kernels", reason="Triton is installed with CUDA builds of torch on Linux"
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_STEP = {"rtol": 2**-7, "atol": 1e-4}  # a number may round to its neighbor
TOLERANCES = dict.fromkeys(DTYPES, ONE_STEP) | {torch.float32: {"rtol": 1e-4, "atol": 1e-4}}
HALF = {"rtol": 0.02, "atol": 0.02}  # rounding to half precision, and sums of gradients in another order
SCALE, LIMIT = 1.5, 0.99


class Case:
    """Input of one halting step: which tokens are live, their states, and options of the step."""

    def __init__(self, live, num_prefix_tokens, x, before, minus_center, surplus, direction=None):
        """live: [B, N] bool; x: [B, N, C]; before: [B, N]; surplus: surplus rows, None in the first block.

        direction: [C + 1] or None.
        """
        self.live, self.x, self.before = live, x, before
        size, rows = tuple(live.shape), min(int(live.sum()) + (surplus or 0), live.numel())
        self.gate = PlannedGate(torch.tensor([SCALE, LIMIT]), minus_center, direction)
        token, cu_seqlens = expected_store(live, rows)
        if surplus is None:
            self.tokens = PlannedTokens.all_live(size, num_prefix_tokens, x.device)
        else:
            self.tokens = PlannedTokens(size, num_prefix_tokens, token, cu_seqlens)
        filler = 7.0  # surplus rows hold anything finite
        self.rows = torch.full((rows, x.shape[2]), filler, dtype=x.dtype)
        self.rows[: live.sum()] = x[live]
        self.cumulative = F.pad(before[live], (0, rows - int(live.sum())), value=filler)

    def to_dense(self, values):
        """Return [c, ...] as [B, N, ...], zero for halted tokens."""
        dense = values.new_zeros(self.live.numel() + 1, *values.shape[1:])
        return dense.index_copy(0, self.tokens.token, values)[:-1].unflatten(0, self.live.shape)


def expected_store(live, capacity):
    """Return token and cu_seqlens of a store in which these tokens are live. live: [B, N] bool."""
    (batch, length), count = live.shape, min(int(live.sum()), capacity)
    token = live.flatten().nonzero().flatten()[:capacity]
    ends = F.pad(live.sum(dim=1).cumsum(0), (1, 0)).clamp(max=capacity).tolist()
    dummies = [min(count + number * length, capacity) for number in range(1, math.ceil(capacity / length) + 1)]
    return F.pad(token, (0, capacity - count), value=batch * length), torch.tensor(ends + dummies, dtype=torch.int32)


@st.composite
def cases(draw):
    batch, length, width = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    surplus = draw(st.sampled_from([None, 0, 1, 50]))
    share = 1.0 if surplus is None else draw(st.sampled_from([0.2, 0.8, 1.0]))
    live = torch.rand(batch, length, generator=generator) < share
    assume(live.any())
    x = torch.randn(batch, length, width, generator=generator).to(draw(st.sampled_from(DTYPES)))
    before, minus_center = torch.rand(batch, length, generator=generator), torch.randn(batch, generator=generator)
    direction = torch.randn(width + 1, generator=generator) / width**0.5 if draw(st.booleans()) else None
    return Case(live, draw(st.integers(1, min(3, length))), x, before, minus_center, surplus, direction)


def score_and_cumulative(case, x, before):
    value, direction = x[..., 0].float(), case.gate.direction
    if direction is not None:
        value = x.detach().float() @ direction[:-1] + direction[-1]
    score = torch.sigmoid(case.gate.minus_center[:, None] + SCALE * value)
    if direction is None:
        return score, before + score
    score[:, : case.tokens.num_prefix_tokens] = 0
    return score, before.detach() + score


def reference(case, x, before, capacity, early_exit):
    """Compute `halt` on dense tokens: the outputs that are differentiable, and those that are not.

    x: [B, N, C]; before: [B, N]; both zero for halted tokens.
    """
    live, prefix = case.live, case.tokens.num_prefix_tokens
    score, cumulative = score_and_cumulative(case, x, before)
    halts = cumulative >= LIMIT if capacity is not None else torch.ones_like(live)
    probability = torch.where(halts, 1 - before, score) * live
    values = {"weighted": probability[:, :prefix, None] * x[:, :prefix].float(), "score": score * live}
    stays = live & ~halts
    if early_exit:
        stays &= stays[:, :prefix].any(dim=1, keepdim=True)
    others = {"halts": halts & live}
    if capacity is not None:
        others["count"] = int(stays.sum())
    if capacity:
        missing = max(capacity - int(stays.sum()), 0)
        values["rows"] = F.pad(x[stays][:capacity], (0, 0, 0, missing))
        values["cumulative"] = F.pad(cumulative[stays][:capacity], (0, missing))
        others["token"], others["cu_seqlens"] = expected_store(stays, capacity)
    return values, others


def assume_clear_decisions(case, x):
    """Discard cases in which rounding could flip a decision. x: [B, N, C]."""
    _, cumulative = score_and_cumulative(case, x, case.to_dense(case.cumulative))
    assume(not ((cumulative - LIMIT).abs() < 1e-5)[case.live].any())


def as_dicts(case, halted):
    """Return the outputs of the kernels in the form of `reference`."""
    values = {"weighted": halted.weighted, "score": case.to_dense(halted.score)}
    others = {"halts": case.to_dense(halted.halts)}
    surplus = case.tokens.token == case.live.numel()
    assert not halted.score[surplus].any()
    assert not halted.halts[surplus].any()
    if halted.count is not None:
        others["count"] = int(halted.count)
    if halted.tokens is not None:
        values |= {"rows": halted.rows, "cumulative": halted.cumulative}
        others |= {"token": halted.tokens.token, "cu_seqlens": halted.tokens.cu_seqlens}
    return {name: value for name, value in values.items() if value is not None}, others


def draw_capacity(data, case, early_exit):
    """Draw the capacity of the next block: none, the end of the plan, tight, large or too small."""
    kind = data.draw(st.sampled_from(["last block", "end of plan", "tight", "large", "too small"]))
    if kind in ("last block", "end of plan"):
        return None if kind == "last block" else 0
    _, others = reference(case, case.x * case.live[..., None], case.before * case.live, 0, early_exit)
    capacity = others["count"] + {"tight": 0, "large": 45, "too small": -3}[kind]
    return min(max(capacity, 1), len(case.tokens.token))


def gradients(values, *inputs):
    torch.manual_seed(0)
    values = {name: value for name, value in values.items() if value.requires_grad}
    loss = sum((value * torch.randn(value.shape)).float().sum() for _, value in sorted(values.items()))
    return torch.autograd.grad(loss, inputs)


@settings(max_examples=60)
@given(cases(), st.booleans(), st.data())
def test_halt_equals_reference(case, early_exit, data):
    assume_clear_decisions(case, case.to_dense(case.rows))
    capacity = draw_capacity(data, case, early_exit)
    rows, cumulative = case.rows.clone().requires_grad_(), case.cumulative.clone().requires_grad_()
    halted = kernels.halt(case.tokens, rows, cumulative, case.gate, capacity, early_exit)
    found, found_others = as_dicts(case, halted)
    expected, expected_others = reference(case, case.to_dense(rows), case.to_dense(cumulative), capacity, early_exit)
    assert_close(found, expected)
    assert_close(found_others, expected_others)
    tolerance = {} if rows.dtype == torch.float32 else HALF
    inputs = (rows, cumulative) if case.gate.direction is None else (rows,)
    assert_close(gradients(found, *inputs), gradients(expected, *inputs), **tolerance)


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
@torch.no_grad()
def test_decide_and_move_equals_reference(case, early_exit, has_gamma, dtype, data):
    torch.manual_seed(0)
    width = case.x.shape[2]
    gamma, norm = torch.randn(width) if has_gamma else None, nn.LayerNorm(width)
    norm.weight.copy_(torch.randn(width))
    norm.bias.copy_(torch.randn(width))
    branch = torch.randn_like(case.rows, dtype=dtype)
    total, _ = kernels.add_norm(case.rows, branch, gamma, norm, dtype)  # the same sum, with the same rounding
    x, before = case.to_dense(total), case.to_dense(case.cumulative)
    case.x = x
    assume_clear_decisions(case, x)
    capacity = draw_capacity(data, case, early_exit)
    expected, expected_others = reference(case, x, before, capacity, early_exit)
    before_features = torch.randn_like(expected["weighted"])
    features = before_features.clone()
    halted = kernels.decide_and_move(
        case.tokens, case.rows, branch, gamma, case.cumulative, case.gate, capacity, early_exit, features, norm, dtype
    )
    found, found_others = as_dicts(case, halted._replace(weighted=features - before_features))
    assert_close(found, expected)
    assert_close(found_others, expected_others)
    if capacity:
        is_token = (halted.tokens.token < case.live.numel())[:, None]
        normed = F.layer_norm(halted.rows.float(), (width,), norm.weight, norm.bias) * is_token
        assert_close(halted.normed, normed.to(dtype), **TOLERANCES[dtype])


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.sampled_from([1, 5, 192]), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans()
)
@torch.no_grad()
def test_add_norm_equals_layer_norm_of_the_sum(count, width, dtype, branch_dtype, has_gamma):
    torch.manual_seed(count)
    norm = nn.LayerNorm(width, eps=1e-3)
    norm.weight.copy_(torch.randn(width))
    rows, branch = torch.randn(count, width).to(dtype), torch.randn(count, width).to(branch_dtype)
    gamma = torch.randn(width) if has_gamma else None
    found, normed = kernels.add_norm(rows, branch, gamma, norm, branch_dtype)
    expected = rows.float() + branch.float() * (1.0 if gamma is None else gamma)
    assert_close(found, expected.to(dtype), **TOLERANCES[dtype])
    expected_norm = F.layer_norm(found.float(), (width,), norm.weight, norm.bias, norm.eps)
    assert_close(normed, expected_norm.to(branch_dtype), **TOLERANCES[branch_dtype])


@torch.no_grad()
def test_add_norm_without_branch_copies_no_rows():
    rows, norm = torch.randn(5, 6), nn.LayerNorm(6)
    found, normed = kernels.add_norm(rows, None, None, norm, torch.float32)
    assert found.data_ptr() == rows.data_ptr()
    assert_close(normed, norm(rows))


# Edges --------------------------------------------------------------------------------------------


def full_case(x, num_prefix_tokens=1):
    """Return the case of a first block. x: [B, N, C]."""
    live = torch.ones(x.shape[:2], dtype=torch.bool)
    return Case(live, num_prefix_tokens, x, torch.zeros(x.shape[:2]), torch.zeros(len(x)), None)


def test_nan_score_halts_no_token():
    case = full_case(torch.full((1, 3, 4), torch.nan))
    halted = kernels.halt(case.tokens, case.rows, case.cumulative, case.gate, 3, early_exit=True)
    assert not halted.halts.any()
    assert int(halted.count) == 3


def test_nan_of_one_image_stays_in_it():
    live = torch.tensor([[True, True], [False, True]])
    x = torch.randn(2, 2, 3)
    x[0] = torch.nan
    case = Case(live, 1, x, torch.zeros(2, 2), torch.zeros(2), 0)
    halted = kernels.halt(case.tokens, case.rows, case.cumulative, case.gate, None, early_exit=False)
    assert halted.weighted[0].isnan().all()
    assert not halted.weighted[1].any()  # its prefix token has halted earlier


def test_strided_rows_equal_contiguous_rows():
    case = full_case(torch.randn(1, 6, 8))
    strided = case.rows.t().contiguous().t()
    assert not strided.is_contiguous()
    found, expected = (
        kernels.halt(case.tokens, rows, case.cumulative, case.gate, 6, False) for rows in (strided, case.rows)
    )
    assert_close([found.rows, found.weighted], [expected.rows, expected.weighted])
    norm = nn.LayerNorm(8)
    assert_close(*(kernels.add_norm(rows, None, None, norm, torch.float32)[1] for rows in (strided, case.rows)))


@pytest.mark.parametrize("name", ["weighted", "score", "rows", "cumulative"])
def test_gradient_of_one_output_equals_reference(name):
    """The other outputs are not used, so their gradients are None."""
    case = full_case(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)))
    rows, cumulative = case.rows.clone().requires_grad_(), case.cumulative.clone().requires_grad_()
    found, _ = as_dicts(case, kernels.halt(case.tokens, rows, cumulative, case.gate, 10, early_exit=False))
    expected, _ = reference(case, case.to_dense(rows), case.to_dense(cumulative), 10, early_exit=False)
    found, expected = (
        torch.autograd.grad(values[name].square().sum(), (rows, cumulative), allow_unused=True, materialize_grads=True)
        for values in (found, expected)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("direction", [None, torch.ones(4)], ids=["channel 0", "direction"])
@pytest.mark.parametrize("capacity", [None, 0, 20])
def test_operator_has_valid_fake_and_gradient(capacity, direction):
    """The check runs the operator under fake tensors and under AOT dispatch, as torch.compile does."""
    case = full_case(torch.randn(2, 15, 3))
    case.gate = case.gate._replace(direction=direction)
    rows, cumulative = case.rows.clone().requires_grad_(), case.cumulative.clone().requires_grad_()
    options = (capacity or 0, capacity is None, False, True)  # and is_last_block, early_exit, save_prefix
    torch.library.opcheck(
        torch.ops.avit.halt.default,
        (rows, cumulative, case.tokens.token, case.tokens.cu_seqlens, *case.gate, 15, 1, *options),
    )


def test_two_batches_need_the_same_launches(monkeypatch):
    """No shape and no number of programs depends on a decision."""
    launches = []

    def record(kernel, programs, *args, original=kernels.launch, **options):
        launches[-1] += [(programs, [getattr(arg, "shape", arg) for arg in args], options)]
        original(kernel, programs, *args, **options)

    monkeypatch.setattr(kernels, "launch", record)
    counts = []
    for seed in (1, 2):
        launches.append([])
        case = full_case(torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(seed)))
        rows = case.rows.requires_grad_()
        first = kernels.halt(case.tokens, rows, case.cumulative, case.gate, 50, early_exit=False)
        second = kernels.halt(first.tokens, first.rows, first.cumulative, case.gate, 40, early_exit=True)
        second.rows.sum().backward()
        counts.append([int(first.count), int(second.count)])
    assert counts[0] != counts[1]
    assert launches[0] == launches[1]
    assert len(launches[0]) == 6


@pytest.mark.parametrize("early_exit", [False, True])
def test_images_that_a_smaller_batch_lacks_keep_no_rows(early_exit):
    tokens, x = PlannedTokens.all_live((3, 5), 1, torch.device("cpu")), torch.full((15, 4), -9.0)
    tokens.token[10:] = 15
    gate = PlannedGate(torch.tensor([SCALE, LIMIT]), torch.zeros(3))
    halted = kernels.halt(tokens, x, torch.zeros(15), gate, 15, early_exit)
    assert halted.count == 10
    assert halted.tokens.token.tolist() == [*range(10), *[15] * 5]
    assert halted.tokens.cu_seqlens.tolist() == [0, 5, 10, 10, 15, 15, 15]
    assert not halted.weighted[2].any()
