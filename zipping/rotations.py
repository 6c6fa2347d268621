"""Rotary position embeddings: queries and keys are rotated by the place of their patch in the image.

timm computes one embedding for the patches of an image, and its attention rotates every row but the first
`num_prefix_tokens`. Packed rows have no such order. Their blocks get no embedding, so timm's attention
does not rotate, and `PerImageAttentionMask` rotates the queries and keys right before attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import apply_rot_embed_cat
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor


def embed_images(model: VisionTransformer | Eva, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the input of the first block of timm's model, and its rotary position embedding, if there is one.

    images: [B, in_chans, H, W] -> [B, N, C]; for the embedding, see `embeddings_of_blocks`.
    """
    embedded = model._pos_embed(model.patch_embed(images))
    x, embedding = embedded if isinstance(embedded, tuple) else (embedded, None)
    return model.norm_pre(x), embedding


def has_fixed_rotations(model: VisionTransformer | Eva) -> bool:
    """Return whether rotations follow from tensors of the model alone, so that a captured pass can compute them.

    For a dynamic image size and for random coordinates, timm computes a grid on the CPU in every pass.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return True
    is_random = model.training and rope.aug_active
    return getattr(rope, "feat_shape", None) is not None and not (is_random or model.dynamic_img_size)


class Rotation(NamedTuple):
    """Rotation of the tokens of an image in one block.

    table: [N, 2 D], or [H, N, 2 D] if each head has its own: sines, then cosines, of each token. Prefix tokens
    are not rotated: their sines are 0 and their cosines 1;
    half: the order of the channels, as in timm's attention.
    """

    table: Tensor
    half: bool

    def rotate(self, position: Tensor, *values: Tensor) -> list[Tensor]:
        """Rotate queries and keys. position: [T], n of the token in each row; values: [1, H, T, D] each."""
        rows = self.table.index_select(-2, position)
        return [apply_rot_embed_cat(x, rows, half=self.half) for x in values]


def embeddings_of_blocks(model: VisionTransformer | Eva, embedding: Tensor | None) -> list[Tensor | None]:
    """Return the rotary position embedding of each of timm's blocks.

    embedding: [N - P, 2 D] for all blocks, or [L, H, N - P, 2 D]; None if the model has none.
    """
    if embedding is None:
        return [None] * len(model.blocks)
    return list(embedding.unbind()) if model.rope_mixed else [embedding] * len(model.blocks)


def rotations_of_blocks(model: VisionTransformer | Eva, embedding: Tensor) -> list[Rotation]:
    """Return the rotation of each block. embedding: see `embeddings_of_blocks`."""
    prefix = embedding.new_ones(*embedding.shape[:-2], model.num_prefix_tokens, embedding.shape[-1])
    prefix[..., : embedding.shape[-1] // 2] = 0
    tables = embeddings_of_blocks(model, torch.cat([prefix, embedding], dim=-2))
    return [Rotation(table, block.attn.rotate_half) for table, block in zip(tables, model.blocks)]
