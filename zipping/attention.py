"""Attention within each image, over the packed rows of a batch."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from zipping.stores import PackedTokens

ATTENTION = F.scaled_dot_product_attention  # torch's own, whatever its place may hold later


class PerImageAttentionMask:
    """Given to an attention module in place of a mask: each row attends to the rows of its own image.

    F.scaled_dot_product_attention hands over to such an object; all else that the module does with
    rows, [1, T, C], as if they were one image, is right for each row by itself.
    """

    def __init__(self, tokens: PackedTokens):
        self.tokens = tokens

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not ATTENTION:
            return NotImplemented
        return kwargs["attn_mask"].tokens.attend(*args[:3], kwargs.get("dropout_p", 0.0))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, dropout_p: float = 0.0) -> Tensor:
    """Attention within each image by one of CUDA's kernels for sequences of different lengths.

    q, k, v: [1, H, T, D], strided as they are; bounds: [I + 1] int32, where images begin and the last ends;
    longest: no image has more rows -> [1, H, T, D].

    The operators that torch's nested tensors call: flash attention in half precision, from compute
    capability 8.0 on, else the memory-efficient one, whose backward refuses a bound above T. They want
    a D in steps of 8 (in float32 of 4); zeros fill it up, which change neither products nor sums.
    """
    longest = min(longest, q.shape[2])
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
    has_flash = dtype in (torch.float16, torch.bfloat16) and _supports_flash_attention(q.device)
    computed = torch.float32 if dtype == torch.bfloat16 and not has_flash else dtype  # old GPUs have no kernel for it
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (x.to(computed).transpose(1, 2) for x in (q, k, v))  # [1, T, H, D]
    if width % 8:
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    limits = (bounds, bounds, longest, longest, dropout_p)
    if has_flash and q.shape[-1] <= 256:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *limits, False, False, scale=scale)[0].unsqueeze(0)
    else:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out = torch.ops.aten._efficient_attention_forward(q, k, v, None, *limits, 0, needs_grad, scale=scale)[0]
    return out[..., :width].to(dtype).transpose(1, 2)


@cache
def _supports_flash_attention(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout_p: float = 0.0) -> Tensor:
    """Attention within each image by dense calls, one for each run of images of equal length.

    q, k, v: [1, H, T, D]; lengths: how many consecutive rows each image has, ascending -> [1, H, T, D].
    A call sees its rows as a view: no padding, no mask, no copy but that of the results.
    """
    if len(lengths) == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    runs = [(length, len(list(images))) for length, images in groupby(lengths)]
    sizes = [length * images for length, images in runs]
    parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)))
    results = [_dense_attention(*part, *run, dropout_p) for part, run in zip(parts, runs)]
    return (torch.cat(results, dim=1) if len(results) > 1 else results[0]).transpose(1, 2)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, length: int, images: int, dropout_p: float) -> Tensor:
    """q, k, v: [1, H, images * length, D] -> [1, images * length, H, D]"""
    if images > 1:
        q, k, v = (x.view(-1, images, length, x.shape[3]).transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)  # [images, H, length, D]
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0) if images > 1 else out.transpose(1, 2)
