"""MACs (multiply-accumulate operations) of a vision transformer whose tokens halt at different depths."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def macs_per_image(model: nn.Module, depth: Tensor) -> Tensor:
    """Return the MACs of one forward pass in which the tokens reach these depths.

    model: a ViT of timm; depth: [B, N], 1..L -> [B] float64. For the static model, depth is L everywhere.
    Counts the patch embedding, the projections and MLPs of the blocks, attention (2 n^2 C for n live
    tokens) and the heads. Norms and activations are not counted.
    """
    return macs_counter(model, depth.shape[1])(depth)


def macs_counter(model: nn.Module, num_tokens: int) -> Callable[[Tensor], Tensor]:
    """Return `macs_per_image` of this model and number of tokens as a function of depth, for repeated calls.

    The sizes of the model's layers are read only once.
    """
    embed = _embedding_macs(model.patch_embed, num_tokens - model.num_prefix_tokens)
    heads = sum(_linear_weights(module) for name, module in model.named_children() if name.startswith("head"))
    sizes = [[_linear_weights(b), 2 * b.attn.attn_dim] for b in model.blocks]
    per_block = torch.tensor(sizes, dtype=torch.float64)

    def count(depth: Tensor) -> Tensor:
        blocks = per_block.to(depth.device, non_blocking=True)
        block = torch.arange(len(blocks), device=depth.device)[:, None, None]
        live = (depth > block).sum(dim=2).double()  # [L, B]
        return embed + heads + (live * blocks[:, :1] + live**2 * blocks[:, 1:]).sum(dim=0)

    return count


def macs_at_depth(model: nn.Module, depth: float) -> float:
    """Return the MACs of one image of the model's size if every token reaches the same depth."""
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return macs_per_image(model, torch.full((1, num_tokens), float(depth))).item()


def static_macs(model: nn.Module) -> float:
    """Return the MACs of one image of the model's size through every block."""
    return macs_at_depth(model, model.num_blocks)


STEM_MACS: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # stem -> its image size, its MACs at that size


def _embedding_macs(embed: nn.Module, num_patches: int) -> float:
    """Return the MACs of the patch embedding.

    A convolutional stem is counted once, by torch on the meta device. For image sizes other than
    its own, its MACs are assumed to grow with the number of patches.
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
    """Return the number of weights of all linear layers, biases excluded.

    A quantized layer is no nn.Linear; it is recognized by its method `weight`, which unpacks the weights.
    """
    layers = (m for m in module.modules() if isinstance(m, nn.Linear) or callable(getattr(m, "weight", None)))
    return sum(layer.in_features * layer.out_features for layer in layers)
