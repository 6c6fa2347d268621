"""timm's ViT block on packed rows, and which modified blocks cannot run on them."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Attention, DropPath, GluMlp, LayerNorm, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zipping.attention import ATTENTION
from zipping.stores import MaskedTokens, PackedTokensCPU, PackedTokensCUDA


def masked_block(block: Block, x: Tensor, tokens: MaskedTokens) -> Tensor:
    """x: [B, N, C] -> [B, N, C]; timm's own block, halted tokens masked as keys."""
    return block(x, attn_mask=tokens.attention_mask)


def zipped_block(block: Block, rows: Tensor, tokens: PackedTokensCPU | PackedTokensCUDA) -> Tensor:
    """rows: [T, C] -> [T, C]; timm's block, on live tokens alone, as if they were one image.

    Stochastic depth is drawn for all images, as on a dense batch, and given to the rows.
    """
    x, mask = rows.unsqueeze(0), tokens.attention_mask
    if not any(isinstance(layer, DropPath) and layer.training for layer in (block.drop_path1, block.drop_path2)):
        return block(x, attn_mask=mask).squeeze(0)
    x = x + _drop_path(block.drop_path1, block.ls1(block.attn(block.norm1(x), attn_mask=mask)), tokens)
    x = x + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), tokens)
    return x.squeeze(0)


def _drop_path(drop_path: nn.Module, branch: Tensor, tokens: PackedTokensCPU | PackedTokensCUDA) -> Tensor:
    """branch: [1, T, C] -> the same, zero for images that skip it, the others' scaled."""
    scale = drop_path(branch.new_ones(tokens.size[0], 1))  # [B, 1]
    return branch * tokens.spread(scale)


def plain_block(block: Block, rows: Tensor, tokens: PackedTokensCPU | PackedTokensCUDA) -> Tensor:
    """rows: [T, C] -> [T, C]; `zipped_block` in evaluation, for `is_plain` blocks.

    For small batches: the layers that have nothing to do, and the calls of modules in modules, take
    as long as everything that halting adds.
    """
    attn, mlp = block.attn, block.mlp
    x = rows.unsqueeze(0)
    qkv = _linear(attn.qkv, _norm(block.norm1, x)).view(1, len(rows), 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [1, H, T, D]
    attended = tokens.attend(q, k, v)
    x = x + _linear(attn.proj, attended.transpose(1, 2).flatten(2))
    hidden = F.gelu(_linear(mlp.fc1, _norm(block.norm2, x)), approximate=mlp.act.approximate)
    return (x + _linear(mlp.fc2, hidden)).squeeze(0)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _layers(block: Block) -> tuple[nn.Module, ...]:
    """What a block, its attention and its MLP are made of; not as attributes, which take longer."""
    parts = block._modules
    return (*parts.values(), *parts["attn"]._modules.values(), *parts["mlp"]._modules.values())


PLAIN_LAYERS = {  # the types of a DeiT's, with and without stochastic depth
    tuple(map(type, _layers(Block(8, 1, drop_path=rate, norm_layer=LayerNorm, device="meta")))) for rate in (0.0, 0.1)
}
SUPPORTED_MLPS = (Mlp, GluMlp, SwiGLU)
SUPPORTED_PARTS = {  # the class of each part of a block must be one of these
    "": (Block,),
    "attn": (Attention,),
    "mlp": SUPPORTED_MLPS,
    "drop_path1": (nn.Identity, DropPath),
    "drop_path2": (nn.Identity, DropPath),
}
LINEAR_PLACES = (".qkv.", ".proj.", ".fc1.", ".fc2.")  # where people put others that work on one token at a time
ORIGINAL_FORWARDS = {
    layer: layer.forward for layer in (Block, Attention, *SUPPORTED_MLPS, DropPath, nn.Linear, LayerNorm, nn.GELU)
}


def is_plain(block: nn.Module) -> bool:
    """Whether nobody has changed this block: in evaluation it does what `plain_block` does."""
    if type(block) is not Block or _is_modified(block):
        return False
    layers = _layers(block)
    for layer in layers:
        if _is_modified(layer) or (layer.training and not block.training):
            return False
    is_deits = tuple(map(type, layers)) in PLAIN_LAYERS
    return is_deits and block.attn.fused_attn and not block.norm1._fast_norm


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _is_modified(module: nn.Module) -> bool:
    """Whether it has a hook, or a `forward` of its own."""
    return "forward" in module.__dict__ or _has_hooks(module)


def why_not_zippable(blocks: nn.Sequential) -> str | None:
    """Why blocks, some of which are not plain, cannot run on rows of live tokens, if so.

    A hook, and what takes the place of a block or of a part of it, may look at tokens by their
    places in an image, or at several at once. What takes the place of a linear layer, as LoRA does,
    is taken to work on one token at a time.
    """
    found = (
        _why_module_not_zippable(f"blocks.{name}.{part}".rstrip("."), part, module)
        for name, block in blocks._modules.items()
        for part, module in block.named_modules()
    )
    return next(filter(None, found), None)


def _why_module_not_zippable(name: str, part: str, module: nn.Module) -> str | None:
    """name: of the module; part: its name in its block."""
    in_linear = any(place in f".{part}." for place in LINEAR_PLACES)
    is_known = in_linear or type(module).__module__.startswith(("timm.", "torch."))
    if not (type(module) in SUPPORTED_PARTS[part] if part in SUPPORTED_PARTS else is_known):
        return f"{name} is a {type(module).__name__}"
    if _has_hooks(module):
        return f"{name} has a hook"
    if "forward" in module.__dict__ and not in_linear:
        return f"{name}.forward was replaced"
    return f"{name} does not use fused attention" if part == "attn" and not module.fused_attn else None


def replaced_function() -> str | None:
    """A function of timm's or torch's that was replaced for all modules, if one was."""
    if F.scaled_dot_product_attention is not ATTENTION:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    replaced = (layer.__name__ for layer, forward in ORIGINAL_FORWARDS.items() if layer.forward is not forward)
    return next((f"{name}.forward was replaced" for name in replaced), None)
