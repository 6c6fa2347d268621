"""Multiply-adds of a vision transformer whose tokens halt at different depths."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def macs_per_image(model: nn.Module, depth: Tensor) -> Tensor:
    """Multiply-adds of one forward pass in which tokens reach these depths.

    depth: [B, N], 1..L -> [B] float64. Counts patch embedding, the blocks' projections and MLPs,
    attention (2 n^2 C for n live tokens), and the heads; norms and activations are left out, as is
    usual. Of a static pass: depth L everywhere.
    """
    embed = _embedding_macs(model.patch_embed, depth.shape[1] - model.num_prefix_tokens)
    heads = sum(_linear_weights(module) for name, module in model.named_children() if name.startswith("head"))
    per_block = [[_linear_weights(b), 2 * b.attn.attn_dim] for b in model.blocks]
    blocks = torch.tensor(per_block, dtype=torch.float64).to(depth.device, non_blocking=True)
    reached = torch.arange(len(blocks), device=depth.device)[:, None, None]
    live = (depth > reached).sum(dim=2).double()  # [L, B]
    return embed + heads + (live * blocks[:, :1] + live**2 * blocks[:, 1:]).sum(dim=0)


STEM_MACS: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # for these sizes of images, these multiply-adds


def _embedding_macs(embed: nn.Module, num_patches: int) -> float:
    """In closed form for patches of pixels; a convolutional stem is counted by torch, on shapes alone, once.

    Its multiply-adds at other image sizes than its own are taken to grow with the number of patches.
    """
    if isinstance(embed, PatchEmbed):
        return embed.proj.weight.numel() * num_patches
    size, macs = STEM_MACS.get(embed, (None, None))
    if size != embed.img_size:
        weights = {name: value.to("meta") for name, value in embed.state_dict().items()}
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(embed, weights, torch.empty(1, embed.in_chans, *embed.img_size, device="meta"))
        macs = counter.get_total_flops() / 2
        STEM_MACS[embed] = embed.img_size, macs
    return macs * num_patches / embed.num_patches


def _linear_weights(module: nn.Module) -> int:
    """Also of layers that torch has quantized, whose weights are packed, and unpacked by a method."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear) or callable(getattr(m, "weight", None)))
    return sum(layer.in_features * layer.out_features for layer in layers)
