"""Triton kernels for the halting step after a block on CUDA.

They compute the same as `zipping.halting.halting_step` and `zipping.drop_halted`, with one pass over the
rows. Per block they need about 5 launches in addition to those of a static block, PyTorch ops about
26 (docs/performance_h200.md). Small batches are launch-bound, so fewer launches make them faster.
The backward kernel writes each gradient once, so its result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHANNELS = 128  # upper bound for the channels that a program loads at a time
ROWS = 16  # rows per program of the compaction and backward kernels
TILE_ELEMENTS = tl.constexpr(8192)  # numbers that a program multiplies with a direction at a time


@triton.jit
def load_sum(rows, branch, gamma, index, channel, mask, width):
    """Return rows + gamma * branch, rounded to the dtype of the rows. gamma, or branch too, may be None."""
    x = tl.load(rows + index, mask=mask, other=0.0)
    if branch is not None:
        y = tl.load(branch + index, mask=mask, other=0.0).to(tl.float32)
        if gamma is not None:
            y *= tl.load(gamma + channel, mask=channel < width, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + y).to(rows.dtype.element_ty)
    return x


@triton.jit
def load_score(
    rows, branch, gamma, direction, scale, minus_center,
    row, in_image, position, width,
    PREFIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the halting score of each row + gamma * branch, see `zipping.gate.Gate`.

    direction: [C + 1], or None for a gate that reads channel 0; minus_center: [], of the image;
    row: [BLOCK] int64; position: [BLOCK], of the token in its image.
    """
    if direction is None:
        value = load_sum(rows, branch, gamma, row * width, 0, in_image, width).to(tl.float32)
    else:
        value = tl.zeros([BLOCK], tl.float32) + tl.load(direction + width).to(tl.float32)
        tile: tl.constexpr = TILE_ELEMENTS // BLOCK if BLOCK < TILE_ELEMENTS else 1  # channels at a time
        for begin in range(0, width, tile):
            channel = begin + tl.arange(0, tile)[None, :]
            exists = channel < width
            weight = tl.load(direction + channel, mask=exists, other=0.0).to(tl.float32)
            mask = in_image[:, None] & exists
            x = load_sum(rows, branch, gamma, row[:, None] * width + channel, channel, mask, width)
            value += tl.sum(x.to(tl.float32) * weight, 1)
    score = 1.0 / (1.0 + tl.exp(-(tl.load(minus_center) + scale * value)))
    if direction is not None:
        score = tl.where(position < PREFIX, 0.0, score)
    return score


@triton.jit
def _halting_kernel(
    rows, cumulative_before, token, cu_seqlens, minus_center, limit, direction,  # inputs, see `HaltAndDrop`
    score, cumulative, halts, dest_offset, counts, prefix,  # outputs
    scale, width, length,
    LAST: tl.constexpr, EARLY_EXIT: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute scores, decisions and prefix-token states; program b handles image b.

    prefix: [B, P, C], 0 for halted tokens;
    dest_offset: [T], a row's place among the rows of its image that stay, -1 if it is dropped;
    counts: [B + 1], 0, then the number of rows that stay in each image.
    """
    image = tl.program_id(0)
    start = tl.load(cu_seqlens + image)
    offset = tl.arange(0, BLOCK)
    in_image = offset < tl.load(cu_seqlens + image + 1) - start
    row = (start + offset).to(tl.int64)
    position = tl.load(token + row, mask=in_image, other=0) - image * length  # of the token in its image
    row_score = load_score(
        rows, None, None, direction, scale, minus_center, row, in_image, position, width, PREFIX, BLOCK
    )
    row_cumulative = tl.load(cumulative_before + row, mask=in_image, other=0.0) + row_score
    row_halts = row_cumulative >= tl.load(limit)  # False for NaN
    if LAST:
        row_halts = row_halts | in_image
    tl.store(score + row, row_score, mask=in_image)
    tl.store(cumulative + row, row_cumulative, mask=in_image)
    tl.store(halts + row, row_halts.to(tl.uint8), mask=in_image)
    for slot in tl.static_range(PREFIX):
        is_slot = in_image & (position == slot)
        source = tl.sum(tl.where(is_slot, row, 0), 0)
        is_live = tl.sum(is_slot.to(tl.int32), 0) > 0
        for begin in range(0, width, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            x = tl.load(rows + source * width + channel, mask=(channel < width) & is_live, other=0.0)
            tl.store(prefix + (image * PREFIX + slot).to(tl.int64) * width + channel, x, mask=channel < width)
    if not LAST:
        stays = in_image & (row_halts == 0)
        if EARLY_EXIT:
            stays = stays & (tl.sum((stays & (position < PREFIX)).to(tl.int32), 0) > 0)
        ones = stays.to(tl.int32)
        tl.store(dest_offset + row, tl.where(stays, tl.cumsum(ones, 0) - 1, -1), mask=in_image)
        tl.store(counts + image + 1, tl.sum(ones, 0))
        tl.store(counts, 0, mask=image == 0)


@triton.jit(do_not_specialize=["count"])
def _compact_kernel(
    rows, cumulative, token, dest_offset, new_cu_seqlens,  # inputs
    new_rows, new_cumulative, new_token,  # outputs
    count, width, length,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Copy the rows that stay, out of `count`, with their cumulative scores and tokens to their new places."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row_offset = tl.load(dest_offset + row, mask=row < count, other=-1)
    stays = row_offset >= 0
    row_token = tl.load(token + row, mask=stays, other=0)
    dest = (tl.load(new_cu_seqlens + row_token // length, mask=stays, other=0) + row_offset).to(tl.int64)
    tl.store(new_cumulative + dest, tl.load(cumulative + row, mask=stays, other=0.0), mask=stays)
    tl.store(new_token + dest, row_token, mask=stays)
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        mask = stays[:, None] & (channel < width)
        x = tl.load(rows + row[:, None] * width + channel, mask=mask, other=0.0)
        tl.store(new_rows + dest[:, None] * width + channel, x, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _halting_backward_kernel(
    grad_new_rows, grad_new_cumulative, grad_score, grad_prefix, score, token, dest_offset, new_cu_seqlens,  # inputs
    grad_rows, grad_cumulative_before,  # outputs
    scale, count, width, length,
    LAST: tl.constexpr, PREFIX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `count` rows and of their cumulative scores before the block.

    A row's gradient is the sum of three: of its copy, of its score and of its prefix-token state.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < count
    row_token = tl.load(token + row, mask=inside, other=0)
    image, position = row_token // length, row_token % length
    row_score = tl.load(score + row, mask=inside, other=0.0)
    row_grad_score = tl.load(grad_score + row, mask=inside, other=0.0)
    if not LAST:
        row_offset = tl.load(dest_offset + row, mask=inside, other=-1)
        stays = row_offset >= 0
        dest = (tl.load(new_cu_seqlens + image, mask=stays, other=0) + row_offset).to(tl.int64)
        row_grad_cumulative = tl.load(grad_new_cumulative + dest, mask=stays, other=0.0)
        tl.store(grad_cumulative_before + row, row_grad_cumulative, mask=inside)
        row_grad_score += row_grad_cumulative
    grad_channel_0 = row_grad_score * scale * row_score * (1.0 - row_score)
    is_prefix = inside & (position < PREFIX)
    slot = image * PREFIX + position
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        exists = channel < width
        gradient = tl.load(grad_prefix + slot[:, None] * width + channel, mask=is_prefix[:, None] & exists, other=0.0)
        gradient = gradient.to(tl.float32) + tl.where(channel == 0, grad_channel_0[:, None], 0.0)
        if not LAST:
            mask = stays[:, None] & exists
            gradient += tl.load(grad_new_rows + dest[:, None] * width + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + row[:, None] * width + channel, gradient, mask=inside[:, None] & exists)


class HaltAndDrop(torch.autograd.Function):
    """Halting step of one block; differentiable once, in the rows and the cumulative scores.

    rows: [T, C] of any floating dtype, T above 0; cumulative_before: [T] float32; token: [T] int64;
    cu_seqlens: [B + 1] int32; minus_center, limit, direction, scale: of `Gate`; size: B, N;
    num_prefix_tokens: P.
    Returns score [T]; halts [T] bool; prefix-token states [B, P, C], zero for halted tokens; then,
    of the rows that stay: rows, cumulative scores, token, cu_seqlens. These four are None after
    the last block. With a direction, the scores are not differentiable.
    One host-device sync reads the number of rows that stay.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        cumulative_before: Tensor,
        token: Tensor,
        cu_seqlens: Tensor,
        minus_center: Tensor,
        limit: Tensor,
        direction: Tensor | None,
        scale: float,
        size: tuple[int, int],
        num_prefix_tokens: int,
        is_last_block: bool,
        early_exit: bool,
    ) -> tuple[Tensor | None, ...]:
        rows = rows.contiguous()
        count, width = rows.shape
        batch, length = size
        channels = min(CHANNELS, triton.next_power_of_2(width))
        block = triton.next_power_of_2(length)
        score, cumulative = torch.empty_like(cumulative_before), torch.empty_like(cumulative_before)
        halts = torch.empty(count, dtype=torch.uint8, device=rows.device)
        dest_offset = counts = halts  # placeholders: the kernel does not write them after the last block
        if not is_last_block:
            dest_offset = torch.empty_like(token, dtype=torch.int32)
            counts = torch.empty_like(cu_seqlens)
        prefix = rows.new_empty(batch, num_prefix_tokens, width)
        _halting_kernel[(batch,)](
            rows, cumulative_before, token, cu_seqlens, minus_center, limit, direction,
            score, cumulative, halts, dest_offset, counts, prefix,
            scale, width, length, LAST=is_last_block, EARLY_EXIT=early_exit, PREFIX=num_prefix_tokens,
            BLOCK=block, CHANNELS=channels, num_warps=min(max(block // 128, 4), 16),
        )  # fmt: skip
        kept = (None, None, None, None)
        if not is_last_block:
            kept = _compact(rows, cumulative, token, dest_offset, counts, length, channels)
        new_rows, new_cumulative, new_token, new_cu_seqlens = kept
        halts = halts.view(torch.bool)
        constants = (halts, new_token, new_cu_seqlens, *(() if direction is None else (score, new_cumulative)))
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        ctx.set_materialize_grads(False)  # do not allocate zero gradients for unused outputs
        ctx.save_for_backward(score, token, dest_offset, cu_seqlens if is_last_block else new_cu_seqlens)
        ctx.scale, ctx.length, ctx.is_last_block, ctx.channels = scale, length, is_last_block, channels
        ctx.shapes = [0 if x is None else x.shape for x in (score, prefix, new_rows, new_cumulative)]
        return score, halts, prefix, new_rows, new_cumulative, new_token, new_cu_seqlens

    @staticmethod
    @once_differentiable
    def backward(
        ctx,
        grad_score: Tensor | None,
        _grad_halts: None,
        grad_prefix: Tensor | None,
        grad_new_rows: Tensor | None,
        grad_new_cumulative: Tensor | None,
        *_grad_indices: None,
    ) -> tuple[Tensor | None, ...]:
        score, token, dest_offset, new_cu_seqlens = ctx.saved_tensors
        grad_score, grad_prefix, grad_new_rows, grad_new_cumulative = (
            score.new_zeros(shape) if gradient is None else gradient.contiguous()
            for gradient, shape in zip((grad_score, grad_prefix, grad_new_rows, grad_new_cumulative), ctx.shapes)
        )
        count = len(score)
        _, num_prefix_tokens, width = ctx.shapes[1]
        grad_rows = grad_prefix.new_empty(count, width)
        grad_cumulative_before = torch.empty_like(score)
        _halting_backward_kernel[(triton.cdiv(count, ROWS),)](
            grad_new_rows, grad_new_cumulative, grad_score, grad_prefix, score, token, dest_offset, new_cu_seqlens,
            grad_rows, grad_cumulative_before, ctx.scale, count, width, ctx.length,
            LAST=ctx.is_last_block, PREFIX=num_prefix_tokens, ROWS=ROWS, CHANNELS=ctx.channels,
        )  # fmt: skip
        return grad_rows, None if ctx.is_last_block else grad_cumulative_before, *[None] * 10


def _compact(
    rows: Tensor, cumulative: Tensor, token: Tensor, dest_offset: Tensor, counts: Tensor, length: int, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, cumulative scores, token and cu_seqlens of the rows that stay; copies nothing if all stay.

    dest_offset, counts: see `_halting_kernel`.
    """
    count, width = rows.shape
    new_cu_seqlens = counts.cumsum(0, dtype=torch.int32)
    num_kept = int(new_cu_seqlens[-1])
    if num_kept == count:
        return rows.view_as(rows), cumulative, token, new_cu_seqlens
    new_rows = rows.new_empty(num_kept, width)
    new_cumulative = cumulative.new_empty(num_kept)
    new_token = token.new_empty(num_kept)
    if num_kept > 0:
        _compact_kernel[(triton.cdiv(count, ROWS),)](
            rows, cumulative, token, dest_offset, new_cu_seqlens, new_rows, new_cumulative, new_token,
            count, width, length, ROWS=ROWS, CHANNELS=channels,
        )  # fmt: skip
    return new_rows, new_cumulative, new_token, new_cu_seqlens
