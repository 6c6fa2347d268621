"""Stores of the live tokens of a batch, masked or packed, and the removal of halted tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zipping.attention import PerImageAttentionMask, ragged_attention, varlen_attention
from zipping.gate import Gate


class BlockOutput(NamedTuple):
    """Result of one block's halting.

    score, halts: [T] or [B, N], for the tokens that were live in the block;
    prefix: [B, P, C] prefix-token states, or None if not requested. Entries of halted tokens are undefined;
    tokens, rows, cumulative: the tokens that stay live, their states and their cumulative scores.
    """

    score: Tensor
    halts: Tensor
    prefix: Tensor | None
    tokens: MaskedTokens | PackedTokens
    rows: Tensor
    cumulative: Tensor


@dataclass(frozen=True)
class MaskedTokens:
    """Store that keeps all tokens in place: a row is a token, live or halted.

    live: [B, N] bool, True for live tokens;
    num_prefix_tokens: P, the number of tokens before the patches of an image.
    """

    live: Tensor
    num_prefix_tokens: int

    @classmethod
    def pack(cls, x: Tensor, num_prefix_tokens: int) -> tuple[MaskedTokens, Tensor]:
        """Return the store in which every token is live, and `x` itself. x: [B, N, C]."""
        return cls(x.new_ones(x.shape[:2], dtype=torch.bool), num_prefix_tokens), x

    @property
    def attention_mask(self) -> Tensor:
        """[B, 1, 1, N] bool, True for tokens that may be attended to.

        An image without live tokens attends to all of its tokens. Nothing reads the result, but a
        softmax over no tokens would be NaN.
        """
        return (self.live | ~self.live.any(dim=1, keepdim=True))[:, None, None, :]

    @property
    def is_prefix(self) -> Tensor:
        """[N] bool, True for prefix tokens."""
        return torch.arange(self.live.shape[1], device=self.live.device) < self.num_prefix_tokens

    def drop(self, halts: Tensor, *values: Tensor, early_exit: bool = False) -> tuple[MaskedTokens, tuple[Tensor, ...]]:
        """Return the store without the halted tokens, and `values` unchanged.

        halts: [B, N] bool. Halted tokens stay halted. `early_exit` has no effect.
        """
        return MaskedTokens(self.live & ~halts, self.num_prefix_tokens), values

    @staticmethod
    def expand_to_tokens(per_image: Tensor) -> Tensor:
        """Return each image's value for each of its tokens. per_image: [B, ...] -> [B, 1, ...]."""
        return per_image.unsqueeze(1)

    def prefix(self, rows: Tensor) -> Tensor:
        """Return the prefix-token states as a copy, which does not keep `rows` in memory.

        rows: [B, N, C] -> [B, P, C].
        """
        return rows[:, : self.num_prefix_tokens].clone()

    def scatter_add(self, total: Tensor, rows: Tensor) -> Tensor:
        """Return `total` plus the rows of live tokens. total, rows: [B, N, C]."""
        return total + rows.masked_fill(~self.live[..., None], 0)

    def scatter(self, total: Tensor, rows: Tensor) -> Tensor:
        """Return `total` with the rows of live tokens in their places. total, rows: [B, N, C]."""
        return rows.where(self.live[..., None], total)

    @staticmethod
    def to_dense(stores: Sequence[MaskedTokens], *values: Tensor) -> list[Tensor]:
        """Return values of all blocks as [L, B, N], zero for halted tokens.

        stores: one for each block; values: [L * B, N] each, the blocks' values concatenated.
        """
        live = torch.stack([tokens.live for tokens in stores])
        return [value.view_as(live).masked_fill(~live, 0) for value in values]


@dataclass(frozen=True)
class PackedTokens:
    """Base class of the packed stores: the live tokens are the rows of [T, ...], image by image.

    size: B, N;
    token: [T] int64, b * N + n for the token in each row;
    prefix_token: [B * P] int64, b * N + n for every prefix token, live or halted.

    Subclasses add the number of rows of each image and `prefix_row`: [B * P], the row of each
    prefix token, or any other row if it has halted. They implement `pack`, `drop` and the four
    methods at the end of this class.
    """

    size: tuple[int, int]
    token: np.ndarray | Tensor
    prefix_token: np.ndarray | Tensor

    @property
    def attention_mask(self) -> PerImageAttentionMask:
        return PerImageAttentionMask(self)

    @property
    def num_prefix_tokens(self) -> int:
        return len(self.prefix_token) // self.size[0]

    @property
    def position(self) -> Tensor:
        """[T] int64, n of the token in each row, which counts the tokens of an image."""
        return self._as_tensor(self.token % self.size[1])

    @property
    def is_prefix(self) -> Tensor:
        """[T] bool, True in the rows of prefix tokens."""
        return self.position < self.num_prefix_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Compute scaled dot-product attention within each image. q, k, v: [1, H, T, D] -> [1, H, T, D]."""
        if q.shape[2] == 0:  # no live rows: skip the kernel, keep the autograd graph
            return q + k + v
        return self._attend(q, k, v, dropout_p)

    def expand_to_tokens(self, per_image: Tensor) -> Tensor:
        """Return each image's value for each of its rows. per_image: [B, ...] -> [T, ...]."""
        return per_image.index_select(0, self._as_tensor(self.token // self.size[1]))

    def prefix(self, rows: Tensor) -> Tensor:
        """Return the prefix-token states, undefined for halted tokens. rows: [T, C] -> [B, P, C]."""
        batch = self.size[0]
        if len(rows) == 0:  # an empty sum keeps the zeros in the graph: gradients are 0, not None
            return rows.new_zeros(batch, self.num_prefix_tokens, rows.shape[1]) + rows.sum(dim=0)
        if len(self.prefix_token) == 1:  # while it is live, its row is the first
            return rows[None, :1]
        return rows.index_select(0, self._as_tensor(self.prefix_row)).unflatten(0, (batch, -1))

    def scatter_add(self, total: Tensor, rows: Tensor) -> Tensor:
        """Add each row to the place of its token, in place. total: [B * N, C]; rows: [T, C]."""
        return total.index_add_(0, self._as_tensor(self.token), rows)

    def scatter(self, total: Tensor, rows: Tensor) -> Tensor:
        """Return a copy of `total` with each row in the place of its token. total: [B * N, C]; rows: [T, C]."""
        return total.index_copy(0, self._as_tensor(self.token), rows)

    @classmethod
    def to_dense(cls, stores: Sequence[PackedTokens], *values: Tensor) -> list[Tensor]:
        """Return values of all blocks as [L, B, N], zero for halted tokens.

        stores: one for each block; values: [sum of T] each, the blocks' values concatenated.
        """
        shape = (len(stores), *stores[0].size)
        starts = range(0, math.prod(shape), math.prod(shape[1:]))
        index = cls._as_tensor(cls._concatenate(cls._add_each([tokens.token for tokens in stores], list(starts))))
        return [v.new_zeros(math.prod(shape)).index_copy(0, index, v).view(shape) for v in values]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Compute `attend` for at least one row."""
        raise NotImplementedError

    @staticmethod
    def _as_tensor(index: np.ndarray | Tensor) -> Tensor:
        """Return an index of this store as a tensor."""
        raise NotImplementedError

    @staticmethod
    def _concatenate(indices: Sequence[np.ndarray | Tensor]) -> np.ndarray | Tensor:
        """Return the indices, one after the other."""
        raise NotImplementedError

    @staticmethod
    def _add_each(indices: Sequence[np.ndarray | Tensor], numbers: Sequence[int]) -> Sequence[np.ndarray | Tensor]:
        """Return each index plus its number."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedTokensCPU(PackedTokens):
    """Packed store for the CPU, with NumPy indices.

    Images are sorted by their number of rows, so that attention can run on images of equal
    length together.

    prefix_row: see `PackedTokens`;
    seqlens: the numbers of rows of the images that have any, ascending.
    """

    prefix_row: np.ndarray
    seqlens: list[int]

    @classmethod
    def pack(cls, x: Tensor, num_prefix_tokens: int) -> tuple[PackedTokensCPU, Tensor]:
        """Return the store in which every token is live, and its rows. x: [B, N, C] -> [B * N, C]."""
        batch, length = x.shape[:2]
        token = np.arange(batch * length)
        prefix = token.reshape(batch, length)[:, :num_prefix_tokens].ravel()
        return cls((batch, length), token, prefix, prefix, [length] * batch), x.flatten(0, 1)

    def drop(
        self, halts: Tensor, *values: Tensor, early_exit: bool = False
    ) -> tuple[PackedTokensCPU, tuple[Tensor, ...]]:
        """Return the store and the values of the rows that stay.

        halts: [T] bool; values: [T, ...] each;
        early_exit: drop all rows of an image once its prefix tokens have halted.
        """
        stays = ~halts.numpy()
        if early_exit and len(stays):
            is_own_row = self.token[self.prefix_row] == self.prefix_token  # another token's, once it has halted
            live = stays[self.prefix_row] & is_own_row
            stays &= live.reshape(self.size[0], -1).any(axis=1)[self.token // self.size[1]]
        kept = stays.nonzero()[0]
        if len(kept) == len(stays):
            return self, values
        kept, seqlens = self._sort_by_seqlen(stays, kept)
        prefix_row = self.prefix_row
        if len(prefix_row) > 1:
            new_row = np.zeros_like(self.token)
            new_row[kept] = np.arange(len(kept))
            prefix_row = new_row[prefix_row]
        tokens = PackedTokensCPU(self.size, self.token[kept], self.prefix_token, prefix_row, seqlens)
        index = torch.from_numpy(kept)
        return tokens, tuple(value.index_select(0, index) for value in values)

    def _sort_by_seqlen(self, stays: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return `kept` with its images sorted by their number of rows, and these numbers, ascending.

        stays: [T] bool; kept: the rows where it is True, in order.

        Example: image A has rows 0 and 1, image B rows 2, 3 and 4; A keeps both, B keeps row 4.
        kept is [0, 1, 4]; counts are [2, 1] for A, B. Sorted, B comes first: order is [1, 0],
        seqlens are [1, 2]. B starts at 2 in kept and moves to 0; A starts at 0 and moves to 1.
        The shifts 2 - 0 and 0 - 1, one for each row, are [2, -1, -1]. Added to [0, 1, 2] they
        give [2, 0, 1], and kept[[2, 0, 1]] is [4, 0, 1].
        """
        if len(kept) == 0 or len(self.seqlens) == 1:
            return kept, [len(kept)] if len(kept) else []
        counts = np.add.reduceat(stays, np.cumsum(self.seqlens) - self.seqlens, dtype=np.int64)
        order = np.argsort(counts, kind="stable")
        seqlens = counts[order]
        if (order[:-1] > order[1:]).any():
            start = (np.cumsum(counts) - counts)[order]
            new_start = np.cumsum(seqlens) - seqlens
            kept = kept[np.arange(len(kept)) + np.repeat(start - new_start, seqlens)]
        return kept, seqlens[seqlens > 0].tolist()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return ragged_attention(q, k, v, self.seqlens, dropout_p)

    @staticmethod
    def _as_tensor(index: np.ndarray) -> Tensor:
        return torch.from_numpy(index)

    @staticmethod
    def _concatenate(indices: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(indices)

    @staticmethod
    def _add_each(indices: Sequence[np.ndarray], numbers: Sequence[int]) -> list[np.ndarray]:
        return [number + index for index, number in zip(indices, numbers)]


@dataclass(frozen=True)
class PackedTokensCUDA(PackedTokens):
    """Packed store for CUDA. Images and their tokens keep their order; all indices stay on the device.

    cu_seqlens: [B + 1] int32, the first row of each image and the end of the last. An image may have no rows.
    """

    cu_seqlens: Tensor

    @classmethod
    def pack(cls, x: Tensor, num_prefix_tokens: int) -> tuple[PackedTokensCUDA, Tensor]:
        """Return the store in which every token is live, and its rows. x: [B, N, C] -> [B * N, C]."""
        batch, length = x.shape[:2]
        token = torch.arange(batch * length, device=x.device)
        cu_seqlens = torch.arange(0, batch * length + 1, length, device=x.device, dtype=torch.int32)
        prefix_token = token.view(batch, length)[:, :num_prefix_tokens].flatten().contiguous()
        return cls((batch, length), token, prefix_token, cu_seqlens), x.flatten(0, 1)

    @property
    def prefix_row(self) -> Tensor:
        """[B * P], the row of each prefix token, or any other row if it has halted."""
        return torch.searchsorted(self.token, self.prefix_token).clamp_(max=len(self.token) - 1)

    def drop(
        self, halts: Tensor, *values: Tensor, early_exit: bool = False
    ) -> tuple[PackedTokensCUDA, tuple[Tensor, ...]]:
        """Return the store and the values of the rows that stay.

        halts: [T] bool; values: [T, ...] each;
        early_exit: drop all rows of an image once its prefix tokens have halted.
        One host-device sync reads the number of rows that stay.
        """
        if len(halts) == 0:
            return self, values
        stays = ~halts
        if early_exit:
            row = self.prefix_row
            live = self.token.index_select(0, row) == self.prefix_token
            live &= stays.index_select(0, row)
            stays &= self.expand_to_tokens(live.view(self.size[0], -1).any(dim=1))
        new_row = torch.zeros(len(stays) + 1, dtype=torch.int32, device=stays.device)
        torch.cumsum(stays, 0, dtype=torch.int32, out=new_row[1:])  # [T + 1], the number of rows that stay before each
        num_rows = int(new_row[-1])
        if num_rows == len(stays):
            return self, values
        kept = torch.nonzero_static(stays, size=num_rows).squeeze(1)  # nonzero would sync again
        tokens = replace(
            self, token=self.token.index_select(0, kept), cu_seqlens=new_row.index_select(0, self.cu_seqlens)
        )
        return tokens, tuple(value.index_select(0, kept) for value in values)

    def halt(
        self, rows: Tensor, cumulative_before: Tensor, gate: Gate, is_last_block: bool, early_exit: bool
    ) -> BlockOutput:
        """Compute scores and decisions and then `drop_halted`, with Triton kernels.

        rows: [T, C] with T above 0; cumulative_before: [T] float32; gate: one for all images.
        The returned prefix states are zero for halted tokens.
        """
        from zipping.kernels import HaltAndDrop  # imported here because Triton may be missing

        with torch.cuda.device_of(rows):
            score, halts, prefix, new_rows, cumulative, token, cu_seqlens = HaltAndDrop.apply(
                rows,
                cumulative_before,
                self.token,
                self.cu_seqlens,
                gate.minus_center,
                gate.limit,
                gate.direction,
                gate.scale,
                self.size,
                self.num_prefix_tokens,
                is_last_block,
                early_exit,
            )
        if is_last_block:
            return BlockOutput(score, halts, prefix, self, rows, cumulative_before)
        tokens = replace(self, token=token, cu_seqlens=cu_seqlens)
        return BlockOutput(score, halts, prefix, tokens, new_rows, cumulative)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return varlen_attention(q, k, v, self.cu_seqlens, self.size[1], dropout_p)

    @staticmethod
    def _as_tensor(index: Tensor) -> Tensor:
        return index

    @staticmethod
    def _concatenate(indices: Sequence[Tensor]) -> Tensor:
        return torch.cat(indices)

    @staticmethod
    def _add_each(indices: Sequence[Tensor], numbers: Sequence[int]) -> Sequence[Tensor]:
        return torch._foreach_add(indices, numbers)


def drop_halted(
    tokens: MaskedTokens | PackedTokens,
    rows: Tensor,
    score: Tensor,
    cumulative: Tensor,
    halts: Tensor,
    is_last_block: bool,
    early_exit: bool,
    with_prefix: bool,
) -> BlockOutput:
    """Drop the halted tokens (except after the last block) and return one block's output.

    rows: the block's output; score, cumulative, halts: [T] or [B, N], see `zipping.halting.halting_step`;
    with_prefix: return the prefix-token states too.
    """
    prefix = tokens.prefix(rows) if with_prefix else None
    if not is_last_block:
        tokens, (rows, cumulative) = tokens.drop(halts, rows, cumulative, early_exit=early_exit)
    return BlockOutput(score, halts, prefix, tokens, rows, cumulative)
