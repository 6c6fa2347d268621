"""Finds the weights of a network in a file of another program: under keys, and under a prefix of all names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

import utils
from training.classes import first_names
from utils import UserError

# Keys under which other programs store weights; the first one that has some wins.
WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "network", "net", "weights")
EMA_WEIGHTS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
MAX_WRAPPERS = 5  # nested in each other
BLOCK, EMBEDDING = "blocks.0.norm1.weight", "patch_embed."  # a ViT has both under the same prefix
HEADS = ("head", "fc", "classifier")  # names of a linear layer outside the ViT that is used as its head


def named_tensors(content: object) -> dict | None:
    is_weights = isinstance(content, dict) and bool(content) and all(map(utils.is_plain_tensor, content.values()))
    return content if is_weights else None


def weights_under(content: object, keys: Sequence[str], depth: int = MAX_WRAPPERS) -> dict | None:
    """Return the named tensors under the first of these keys that has some, at any depth, or None."""
    for key in keys if isinstance(content, dict) and depth else ():
        inside = content.get(key)
        weights = named_tensors(inside) or weights_under(inside, WEIGHTS, depth - 1)
        if weights:
            return weights
    return None


def vit_under_any_key(content: dict, location: str) -> dict | None:
    """Return the named tensors of a ViT under any key but those of averages, or None.

    Raises UserError if several keys have some.
    """
    found = {}
    for key, inside in content.items():
        weights = named_tensors(inside) or weights_under(inside, WEIGHTS)
        if key not in EMA_WEIGHTS and weights and _prefixes(map(str, weights)):
            found[str(key)] = weights
    if len(found) > 1:
        raise _several(location, sorted(found))
    return next(iter(found.values()), None)


def unwrapped(weights: dict, location: str) -> tuple[dict[str, Tensor], str | None]:
    """Return the weights of a network without the prefix of its wrappers, whatever it is, and a line about the others.

    A linear layer outside the prefix becomes the head if it is the only one with a name in HEADS that fits.
    Raises UserError if several prefixes hold a ViT.
    """
    weights = {str(name): value for name, value in weights.items()}
    prefixes = sorted(_prefixes(weights))
    if not prefixes:
        return _without_common_prefix(weights), None
    if prefixes[0] == "":
        return weights, None
    if len(prefixes) > 1:
        raise _several(location, [prefix.removesuffix(".") for prefix in prefixes])
    (prefix,) = prefixes
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    others = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    head = _outer_head(inside, others)
    inside |= {f"head.{kind}": others.pop(f"{head}.{kind}") for kind in ("weight", "bias") if head is not None}
    lines = [] if head is None else [f"{first_names([head])} is used as its head"]
    lines += [f"other entries are not used ({len(others)}): {first_names([*others])}"] if others else []
    return inside, f"{location}: the model is {first_names([prefix[:-1]])}; {'; '.join(lines)}" if lines else None


def _prefixes(names: Sequence[str]) -> set[str]:
    """Return the prefixes under which there is a ViT."""
    names = [*names]
    ends = [name.rpartition(EMBEDDING)[0] for name in names if EMBEDDING in name]  # the prefix may contain it, too
    starts = {name.removesuffix(BLOCK) for name in names if name.endswith(BLOCK)}
    return {prefix for prefix in starts.intersection(ends) if not prefix or prefix.endswith(".")}


def _without_common_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of another kind of model, such as a teacher, without what begins all of their names."""
    parts = zip(*(name.split(".") for name in weights))
    prefix = "".join(f"{part[0]}." for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    names = {name.removeprefix(prefix): value for name, value in weights.items()}
    return names if any("." in name for name in names) else weights  # else the names of one layer


def _outer_head(inside: dict[str, Tensor], others: dict[str, Tensor]) -> str | None:
    """Return the name of the only linear layer that fits as the head of a ViT without one; None if there is none."""
    if any(name.startswith("head") for name in inside):
        return None
    found, width = [], len(inside[BLOCK]) if inside[BLOCK].ndim == 1 else 0
    for name, weight in others.items():
        layer = name.removesuffix(".weight")
        bias = others.get(f"{layer}.bias")
        is_linear = layer != name and weight.ndim == 2 and bias is not None and bias.shape == weight.shape[:1]
        if is_linear and weight.shape[1] == width and layer.rpartition(".")[2] in HEADS:
            found.append(layer)
    return found[0] if len(found) == 1 else None


def _several(location: str, names: list[str]) -> UserError:
    count = len(names)
    return UserError(f"{location} has the weights of {count} models: {first_names(names)}; save those of one alone")
