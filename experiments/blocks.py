"""Parts that the baselines share: the two halves of timm's block, and how tokens leave a dense batch.

Letters in shapes: B images, n tokens of each image in the block, N in the first block, P patches, C channels, H heads,
D channels of a head, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor


def attend(block: Block, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the attention half of a block, with its residual connection.

    x: [B, n, C]; bias: [B, n], is added to the logits of each key.
    Returns x: [B, n, C]; query, key: [B, H, n, D].
    """
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, n, D]
    query, key = attn.q_norm(query), attn.k_norm(key)
    mask = None if bias is None else bias[:, None, None, :].to(query.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    branch = attn.proj_drop(attn.proj(attended.transpose(1, 2).flatten(2)))
    return x + block.drop_path1(block.ls1(branch)), query, key


def feed_forward(block: Block, x: Tensor) -> Tensor:
    """Run the MLP half of a block, with its residual connection. x: [B, n, C] -> [B, n, C]."""
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def class_attention(block: Block, query: Tensor, key: Tensor) -> Tensor:
    """Return the class token's attention to each patch, averaged over heads.

    query, key: [B, H, n, D] -> [B, n - 1]
    """
    logits = (query[:, :, :1] * block.attn.scale) @ key.transpose(2, 3)
    return logits.softmax(dim=3).mean(dim=1)[:, 0, 1:]


def with_class_token(patch: Tensor) -> Tensor:
    """Return the places of the class token and these patches among all tokens. patch: [B, P] -> [B, 1 + P]."""
    return F.pad(patch + 1, (1, 0))


def select(x: Tensor, places: Tensor) -> Tensor:
    """Return the states of the tokens at these places. x: [B, n, C], places: [B, m] -> [B, m, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def depth_of_counts(counts: Sequence[int], num_tokens: int) -> Tensor:
    """Return depths by which each block runs this number of tokens, the first ones of the image: [N] float."""
    return (torch.tensor(counts)[:, None] > torch.arange(num_tokens)).sum(dim=0).float()
