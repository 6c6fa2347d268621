"""Triton kernels of the planned mode; `kernels.py` launches them.

No number that differs between plans is compiled into a kernel. Each output is written once, so that
results are deterministic. A pointer argument that is None stands for an input or output that is absent.
"""

import triton
import triton.language as tl

from zipping.kernels import load_score, load_sum


@triton.jit
def _layer_norm(x, weight, bias, channel, width, eps):
    """Return the layer norm of whole rows. x: [ROWS, CHANNELS] float32, zero from `width` on."""
    centered = tl.where(channel < width, x - tl.sum(x, 1)[:, None] / width, 0.0)
    variance = tl.sum(centered * centered, 1)[:, None] / width
    channel_weight = tl.load(weight + channel, mask=channel < width, other=0.0).to(tl.float32)
    channel_bias = tl.load(bias + channel, mask=channel < width, other=0.0).to(tl.float32)
    return centered / tl.sqrt(variance + eps) * channel_weight + channel_bias


@triton.jit
def _weigh_prefix(
    rows, branch, gamma, features, prefix, weighted,
    row, is_slot, probability, slot, width,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the state of one prefix token, and its share of the mean field; 0 if it has halted earlier.

    is_slot: [BLOCK] bool, True for the row of the token; slot: its number among the prefix tokens of the batch.
    """
    source = tl.sum(tl.where(is_slot, row, 0), 0)
    is_live = tl.sum(is_slot.to(tl.int32), 0) > 0
    weight = tl.sum(tl.where(is_slot, probability, 0.0), 0)
    target = slot.to(tl.int64) * width
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        exists = channel < width
        x = load_sum(rows, branch, gamma, source * width + channel, channel, exists & is_live, width)
        if prefix is not None:
            tl.store(prefix + target + channel, x, mask=exists)
        share = weight * x.to(tl.float32)
        if features is not None:
            share += tl.load(features + target + channel, mask=exists, other=0.0)
            tl.store(features + target + channel, share, mask=exists)
        else:
            tl.store(weighted + target + channel, share, mask=exists)


@triton.jit(do_not_specialize=["length", "images"])
def decide_kernel(
    rows, branch, gamma, cumulative_before, token, cu_seqlens, scale_and_limit, minus_center, direction,  # inputs
    features,  # input and output: see `decide_and_move`
    score, cumulative, halts, prefix, weighted, dest_offset, counts,  # outputs
    width, length, images,
    LAST: tl.constexpr, EARLY_EXIT: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute scores, decisions and the mean field's shares; program s handles image s, or a dummy sequence.

    dest_offset: [c], a row's place among the rows of its image that stay, -1 if it is dropped;
    counts: [B], the number of rows of each image that stay.
    """
    image = tl.program_id(0)
    start, offset = tl.load(cu_seqlens + image), tl.arange(0, BLOCK)
    row, in_image = (start + offset).to(tl.int64), offset < tl.load(cu_seqlens + image + 1) - start
    if image >= images:  # a dummy sequence
        tl.store(score + row, tl.zeros([BLOCK], tl.float32), mask=in_image)
        tl.store(halts + row, tl.zeros([BLOCK], tl.uint8), mask=in_image)
        return
    position = tl.load(token + row, mask=in_image, other=0) - image * length  # of the token in its image
    scale, limit = tl.load(scale_and_limit), tl.load(scale_and_limit + 1)
    row_score = load_score(
        rows, branch, gamma, direction, scale, minus_center + image, row, in_image, position, width, PREFIX, BLOCK
    )
    before = tl.load(cumulative_before + row, mask=in_image, other=0.0)
    row_halts = before + row_score >= limit  # False for NaN
    if LAST:
        row_halts = row_halts | in_image
    tl.store(score + row, row_score, mask=in_image)
    tl.store(halts + row, row_halts.to(tl.uint8), mask=in_image)
    probability = tl.where(row_halts, 1.0 - before, row_score)
    for slot in tl.static_range(PREFIX):
        is_slot = in_image & (position == slot)
        _weigh_prefix(
            rows, branch, gamma, features, prefix, weighted,
            row, is_slot, probability, image * PREFIX + slot, width, CHANNELS,
        )  # fmt: skip
    if not LAST:
        stays = in_image & (row_halts == 0) & (position < length)  # a missing image has rows without tokens
        if EARLY_EXIT:
            stays = stays & (tl.sum((stays & (position < PREFIX)).to(tl.int32), 0) > 0)
        ones = stays.to(tl.int32)
        tl.store(cumulative + row, before + row_score, mask=in_image)
        tl.store(dest_offset + row, tl.where(stays, tl.cumsum(ones, 0) - 1, -1), mask=in_image)
        tl.store(counts + image, tl.sum(ones, 0))


@triton.jit
def _move_rows(
    rows, branch, gamma, cumulative, token, cu_seqlens, dest_offset, weight, bias,
    new_rows, normed, new_cumulative, new_token,
    image, part, base, capacity, width, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Copy part of the rows of an image to their new places. base: rows of the images before it that stay."""
    start = tl.load(cu_seqlens + image)
    offset = part * ROWS + tl.arange(0, ROWS)
    row = (start + offset).to(tl.int64)
    row_offset = tl.load(dest_offset + row, mask=offset < tl.load(cu_seqlens + image + 1) - start, other=-1)
    dest = (base + row_offset).to(tl.int64)
    stays = (row_offset >= 0) & (dest < capacity)
    tl.store(new_cumulative + dest, tl.load(cumulative + row, mask=stays, other=0.0), mask=stays)
    tl.store(new_token + dest, tl.load(token + row, mask=stays, other=0), mask=stays)
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        mask = stays[:, None] & (channel < width)
        x = load_sum(rows, branch, gamma, row[:, None] * width + channel, channel, mask, width)
        target = dest[:, None] * width + channel
        tl.store(new_rows + target, x, mask=mask)
        if normed is not None:
            tl.store(normed + target, _layer_norm(x.to(tl.float32), weight, bias, channel, width, eps), mask=mask)


@triton.jit
def _clear_rows(
    new_rows, normed, new_cumulative, new_token,
    row, is_surplus, no_token, width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write zeros to surplus rows, and `no_token` as their token. row: [ROWS] int64."""
    tl.store(new_cumulative + row, tl.zeros([ROWS], tl.float32), mask=is_surplus)
    tl.store(new_token + row, tl.zeros([ROWS], tl.int64) + no_token, mask=is_surplus)
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        mask = is_surplus[:, None] & (channel < width)
        zero = tl.zeros([ROWS, CHANNELS], tl.float32)
        tl.store(new_rows + row[:, None] * width + channel, zero, mask=mask)
        if normed is not None:
            tl.store(normed + row[:, None] * width + channel, zero, mask=mask)


@triton.jit(do_not_specialize=["length", "images", "parts", "capacity", "dummies"])
def move_kernel(
    rows, branch, gamma, cumulative, token, cu_seqlens, dest_offset, counts, weight, bias,  # inputs
    new_rows, normed, new_cumulative, new_token, new_cu_seqlens, kept_count,  # outputs
    width, length, images, parts, capacity, dummies, eps,
    IMAGES: tl.constexpr, DUMMIES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Copy the rows that stay, and clear the surplus rows.

    The first images * parts programs handle `ROWS` rows of an image each. Every other program
    handles `ROWS` new rows, and clears those that are surplus rows.
    kept_count: [], the number of rows that stay, which may exceed the capacity;
    normed: the layer norm of the new rows, or None. With it, CHANNELS is at least the width.
    """
    program = tl.program_id(0)
    number = tl.arange(0, IMAGES)
    image_counts = tl.load(counts + number, mask=number < images, other=0)
    if program < images * parts:
        image, part = program // parts, program % parts
        base = tl.sum(tl.where(number < image, image_counts, 0), 0)  # a scan of its own, which saves a launch
        if part == 0:
            tl.store(new_cu_seqlens + image, tl.minimum(base, capacity))
        _move_rows(
            rows, branch, gamma, cumulative, token, cu_seqlens, dest_offset, weight, bias,
            new_rows, normed, new_cumulative, new_token, image, part, base, capacity, width, eps, ROWS, CHANNELS,
        )  # fmt: skip
    else:
        all_kept = tl.sum(image_counts, 0)
        kept = tl.minimum(all_kept, capacity)
        part = program - images * parts
        if part == 0:
            dummy = tl.arange(0, DUMMIES)
            end = tl.minimum(kept + dummy * length, capacity)
            tl.store(new_cu_seqlens + images + dummy, end, mask=dummy <= dummies)
            tl.store(kept_count, all_kept)
        row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        if (part + 1) * ROWS > kept:
            is_surplus = (row >= kept) & (row < capacity)
            _clear_rows(
                new_rows, normed, new_cumulative, new_token, row, is_surplus, images * length, width, ROWS, CHANNELS
            )


@triton.jit(do_not_specialize=["count"])
def add_norm_kernel(
    rows, branch, gamma, weight, bias,  # inputs
    new_rows, normed,  # outputs
    count, width, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute new_rows = rows + gamma * branch and its layer norm. Without a branch, new_rows is not written."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    index = row[:, None] * width + channel
    mask = (row < count)[:, None] & (channel < width)
    x = load_sum(rows, branch, gamma, index, channel, mask, width)
    if branch is not None:
        tl.store(new_rows + index, x, mask=mask)
    tl.store(normed + index, _layer_norm(x.to(tl.float32), weight, bias, channel, width, eps), mask=mask)


@triton.jit
def _load_decision(score, halts, cumulative_before, row, is_live):
    """Return score, decision and halting probability p_l of each row, 0 where it is not live."""
    row_score = tl.load(score + row, mask=is_live, other=0.0)
    row_halts = tl.load(halts + row, mask=is_live, other=0) != 0
    before = tl.load(cumulative_before + row, mask=is_live, other=0.0)
    return row_score, row_halts, tl.where(row_halts, 1.0 - before, row_score)


@triton.jit
def _grad_of_probability(prefix, grad_weighted, slot, is_prefix, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the gradient of the halting probability p_l of each row, through p_l x_l; 0 for patches."""
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        mask = is_prefix[:, None] & (channel < width)
        x = tl.load(prefix + slot[:, None] * width + channel, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * tl.load(grad_weighted + slot[:, None] * width + channel, mask=mask, other=0.0), 1)
    return total


@triton.jit(do_not_specialize=["count", "length", "images", "capacity"])
def halt_backward_kernel(
    score, cumulative_before, halts, prefix, token, dest_offset, new_cu_seqlens, scale_and_limit,  # inputs
    grad_new_rows, grad_new_cumulative, grad_score, grad_weighted,  # inputs, None if zero
    grad_rows, grad_cumulative_before,  # outputs
    count, width, length, images, capacity,
    PREFIX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `count` rows and of their cumulative scores before the block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < count
    row_token = tl.load(token + row, mask=inside, other=0)
    image, position = row_token // length, row_token % length
    is_live = inside & (image < images)
    slot = image * PREFIX + position
    is_prefix = is_live & (position < PREFIX)
    row_score, row_halts, probability = _load_decision(score, halts, cumulative_before, row, is_live)
    row_grad_score, row_grad_before = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if grad_score is not None:
        row_grad_score += tl.load(grad_score + row, mask=is_live, other=0.0)
    if grad_weighted is not None:
        grad_probability = _grad_of_probability(prefix, grad_weighted, slot, is_prefix, width, ROWS, CHANNELS)
        row_grad_score += tl.where(row_halts, 0.0, grad_probability)
        row_grad_before -= tl.where(row_halts, grad_probability, 0.0)
    if dest_offset is not None:
        row_offset = tl.load(dest_offset + row, mask=is_live, other=-1)
        dest = (tl.load(new_cu_seqlens + image, mask=is_live, other=0) + row_offset).to(tl.int64)
        stays = (row_offset >= 0) & (dest < capacity)
    if grad_new_cumulative is not None:
        row_grad_cumulative = tl.load(grad_new_cumulative + dest, mask=stays, other=0.0)
        row_grad_score += row_grad_cumulative
        row_grad_before += row_grad_cumulative
    tl.store(grad_cumulative_before + row, row_grad_before, mask=inside)
    grad_channel_0 = row_grad_score * tl.load(scale_and_limit) * row_score * (1.0 - row_score)
    for begin in range(0, width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        exists = channel < width
        gradient = tl.where(channel == 0, grad_channel_0[:, None], 0.0)
        if grad_weighted is not None:
            mask = is_prefix[:, None] & exists
            share = tl.load(grad_weighted + slot[:, None] * width + channel, mask=mask, other=0.0)
            gradient += probability[:, None] * share
        if grad_new_rows is not None:
            mask = stays[:, None] & exists
            gradient += tl.load(grad_new_rows + dest[:, None] * width + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + row[:, None] * width + channel, gradient, mask=inside[:, None] & exists)
