"""The gate, which computes the halting score of a token from its state after a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor

if TYPE_CHECKING:
    from zipping.stores import MaskedTokens, PackedTokens


class Gate(NamedTuple):
    """Gate of one block: h = sigmoid(scale * value - center). The tensors are built once per forward pass.

    minus_center: 0-d, or one number for each row;
    limit: 0-d, 1 - halt_eps, the cumulative score at which a token halts;
    direction: [C + 1] float32, weights w and bias b of the value w . x + b of patch tokens, whereas prefix tokens have
    score 0. None: the value of every token is channel 0.
    """

    scale: float
    minus_center: Tensor
    limit: Tensor
    direction: Tensor | None = None

    @classmethod
    def of(cls, scale: float, center: float, halt_eps: float, device: torch.device) -> Gate:
        """Build a gate that reads channel 0."""
        minus_center = torch.full((), -center, dtype=torch.float32, device=device)
        return cls(scale, minus_center, torch.full((), 1 - halt_eps, dtype=torch.float32, device=device))

    @classmethod
    def of_blocks(cls, model: VisionTransformer, device: torch.device) -> list[Gate]:
        """Build the gates of all blocks of an adaptive model."""
        gate = cls.of(model.gate_scale, model.gate_center, model.halt_eps, device)
        if model.gate_directions is None:
            return [gate] * model.num_blocks
        return [gate._replace(direction=direction) for direction in model.gate_directions.float()]

    def for_rows(self, tokens: MaskedTokens | PackedTokens, offset: Tensor | None) -> Gate:
        """Return the gate with the center of each row, as `logit` needs it.

        offset: [B], added to the center of each image, or None. With a direction, the center of prefix tokens is
        infinite, so their score is 0.
        """
        minus_center = self.minus_center
        if offset is not None:
            minus_center = minus_center - tokens.expand_to_tokens(offset)
        if self.direction is not None:
            minus_center = torch.where(tokens.is_prefix, -torch.inf, minus_center)
        return self._replace(minus_center=minus_center)

    def logit(self, x: Tensor) -> Tensor:
        """Return scale * value - center, float32. x: [..., C], the block's output -> [...].

        No gradient flows through a direction. The product and its sum are float32 under autocast too.
        """
        if self.direction is None:
            value = x.select(-1, 0).float()
        else:
            with torch.autocast(x.device.type, enabled=False):
                value = x.detach().float() @ self.direction[:-1] + self.direction[-1]
        return torch.add(self.minus_center, value, alpha=self.scale)


def checked_directions(directions: Tensor | None, model: VisionTransformer) -> Tensor | None:
    """Return a copy of directions in float32 on the device of the model; None if there are none.

    Raises ValueError unless they are dense, real, finite and of shape [L, C + 1].
    """
    if directions is None:
        return None
    shape = (model.num_blocks, model.embed_dim + 1)
    expected = f"gate_directions must be a tensor of finite numbers of shape {list(shape)} (blocks, channels + 1)"
    if not isinstance(directions, Tensor):
        raise ValueError(f"{expected}, got {type(directions).__name__}")
    is_dense = directions.layout == torch.strided and not (directions.is_nested or directions.is_quantized)
    if not is_dense or not directions.is_floating_point() or directions.is_meta:
        raise ValueError(f"{expected}, got a tensor that is not dense or not of real numbers")
    if directions.shape != shape:
        raise ValueError(f"{expected}, got {list(directions.shape)}")
    copied = directions.detach().to(torch.float32, copy=True)
    if not copied.isfinite().all():
        raise ValueError(f"{expected}, got {int((~copied.isfinite()).sum())} numbers that are not finite")
    return copied.to(next(model.parameters()).device)
