"""Weights that impose token depths on a model, for tests and benchmarks.

The halting gate of an A-ViT model reads channel 0 of a token after each block. Its logit is
gate_scale * channel 0 - gate_center. `set_synthetic_depths` makes channel 0 a straight line over depth, with the same
slope for all tokens. A token halts soon after its line crosses the threshold, so its start decides its depth:

    channel 0
        |         A       B
        |- - - -A- - - -B- - - - - - - - -  threshold: gate_center / gate_scale
        |     A       B
        |   A       B
        | A       B
        |       B             each block adds `step` to every token
        |     B
        |   B
        | B
        +----------------------------------> blocks

The starts are normally distributed. Their variance comes from the position of the token (1/2), its content (1/4) and
the content of its image (1/4). So depths differ within an image and between images. The content of the token also takes
the part of the position in models without position embeddings, and that of the image in models whose attention has a
norm before the output projection. The prefix tokens of the latter have the same depth in every image.
"""

from __future__ import annotations

import math

import torch
from timm.models import VisionTransformer
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

LOGIT_SLOPE = 6.0  # rise of the gate's logit per block: a token halts one or two blocks after its crossing


@torch.no_grad()
def set_synthetic_depths(model: VisionTransformer, mean: float, spread: float) -> None:
    """Set weights so that tokens halt around depth `mean` with standard deviation `spread`, in blocks.

    Prefix tokens have no position and no content, so their depths vary with the image only. The variances hold for
    images of standard normal noise. The changed weights are those that write to channels 0 to 2, and the first head of
    block 1 with its norm.
    Raises ValueError if the projections have no bias, if the patch embedding has no projection, or if blocks normalize
    what they add.
    """
    if isinstance(model.blocks[0], EvaBlockPostNorm):
        raise ValueError("depths cannot be imposed, because the blocks normalize what they add")
    if model.blocks[0].mlp.fc2.bias is None:
        raise ValueError("depths cannot be imposed, because the projections have no bias")
    if isinstance(model.patch_embed.proj, nn.Identity):
        raise ValueError("depths cannot be imposed, because the patch embedding has no projection")
    step = LOGIT_SLOPE / model.gate_scale  # added to channel 0 by each block
    crossing = mean - _mean_blocks_after_crossing(LOGIT_SLOPE)  # depth at which the logit of the mean token is 0
    start = (model.gate_center / LOGIT_SLOPE - crossing) * step  # channel 0 of the mean token before block 1
    std = spread * step  # of channel 0 over the tokens
    position = 1 / 2 if model.pos_embed is not None else 0  # fractions of the variance
    image = 1 / 4 if isinstance(model.blocks[0].attn.norm, nn.Identity) else 0

    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        _set_step(block, step)
    _set_content_term(model, math.sqrt(1 - position - image) * std, generator)
    is_normed = not isinstance(model.norm_pre, nn.Identity)
    _set_start(model, 0.0 if is_normed else start, math.sqrt(position) * std, generator)
    if is_normed:
        _set_norm(model, start, generator)
    if image:
        _set_image_term(model.blocks[0], math.sqrt(image) * std, start, model.patch_embed.num_patches)


def _set_step(block: Block, step: float) -> None:
    """Make a block add `step` to channel 0 and nothing else."""
    block.attn.proj.weight[0], block.attn.proj.bias[0] = 0, 0
    block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = 0, step
    for name, parameter in block.named_parameters():
        if name in ("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2"):
            parameter[0] = 1


def _set_content_term(model: VisionTransformer, std: float, generator: torch.Generator) -> None:
    """Make the patch embedding write the content of a patch to channels 0 to 2.

    Channel 0 gets one random projection of the pixels with standard deviation `std`. Channels 1 and 2 get another
    one and its negative, with unit variance, for `_set_image_term`.
    """
    projection = model.patch_embed.proj
    content, shared = torch.randn(2, *projection.weight.shape[1:], generator=generator).to(projection.weight)
    content, shared = content / content.norm(), shared / shared.norm()
    projection.weight[0], projection.weight[1], projection.weight[2] = std * content, shared, -shared
    if projection.bias is not None:
        projection.bias[:3] = 0


def _set_start(model: VisionTransformer, start: float, position_std: float, generator: torch.Generator) -> None:
    """Set the contribution of the position to channels 0 to 2: `start` plus a normal quantile per patch, 0 and 0.

    Prefix tokens get `start`. Without position embeddings, the bias of the patch embedding is `start`.
    """
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
    """Make the norm before the blocks keep channels 0 to 2 approximately unchanged, and add `start` to channel 0."""
    embed, weight = model.patch_embed, model.norm_pre.weight
    noise = torch.randn(4, 3, *embed.img_size, generator=generator)
    embedded = model._pos_embed(embed(noise.to(weight)))
    tokens = embedded[0] if isinstance(embedded, tuple) else embedded
    weight[:3] = tokens.std(dim=2).mean()
    model.norm_pre.bias[:3] = 0
    model.norm_pre.bias[0] = start


def _set_image_term(block: Block, std: float, start: float, num_patches: int) -> None:
    """Make the attention of block 1 add the mean content of the image to channel 0, with standard deviation `std`.

    The first head attends evenly, and the first channel of its value is channel 1 minus channel 2. Its mean over the
    patches has a standard deviation proportional to 1 / sqrt(num_patches), which the output projection undoes.
    """
    attn = block.attn
    queries, values = _queries_and_values(attn)
    for parameter in queries:
        parameter[: attn.head_dim] = 0
    for parameter in values:
        parameter[0] = 0
    values[0][0, 1], values[0][0, 2] = 1, -1
    block.norm1.weight[1:3] = 1
    if getattr(block.norm1, "bias", None) is not None:
        block.norm1.bias[1:3] = 0
    norm = math.sqrt((start**2 + 2) / values[0].shape[1] + 1 / 3)  # estimate of what norm1 divides by
    attn.proj.weight[0, 0] = std * math.sqrt(num_patches) * norm / 2


def _queries_and_values(attn: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weight and the biases from which attention computes queries, and those of the values."""
    if attn.qkv is None:
        return list(attn.q_proj.parameters()), list(attn.v_proj.parameters())
    parts = [parameter.chunk(3) for parameter in attn.qkv.parameters()]
    biases = [getattr(attn, name, None) for name in ("q_bias", "v_bias")]  # of timm's EvaAttention
    queries, values = [query for query, _, _ in parts], [value for _, _, value in parts]
    return tuple(part if bias is None else [*part, bias] for part, bias in zip((queries, values), biases))


def _mean_blocks_after_crossing(slope: float) -> float:
    """Return the mean depth of a token minus the depth at which its logit crosses 0, for a logit of this slope.

    The mean is over crossings spread evenly between two blocks.
    """
    crossing = 20 + torch.linspace(0, 1, 101)[:-1]
    depths = torch.arange(1, 41)[:, None]
    cumulative = torch.sigmoid(slope * (depths - crossing)).cumsum(0)  # [depth, crossing]
    depth = (cumulative < 0.99).sum(0) + 1
    return (depth - crossing).mean().item()


impose_depths = set_synthetic_depths  # earlier name
