"""timm's ViT blocks on packed rows, and the check whether a modified block can run on them.

A change that may look at several tokens, or at a token's place in its image, needs the dense
[B, N, C]. All blocks then run masked: same result, but halted tokens save no compute.

| change to a block                                                       | mode   |
| ----------------------------------------------------------------------- | ------ |
| none, a plain DeiT block: short form in evaluation without gradients    | zipped |
| another linear layer (qkv, proj, fc1, fc2; LoRA), or its own `forward`  | zipped |
| other norms, layer scale and other small layers from timm or torch      | zipped |
| a hook for all modules, registered with torch                           | zipped |
| a hook on a module                                                      | masked |
| another class of block, attention, MLP or stochastic depth              | masked |
| any other layer from outside timm and torch                             | masked |
| another `forward` of a module, except these linear layers               | masked |
| another `forward` of a class, or another F.scaled_dot_product_attention | masked |
| attention that is not fused                                             | masked |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, DropPath, GluMlp, LayerNorm, Mlp, SwiGLU, apply_rot_embed_cat
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models import VisionTransformer, VisionTransformerDistilled, checkpoint
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from zipping import can_pack, pack
from zipping.attention import ATTENTION, PerImageAttentionMask
from zipping.rotations import Rotation, embeddings_of_blocks, rotations_of_blocks
from zipping.stores import MaskedTokens, PackedTokens

ViTBlock = Block | EvaBlock | EvaBlockPostNorm


def prepare_blocks(
    model: VisionTransformer | Eva, x: Tensor, embedding: Tensor | None, zip_tokens: bool
) -> tuple[MaskedTokens | PackedTokens, Tensor, list[Callable]]:
    """Return the store in which every token is live, its rows, and a forward function for each block.

    x: [B, N, C], the input of the first block; embedding: the rotary position embedding, see `embeddings_of_blocks`.
    Warns if a modified block or function prevents zipping.
    """
    block_forwards = _select_block_forwards(model.blocks, x, zip_tokens)
    is_masked = masked_block in block_forwards
    tokens, rows = (MaskedTokens.pack if is_masked else pack)(x, model.num_prefix_tokens)
    if embedding is not None:
        rotations = (embeddings_of_blocks if is_masked else rotations_of_blocks)(model, embedding)
        block_forwards = [partial(forward, rotation=own) for forward, own in zip(block_forwards, rotations)]
    if model.grad_checkpointing and torch.is_grad_enabled():
        block_forwards = [partial(checkpoint, block_forward) for block_forward in block_forwards]
    return tokens, rows, block_forwards


def _select_block_forwards(blocks: nn.Sequential, x: Tensor, zip_tokens: bool) -> list[Callable]:
    """Return a forward function for each block: `masked_block`, `zipped_block` or `plain_block`.

    Either all blocks run masked or none.
    """
    if not zip_tokens or not can_pack(x):
        return [masked_block] * len(blocks)
    plain = [_is_plain(block) for block in blocks._modules.values()]
    reason = replaced_function() or (None if all(plain) else why_not_zippable(blocks))
    if reason:
        warnings.warn(
            f"zipping is disabled because {reason}. Halted tokens are masked instead, so they save no compute. "
            "Undo the change, or set zip_tokens=False to silence this warning.",
            stacklevel=10,  # the line that calls the model
        )
        return [masked_block] * len(blocks)
    needs_modules = torch.is_grad_enabled() or _has_any_global_hook()
    return [
        plain_block if is_plain and not (needs_modules or block.training) else zipped_block
        for is_plain, block in zip(plain, blocks)
    ]


# Forward functions -------------------------------------------------------------------------------


def masked_block(block: ViTBlock, x: Tensor, tokens: MaskedTokens, rotation: Tensor | None = None) -> Tensor:
    """Run timm's block on all tokens, with halted tokens masked as keys. x: [B, N, C] -> [B, N, C].

    rotation: the rotary position embedding of the patches, as timm's attention takes it, or None.
    """
    return run_block(block, x, tokens.attention_mask, rotation)


def run_block(block: ViTBlock, x: Tensor, mask: object, embedding: Tensor | None) -> Tensor:
    """Run timm's block with an attention mask. Only blocks of timm's Eva take a rotary position embedding."""
    return block(x, attn_mask=mask) if embedding is None else block(x, rope=embedding, attn_mask=mask)


def zipped_block(block: ViTBlock, rows: Tensor, tokens: PackedTokens, rotation: Rotation | None = None) -> Tensor:
    """Run timm's block on the live tokens only, as if they were one image. rows: [T, C] -> [T, C].

    Stochastic depth is drawn for all images, as for a dense batch, and applied to the rows.
    """
    if len(rows) == 0 and isinstance(block.attn, EvaAttention):  # timm's code needs a row: it gets one of zeros
        return _run_on_rows(block, rows.sum(dim=0, keepdim=True), tokens, None)[:0]
    return _run_on_rows(block, rows, tokens, PerImageAttentionMask(tokens, rotation))


def _run_on_rows(block: ViTBlock, rows: Tensor, tokens: PackedTokens, mask: PerImageAttentionMask | None) -> Tensor:
    x = rows.unsqueeze(0)
    if not any(isinstance(layer, DropPath) and layer.training for layer in (block.drop_path1, block.drop_path2)):
        return block(x, attn_mask=mask).squeeze(0)
    x = x + _drop_path(block.drop_path1, _attention_branch(block, x, mask), tokens)
    x = x + _drop_path(block.drop_path2, _mlp_branch(block, x), tokens)
    return x.squeeze(0)


def _attention_branch(block: ViTBlock, x: Tensor, mask: PerImageAttentionMask | None) -> Tensor:
    """Return what a block's attention adds to x before stochastic depth. x: [1, T, C] -> [1, T, C]."""
    if isinstance(block, EvaBlockPostNorm):
        return block.norm1(block.attn(x, attn_mask=mask))
    branch = block.attn(block.norm1(x), attn_mask=mask)
    if isinstance(block, EvaBlock):
        return branch if block.gamma_1 is None else block.gamma_1 * branch
    return block.ls1(branch)


def _mlp_branch(block: ViTBlock, x: Tensor) -> Tensor:
    """Return what a block's MLP adds to x before stochastic depth. x: [1, T, C] -> [1, T, C]."""
    if isinstance(block, EvaBlockPostNorm):
        return block.norm2(block.mlp(x))
    branch = block.mlp(block.norm2(x))
    if isinstance(block, EvaBlock):
        return branch if block.gamma_2 is None else block.gamma_2 * branch
    return block.ls2(branch)


def _drop_path(drop_path: nn.Module, branch: Tensor, tokens: PackedTokens) -> Tensor:
    """Return the branch with stochastic depth: zero for images that skip it, scaled for the others.

    branch: [1, T, C] -> [1, T, C].
    """
    scale = drop_path(branch.new_ones(tokens.size[0], 1))  # [B, 1]
    return branch * tokens.expand_to_tokens(scale)


def plain_block(block: Block, rows: Tensor, tokens: PackedTokens) -> Tensor:
    """Run `zipped_block` in short form: for plain blocks in evaluation. rows: [T, C] -> [T, C].

    In small batches, calls of modules and layers without effect take as long as all halting ops.
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


# Modified blocks ---------------------------------------------------------------------------------


def layers_of(block: Block) -> tuple[nn.Module, ...]:
    """Return the layers of a block, its attention and its MLP, from `_modules`: attribute access is slower."""
    parts = block._modules
    return (*parts.values(), *parts["attn"]._modules.values(), *parts["mlp"]._modules.values())


PLAIN_LAYER_TYPES = {  # in a DeiT block, without and with stochastic depth
    tuple(map(type, layers_of(Block(8, 1, drop_path=rate, norm_layer=LayerNorm, device="meta")))) for rate in (0.0, 0.1)
}
SUPPORTED_MLPS = (Mlp, GluMlp, SwiGLU)
SUPPORTED_PARTS = {  # the class of each part of a block must be one of these; "" is the block itself
    "": (Block, EvaBlock, EvaBlockPostNorm),
    "attn": (Attention, AttentionRope, EvaAttention),
    "mlp": SUPPORTED_MLPS,
    "drop_path1": (nn.Identity, DropPath),
    "drop_path2": (nn.Identity, DropPath),
}
ROTARY_EMBEDDINGS = (type(None), RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)
# Layers in these places are assumed to treat each token separately, whatever replaces them
LINEAR_PLACES = (".qkv.", ".q_proj.", ".k_proj.", ".v_proj.", ".proj.", ".fc1.", ".fc1_g.", ".fc1_x.", ".fc2.")
ORIGINAL_FORWARDS = {
    layer: layer.forward
    for layer in (
        *SUPPORTED_PARTS[""],
        *SUPPORTED_PARTS["attn"],
        *SUPPORTED_MLPS,
        DropPath,
        nn.Linear,
        LayerNorm,
        nn.GELU,
    )
}


def unsupported_part(model: VisionTransformer | Eva) -> str | None:
    """Return which part of a timm ViT halting does not support; None if it supports all."""
    for name, block in model.blocks.named_children():
        for part in ("", "attn", "mlp"):
            module = block.get_submodule(part)
            if type(module) not in SUPPORTED_PARTS[part]:
                return f"{f'blocks.{name}.{part}'.rstrip('.')} is a {type(module).__name__}"
    if isinstance(model, VisionTransformerDistilled) and (model.num_reg_tokens or model.no_embed_class):
        return "timm's distilled class has no reg_tokens and no no_embed_class"
    embedding = getattr(model, "rope", None)
    if type(embedding) not in ROTARY_EMBEDDINGS:
        return f"rope is a {type(embedding).__name__}"
    return None if isinstance(model.patch_drop, (nn.Identity, type(None))) else "patch_drop_rate is above 0"


def _is_plain(block: nn.Module) -> bool:
    """Return whether a block is an unmodified DeiT block, so that `plain_block` computes the same in evaluation."""
    if type(block) is not Block or _is_modified(block):
        return False
    layers = layers_of(block)
    for layer in layers:
        if _is_modified(layer) or (layer.training and not block.training):
            return False
    has_plain_layers = tuple(map(type, layers)) in PLAIN_LAYER_TYPES
    return has_plain_layers and block.attn.fused_attn and not block.norm1._fast_norm


def _is_modified(module: nn.Module) -> bool:
    """Return whether a module has a hook or its own `forward`."""
    return "forward" in module.__dict__ or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def why_not_zippable(blocks: nn.Sequential) -> str | None:
    """Return why blocks cannot run on packed rows; None if they can. The table above lists the cases."""
    for name, block in blocks._modules.items():
        for part, module in block.named_modules():
            reason = _why_module_not_zippable(part, module)
            if reason:
                return f"blocks.{name}.{part}".rstrip(".") + reason
    return None


def _why_module_not_zippable(part: str, module: nn.Module) -> str | None:
    """Return why one module cannot run on packed rows, as words that follow its name; None if it can.

    part: name of the module in its block, "" for the block itself.
    """
    if not _is_supported_type(part, type(module)):
        return f" is a {type(module).__name__}"
    if _has_hooks(module):
        return " has a hook"
    if "forward" in module.__dict__ and not _is_linear_place(part):
        return ".forward was replaced"
    return " does not use fused attention" if part == "attn" and not module.fused_attn else None


@cache  # asked for every module in every forward pass
def _is_supported_type(part: str, layer: type[nn.Module]) -> bool:
    if part in SUPPORTED_PARTS:
        return layer in SUPPORTED_PARTS[part]
    return _is_linear_place(part) or layer.__module__.startswith(("timm.", "torch."))


def _is_linear_place(part: str) -> bool:
    return any(place in f".{part}." for place in LINEAR_PLACES)


def replaced_function() -> str | None:
    """Return which function of timm or torch was replaced for all modules; None if there is none."""
    if F.scaled_dot_product_attention is not ATTENTION:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    for module in (timm.layers.attention, timm.models.eva):
        if module.apply_rot_embed_cat is not apply_rot_embed_cat:
            return f"{module.__name__}.apply_rot_embed_cat was replaced"
    replaced = (layer.__name__ for layer, forward in ORIGINAL_FORWARDS.items() if layer.forward is not forward)
    return next((f"{name}.forward was replaced" for name in replaced), None)
