"""Baselines to compare A-ViT with.

Usage: python -m experiments.baselines KIND FLAGS

full                   # the full model
shallow:N              # the first N blocks
narrow:C               # embedding width C, with the same three heads
random:K:N             # N patches, drawn at random, are kept after block K
evit:K:N               # the N patches with the highest class-token attention are kept after block K
evit:K:N:K2:N2:K3:N3   # the same in several steps; random and fused take steps too
fused:K:N              # as evit, but one of the N is the average of the patches that leave and the last of the best
tome:R                 # R pairs of similar patches merge in every block
tome:R:M               # the same, and one more pair in each of the first M blocks
counts:N1,N2,...,N11   # A-ViT, but in every image the same number of patches goes on after each block
MODEL/KIND             # the same with another full model than avit_micro_patch4_32, such as avit_mini_patch16_224

FLAGS are those of main_act.py. KIND replaces --model, and --amp none is the default, so that all kinds run in float32
on every device. The flags decide whether tokens halt; in `random`, `evit`, `fused` and `tome` they
never do. `evit` and `fused` select patches as EViT does (Liang et al., ICLR 2022), after a whole block instead of
before its MLP; `fused` keeps a token for the rest of the patches as EViT does. `tome` merges as ToMe does (Bolya et
al., ICLR 2023). experiments/settings.py prints the KIND for a budget; `experiments.stages counts` prints that of a
trained A-ViT. The MACs of `counts` are fixed. Train it with --ponder_token_scale 0 and a gate that was found for a
budget, see `experiments.stages regate`.
"""

from __future__ import annotations

import sys

import timm

import main_act
import models_act
from experiments.merging import MergingVisionTransformer
from experiments.pruning import PatchPruningVisionTransformer, SameCountsVisionTransformer

PRUNING_RULES = ("random", "evit", "fused")


def register(kind: str) -> str:
    """Register the model of this kind with timm and return its name.

    Exits with the usage text if the kind does not exist. Raises ValueError if it has too many or too few numbers.
    """
    base, _, kind = kind.rpartition("/")
    base, (method, _, rest) = base or "avit_micro_patch4_32", kind.partition(":")
    if kind == "full" and base in models_act.MODELS:
        return base
    if base not in models_act.MODELS or method not in ("shallow", "narrow", "tome", "counts", *PRUNING_RULES):
        raise SystemExit(__doc__)
    numbers = tuple(int(number) for number in rest.split("," if method == "counts" else ":"))
    name = base.replace("_patch", "_".join(["", method, *map(str, numbers), "patch"]))
    if timm.is_model(name):
        return name
    _, sizes = models_act.MODELS[base]
    models_act.default_cfgs[name] = models_act.default_cfgs[base]
    models_act._register(name, {**sizes, **_options(method, numbers)})
    return name


def _options(method: str, numbers: tuple[int, ...]) -> dict:
    """Return the options of the model of this method, in addition to or instead of those of the full model."""
    if method in PRUNING_RULES:
        if len(numbers) < 2 or len(numbers) % 2:
            raise ValueError(f"{method} takes pairs of a block and a number of patches, got {numbers}")
        return {"model_cls": PatchPruningVisionTransformer, "rule": method, "steps": numbers}
    if method == "counts":
        return {"model_cls": SameCountsVisionTransformer, "counts": numbers}
    if method == "tome":
        rate, *extra = numbers
        return {"model_cls": MergingVisionTransformer, "rate": rate} | dict(zip(("extra",), extra or [0], strict=True))
    return dict(zip(({"shallow": "depth", "narrow": "embed_dim"}[method],), numbers, strict=True))


def main(argv: list[str]) -> None:
    """Run main_act.py with the model of this kind. Exits with an error for a budget if the kind has fixed MACs."""
    kind, *flags = argv
    if "counts:" in kind and any(flag.replace("_", "-").startswith("--target-macs") for flag in flags):
        raise SystemExit("--target-macs cannot be combined with counts, whose MACs are fixed")
    main_act.main(["--model", register(kind), "--amp", "none", *flags])


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
