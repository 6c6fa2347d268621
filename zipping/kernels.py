"""What follows a block on CUDA, in three Triton kernels: scores and decisions, what leaves, and the backward of both.

The same as `models_act.halting_step`, `PackedTokensCUDA.prefix` and `PackedTokensCUDA.drop` after each other,
with one pass over the rows and some 6 launches instead of 26 (docs/performance.md): on a GPU the host is
what small batches wait for. The backward writes each gradient once, in no order that could vary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHANNELS = 128  # that a program takes at a time, at most
ROWS = 16  # that a program of the kernels that move rows takes


@triton.jit
def _halting_kernel(
    rows, before, token, bounds, minus_center, limit,  # what is read, see `Halt`
    score, cumulative, halts, place, counts, prefix,  # what is written
    scale, width, length,
    LAST: tl.constexpr, EARLY_EXIT: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program b: image b's scores and decisions, its prefix tokens' rows, 0 where one has left, and places.

    place: of a row among those of its image that stay, -1 where it leaves; counts: [I + 1], 0 and how many stay.
    """
    image = tl.program_id(0)
    start = tl.load(bounds + image)
    offset = tl.arange(0, BLOCK)
    here = offset < tl.load(bounds + image + 1) - start
    row = (start + offset).to(tl.int64)
    number = tl.load(token + row, mask=here, other=0) - image * length  # of the token in its image
    first = tl.load(rows + row * width, mask=here, other=0.0).to(tl.float32)
    own_score = 1.0 / (1.0 + tl.exp(-(tl.load(minus_center) + scale * first)))
    reached = tl.load(before + row, mask=here, other=0.0) + own_score
    leaves = reached >= tl.load(limit)  # not so where it is not a number
    if LAST:
        leaves = leaves | here
    tl.store(score + row, own_score, mask=here)
    tl.store(cumulative + row, reached, mask=here)
    tl.store(halts + row, leaves.to(tl.uint8), mask=here)
    for slot in tl.static_range(PREFIX):
        found = here & (number == slot)
        source = tl.sum(tl.where(found, row, 0), 0)
        is_there = tl.sum(found.to(tl.int32), 0) > 0
        for begin in range(0, width, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            x = tl.load(rows + source * width + channel, mask=(channel < width) & is_there, other=0.0)
            tl.store(prefix + (image * PREFIX + slot).to(tl.int64) * width + channel, x, mask=channel < width)
    if not LAST:
        stays = here & (leaves == 0)
        if EARLY_EXIT:
            stays = stays & (tl.sum((stays & (number < PREFIX)).to(tl.int32), 0) > 0)
        ones = stays.to(tl.int32)
        tl.store(place + row, tl.where(stays, tl.cumsum(ones, 0) - 1, -1), mask=here)
        tl.store(counts + image + 1, tl.sum(ones, 0))
        tl.store(counts, 0, mask=image == 0)


@triton.jit(do_not_specialize=["count"])
def _compact_kernel(
    rows, cumulative, token, place, new_bounds,  # what is read
    new_rows, new_cumulative, new_token,  # what is written
    count, width, length,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each of `count` rows that stays, and what goes with it, to its place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    own_place = tl.load(place + row, mask=row < count, other=-1)
    stays = own_place >= 0
    own_token = tl.load(token + row, mask=stays, other=0)
    target = (tl.load(new_bounds + own_token // length, mask=stays, other=0) + own_place).to(tl.int64)
    tl.store(new_cumulative + target, tl.load(cumulative + row, mask=stays, other=0.0), mask=stays)
    tl.store(new_token + target, own_token, mask=stays)
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        mask = stays[:, None] & (channel < width)
        x = tl.load(rows + row[:, None] * width + channel, mask=mask, other=0.0)
        tl.store(new_rows + target[:, None] * width + channel, x, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _backward(
    grad_new_rows, grad_new_cumulative, grad_score, grad_prefix, score, token, place, new_bounds,  # what is read
    grad_rows, grad_before,  # what is written
    scale, count, width, length,
    LAST: tl.constexpr, PREFIX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of `count` rows and of their earlier scores: each row's own, through its score and as a prefix."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < count
    own_token = tl.load(token + row, mask=inside, other=0)
    image, number = own_token // length, own_token % length
    own_score = tl.load(score + row, mask=inside, other=0.0)
    of_score = tl.load(grad_score + row, mask=inside, other=0.0)
    if not LAST:
        own_place = tl.load(place + row, mask=inside, other=-1)
        stays = own_place >= 0
        target = (tl.load(new_bounds + image, mask=stays, other=0) + own_place).to(tl.int64)
        of_cumulative = tl.load(grad_new_cumulative + target, mask=stays, other=0.0)
        tl.store(grad_before + row, of_cumulative, mask=inside)
        of_score += of_cumulative
    through_score = of_score * scale * own_score * (1.0 - own_score)
    is_prefix = inside & (number < PREFIX)
    slot = image * PREFIX + number
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        exists = channel < width
        gradient = tl.load(grad_prefix + slot[:, None] * width + channel, mask=is_prefix[:, None] & exists, other=0.0)
        gradient = gradient.to(tl.float32) + tl.where(channel == 0, through_score[:, None], 0.0)
        if not LAST:
            mask = stays[:, None] & exists
            gradient += tl.load(grad_new_rows + target[:, None] * width + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + row[:, None] * width + channel, gradient, mask=inside[:, None] & exists)


class Halt(torch.autograd.Function):
    """One block's halting; differentiable in the rows and the earlier scores, once.

    rows: [T, C] of any floating type, T above 0; before: [T] float32; token: [T] int64; bounds: [B + 1] int32, of
    all B images; minus_center, limit: of no dimension, float32; scale: a number; size: B, N; num_prefix_tokens: P.
    Returns score [T], halts [T] bool, the prefix tokens' rows [B, P, C], zero where one has left; and, but for
    the last block, of the rows that stay: rows, cumulative scores, tokens, bounds. Waits for the device once.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        before: Tensor,
        token: Tensor,
        bounds: Tensor,
        minus_center: Tensor,
        limit: Tensor,
        scale: float,
        size: tuple[int, int],
        num_prefix_tokens: int,
        last: bool,
        early_exit: bool,
    ) -> tuple[Tensor | None, ...]:
        rows, (count, width), (batch, length) = rows.contiguous(), rows.shape, size
        block, channels = triton.next_power_of_2(length), min(CHANNELS, triton.next_power_of_2(width))
        score, cumulative = torch.empty_like(before), torch.empty_like(before)
        halts = torch.empty(count, dtype=torch.uint8, device=rows.device)
        place, counts = halts, halts  # of which the last block makes no use
        if not last:
            place, counts = torch.empty_like(token, dtype=torch.int32), torch.empty_like(bounds)
        prefix = rows.new_empty(batch, num_prefix_tokens, width)
        _halting_kernel[(batch,)](
            rows, before, token, bounds, minus_center, limit, score, cumulative, halts, place, counts, prefix,
            scale, width, length, LAST=last, EARLY_EXIT=early_exit, PREFIX=num_prefix_tokens,
            BLOCK=block, CHANNELS=channels, num_warps=min(max(block // 128, 4), 16),
        )  # fmt: skip
        new_rows, new_cumulative, new_token, new_bounds = None, None, None, None
        if not last:
            new_bounds = counts.cumsum(0, dtype=torch.int32)
            stay = int(new_bounds[-1])
            new_rows, new_cumulative, new_token = rows.view_as(rows), cumulative, token
            if stay < count:
                new_rows, new_cumulative = rows.new_empty(stay, width), before.new_empty(stay)
                new_token = token.new_empty(stay)
            if 0 < stay < count:
                _compact_kernel[(triton.cdiv(count, ROWS),)](
                    rows, cumulative, token, place, new_bounds, new_rows, new_cumulative, new_token,
                    count, width, length, ROWS=ROWS, CHANNELS=channels,
                )  # fmt: skip
        halts = halts.view(torch.bool)
        ctx.mark_non_differentiable(*(x for x in (halts, new_token, new_bounds) if x is not None))
        ctx.set_materialize_grads(False)  # of what nothing is to be made: zeros that are not asked for
        ctx.save_for_backward(score, token, place, bounds if last else new_bounds)
        shapes = [0 if x is None else x.shape for x in (score, prefix, new_rows, new_cumulative)]
        ctx.numbers = scale, length, last, channels, shapes
        return score, halts, prefix, new_rows, new_cumulative, new_token, new_bounds

    @staticmethod
    @once_differentiable
    def backward(
        ctx,
        grad_score: Tensor | None,
        _,
        grad_prefix: Tensor | None,
        grad_new_rows: Tensor | None,
        grad_new_cumulative: Tensor | None,
        *__,
    ) -> tuple[Tensor | None, ...]:
        score, token, place, new_bounds = ctx.saved_tensors
        scale, length, last, channels, shapes = ctx.numbers
        found = (grad_score, grad_prefix, grad_new_rows, grad_new_cumulative)
        grad_score, grad_prefix, grad_new_rows, grad_new_cumulative = (
            score.new_zeros(shape) if gradient is None else gradient.contiguous()
            for gradient, shape in zip(found, shapes)
        )
        (count,), (*_, num_prefix_tokens, width) = shapes[:2]
        grad_rows, grad_before = grad_prefix.new_empty(count, width), torch.empty_like(score)
        _backward[(triton.cdiv(count, ROWS),)](
            grad_new_rows, grad_new_cumulative, grad_score, grad_prefix, score, token, place, new_bounds,
            grad_rows, grad_before, scale, count, width, length,
            LAST=last, PREFIX=num_prefix_tokens, ROWS=ROWS, CHANNELS=channels,
        )  # fmt: skip
        return grad_rows, None if last else grad_before, *[None] * 9
