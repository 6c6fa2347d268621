"""Weights that make tokens halt around a given depth, for tests and benchmarks."""

from __future__ import annotations

import math

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn


@torch.no_grad()
def set_synthetic_depths(model: VisionTransformer, mean: float, spread: float) -> None:
    """Set weights so that tokens halt around depth `mean` with standard deviation `spread`, in blocks.

    For tests and benchmarks. Channel 0 then grows by the same step in every block and starts, for
    each token, from its position (half of the variance), its content (a quarter) and its image (a
    quarter; the only part for prefix tokens), which the first head of block 1 brings to all of the
    image's tokens. The shares hold for images of standard normal noise. Other weights, and so the
    rest of the computation, stay as they are.

    ValueError for a model whose projections have no bias, or whose stem has no projection.
    """
    blocks, grid, channels = model.blocks, model.patch_embed.num_patches, model.embed_dim
    if blocks[0].mlp.fc2.bias is None:
        raise ValueError("depths are imposed by the bias of projections, and it has none")
    if isinstance(model.patch_embed.proj, nn.Identity):
        raise ValueError("depths are imposed by the projection of patches, and it has none")
    slope = 6.0  # rise of the gate's logit per block: steep enough to halt within one or two
    step = slope / model.gate_scale  # the same in units of channel 0
    crossing = mean - _halting_lag(slope)  # the block where the logit of an average token crosses 0
    start = (model.gate_center / slope - crossing) * step  # in channel 0; + l * step after block l

    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        block.attn.proj.weight[0], block.attn.proj.bias[0] = 0, 0
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = 0, step
        for scale in (block.ls1, block.ls2):
            if not isinstance(scale, nn.Identity):
                scale.gamma[0] = 1

    kernel = model.patch_embed.proj.weight
    content, shared = torch.randn(2, *kernel.shape[1:], generator=generator).to(kernel)
    content, shared = content / content.norm(), shared / shared.norm()  # of unit variance on normal noise
    kernel[0], kernel[1], kernel[2] = 0.5 * spread * step * content, shared, -shared
    if model.patch_embed.proj.bias is not None:
        model.patch_embed.proj.bias[:3] = 0

    is_normed = not isinstance(model.norm_pre, nn.Identity)
    _set_start(model, 0.0 if is_normed else start, math.sqrt(0.5) * spread * step, generator)
    if is_normed:
        _set_norm(model, start, generator)
    _set_image_term(blocks[0], 0.5 * spread * step * math.sqrt(grid), start, channels)


def _set_start(model: VisionTransformer, start: float, position_std: float, generator: torch.Generator) -> None:
    """Channels 0 to 2 before the first block: `start` plus a term of the position; 0, 0."""
    prefix = [t for t in (model.cls_token, model.reg_token, getattr(model, "dist_token", None)) if t is not None]
    for token in prefix:
        token[..., :3] = 0
        token[..., 0] = start
    if model.pos_embed is None:
        model.patch_embed.proj.bias[0] = start
        return
    model.pos_embed[..., :3] = 0
    patches = model.pos_embed[:, -model.patch_embed.num_patches :, 0]
    quantiles = torch.linspace(0, 1, patches.numel() + 2)[1:-1][torch.randperm(patches.numel(), generator=generator)]
    patches.copy_(start + position_std * math.sqrt(2) * torch.erfinv(2 * quantiles - 1))


def _set_norm(model: VisionTransformer, start: float, generator: torch.Generator) -> None:
    """Lets the norm before the blocks leave channels 0 to 2 about as they are, but for `start`."""
    embed, weight = model.patch_embed, model.norm_pre.weight
    noise = torch.randn(4, 3, *embed.img_size, generator=generator)
    weight[:3] = model._pos_embed(embed(noise.to(weight))).std(dim=2).mean()
    model.norm_pre.bias[:3] = 0
    model.norm_pre.bias[0] = start


def _set_image_term(block: Block, std: float, start: float, channels: int) -> None:
    """Block 1's attention adds the image's mean content (channel 1 - channel 2) to channel 0.

    `std` is that of the term times the square root of the number of patches.
    """
    attn = block.attn
    queries, value = slice(attn.head_dim), 2 * attn.attn_dim  # of the first head; its first value channel
    for parameter in attn.qkv.parameters():
        parameter[queries] = 0  # the first head attends evenly
        parameter[value] = 0
    attn.qkv.weight[value, 1], attn.qkv.weight[value, 2] = 1, -1
    block.norm1.weight[1:3] = 1
    if block.norm1.bias is not None:
        block.norm1.bias[1:3] = 0
    norm = math.sqrt((start**2 + 2) / channels + 1 / 3)  # what norm1 divides by, roughly
    attn.proj.weight[0, 0] = std * norm / 2


def _halting_lag(slope: float) -> float:
    """Mean blocks between a logit's crossing of 0 and the halting of its token."""
    crossing = 20 + torch.linspace(0, 1, 101)[:-1]
    cumulative = torch.sigmoid(slope * (torch.arange(1, 41)[:, None] - crossing)).cumsum(0)  # [l, crossing]
    depth = (cumulative < 0.99).sum(0) + 1
    return (depth - crossing).mean().item()


impose_depths = set_synthetic_depths  # its old name
