"""Store of the live tokens in a fixed number of rows, and the gate of the planned mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zipping.attention import PerImageAttentionMask, varlen_attention


class PlannedGate(NamedTuple):
    """Gate parameters on the device, so that a captured pass reads their current values.

    scale_and_limit: [2] float32, the scale and 1 - halt_eps, the cumulative score at which a token halts;
    minus_center: [B] float32, minus the center of each image;
    direction: [C + 1] float32, of one block, or None; see `zipping.gate.Gate`.
    """

    scale_and_limit: Tensor
    minus_center: Tensor
    direction: Tensor | None = None


@dataclass(frozen=True)
class PlannedTokens:
    """Packed store with c rows: the live tokens, image by image, then surplus rows, which hold none.

    size: B, N;
    num_prefix_tokens: P, the number of tokens before the patches of an image;
    token: [c] int64, b * N + n for the token in each row, ascending. B * N in surplus rows, and in the
    first block in the rows of images that a smaller batch lacks;
    cu_seqlens: [B + D + 1] int32, the first row of each image, then the ends of D dummy sequences. The last is c.
    Dummy sequences cover the surplus rows with at most N rows each, so that attention writes every row.
    D is ceil(c / N), and 0 in the first block, which has no surplus rows.
    """

    size: tuple[int, int]
    num_prefix_tokens: int
    token: Tensor
    cu_seqlens: Tensor

    @classmethod
    def all_live(cls, size: tuple[int, int], num_prefix_tokens: int, device: torch.device) -> PlannedTokens:
        """Return the store of the first block, in which every token is live."""
        batch, length = size
        token = torch.arange(batch * length, device=device)
        cu_seqlens = torch.arange(0, batch * length + 1, length, device=device, dtype=torch.int32)
        return cls(size, num_prefix_tokens, token, cu_seqlens)

    @property
    def attention_mask(self) -> PerImageAttentionMask:
        return PerImageAttentionMask(self)

    @property
    def position(self) -> Tensor:
        """[c] int64, n of the token in each row, which counts the tokens of an image; 0 in surplus rows."""
        return self.token % self.size[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Compute attention within each image and each dummy sequence. q, k, v: [1, H, c, D] -> [1, H, c, D]."""
        return varlen_attention(q, k, v, self.cu_seqlens, self.size[1], dropout_p)

    def expand_to_tokens(self, per_image: Tensor) -> Tensor:
        """Return each image's value for each of its rows, and the last image's for surplus rows.

        per_image: [B, ...] -> [c, ...].
        """
        batch, length = self.size
        return per_image.index_select(0, (self.token // length).clamp(max=batch - 1))
