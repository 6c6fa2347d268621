"""Find the KIND of a baseline, see baselines.py, for a MACs budget.

Usage: python -m experiments.settings METHOD BUDGET MODEL SIZE

METHOD is evit, fused, random or tome. BUDGET is a fraction of the static model's MACs. MODEL and SIZE, in pixels, set
the widths and the number of patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import timm

from experiments.baselines import PRUNING_RULES
from experiments.blocks import depth_of_counts
from experiments.merging import equivalent_counts
from macs import macs_counter, static_macs
from models_act import AdaptiveVisionTransformer
from training.arguments import Parser
from training.models import avit_names

MIN_KEEP_RATE = 0.4


def setting(method: str, budget: float, model: AdaptiveVisionTransformer) -> str:
    """Return the KIND whose MACs are nearest to a budget.

    model: any of the sizes in question, on any device.

    evit, fused and random prune in three steps with the same keep rate, after blocks K, 2K and 3K. K is a quarter of
    the blocks, 3 of 12, as in EViT. Small budgets need earlier steps: K is the largest with a keep rate of at least
    MIN_KEEP_RATE, else 1.
    tome merges the same number of pairs in every block, and one more in the first blocks where that comes nearer.
    Raises ValueError for another method.
    """
    cost_of, patches = _cost_counter(model), model.patch_embed.num_patches
    if method == "tome":
        rates = itertools.product(range(1, patches // 2), range(model.num_blocks))
        rate, extra = min(rates, key=lambda each: abs(cost_of(equivalent_counts(model, 1 + patches, *each)) - budget))
        return f"tome:{rate}:{extra}" if extra else f"tome:{rate}"
    if method not in PRUNING_RULES:
        raise ValueError(f"expected tome, {', '.join(PRUNING_RULES)}, got {method!r}")
    rates = [permille / 1000 for permille in range(1, 1000)]
    for first in range(model.num_blocks // 4, 0, -1):
        rate = min(rates, key=lambda rate: abs(cost_of(_pruned_counts(model, first, rate)) - budget))
        if rate >= MIN_KEEP_RATE:
            break
    steps = [(first * step, kept) for step, kept in enumerate(_kept(patches, rate), start=1)]
    return ":".join(map(str, [method, *itertools.chain(*steps)]))


def _kept(patches: int, rate: float) -> list[int]:
    """Return the numbers of patches after each of the three steps."""
    return [max(1, round(patches * rate**step)) for step in (1, 2, 3)]


def _pruned_counts(model: AdaptiveVisionTransformer, first: int, rate: float) -> list[int]:
    """Return the number of tokens in each block, with steps after blocks `first`, 2 `first` and 3 `first`."""
    patches = model.patch_embed.num_patches
    kept = [patches, *_kept(patches, rate)]
    return [1 + kept[min(block // first, 3)] for block in range(model.num_blocks)]


def _cost_counter(model: AdaptiveVisionTransformer) -> Callable[[Sequence[int]], float]:
    """Return a function from the number of tokens in each block to the fraction of the static model's MACs."""
    num_tokens, static = 1 + model.patch_embed.num_patches, static_macs(model)
    count_macs = macs_counter(model, num_tokens)
    return lambda counts: count_macs(depth_of_counts(counts, num_tokens)[None]).item() / static


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="settings.py", description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=("tome", *PRUNING_RULES))
    parser.add_argument("budget", type=float, help="fraction of the static model's MACs")
    parser.add_argument("model", choices=avit_names(), metavar="model", help="name of a registered model")
    parser.add_argument("size", type=int, help="side of an image in pixels")
    args = parser.parse_args(argv)
    print(setting(args.method, args.budget, timm.create_model(args.model, img_size=args.size)))


if __name__ == "__main__":
    main()
