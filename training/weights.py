"""Weights fitted to a model: which gate they were trained with, which names and shapes, and which model they fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import models_act  # noqa: F401 - registers the models
from training.arguments import GATE_DEFAULTS
from training.models import build_on_meta, own_names
from utils import UserError, log, warn

MAX_GATE = 1e6  # a larger one, infinity or NaN is none
HALTING_DEFAULTS = GATE_DEFAULTS | {"halt_eps": 0.01}
PUBLISHED_GATES = {"visualization-tiny": (5.0, 50.0)}  # not in the file's name

# The gate ----------------------------------------------------------------------------------------


def resolve_gate(
    flags: dict[str, float | None], sources: Iterable[tuple[str, dict[str, float]]] = ()
) -> dict[str, float]:
    """Gate scale, gate center and halt_eps, from the first source that knows them; says which, warns of conflicts.

    In this order: flags; what a checkpoint of ours records, its file name (NAME-SCALE-CENTER.pth), `args` inside a
    foreign checkpoint, see `Checkpoint.gate_sources`; the defaults.
    """
    sources, resolved = [("the command line", flags), *sources], {}
    for name, default in HALTING_DEFAULTS.items():
        known = [(source, values[name]) for source, values in sources if values.get(name) is not None]
        source, resolved[name] = known[0] if known else ("the defaults", default)
        if name in GATE_DEFAULTS or resolved[name] != default:
            log(f"{name} {resolved[name]:g}, from {source}")
        for other, value in known[1:]:
            if value != resolved[name]:
                warn(f"{name}: {source} says {resolved[name]:g}, {other} says {value:g}; {source} counts")
    return resolved


def gate_numbers(record: object) -> dict[str, float]:
    """Gate values in a dictionary, where they are finite numbers; halt_eps from 0 to 1."""
    values = record if isinstance(record, dict) else {}
    found = {name: values.get(name) for name in HALTING_DEFAULTS}
    found = {name: float(v) for name, v in found.items() if isinstance(v, int | float) and abs(v) < MAX_GATE}
    return {name: value for name, value in found.items() if name in GATE_DEFAULTS or 0 <= value < 1}


def gate_in_name(location: str) -> dict[str, float]:
    stem = Path(location).stem
    if stem in PUBLISHED_GATES:
        return dict(zip(GATE_DEFAULTS, PUBLISHED_GATES[stem]))
    match = re.fullmatch(r".+-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", stem)
    return dict(zip(GATE_DEFAULTS, map(float, match.groups()))) if match else {}


# Models and their weights ------------------------------------------------------------------------


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    location: str,
    replace_head: bool,
    trained_size: tuple[int, int] | None = None,
) -> None:
    """Loads weights into the model, with the position embedding resampled to its size.

    replace_head: where the class count differs, the model keeps its new head, with a warning; else
    that is an error. trained_size: height and width that the weights were trained at, where known;
    else a square, or the model's own size if the embedding fits it. UserError, naming the weights,
    if names or shapes do not fit, and which model of ours they do fit.
    """
    own, weights = model.state_dict(), _with_our_names(weights)
    head = {name: value for name, value in own.items() if is_of_head(name)}
    if replace_head and not head.keys() & weights.keys():
        warn(f"{location}: holds no head for these classes: a new one of {model.num_classes} is trained")
        weights |= head
    wrong = state_dict_mismatches(own, weights, may_be_resized)
    if wrong:
        fitting = fitting_models(weights)
        hint = f"; it fits {' or '.join(fitting)}" if fitting else ""
        raise UserError(f"{location}: does not fit the model: {_first_three(wrong, '; ')}{hint}")
    if "pos_embed" in own:
        weights["pos_embed"] = _resampled(model, weights["pos_embed"], location, trained_size)
    foreign_head = [name for name in own if is_of_head(name) and weights[name].shape != own[name].shape]
    if foreign_head:
        found, expected = len(weights[foreign_head[0]]), len(own[foreign_head[0]])
        if not replace_head:
            raise UserError(f"{location}: its head has {found} classes, the data has {expected}")
        warn(f"{location}: its head of {found} classes is replaced by a new one of {expected}")
        weights |= {name: own[name] for name in foreign_head}
    model.load_state_dict(weights, strict=True)


def _resampled(model: nn.Module, embedding: Tensor, location: str, trained_size: tuple[int, int] | None) -> Tensor:
    """embedding: [1, prefix + old patches, C] -> [1, prefix + the model's patches, C], by timm."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches, grid = embedding.shape[1] - prefix, model.patch_embed.grid_size
    old_grid = (math.isqrt(max(patches, 0)),) * 2
    if trained_size is not None:
        ratio = model.patch_embed.feat_ratio(as_scalar=False)
        of_size = tuple(side // patch for side, patch in zip(trained_size, ratio))
        old_grid = of_size if math.prod(of_size) == patches else old_grid  # a stem's ratio may depend on the size
    elif embedding.shape == model.pos_embed.shape:
        old_grid = grid
    if patches < 1 or math.prod(old_grid) != patches:
        raise UserError(
            f"{location}: does not fit the model: pos_embed is of {patches} patches, which is no {old_grid} grid"
        )
    return resample_abs_pos_embed(embedding, list(grid), list(old_grid), num_prefix_tokens=prefix)


def load_teacher_weights(model: nn.Module, weights: dict[str, Tensor], location: str) -> None:
    """Loads weights into any network.

    UserError, naming the weights, if names or shapes do not fit.
    """
    wrong = state_dict_mismatches(model.state_dict(), weights, resizable=lambda name: False)
    if wrong:
        raise UserError(f"{location}: does not fit the teacher: {_first_three(wrong, '; ')}")
    model.load_state_dict(weights, strict=True)


def may_be_resized(name: str) -> bool:
    return name == "pos_embed" or is_of_head(name)


def is_of_head(name: str) -> bool:
    return name.startswith("head")


def state_dict_mismatches(own: dict, weights: dict, resizable: Callable[[str], bool]) -> list[str]:
    """What does not fit; resizable: names for which one size may differ."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not in this model" for name in weights if name not in own]
    for name in (name for name in own if name in weights):
        found, expected = tuple(weights[name].shape), tuple(own[name].shape)
        if found != expected and not (resizable(name) and _differ_in_one_size(found, expected)):
            wrong.append(f"{name} is {found}, expected {expected}")
    return wrong


def first_names(classes: Sequence[str]) -> str:
    return _first_three([name if name.isprintable() and len(name) < 40 else ascii(name[:40]) for name in classes])


def _first_three(texts: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return separator.join(texts[:3]) + more


def _with_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeiT III's release has other names for layer scale."""
    return {re.sub(r"gamma_([12])$", r"ls\1.gamma", name): value for name, value in weights.items()}


def fitting_models(weights: dict[str, Tensor]) -> list[str]:
    """Our models of which these are the weights, those of the same image size first."""
    weights = _with_our_names(weights)
    own = {name: empty_state_dict(name) for name in own_names()}
    fitting = [name for name in own if not state_dict_mismatches(own[name], weights, may_be_resized)]
    return sorted(fitting, key=lambda name: own[name]["pos_embed"].shape != weights["pos_embed"].shape)


@cache
def empty_state_dict(name: str) -> dict[str, Tensor]:
    """Of a model: shapes without numbers."""
    return build_on_meta(name).state_dict()


def _differ_in_one_size(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """True for the heads [K, C] and [K], and the position embedding [1, N, C], of another K or N."""
    different = [i for i, (a, b) in enumerate(zip(found, expected)) if a != b]
    return len(found) == len(expected) and different == [max(len(expected) - 2, 0)]
