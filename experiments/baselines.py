"""What a user might do instead of halting, for the flags of main_act.py: python -m experiments.baselines KIND FLAGS

full                # avit_micro_patch4_32 as it is
shallow:N           # the first N blocks
narrow:C            # C channels, in three heads as before
random:K:N          # N of the patches go on after block K, drawn at random
evit:K:N            # N of the patches go on after block K, those that the class token attends to most

KIND stands for --model avit_micro_patch4_32 with that difference, in float32 (--amp none) on every device. Whether its
tokens halt is for the flags to say; of the last two they never do. The rule of the last is that of EViT (Liang et al.,
ICLR 2022), without its fused token.
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import Tensor

import main_act
import models_act
from models_act import AdaptiveVisionTransformer, Halting


class DroppingVisionTransformer(AdaptiveVisionTransformer):
    """A static network of which a fixed number of patches goes on after a fixed block; the class token always does.

    after: K, the number of that block; kept: N, the number of patches; attentive: by the class token's attention in
    block K, averaged over heads, else at random, in evaluation by a fixed seed.
    """

    def __init__(self, *args, after: int, kept: int, attentive: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.after, self.kept, self.attentive = after, kept, attentive

    def _features(self, x: Tensor, return_halting: bool = False, **_) -> tuple[Tensor, Halting | None]:
        x = self.blocks[: self.after - 1](self._embed(x))
        score = self._attention(x) if self.attentive else self._random_score(x)
        x = self.blocks[self.after - 1](x)
        kept = 1 + score.topk(self.kept, dim=1).indices
        kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)  # [B, 1 + N]
        features = self.norm(self.blocks[self.after :](x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))))
        if not return_halting:
            return features, None
        depth = torch.full(x.shape[:2], float(self.after), device=x.device)
        depth = depth.scatter(1, kept, float(self.num_blocks))
        return features, Halting(depth, depth + 1, depth.new_zeros(self.num_blocks))

    def _attention(self, x: Tensor) -> Tensor:
        """x: [B, 1 + patches, C], what enters block K -> [B, patches], the class token's attention to each."""
        block = self.blocks[self.after - 1]
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
        query, key = qkv[:, :1, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)  # [B, H, 1 or N, D]
        return ((query * attn.scale) @ key.transpose(2, 3)).softmax(dim=3).mean(dim=1)[:, 0, 1:]

    def _random_score(self, x: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator(x.device).manual_seed(0)
        return torch.rand(x.shape[0], x.shape[1] - 1, device=x.device, generator=generator)


def register(kind: str) -> str:
    """Makes the model of that kind known to timm; returns its name."""
    what, *numbers = kind.split(":")
    numbers = [int(number) for number in numbers]
    if kind == "full":
        return "avit_micro_patch4_32"
    if what == "shallow":
        sizes = dict(zip(("depth",), numbers, strict=True))
    elif what == "narrow":
        sizes = dict(zip(("embed_dim",), numbers, strict=True))
    elif what in ("random", "evit"):
        sizes = dict(zip(("after", "kept"), numbers, strict=True))
        sizes |= {"model_cls": DroppingVisionTransformer, "attentive": what == "evit"}
    else:
        raise SystemExit(__doc__)
    name = "_".join(["avit_micro", what, *map(str, numbers), "patch4_32"])
    if timm.is_model(name):
        return name
    models_act.default_cfgs[name] = models_act.default_cfgs["avit_micro_patch4_32"]
    models_act._register(name, {**models_act.MICRO, **sizes})
    return name


if __name__ == "__main__":
    main_act.main(["--model", register(sys.argv[1]), "--amp", "none", *sys.argv[2:]])
