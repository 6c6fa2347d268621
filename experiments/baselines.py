"""Static baselines to compare A-ViT with.

Usage: python -m experiments.baselines KIND FLAGS

full                # the full model, avit_micro_patch4_32
shallow:N           # the first N blocks
narrow:C            # embedding width C, with the same three heads
random:K:N          # N patches, drawn at random, are kept after block K
evit:K:N            # the N patches with the highest class-token attention are kept after block K

FLAGS are those of main_act.py. KIND replaces --model avit_micro_patch4_32, and --amp none is the default, so that all
kinds run in float32 on every device. The flags decide whether tokens halt; in `random` and `evit` they never do. `evit`
selects patches as EViT does (Liang et al., ICLR 2022), but without its fused token.
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import Tensor

import main_act
import models_act
from models_act import AdaptiveVisionTransformer, Halting


class PatchPruningVisionTransformer(AdaptiveVisionTransformer):
    """A static model that keeps a fixed number of patches after a fixed block, and always the class token.

    after: K, the 1-based number of that block; kept: N, the number of patches to keep. by_attention: select patches by
    the class token's attention in block K, averaged over heads. Otherwise select at random, with a fixed seed in
    evaluation.
    """

    def __init__(self, *args, after: int, kept: int, by_attention: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.after, self.kept, self.by_attention = after, kept, by_attention

    def _features(self, x: Tensor, return_halting: bool = False, **_) -> tuple[Tensor, Halting | None]:
        x = self.blocks[: self.after - 1](self._embed(x))
        score = self._attention(x) if self.by_attention else self._random_score(x)
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
        """Return the class token's attention to each patch, averaged over heads.

        x: [B, 1 + patches, C], the input of block K
        returns: [B, patches]
        """
        block = self.blocks[self.after - 1]
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
        query, key = qkv[:, :1, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)  # [B, H, 1 or N, D]
        return ((query * attn.scale) @ key.transpose(2, 3)).softmax(dim=3).mean(dim=1)[:, 0, 1:]

    def _random_score(self, x: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator(x.device).manual_seed(0)
        return torch.rand(x.shape[0], x.shape[1] - 1, device=x.device, generator=generator)


def register(kind: str) -> str:
    """Register the model of this kind with timm and return its name.

    Exits with the usage text if the kind does not exist. Raises ValueError if it has too many or too few numbers.
    """
    method, *numbers = kind.split(":")
    numbers = [int(number) for number in numbers]
    if kind == "full":
        return "avit_micro_patch4_32"
    if method == "shallow":
        sizes = dict(zip(("depth",), numbers, strict=True))
    elif method == "narrow":
        sizes = dict(zip(("embed_dim",), numbers, strict=True))
    elif method in ("random", "evit"):
        sizes = dict(zip(("after", "kept"), numbers, strict=True))
        sizes |= {"model_cls": PatchPruningVisionTransformer, "by_attention": method == "evit"}
    else:
        raise SystemExit(__doc__)
    name = "_".join(["avit_micro", method, *map(str, numbers), "patch4_32"])
    if timm.is_model(name):
        return name
    models_act.default_cfgs[name] = models_act.default_cfgs["avit_micro_patch4_32"]
    models_act._register(name, {**models_act.MICRO, **sizes})
    return name


if __name__ == "__main__":
    main_act.main(["--model", register(sys.argv[1]), "--amp", "none", *sys.argv[2:]])
