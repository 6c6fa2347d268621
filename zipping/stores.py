"""Stores of the live tokens of a batch: `MaskedTokens`, `PackedTokensCPU` and `PackedTokensCUDA`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from zipping.attention import PerImageAttentionMask, ragged_attention, varlen_attention


@dataclass(frozen=True)
class MaskedTokens:
    """All tokens stay where they are: a row is a token, live or not.

    live: [B, N] bool, which tokens still count;
    num_prefix_tokens: P, how many tokens come before the patches of an image.
    """

    live: Tensor
    num_prefix_tokens: int

    @classmethod
    def pack(cls, x: Tensor, num_prefix_tokens: int) -> tuple[MaskedTokens, Tensor]:
        """x: [B, N, C] -> the store in which every token is live, and x itself."""
        return cls(x.new_ones(x.shape[:2], dtype=torch.bool), num_prefix_tokens), x

    @property
    def attention_mask(self) -> Tensor:
        """[B, 1, 1, N] bool, True where a token may be attended to.

        An image without a live token attends to all of its tokens: nothing reads the result, and a
        softmax over nothing would be NaN.
        """
        return (self.live | ~self.live.any(dim=1, keepdim=True))[:, None, None, :]

    def drop(
        self, leaves: Tensor, *values: Tensor, early_exit: bool = False
    ) -> tuple[MaskedTokens, tuple[Tensor, ...]]:
        """leaves: [B, N] bool; tokens that have left do not come back. The values stay as they are, and all images."""
        return MaskedTokens(self.live & ~leaves, self.num_prefix_tokens), values

    @staticmethod
    def spread(per_image: Tensor) -> Tensor:
        """per_image: [B, ...] -> [B, 1, ...], each token with its image's value."""
        return per_image.unsqueeze(1)

    def prefix(self, rows: Tensor) -> Tensor:
        """rows: [B, N, C] -> [B, P, C], those of the prefix tokens; a copy, which does not keep the others alive."""
        return rows[:, : self.num_prefix_tokens].clone()

    def add_to(self, total: Tensor, rows: Tensor) -> Tensor:
        """total, rows: [B, N, C] -> their sum, without the rows of tokens that have left."""
        return total + rows.masked_fill(~self.live[..., None], 0)

    def put(self, total: Tensor, rows: Tensor) -> Tensor:
        """total, rows: [B, N, C] -> total with the rows of live tokens in their places."""
        return rows.where(self.live[..., None], total)

    @staticmethod
    def tables(stores: Sequence[MaskedTokens], *values: Tensor) -> list[Tensor]:
        """values: [L * B, N], of all blocks' rows in turn -> each [L, B, N], zero where a token has left."""
        live = torch.stack([tokens.live for tokens in stores])
        return [value.view_as(live).masked_fill(~live, 0) for value in values]


@dataclass(frozen=True)
class PackedTokens:
    """What both stores of rows have in common; a store adds where images begin.

    Its `_index` makes a tensor of its kind of numbers, `_joined` joins several, `_added` adds a number to each of
    several, `_attend` is `attend` for some rows.

    size: B, N;
    token: [T] int64, b * N + n, the token that a row holds;
    prefix_token: [B * P] int64, the prefix tokens, live or not;
    prefix_row: [B * P], the row that holds each of them, or any other where it has left; each store has its own way.
    """

    size: tuple[int, int]
    token: np.ndarray | Tensor
    prefix_token: np.ndarray | Tensor

    @property
    def attention_mask(self) -> PerImageAttentionMask:
        return PerImageAttentionMask(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """q, k, v: [1, H, T, D] -> [1, H, T, D], scaled dot-product attention within each image."""
        return self._attend(q, k, v, dropout_p) if q.shape[2] else q + k + v  # no rows, no kernel, but a gradient

    def spread(self, per_image: Tensor) -> Tensor:
        """per_image: [B, ...] -> [T, ...], each row with its image's value."""
        return per_image.index_select(0, self._index(self.token // self.size[1]))

    def prefix(self, rows: Tensor) -> Tensor:
        """rows: [T, C] -> [B, P, C], those of the prefix tokens, some other where one has left."""
        batch = self.size[0]
        if len(rows) == 0:  # an empty sum ties the zeros to the graph: gradients are 0, not None
            return rows.new_zeros(batch, len(self.prefix_token) // batch, rows.shape[1]) + rows.sum(dim=0)
        if len(self.prefix_token) == 1:  # the first row, while it is there
            return rows[None, :1]
        return rows.index_select(0, self._index(self.prefix_row)).unflatten(0, (batch, -1))

    def add_to(self, total: Tensor, rows: Tensor) -> Tensor:
        """total: [B * N, C], which is overwritten, rows: [T, C] -> their sum, each row where its token is."""
        return total.index_add_(0, self._index(self.token), rows)

    def put(self, total: Tensor, rows: Tensor) -> Tensor:
        """total: [B * N, C], rows: [T, C] -> a copy of total with each row where its token is."""
        return total.index_copy(0, self._index(self.token), rows)

    @classmethod
    def tables(cls, stores: Sequence[PackedTokens], *values: Tensor) -> list[Tensor]:
        """values: [sum of T], of all blocks' rows in turn -> each [L, B, N], zero where a token has left."""
        shape = (len(stores), *stores[0].size)
        starts = range(0, math.prod(shape), math.prod(shape[1:]))
        index = cls._index(cls._joined(cls._added([tokens.token for tokens in stores], list(starts))))
        return [v.new_zeros(math.prod(shape)).index_copy(0, index, v).view(shape) for v in values]


@dataclass(frozen=True)
class PackedTokensCPU(PackedTokens):
    """The live tokens as rows, on the CPU; its numbers are NumPy's, made where decisions are read.

    Images stand in the order of their numbers of rows, so that attention can take those of equal
    numbers together.

    lengths: how many rows each image has that has any, ascending.
    """

    prefix_row: np.ndarray
    lengths: list[int]

    @classmethod
    def pack(cls, x: Tensor, num_prefix_tokens: int) -> tuple[PackedTokensCPU, Tensor]:
        """x: [B, N, C] -> the store in which every token is live, and its rows [B * N, C]."""
        batch, length = x.shape[:2]
        token = np.arange(batch * length)
        prefix = token.reshape(batch, length)[:, :num_prefix_tokens].ravel()
        return cls((batch, length), token, prefix, prefix, [length] * batch), x.flatten(0, 1)

    def drop(
        self, leaves: Tensor, *values: Tensor, early_exit: bool = False
    ) -> tuple[PackedTokensCPU, tuple[Tensor, ...]]:
        """leaves: [T] bool; values: [T, ...] each -> the store, and the values, of the rows that stay.

        early_exit: an image whose prefix tokens have all left leaves as a whole.
        """
        stays = ~leaves.numpy()
        if early_exit and len(stays):
            live = stays[self.prefix_row] & (self.token[self.prefix_row] == self.prefix_token)
            stays &= live.reshape(self.size[0], -1).any(axis=1)[self.token // self.size[1]]
        kept = stays.nonzero()[0]
        if len(kept) == len(stays):
            return self, values
        kept, lengths = self._by_length(stays, kept)
        prefix_row = self.prefix_row
        if len(prefix_row) > 1:
            new_row = np.zeros_like(self.token)
            new_row[kept] = np.arange(len(kept))
            prefix_row = new_row[prefix_row]
        tokens = PackedTokensCPU(self.size, self.token[kept], self.prefix_token, prefix_row, lengths)
        index = torch.from_numpy(kept)
        return tokens, tuple(value.index_select(0, index) for value in values)

    def _by_length(self, stays: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """stays: [T] bool, kept: where -> `kept` in the images' new order, and their numbers of rows, ascending."""
        if len(kept) == 0 or len(self.lengths) == 1:
            return kept, [len(kept)] if len(kept) else []
        counts = np.add.reduceat(stays, np.cumsum(self.lengths) - self.lengths, dtype=np.int64)
        order = np.argsort(counts, kind="stable")
        lengths = counts[order]
        if (order[:-1] > order[1:]).any():
            start, new_start = (np.cumsum(counts) - counts)[order], np.cumsum(lengths) - lengths
            kept = kept[np.arange(len(kept)) + np.repeat(start - new_start, lengths)]
        return kept, lengths[lengths > 0].tolist()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return ragged_attention(q, k, v, self.lengths, dropout_p)

    _index, _joined = staticmethod(torch.from_numpy), staticmethod(np.concatenate)
    _added = staticmethod(lambda tokens, starts: [start + token for start, token in zip(starts, tokens)])


@dataclass(frozen=True)
class PackedTokensCUDA(PackedTokens):
    """The live tokens as rows, on CUDA. Images and their tokens stay in their order; numbers stay on the device.

    bounds: [B + 1] int32, where the rows of each image begin, and the end of the last; an image may have none.
    """

    bounds: Tensor

    @classmethod
    def pack(cls, x: Tensor, num_prefix_tokens: int) -> tuple[PackedTokensCUDA, Tensor]:
        """x: [B, N, C] -> the store in which every token is live, and its rows [B * N, C]."""
        batch, length = x.shape[:2]
        token = torch.arange(batch * length, device=x.device)
        bounds = torch.arange(0, batch * length + 1, length, device=x.device, dtype=torch.int32)
        prefix_token = token.view(batch, length)[:, :num_prefix_tokens].flatten().contiguous()
        return cls((batch, length), token, prefix_token, bounds), x.flatten(0, 1)

    @property
    def prefix_row(self) -> Tensor:
        return torch.searchsorted(self.token, self.prefix_token).clamp_(max=len(self.token) - 1)

    def drop(
        self, leaves: Tensor, *values: Tensor, early_exit: bool = False
    ) -> tuple[PackedTokensCUDA, tuple[Tensor, ...]]:
        """leaves: [T] bool; values: [T, ...] each -> the store, and the values, of the rows that stay.

        early_exit: an image whose prefix tokens have all left leaves as a whole.
        Waits for the device once, for how many rows there will be.
        """
        if len(leaves) == 0:
            return self, values
        stays = ~leaves
        if early_exit:
            row = self.prefix_row
            live = self.token.index_select(0, row) == self.prefix_token
            live &= stays.index_select(0, row)
            stays &= self.spread(live.view(self.size[0], -1).any(dim=1))
        new_row = torch.zeros(len(stays) + 1, dtype=torch.int32, device=stays.device)
        torch.cumsum(stays, 0, dtype=torch.int32, out=new_row[1:])  # [T + 1], how many rows stay before each
        num_rows = int(new_row[-1])
        if num_rows == len(stays):
            return self, values
        kept = torch.nonzero_static(stays, size=num_rows).squeeze(1)  # without another wait
        bounds = new_row.index_select(0, self.bounds)
        tokens = replace(self, token=self.token.index_select(0, kept), bounds=bounds)
        return tokens, tuple(value.index_select(0, kept) for value in values)

    def halt(
        self,
        rows: Tensor,
        before: Tensor,
        minus_center: Tensor,
        limit: Tensor,
        scale: float,
        last: bool,
        early_exit: bool,
    ) -> tuple[Tensor, Tensor, Tensor, PackedTokensCUDA, Tensor, Tensor]:
        """What `models_act.halting_step`, `prefix` and, but for the last block, `drop` do after each other.

        Arguments as there, T above 0 -> score [T], halts [T] bool, the prefix tokens' rows [B, P, C], zero where
        one has left; the store of the rows that stay, these rows, and the sums of their scores, or, of the last
        block, this store, `rows` and `before`.
        """
        from zipping.kernels import Halt  # here, as Triton may be missing

        num_prefix_tokens = len(self.prefix_token) // self.size[0]
        with torch.cuda.device_of(rows):
            score, halts, prefix, *kept = Halt.apply(
                rows, before, self.token, self.bounds, minus_center, limit,
                scale, self.size, num_prefix_tokens, last, early_exit,
            )  # fmt: skip
        if last:
            return score, halts, prefix, self, rows, before
        rows, cumulative, token, bounds = kept
        return score, halts, prefix, replace(self, token=token, bounds=bounds), rows, cumulative

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return varlen_attention(q, k, v, self.bounds, self.size[1], dropout_p)

    @staticmethod
    def _index(numbers: Tensor) -> Tensor:
        return numbers

    _joined, _added = staticmethod(torch.cat), staticmethod(torch._foreach_add)
