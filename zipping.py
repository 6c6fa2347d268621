"""Live tokens of a batch: what stays, what leaves, and attention among those that stay.

Two stores with one interface. `MaskedTokens` keeps every token in a dense `[B, N, ...]` and knows
which are live; `ZippedTokens` keeps the live ones alone, as the rows of `[T, ...]`, image by image,
so that everything computed on the rows costs less as tokens leave. Both are immutable: `keep`
returns a new store. Nothing here knows why a token leaves, or what a row means.

    tokens, rows = ZippedTokens.pack(x)                  # x: [B, N, C] -> rows: [T, C]
    rows = rows + tokens.attend(qkv)                     # qkv: [T, 3, H, D], within each image
    tokens, (rows, state) = tokens.keep(keep_mask, rows, state)
    (y,) = tokens.unpack(rows)                           # [B, N, C], zero where a token has left
"""

from __future__ import annotations

from itertools import accumulate, groupby
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

    def unpack(self, *values: Tensor, first: int | None = None) -> tuple[Tensor, ...]:
        """values: [B, N, ...] each -> the `first` tokens of each image (all by default), 0 where not live."""
        live = self.live[:, :first]
        return tuple(v[:, :first].masked_fill(~_trailing(live, v.ndim), 0) for v in values)

    def keep(self, keep_mask: Tensor, *values: Tensor) -> tuple[MaskedTokens, tuple[Tensor, ...]]:
        """keep_mask: [B, N] bool; tokens that have left do not come back. The values stay as they are."""
        return MaskedTokens(self.live & keep_mask), values


class ZippedTokens(NamedTuple):
    """The live tokens as rows, image by image, in their order within the image.

    Images stand in the order of their numbers of live tokens, so that attention can take those of
    equal numbers together, as a dense view.

    images: the images in that order, as Python numbers;
    lengths: their live tokens, ascending, as Python numbers;
    image: [T] int64, the image that a row belongs to;
    token: [T] int64, b * N + n, the token that a row holds;
    row: [B, N] int64, the row that holds a token, 0 where it has left;
    live: [B, N] bool, whether a token is still there.
    """

    images: list[int]
    lengths: list[int]
    image: Tensor
    token: Tensor
    row: Tensor
    live: Tensor

    @classmethod
    def pack(cls, x: Tensor) -> tuple[ZippedTokens, Tensor]:
        """x: [B, N, C] -> the store in which every token is live, and its rows [B * N, C]."""
        batch, length = x.shape[:2]
        token = torch.arange(batch * length, device=x.device)
        row = token.view(batch, length)
        live = torch.ones_like(row, dtype=torch.bool)
        return cls(list(range(batch)), [length] * batch, token // length, token, row, live), x.flatten(0, 1)

    def unpack(self, *values: Tensor, first: int | None = None) -> tuple[Tensor, ...]:
        """values: [T, ...] each -> [B, first, ...], the first tokens of each image, 0 where one has left."""
        batch, length = self.row.shape
        if len(self.token) == batch * length:  # nothing has left
            return tuple(v.view(batch, length, *v.shape[1:])[:, :first] for v in values)
        row, gone = self.row[:, :first], ~self.live[:, :first]
        if len(self.token) == 0:  # an empty sum ties the zeros to the graph: gradients are 0, not None
            return tuple(v.new_zeros(*row.shape, *v.shape[1:]) + v.sum(dim=0) for v in values)
        index = row.flatten()
        found = (v.index_select(0, index).view(*row.shape, *v.shape[1:]) for v in values)
        return tuple(v.masked_fill(_trailing(gone, v.ndim), 0) for v in found)

    def spread(self, per_image: Tensor) -> Tensor:
        """per_image: [B, ...] -> [T, ...], each row with its image's value."""
        return per_image.index_select(0, self.image)

    def keep(self, keep_mask: Tensor, *values: Tensor) -> tuple[ZippedTokens, tuple[Tensor, ...]]:
        """keep_mask: [T] bool; values: [T, ...] each -> the remaining rows.

        Waits for the device once: the shapes to come are read from it.
        """
        counts = self.image.new_zeros(len(self.images)).index_add_(0, self.image, keep_mask.long())  # [B]
        count_of = counts.tolist()
        lengths, total = [count_of[image] for image in self.images], sum(count_of)
        if total == len(keep_mask):
            return self, values
        if lengths == sorted(lengths):
            images, kept = self.images, torch.nonzero_static(keep_mask, size=total).squeeze(1)
        else:
            images, lengths = sorted(range(len(count_of)), key=count_of.__getitem__), sorted(lengths)
            kept = self._kept(keep_mask, counts.sort(stable=True).indices, total)
        token = self.token.index_select(0, kept)
        row = torch.zeros_like(self.row).flatten().index_copy_(0, token, torch.arange(total, device=token.device))
        live = torch.zeros_like(self.live).flatten().index_fill_(0, token, True)
        image = self.image.index_select(0, kept)
        tokens = ZippedTokens(images, lengths, image, token, row.view_as(self.row), live.view_as(self.live))
        return tokens, tuple(v.index_select(0, kept) for v in values)

    def _kept(self, keep_mask: Tensor, order: Tensor, total: int) -> Tensor:
        """keep_mask: [T] bool, order: [B] images -> [total], the rows that stay, in that order of images."""
        remains = self.unpack(keep_mask)[0].index_select(0, order)  # [B, N] bool
        rows = self.row.index_select(0, order).flatten()
        return rows.index_select(0, torch.nonzero_static(remains.flatten(), size=total).squeeze(1))

    def attend(self, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
        """qkv: [T, 3, H, D] -> [T, H, D], scaled dot-product attention within each image."""
        return ragged_attention(qkv, self.lengths, dropout_p)


def _trailing(mask: Tensor, ndim: int) -> Tensor:
    """mask with trailing dimensions of size 1, to broadcast against `ndim` dimensions."""
    return mask.view(*mask.shape, *[1] * (ndim - mask.ndim))


def ragged_attention(qkv: Tensor, lengths: list[int], dropout_p: float = 0.0) -> Tensor:
    """qkv: [T, 3, H, D], queries, keys, values -> [T, H, D], attention within each image's rows.

    lengths: consecutive rows of each image, ascending, as in ZippedTokens.

    On CUDA one call on jagged nested tensors. On the CPU one call for each run of images of equal
    length, a dense view: no padding, no mask, no copy but that of the results. Equal lengths are
    one dense call everywhere.
    """
    if len(qkv) == 0:
        return qkv.sum(dim=1)  # no kernel, but a gradient
    if lengths[0] == lengths[-1]:
        return _dense_attention(qkv, len(lengths), dropout_p)
    if qkv.is_cuda:
        return _jagged_attention(qkv, lengths, dropout_p)
    runs = [(length, len(list(images))) for length, images in groupby(lengths) if length]
    parts = qkv.split([length * images for length, images in runs])
    return torch.cat([_dense_attention(part, images, dropout_p) for part, (_, images) in zip(parts, runs)])


def _dense_attention(qkv: Tensor, images: int, dropout_p: float) -> Tensor:
    """qkv: [B * n, 3, H, D] -> [B * n, H, D] for `images` images of equal length."""
    q, k, v = qkv.view(images, -1, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, n, D]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).flatten(0, 1)


def _jagged_attention(qkv: Tensor, lengths: list[int], dropout_p: float = 0.0) -> Tensor:
    """qkv: [T, 3, H, D] -> [T, H, D], one kernel over all images that have rows."""
    lengths = [length for length in lengths if length]
    offsets = torch.tensor([0, *accumulate(lengths)]).to(qkv.device, non_blocking=True)
    bounds = {"min_seqlen": lengths[0], "max_seqlen": lengths[-1]}
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(t.contiguous(), offsets, **bounds).transpose(1, 2) for t in qkv.unbind(1)
    )
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).values()
