"""The halting arithmetic of one block: scores, decisions and probabilities of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zipping.gate import Gate


class HaltingStep(NamedTuple):
    """Halting arithmetic of one block: a value per token, see `halting_step`."""

    score: Tensor
    cumulative_before: Tensor
    cumulative: Tensor
    halts: Tensor

    @property
    def probability(self) -> Tensor:
        return halting_probability(self.score, self.cumulative_before, self.halts)


def halting_step(x: Tensor, cumulative_before: Tensor, gate: Gate, is_last_block: bool) -> HaltingStep:
    """Compute the halting scores and decisions of live tokens after one block (Eq. 4 to 8).

    x: [..., C], the block's output; cumulative_before: [...] float32, the sum of the token's earlier scores.
    Returns, each [...]: score, h_l, float32; cumulative, c_l, the sum with it; halts, bool, True where
    c_l reaches 1 - halt_eps, and everywhere after the last block. A NaN score halts no token before
    the last block: the token stays live, and the logits become NaN.
    """
    score = torch.sigmoid(gate.logit(x))
    cumulative = cumulative_before + score
    halts = cumulative >= gate.limit
    return HaltingStep(score, cumulative_before, cumulative, torch.ones_like(halts) if is_last_block else halts)


def halting_probability(score: Tensor, cumulative_before: Tensor, halts: Tensor) -> Tensor:
    """Return p_l (Eq. 8): the score, or the remainder if the token halts."""
    return torch.where(halts, 1 - cumulative_before, score)
