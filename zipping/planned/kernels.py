"""Halting and norms of the planned mode, computed by Triton kernels.

`halt` follows a block in training and inference: two launches forward, one backward. It calls the operator
`avit::halt`, which torch.compile can trace. In inference, `add_norm` and `decide_and_move` also compute the
residual sums and the norms. No shape, branch or launch depends on which tokens halt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn

from zipping.planned.tokens import PlannedGate, PlannedTokens
from zipping.planned.triton_kernels import add_norm_kernel, decide_kernel, halt_backward_kernel, move_kernel

CHANNELS = 128  # upper bound for the channels that a program loads at a time
ROWS = 16  # rows of a program that may load their channels in parts
ELEMENTS = 4096  # elements of a program that needs all channels of its rows


class Halted(NamedTuple):
    """Result of one block's halting.

    score: [c] float32, 0 in surplus rows; halts: [c] bool, False in surplus rows;
    weighted: [B, P, C] float32, p_l x_l of the prefix tokens, 0 if one has halted earlier; None if it was
    added to `features`.
    The others are None after the network's last block, and all but `count` if the plan ends:
    count: [] int, the number of rows that stay, which may exceed the capacity;
    tokens, rows, cumulative: the tokens that stay live, their states and their cumulative scores;
    normed: the next block's first norm of `rows`, from `decide_and_move` only.
    """

    score: Tensor
    halts: Tensor
    weighted: Tensor | None
    tokens: PlannedTokens | None = None
    rows: Tensor | None = None
    cumulative: Tensor | None = None
    count: Tensor | None = None
    normed: Tensor | None = None


# Launches ----------------------------------------------------------------------------------------


def launch(kernel, programs: int, *args, **options) -> None:
    """Launch a kernel on the device of its first argument. Every launch of this module goes through this function."""
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **options)


def _decide(
    tokens: PlannedTokens,
    rows: Tensor,
    cumulative_before: Tensor,
    gate: PlannedGate,
    is_last_block: bool,
    early_exit: bool,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    features: Tensor | None = None,
    prefix: Tensor | None = None,
    weighted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch `decide_kernel` for the rows + gamma * branch.

    features, prefix, weighted: [B, P, C] each, written by the kernel if present.
    Returns score, halts, cumulative scores, dest_offset and counts. The last three are None in the last block.
    """
    (count, width), (batch, length) = rows.shape, tokens.size
    block = triton.next_power_of_2(length)
    score = torch.empty_like(cumulative_before)
    halts = torch.empty(count, dtype=torch.uint8, device=rows.device)
    cumulative = dest_offset = counts = None
    if not is_last_block:
        cumulative = torch.empty_like(score)
        dest_offset = torch.empty(count, dtype=torch.int32, device=rows.device)
        counts = torch.empty(batch, dtype=torch.int32, device=rows.device)
    launch(
        decide_kernel, len(tokens.cu_seqlens) - 1,
        rows, branch, gamma, cumulative_before, tokens.token, tokens.cu_seqlens, *gate, features,
        score, cumulative, halts, prefix, weighted, dest_offset, counts, width, length, batch,
        LAST=is_last_block, EARLY_EXIT=early_exit, PREFIX=tokens.num_prefix_tokens, BLOCK=block,
        CHANNELS=min(CHANNELS, triton.next_power_of_2(width)), num_warps=min(max(block // 128, 4), 16),
    )  # fmt: skip
    return score, halts.view(torch.bool), cumulative, dest_offset, counts


def _move(
    tokens: PlannedTokens,
    rows: Tensor,
    cumulative: Tensor,
    dest_offset: Tensor,
    counts: Tensor,
    capacity: int,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Launch `move_kernel` for the rows + gamma * branch.

    norm: the next block's first norm, computed in float32 and returned in `dtype`, or None.
    Returns count, rows, cumulative scores, token, cu_seqlens and normed.
    """
    width, (batch, length) = rows.shape[1], tokens.size
    num_rows, channels = (ROWS, min(CHANNELS, triton.next_power_of_2(width))) if norm is None else _whole_rows(width)
    parts, dummies = triton.cdiv(length, num_rows), triton.cdiv(capacity, length)
    new_rows, new_cumulative = rows.new_empty(capacity, width), cumulative.new_empty(capacity)
    new_token, new_cu_seqlens = tokens.token.new_empty(capacity), tokens.cu_seqlens.new_empty(batch + dummies + 1)
    normed = None if norm is None else torch.empty_like(new_rows, dtype=dtype)
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    count = counts.new_empty(())
    launch(
        move_kernel, batch * parts + triton.cdiv(capacity, num_rows),
        rows, branch, gamma, cumulative, tokens.token, tokens.cu_seqlens, dest_offset, counts, weight, bias,
        new_rows, normed, new_cumulative, new_token, new_cu_seqlens, count,
        width, length, batch, parts, capacity, dummies, eps,
        IMAGES=triton.next_power_of_2(batch), DUMMIES=triton.next_power_of_2(batch + 1),
        ROWS=num_rows, CHANNELS=channels,
    )  # fmt: skip
    return count, new_rows, new_cumulative, new_token, new_cu_seqlens, normed


def _whole_rows(width: int) -> tuple[int, int]:
    """Return how many rows a program handles that needs whole rows, and its channels."""
    channels = triton.next_power_of_2(width)
    return max(ELEMENTS // channels, 1), channels


# Halting in training and inference ---------------------------------------------------------------


@torch.library.custom_op("avit::halt", mutates_args=())
def _halt_op(
    rows: Tensor, cumulative_before: Tensor, token: Tensor, cu_seqlens: Tensor,
    scale_and_limit: Tensor, minus_center: Tensor, direction: Tensor | None, length: int, num_prefix_tokens: int,
    capacity: int, is_last_block: bool, early_exit: bool, save_prefix: bool,
) -> list[Tensor]:  # fmt: skip
    """Compute `halt`; see `PlannedTokens` and `PlannedGate` for the tensors.

    Returns score; halts; weighted; dest_offset, empty after the last block; the states of the prefix tokens,
    empty unless `save_prefix`; then, unless this is the last block, count; then, if the capacity is above 0,
    of the rows that stay: rows, cumulative scores, token, cu_seqlens.
    """
    tokens = PlannedTokens((len(minus_center), length), num_prefix_tokens, token, cu_seqlens)
    gate, rows = PlannedGate(scale_and_limit, minus_center, direction), rows.contiguous()
    weighted = rows.new_empty(len(minus_center), num_prefix_tokens, rows.shape[1], dtype=torch.float32)
    prefix = torch.empty_like(weighted, dtype=rows.dtype) if save_prefix else None
    score, halts, cumulative, dest_offset, counts = _decide(
        tokens, rows, cumulative_before, gate, is_last_block, early_exit, prefix=prefix, weighted=weighted
    )
    results = [score, halts, weighted]
    results += [token.new_empty(0, dtype=torch.int32) if dest_offset is None else dest_offset]
    results += [rows.new_empty(0) if prefix is None else prefix]
    if is_last_block:
        return results
    if capacity == 0:
        return [*results, counts.sum()]
    *kept, _ = _move(tokens, rows, cumulative, dest_offset, counts, capacity)
    return [*results, *kept]


@_halt_op.register_fake
def _(
    rows, cumulative_before, token, cu_seqlens, scale_and_limit, minus_center, direction, length, num_prefix_tokens,
    capacity, is_last_block, early_exit, save_prefix,
):  # fmt: skip
    (rows_before, width), batch = rows.shape, len(minus_center)
    weighted = rows.new_empty(batch, num_prefix_tokens, width, dtype=torch.float32)
    results = [torch.empty_like(cumulative_before), rows.new_empty(rows_before, dtype=torch.bool), weighted]
    results += [token.new_empty(0 if is_last_block else rows_before, dtype=torch.int32)]
    results += [torch.empty_like(weighted, dtype=rows.dtype) if save_prefix else rows.new_empty(0)]
    if is_last_block:
        return results
    if capacity == 0:
        return [*results, token.new_empty(())]
    kept = [rows.new_empty(capacity, width), cumulative_before.new_empty(capacity), token.new_empty(capacity)]
    new_cu_seqlens = cu_seqlens.new_empty(batch + triton.cdiv(capacity, length) + 1)
    return [*results, token.new_empty((), dtype=torch.int32), *kept, new_cu_seqlens]


@torch.library.custom_op("avit::halt_backward", mutates_args=())
def _halt_backward_op(
    grad_new_rows: Tensor | None, grad_new_cumulative: Tensor | None, grad_score: Tensor | None,
    grad_weighted: Tensor | None, score: Tensor, cumulative_before: Tensor, halts: Tensor, prefix: Tensor,
    token: Tensor, dest_offset: Tensor | None, new_cu_seqlens: Tensor | None, scale_and_limit: Tensor,
    length: int, capacity: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows and cumulative_before; see `_halt_op`. A gradient that is None is zero."""
    batch, num_prefix_tokens, width = prefix.shape
    count = len(score)
    grad_rows, grad_before = prefix.new_empty(count, width), torch.empty_like(score)
    gradients = (grad_new_rows, grad_new_cumulative, grad_score, grad_weighted)
    launch(
        halt_backward_kernel, triton.cdiv(count, ROWS),
        score, cumulative_before, halts.view(torch.uint8), prefix, token, dest_offset, new_cu_seqlens, scale_and_limit,
        *(None if gradient is None else gradient.contiguous() for gradient in gradients), grad_rows, grad_before,
        count, width, length, batch, capacity,
        PREFIX=num_prefix_tokens, ROWS=ROWS, CHANNELS=min(CHANNELS, triton.next_power_of_2(width)),
    )  # fmt: skip
    return grad_rows, grad_before


@_halt_backward_op.register_fake
def _(grad_new_rows, grad_new_cumulative, grad_score, grad_weighted, score, cumulative_before, halts, prefix, *_):
    return prefix.new_empty(len(score), prefix.shape[2]), torch.empty_like(score)


def _save_for_backward(ctx, inputs: tuple, output: list[Tensor]) -> None:
    _, cumulative_before, token, _, scale_and_limit, _, _, length, _, capacity, *_ = inputs
    score, halts, _, dest_offset, prefix, *kept = output
    ctx.set_materialize_grads(False)  # do not allocate zero gradients for unused outputs
    places = (dest_offset, kept[-1]) if capacity > 0 else (None, None)
    ctx.save_for_backward(score, cumulative_before, halts, prefix, token, *places, scale_and_limit)
    ctx.numbers = length, capacity


def _halt_backward(ctx, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad_score, _, grad_weighted, _, _, *kept = gradients
    grad_new_rows, grad_new_cumulative = kept[1:3] if len(kept) > 1 else (None, None)
    gradients = (grad_new_rows, grad_new_cumulative, grad_score, grad_weighted)
    return *_halt_backward_op(*gradients, *ctx.saved_tensors, *ctx.numbers), *[None] * 11


_halt_op.register_autograd(_halt_backward, setup_context=_save_for_backward)


def halt(
    tokens: PlannedTokens,
    rows: Tensor,
    cumulative: Tensor,
    gate: PlannedGate,
    capacity: int | None,
    early_exit: bool,
) -> Halted:
    """Compute one block's scores and decisions, and keep the rows of tokens that stay live.

    rows: [c, C] of any floating dtype, the block's output; cumulative: [c] float32, scores before the block;
    capacity: rows of the next block, 0 if the plan ends here, None after the network's last block;
    early_exit: drop all rows of an image once its prefix tokens have halted.
    Differentiable once, in the rows and the cumulative scores. The scores of a direction have no gradient.
    """
    needs_grad = torch.is_grad_enabled() and (rows.requires_grad or cumulative.requires_grad)
    score, halts, weighted, _, _, *kept = _halt_op(
        rows, cumulative, tokens.token, tokens.cu_seqlens, *gate, tokens.size[1], tokens.num_prefix_tokens,
        capacity or 0, capacity is None, early_exit, needs_grad,
    )  # fmt: skip
    halted = _halted(tokens, score, halts, weighted, *kept)
    if gate.direction is None:
        return halted
    cumulative = None if halted.cumulative is None else halted.cumulative.detach()
    return halted._replace(score=halted.score.detach(), cumulative=cumulative)


def _halted(
    tokens: PlannedTokens,
    score: Tensor,
    halts: Tensor,
    weighted: Tensor | None,
    count: Tensor | None = None,
    rows: Tensor | None = None,
    cumulative: Tensor | None = None,
    token: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normed: Tensor | None = None,
) -> Halted:
    """Build `Halted`, with the store of the rows that stay if there are any."""
    kept = None if token is None else replace(tokens, token=token, cu_seqlens=cu_seqlens)
    return Halted(score, halts, weighted, kept, rows, cumulative, count, normed)


# Fused inference ---------------------------------------------------------------------------------


def add_norm(
    rows: Tensor, branch: Tensor | None, gamma: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return rows + gamma * branch, in the dtype of the rows, and its layer norm, in `dtype`.

    rows, branch: [c, C]; a branch that is None is zero; gamma: [C], layer scale, or None for 1;
    norm: a layer norm with weight and bias. The norm is computed in float32.
    """
    rows, (count, width) = rows.contiguous(), rows.shape
    num_rows, channels = _whole_rows(width)
    new_rows = rows if branch is None else torch.empty_like(rows)
    normed = torch.empty_like(rows, dtype=dtype)
    launch(
        add_norm_kernel, triton.cdiv(count, num_rows),
        rows, branch, gamma, norm.weight, norm.bias, new_rows, normed, count, width, norm.eps,
        ROWS=num_rows, CHANNELS=channels,
    )  # fmt: skip
    return new_rows, normed


def decide_and_move(
    tokens: PlannedTokens,
    rows: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    cumulative: Tensor,
    gate: PlannedGate,
    capacity: int | None,
    early_exit: bool,
    features: Tensor,
    next_norm: nn.LayerNorm | None,
    dtype: torch.dtype,
) -> Halted:
    """Compute `halt` for the rows + gamma * branch, in inference, and the next block's first norm in `dtype`.

    rows, branch: [c, C] contiguous; gamma: see `add_norm`; the sum is rounded to the dtype of the rows;
    features: [B, P, C] float32, to which p_l x_l of the prefix tokens is added in place;
    next_norm: a layer norm with weight and bias, None if no rows are kept.
    """
    score, halts, cumulative, dest_offset, counts = _decide(
        tokens, rows, cumulative, gate, capacity is None, early_exit, branch=branch, gamma=gamma, features=features
    )
    if capacity is None:
        return Halted(score, halts, None)
    if capacity == 0:
        return Halted(score, halts, None, count=counts.sum())
    kept = _move(
        tokens, rows, cumulative, dest_offset, counts, capacity, branch=branch, gamma=gamma, norm=next_norm, dtype=dtype
    )
    return _halted(tokens, score, halts, None, *kept)
