"""Token merging at a fixed rate, written from the paper: Bolya et al., Token Merging, ICLR 2023, arXiv 2210.09461.

In every block, between attention and MLP, the most similar pairs of patches merge into their averages.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from experiments.blocks import attend, depth_of_counts, feed_forward, select
from models_act import AdaptiveVisionTransformer, Halting


def match(key: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match patches by bipartite soft matching (Section 3 of the paper).

    Every second patch, from the first on, is a source, the others are targets. A source's partner is the target whose
    key has the highest cosine similarity. The sources with the most similar partners merge.
    key: [B, P, D]; merged: the number of sources that merge.
    Returns leaving: [B, merged] and staying: [B, sources - merged], indices of sources; partner: [B, merged], the
    target of each source that leaves.
    """
    key = F.normalize(key, dim=2)
    similarity = key[:, ::2] @ key[:, 1::2].transpose(1, 2)  # [B, sources, targets]
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True)
    leaving, staying = order[:, :merged], order[:, merged:].sort(dim=1).values
    return leaving, staying, partner.gather(1, leaving)


def merge(x: Tensor, size: Tensor, key: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Merge pairs of patches into averages weighted by size. The class token never merges.

    x: [B, n, C]; size: [B, n], the number of patches that each token stands for; key: [B, n, D]; merged: the number of
    pairs, see `num_merged`. Returns x and size of the n - merged tokens.
    """
    if merged == 0:
        return x, size
    leaving, staying, partner = match(key[:, 1:].detach(), merged)
    total = torch.cat([x * size[..., None], size[..., None]], dim=2)  # [B, n, C + 1], sizes travel along
    class_token, source, target = total[:, :1], total[:, 1::2], total[:, 2::2]
    moved = select(source, leaving)
    target = target.scatter_add(1, partner[..., None].expand_as(moved), moved)
    total = torch.cat([class_token, select(source, staying), target], dim=1)
    size = total[:, :, -1]
    return (total[:, :, :-1] / size[..., None]).to(x.dtype), size


def num_merged(num_tokens: int, rate: int) -> int:
    """Return how many pairs merge among this many tokens: the rate, but at most half of the patches."""
    return min(rate, (num_tokens - 1) // 2)


class MergingVisionTransformer(AdaptiveVisionTransformer):
    """A static model that merges the same number of pairs of patches in every block.

    rate: that number. extra: in so many blocks, the first ones, one more pair merges, which gives finer steps of MACs.
    A token that stands for s patches counts s times in the softmax of attention ("proportional attention").
    The depths in `Halting` give the MACs, see `equivalent_counts`. They do not say which patches merge.
    """

    def __init__(self, *args, rate: int, extra: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.rate, self.extra = rate, extra

    def _features(self, x: Tensor, return_halting: bool = False, **_) -> tuple[Tensor, Halting | None]:
        x, _ = self._embed(x)
        depth = torch.zeros(x.shape[:2], device=x.device)
        size = torch.ones(x.shape[:2], device=x.device)
        for number, block in enumerate(self.blocks):
            x, _, key = attend(block, x, bias=size.log())
            x, size = merge(x, size, key.mean(dim=1), num_merged(x.shape[1], self.rate + (number < self.extra)))
            x = feed_forward(block, x)
        if not return_halting:
            return self.norm(x), None
        counts = equivalent_counts(self, depth.shape[1], self.rate, self.extra)
        depth = depth + depth_of_counts(counts, depth.shape[1]).to(depth.device)
        return self.norm(x), Halting(depth, depth + 1, depth.new_zeros(self.num_blocks))


def equivalent_counts(model: AdaptiveVisionTransformer, num_tokens: int, rate: int, extra: int) -> list[int]:
    """Return for each block a number of tokens that has the MACs of merging if no token merges in the block.

    model: its blocks count, it need not merge itself.

    Attention runs on the tokens before merging, the MLP on those after it, and the similarities cost MACs too. Each
    count is rounded so that the total over the blocks so far is as close as integers allow.
    """
    counts, difference, live = [], 0.0, num_tokens
    for number, block in enumerate(model.blocks):
        merged = num_merged(live, rate + (number < extra))
        in_attention, per_pair, in_mlp = _block_macs(block)
        sources = live // 2  # of live - 1 patches, rounded up
        matching = block.attn.head_dim * sources * (live - 1 - sources) if merged else 0
        difference += live * in_attention + live**2 * per_pair + matching + (live - merged) * in_mlp
        per_token = in_attention + in_mlp
        root = (math.sqrt(per_token**2 + 4 * per_pair * max(difference, 0)) - per_token) / (2 * per_pair)
        count = min(round(root), counts[-1] if counts else num_tokens)
        difference -= count * per_token + count**2 * per_pair
        counts.append(count)
        live -= merged
    return counts


def _block_macs(block: Block) -> tuple[int, int, int]:
    """Return the MACs of attention per token, of attention per pair of tokens, and of the MLP per token."""
    attn, mlp = block.attn, block.mlp
    in_attention = attn.qkv.weight.numel() + attn.proj.weight.numel()
    return in_attention, 2 * attn.attn_dim, mlp.fc1.weight.numel() + mlp.fc2.weight.numel()
