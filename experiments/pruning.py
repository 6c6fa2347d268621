"""Baselines in which the same number of patches leaves every image after given blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.blocks import attend, class_attention, feed_forward, select, with_class_token
from models_act import AdaptiveVisionTransformer, Halting, halting_step
from zipping import Gate, MaskedTokens


class PatchPruningVisionTransformer(AdaptiveVisionTransformer):
    """A static model that keeps a fixed number of patches after fixed blocks, and always the class token.

    rule: how the patches are chosen. "evit": those with the highest class-token attention in that block, averaged over
    heads. "fused": the same, but the last of them is replaced by the average of it and the patches that leave, weighted
    by this attention. "random": at random, with a fixed seed in evaluation.
    steps: K1, N1, K2, N2, ...: after block K, counted from 1, N patches are kept.
    Raises ValueError unless blocks ascend and numbers of patches descend.
    """

    def __init__(self, *args, rule: str, steps: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.rule, self.steps = rule, steps
        after, kept = [0, *steps[::2], self.num_blocks], [*steps[1::2], 0]
        if sorted(set(after)) != after or sorted(set(kept), reverse=True) != kept:
            raise ValueError(
                f"expected blocks from 1 to {self.num_blocks - 1}, ascending, and numbers of patches above 0, "
                f"descending; got {steps}"
            )

    def _features(self, x: Tensor, return_halting: bool = False, **_) -> tuple[Tensor, Halting | None]:
        (x, _), num_kept = self._embed(x), dict(zip(self.steps[::2], self.steps[1::2], strict=True))
        generator = None if self.training else torch.Generator(x.device).manual_seed(0)
        token = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])  # [B, n]
        depth = torch.full(x.shape[:2], float(self.num_blocks), device=x.device)
        for number, block in enumerate(self.blocks, start=1):
            if number not in num_kept:
                x = block(x)
                continue
            x, query, key = attend(block, x)
            x = feed_forward(block, x)
            if self.rule == "random":
                score = torch.rand(x.shape[0], x.shape[1] - 1, device=x.device, generator=generator)
            else:
                score = class_attention(block, query, key)
            best = score.topk(num_kept[number], dim=1).indices
            kept = with_class_token(best)
            depth = depth.scatter(1, token, float(number))
            token = token.gather(1, kept)
            depth = depth.scatter(1, token, float(self.num_blocks))
            x = _fuse(x, score, best) if self.rule == "fused" else x
            x = select(x, kept)
        halting = Halting(depth, depth + 1, depth.new_zeros(self.num_blocks)) if return_halting else None
        return self.norm(x), halting


def _fuse(x: Tensor, score: Tensor, best: Tensor) -> Tensor:
    """Return the states, with an average in the place of the last of the best patches.

    The average is over that patch and all that are not among the best, weighted by their scores.
    x: [B, n, C]; score: [B, n - 1]; best: [B, m], indices of patches.
    """
    weight = score.scatter(1, best[:, :-1], 0.0)
    fused = (weight / weight.sum(dim=1, keepdim=True))[:, None] @ x[:, 1:]  # [B, 1, C]
    return x.scatter(1, (best[:, -1:, None] + 1).expand_as(fused), fused)


class SameCountsVisionTransformer(AdaptiveVisionTransformer):
    """A-ViT in which the same number of patches goes on in every image: those with the lowest cumulative scores.

    Scores, the class token's output weights and the ponder cost are A-ViT's. The class token stays in every block. If
    its cumulative score reaches the limit, its later states have weight 0, as if it had halted.
    counts: the number of patches that go on after each block but the last.
    Raises ValueError unless there are L - 1 counts, which do not ascend.
    """

    def __init__(self, *args, counts: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = counts
        if len(counts) != self.num_blocks - 1 or sorted((*counts, 0), reverse=True) != [*counts, 0]:
            raise ValueError(
                f"expected {self.num_blocks - 1} numbers of patches, none larger than the one before; got {counts}"
            )

    def _features(
        self, x: Tensor, return_halting: bool = False, gate_offset: Tensor | None = None, **_
    ) -> tuple[Tensor, Halting | None]:
        if not self.halting:
            return super()._features(x, return_halting)
        x, _ = self._embed(x)
        num_patches = x.shape[1] - 1
        token = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])  # [B, n]
        cumulative = torch.zeros(x.shape[:2], device=x.device)  # [B, n]
        depth = before = torch.zeros_like(cumulative)  # [B, N]
        output, layer_scores = torch.zeros_like(x[:, :1]), []
        blocks = zip(self.blocks, (*self.counts, 0), Gate.of_blocks(self, x.device))
        for number, (block, count, gate) in enumerate(blocks, start=1):
            x = block(x)
            tokens, _ = MaskedTokens.pack(x, num_prefix_tokens=1)
            gate = gate.for_rows(tokens, gate_offset)
            step = halting_step(x, cumulative, gate, is_last_block=number == self.num_blocks)
            depth = depth.scatter(1, token, float(number))
            before = before.scatter(1, token, cumulative)
            weight = step.probability.masked_fill(cumulative >= gate.limit, 0)
            output = output + weight[:, :1, None] * x[:, :1]
            layer_scores.append(step.score[:, 1:].sum(dim=1).mean() / num_patches)
            stays = with_class_token(step.cumulative[:, 1:].topk(count, dim=1, largest=False).indices)
            x, token, cumulative = select(x, stays), token.gather(1, stays), step.cumulative.gather(1, stays)
        remainder = (1 - before).clamp(min=0)
        halting = Halting(depth, depth + remainder, torch.stack(layer_scores)) if return_halting else None
        return self.norm(output), halting
