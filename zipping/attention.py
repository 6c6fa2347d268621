"""Attention within each image, for the packed rows of a batch."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from zipping.rotations import Rotation
    from zipping.stores import PackedTokens

ATTENTION = F.scaled_dot_product_attention  # torch's own function, even if a library replaces it later


class PerImageAttentionMask:
    """Stand-in attention mask that restricts attention to the rows of each image.

    1. The caller passes it as `attn_mask` to timm's block, with all rows as one image: [1, T, C].
       Everything in the block except attention works on each row separately.
    2. timm's attention passes it to `F.scaled_dot_product_attention`. torch finds
       `__torch_function__` on this class and calls it instead.
    3. `__torch_function__` calls `PackedTokens.attend` with the queries, keys and values, after it has rotated
       queries and keys if the block has a `rotation`.

    Every other torch function that gets this object raises TypeError.
    """

    def __init__(self, tokens: PackedTokens, rotation: Rotation | None = None):
        self.tokens, self.rotation = tokens, rotation

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not ATTENTION:
            return NotImplemented
        mask, (q, k, v) = kwargs["attn_mask"], args[:3]
        if mask.rotation is not None:
            q, k = (x.type_as(v) for x in mask.rotation.rotate(mask.tokens.position, q, k))
        return mask.tokens.attend(q, k, v, kwargs.get("dropout_p", 0.0))


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0
) -> Tensor:
    """Compute attention within each image by one CUDA kernel for sequences of different lengths.

    q, k, v: [1, H, T, D], any strides; cu_seqlens: [B + 1] int32, the first row of each image and
    the end of the last; max_seqlen: an upper bound for the rows of an image.
    Returns [1, H, T, D].

    It calls the operators behind torch's nested tensors. Flash attention runs in half precision
    with D up to 256, from compute capability 8.0. Otherwise memory-efficient attention runs, whose
    backward pass rejects a max_seqlen above T. Both need D in multiples of 8 (of 4 in float32).
    Other widths are padded with zeros to a multiple of 8, which changes neither products nor sums.
    """
    max_seqlen = min(max_seqlen, q.shape[2])
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
    has_flash = dtype in (torch.float16, torch.bfloat16) and _supports_flash_attention(q.device)
    computed = torch.float32 if dtype == torch.bfloat16 and not has_flash else dtype  # old GPUs have no kernel for it
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (x.to(computed).transpose(1, 2) for x in (q, k, v))  # [1, T, H, D]
    if width % 8:
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    seqlens = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)  # offsets and maxima of queries and keys
    if has_flash and q.shape[-1] <= 256:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *seqlens, dropout_p, False, False, scale=scale)[0]
        out = out.unsqueeze(0)
    else:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, *seqlens, dropout_p, 0, needs_grad, scale=scale
        )[0]
    return out[..., :width].to(dtype).transpose(1, 2)


_capability = cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def _supports_flash_attention(device: torch.device) -> bool:
    return device.type != "cuda" or _capability(device) >= (8, 0)


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int], dropout_p: float = 0.0) -> Tensor:
    """Compute attention within each image by one dense call per distinct sequence length.

    q, k, v: [1, H, T, D]; seqlens: the number of consecutive rows of each image, ascending.
    Returns [1, H, T, D]. Each call gets a view of its rows: no padding and no mask. Only the
    results are copied. If such calls would be too small, `padded_attention` runs instead.
    """
    if len(seqlens) == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    runs = [(seqlen, len(list(images))) for seqlen, images in groupby(seqlens)]
    if dropout_p == 0 and _padding_pays(q, runs):
        return padded_attention(q, k, v, seqlens)
    sizes = [seqlen * images for seqlen, images in runs]
    parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)))
    results = [_dense_attention(*part, *run, dropout_p) for part, run in zip(parts, runs)]
    return (torch.cat(results, dim=1) if len(results) > 1 else results[0]).transpose(1, 2)


def _padding_pays(q: Tensor, runs: list[tuple[int, int]]) -> bool:
    """Return whether `padded_attention` is faster than one call per run.

    q: [1, H, T, D]; runs: the sequence length and the number of images of each call, ascending.
    The limits were measured. With many calls, short sequences and few channels, torch's attention
    gains less from a second thread than matrix products do. With one thread both take about as long.
    """
    num_heads, head_dim, longest = q.shape[1], q.shape[3], runs[-1][0]
    is_small = 16 < longest <= 64 and num_heads * head_dim <= 64
    return is_small and len(runs) >= 8 and q.dtype == torch.float32 and torch.get_num_threads() > 1


PADDED_IMAGES = 48  # images of a group, at most: with more, lengths differ more, and the scores exceed the cache


def padded_attention(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int]) -> Tensor:
    """Compute attention within each image by matrix products, for groups of images padded to one length.

    Arguments and result: see `ragged_attention`.
    """
    groups = np.array_split(seqlens, -(-len(seqlens) // PADDED_IMAGES))
    parts = zip(*(x.split([int(group.sum()) for group in groups], dim=2) for x in (q, k, v)))
    results = [_attend_in_group(*part, group) for part, group in zip(parts, groups)]
    return (torch.cat(results, dim=1) if len(results) > 1 else results[0]).transpose(1, 2)


def _attend_in_group(q: Tensor, k: Tensor, v: Tensor, seqlens: np.ndarray) -> Tensor:
    """Compute `padded_attention` for one group. q, k, v: [1, H, T, D] -> [1, T, H, D].

    Each image is padded with copies of its own last row, so that a NaN does not reach other images.
    """
    num_heads, head_dim, longest = q.shape[1], q.shape[3], int(seqlens[-1])
    position, seqlens = np.arange(longest), seqlens[:, None]
    row = np.cumsum(seqlens)[:, None] - seqlens + np.minimum(position, seqlens - 1)
    is_row = position < seqlens  # [images, longest], False for padding
    bias = np.where(is_row, 0, -np.inf).astype(np.float32).repeat(num_heads, axis=0)

    def pad(x: Tensor) -> Tensor:  # [1, H, T, D] -> [images * H, longest, D]
        padded = x[0].transpose(0, 1).index_select(0, torch.from_numpy(row.ravel()))
        return padded.unflatten(0, row.shape).transpose(1, 2).reshape(-1, longest, head_dim)

    scores = torch.baddbmm(torch.from_numpy(bias)[:, None], pad(q), pad(k).transpose(1, 2), alpha=head_dim**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), pad(v)).unflatten(0, (-1, num_heads))  # [images, H, longest, D]
    kept = torch.from_numpy(is_row.ravel().nonzero()[0])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, kept).unsqueeze(0)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, seqlen: int, images: int, dropout_p: float) -> Tensor:
    """Compute attention for images of equal length.

    q, k, v: [1, H, images * seqlen, D] -> [1, images * seqlen, H, D].
    """
    if images > 1:
        q, k, v = (x.view(-1, images, seqlen, x.shape[3]).transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)  # [images, H, seqlen, D]
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0) if images > 1 else out.transpose(1, 2)
