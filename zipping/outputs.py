"""Outputs that a forward pass collects over all blocks: halting results, mean field, intermediate states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zipping.stores import BlockOutput, MaskedTokens, PackedTokens


class Halting(NamedTuple):
    """Halting results of a batch.

    depth: [B, N] float, 1..L, the number of blocks that processed the token (N_k in the paper);
    ponder_cost: [B, N] float, depth + remainder, differentiable (rho, Eq. 9);
    layer_scores: [L] float, differentiable, mean halting score of the patch tokens after each block (halted: 0).
    """

    depth: Tensor
    ponder_cost: Tensor
    layer_scores: Tensor


def summarize_halting(score: Tensor, halts: Tensor, num_prefix_tokens: int, num_blocks: int) -> Halting:
    """Compute depth, ponder cost and layer scores.

    score, halts: [R, B, N], zero for halted tokens, of the R <= num_blocks blocks that were run.
    """
    block = torch.arange(1, len(halts) + 1, device=halts.device)[:, None, None]
    depth = (block * halts).sum(dim=0)
    remainder = 1 - (score * ~halts).sum(dim=0)
    layer_scores = score[:, :, num_prefix_tokens:].mean(dim=(1, 2))
    if len(halts) < num_blocks:  # no live token was left, or blocks were pruned and some tokens never halted
        depth = depth.where(depth > 0, len(halts))
        layer_scores = nn.functional.pad(layer_scores, (0, num_blocks - len(halts)))
    return Halting(depth.float(), depth + remainder, layer_scores)


class HaltingHistory:
    """Scores and decisions of all blocks, and the prefix-token states."""

    def __init__(self):
        self.stores: list[MaskedTokens | PackedTokens] = []
        self.scores: list[Tensor] = []
        self.cumulative_before: list[Tensor] = []
        self.halts: list[Tensor] = []
        self.prefix_states: list[Tensor | None] = []

    def add(self, tokens: MaskedTokens | PackedTokens, cumulative_before: Tensor, output: BlockOutput) -> None:
        """Record one block. tokens, cumulative_before: as they were before its halting."""
        self.stores.append(tokens)
        self.scores.append(output.score)
        self.cumulative_before.append(cumulative_before)
        self.halts.append(output.halts)
        self.prefix_states.append(output.prefix)

    @property
    def row_counts(self) -> list[int]:
        """The number of packed rows before each block that ran; empty in masked mode."""
        return [len(score) for score in self.scores if score.ndim == 1]

    def concatenated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return score, cumulative score before the block, and decision of all blocks, concatenated."""
        return torch.cat(self.scores), torch.cat(self.cumulative_before), torch.cat(self.halts)

    def to_dense(self, *values: Tensor) -> list[Tensor]:
        """Return values shaped as in `concatenated` as [L, B, N], zero for halted tokens."""
        return self.stores[0].to_dense(self.stores, *values)

    def prefix_mean_field(self, probability: Tensor) -> Tensor:
        """Return sum_l p_l x_l (Eq. 5) of the prefix tokens. probability: [L, B, N] -> [B, P, C]."""
        states = torch.stack(self.prefix_states)
        probability = probability[:, :, : states.shape[2], None]
        return (probability * states).masked_fill(probability == 0, 0).sum(dim=0)


class MeanField:
    """Mean-field output of every token: sum over the blocks, sum_l p_l x_l (Eq. 5).

    rows: of the store in which every token is live; shape: of the output, [B, N, C].
    """

    def __init__(self, rows: Tensor, shape: torch.Size):
        self._total = rows.new_zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        self._shape = shape

    def add(self, tokens: MaskedTokens | PackedTokens, probability: Tensor, rows: Tensor) -> None:
        """Add p_l x_l of one block. probability: [T] or [B, N]; rows: the block's output."""
        self._total = tokens.scatter_add(self._total, probability.unsqueeze(-1) * rows)

    def output(self) -> Tensor:
        """Return the sum so far, [B, N, C]."""
        return self._total.view(self._shape)


class Intermediates:
    """States after some of the blocks, in which halted tokens keep their last state.

    indices: the blocks, counted from 0. `states` has one tensor for each, shaped like the rows of
    the store in which every token is live.
    """

    def __init__(self, indices: Sequence[int]):
        self.indices = indices
        self.states: list[Tensor | None] = [None] * len(indices)
        self._latest: Tensor | None = None

    def add(self, index: int, tokens: MaskedTokens | PackedTokens, rows: Tensor) -> None:
        """Record the states after block `index`, also for later blocks until they are recorded themselves."""
        if self._latest is None:
            self._latest = rows.new_empty(rows.shape)  # in the first block every token is live
        self._latest = tokens.scatter(self._latest, rows)
        self.states = [self._latest if i >= index else state for i, state in zip(self.indices, self.states)]


def split_states(
    states: Sequence[Tensor], num_prefix_tokens: int, grid: tuple[int, int] | None
) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Split states into prefix tokens and patches.

    states: [B, N, C] each -> prefix: [B, P, C] each, None if P is 0; patches: [B, N - P, C] each, or
    [B, C, H, W] if the grid H, W is given.
    """
    prefix = [state[:, :num_prefix_tokens] for state in states] if num_prefix_tokens else None
    patches = [state[:, num_prefix_tokens:] for state in states]
    if grid is not None:
        patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
    return prefix, patches


def timm_result(
    patches: list[Tensor], prefix: list[Tensor] | None, features: Tensor | None, as_dict: bool
) -> dict[str, Tensor | list[Tensor]] | tuple | list:
    """Return the result of timm's `forward_intermediates`. prefix, features: None if not requested."""
    if as_dict:
        result = {
            "image_intermediates": patches,
            "image_intermediates_prefix": prefix,
            "image_features": features,
        }
        return {name: value for name, value in result.items() if value is not None}
    intermediates = patches if prefix is None else list(zip(patches, prefix))
    return intermediates if features is None else (features, intermediates)


def read_timm_result(
    result: tuple | list, with_prefix: bool, with_features: bool
) -> tuple[list[Tensor], list[Tensor] | None, Tensor | None]:
    """Return patches, prefix tokens and features of what timm's `forward_intermediates` returned, see `timm_result`."""
    features, states = result if with_features else (None, result)
    patches, prefix = map(list, zip(*states)) if with_prefix else (states, None)
    return patches, prefix, features
