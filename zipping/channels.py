"""The channels of the tokens in a ViT's weights, where two of them can change places."""

from __future__ import annotations

import copy
import re

import torch
from timm.models import VisionTransformer
from torch import nn

READING = r"attn\.(qkv|[qkv]_proj|gate)|mlp\.fc1(_g|_x)?"  # the linear layers of a block that read the tokens
LINEAR = re.compile(rf"head(_dist)?|blocks\.\d+\.({READING}|attn\.proj|mlp\.fc2)")
WITHOUT_CHANNELS = re.compile(
    rf"({READING}|head|head_dist)\.bias|attn\.[qv]_bias|(attn|mlp)\.norm\.\w+|attn\.[qk]_norm\.\w+"
    r"|patch_embed\.backbone\..+|rope\.freqs"
)


def channel_axis(name: str) -> int | None:
    """Return which axis of a ViT parameter holds the channels of the tokens; None if there is none."""
    in_block = _name_in_block(name)
    if re.fullmatch(rf"({READING}|head|head_dist)\.weight", in_block):
        return 1
    if re.fullmatch(r"(cls|dist|reg)_token|pos_embed", name):
        return 2
    written = r"patch_embed\.proj|attn\.proj|mlp\.fc2|norm[12]?|norm_pre|fc_norm|patch_embed\.norm"
    return 0 if re.fullmatch(rf"({written})\.(weight|bias)|ls[12]\.gamma|gamma_[12]", in_block) else None


def _name_in_block(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


@torch.no_grad()
def swap_channels(model: VisionTransformer, channel: int) -> None:
    """Swap a channel of the tokens with channel 0, in all weights and in the directions of the gate."""
    weights = [(parameter, channel_axis(name)) for name, parameter in model.named_parameters()]
    for weight, axis in [*weights, (model.gate_directions, 1)]:
        if weight is not None and axis is not None:
            pair = torch.tensor([channel, 0], device=weight.device)
            weight.index_copy_(axis, pair.flip(0), weight.index_select(axis, pair))


def why_not_swappable(model: VisionTransformer) -> str | None:
    """Return why a swap of channels in the known weights would change the outputs; None if it would not."""
    if isinstance(model.patch_embed.proj, nn.Identity):
        return "the patch embedding has no projection"
    for name, _ in model.named_parameters():
        if channel_axis(name) is None and not WITHOUT_CHANNELS.fullmatch(_name_in_block(name)):
            return f"the channels of {name} are not known"
    for name, module in model.named_modules():
        if LINEAR.fullmatch(name) and "weight" not in module._parameters and not isinstance(module, nn.Identity):
            return f"{name} is a {type(module).__name__}, whose channels are not known"
    return None


@torch.no_grad()
def why_swap_changes_logits(model: VisionTransformer) -> str | None:
    """Return the reason if code of the model treats channels differently; None if it treats them alike.

    Tried on one image, with a copy of the model. Its weights get noise, because zeros would hide a branch.
    """
    random, probe = torch.Generator().manual_seed(0), copy.deepcopy(model).cpu().float().eval()
    if any(parameter.is_meta for parameter in probe.parameters()):
        return None
    probe.halting = False
    if probe.num_classes == 0:
        probe.head = nn.Linear(probe.embed_dim, 8)
    for parameter in probe.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
    image = torch.randn(1, probe.patch_embed.proj.weight.shape[1], *probe.patch_embed.img_size, generator=random)
    before = probe(image)
    swap_channels(probe, probe.embed_dim - 1)
    if torch.allclose(probe(image), before, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
        return None
    return f"{type(model).__name__} treats channels differently"
