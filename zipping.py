"""Live tokens of a batch: what stays, what leaves, and attention among those that stay.

Two stores with one interface. `MaskedTokens` keeps every token in a dense `[B, N, ...]` and knows
which are live; `ZippedTokens` keeps the live ones alone, as the rows of `[T, ...]`, image by image,
so that everything computed on the rows costs less as tokens leave. Both are immutable: `drop`
returns a new store. Nothing here knows why a token leaves, or what a row means.

    tokens, rows = ZippedTokens.pack(x)                  # x: [B, N, C] -> rows: [T, C]
    rows = rows + tokens.attend(q, k, v)                 # q, k, v: [T, H, D], within each image
    tokens, (rows, state) = tokens.drop(leaving, rows, state)
    y = tokens.unpack(rows)                              # [B, N, C], zero where a token has left
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskedTokens(NamedTuple):
    """All tokens stay where they are; `live: [B, N]` bool says which still count."""

    live: Tensor

    @classmethod
    def pack(cls, x: Tensor) -> tuple[MaskedTokens, Tensor]:
        """x: [B, N, C] -> the store in which every token is live, and x itself."""
        return cls(x.new_ones(x.shape[:2], dtype=torch.bool)), x

    def attention_mask(self) -> Tensor:
        """[B, 1, 1, N] bool, True where a token may be attended to.

        An image without a live token attends to all of its tokens: nothing reads the result, and a
        softmax over nothing would be NaN.
        """
        return (self.live | ~self.live.any(dim=1, keepdim=True))[:, None, None, :]

    def unpack(self, values: Tensor, first: int | None = None) -> Tensor:
        """values: [B, N, ...] -> the `first` tokens of each image (all by default), 0 where not live."""
        live = self.live[:, :first]
        return values[:, :first].masked_fill(~_trailing(live, values.ndim), 0)

    def drop(self, leaving: Tensor, *values: Tensor) -> tuple[MaskedTokens, tuple[Tensor, ...]]:
        """leaving: [B, N] bool. The values stay as they are."""
        return MaskedTokens(self.live & ~leaving), values


class ZippedTokens(NamedTuple):
    """The live tokens as rows, image by image, in their order within the image.

    lengths: live tokens of each image, as Python numbers;
    image: [T] int64, the image that a row belongs to;
    row: [B, N] int64, the row that holds a token, -1 where it has left.
    """

    lengths: list[int]
    image: Tensor
    row: Tensor

    @classmethod
    def pack(cls, x: Tensor) -> tuple[ZippedTokens, Tensor]:
        """x: [B, N, C] -> the store in which every token is live, and its rows [B * N, C]."""
        batch, length = x.shape[:2]
        row = torch.arange(batch * length, device=x.device)
        return cls([length] * batch, row // length, row.view(batch, length)), x.flatten(0, 1)

    @property
    def live(self) -> Tensor:
        """[B, N] bool."""
        return self.row >= 0

    def unpack(self, values: Tensor, first: int | None = None) -> Tensor:
        """values: [T, ...] -> [B, first, ...], the first tokens of each image, 0 where one has left."""
        row = self.row[:, :first]
        if len(values) == 0:  # an empty sum ties the zeros to the graph: gradients are 0, not None
            return values.new_zeros(*row.shape, *values.shape[1:]) + values.sum(dim=0)
        if first is None and len(values) == row.numel():  # nothing has left
            return values.view(*row.shape, *values.shape[1:])
        found = values.index_select(0, row.clamp(min=0).flatten()).view(*row.shape, *values.shape[1:])
        return found.masked_fill(_trailing(row < 0, found.ndim), 0)

    def spread(self, per_image: Tensor) -> Tensor:
        """per_image: [B, ...] -> [T, ...], each row with its image's value."""
        return per_image.index_select(0, self.image)

    def drop(self, leaving: Tensor, *values: Tensor) -> tuple[ZippedTokens, tuple[Tensor, ...]]:
        """leaving: [T] bool; values: [T, ...] each -> the remaining rows.

        Waits for the device once: the shapes to come are read from it.
        """
        stays = self.unpack(~leaving)  # [B, N]
        lengths = stays.sum(dim=1).tolist()
        total = sum(lengths)
        if total == len(leaving):
            return self, values
        row = stays.flatten().cumsum(0).view_as(stays).sub(1).masked_fill(~stays, -1)
        token = torch.nonzero_static(stays.flatten(), size=total).squeeze(1)  # [T], b * N + n
        kept = self.row.flatten().index_select(0, token)
        image = self.image.index_select(0, kept)
        return ZippedTokens(lengths, image, row), tuple(v.index_select(0, kept) for v in values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """q, k, v: [T, H, D] -> [T, H, D], scaled dot-product attention within each image."""
        return ragged_attention(q, k, v, self.lengths, dropout_p)


def _trailing(mask: Tensor, ndim: int) -> Tensor:
    """mask with trailing dimensions of size 1, to broadcast against `ndim` dimensions."""
    return mask.view(*mask.shape, *[1] * (ndim - mask.ndim))


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout_p: float = 0.0) -> Tensor:
    """q, k, v: [T, H, D] -> [T, H, D], attention within consecutive runs of `lengths` rows."""
    if len(q) == 0:
        return q + k + v  # no kernel, but a gradient for each
    if min(lengths) == max(lengths):
        return _dense_attention(q, k, v, len(lengths), dropout_p)
    outputs = [
        _dense_attention(*qkv, 1, dropout_p) for qkv in zip(*(t.split(lengths) for t in (q, k, v))) if len(qkv[0])
    ]
    return torch.cat(outputs)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, images: int, dropout_p: float) -> Tensor:
    """q, k, v: [B * n, H, D] -> [B * n, H, D] for `images` images of equal length."""
    q, k, v = (t.unflatten(0, (images, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, n, D]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(0, 1)
