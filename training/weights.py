"""Fits a checkpoint's weights to a model: the halting gate, parameter names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from models_act import HALTING_DEFAULTS
from training.arguments import GATE_DEFAULTS
from training.classes import first_three, is_of_head
from training.models import avit_names, build_on_meta
from utils import UserError, log, warn

GATE_NAMES = (*GATE_DEFAULTS, "halt_eps")
MAX_GATE = 1e6  # gate values read from files must be smaller in magnitude, which also excludes infinity and NaN
PUBLISHED_GATES = {"visualization-tiny": (5.0, 50.0)}  # this file name does not contain the gate


# The gate ----------------------------------------------------------------------------------------


def resolve_gate(
    flags: dict[str, float | None],
    sources: Iterable[tuple[str, dict[str, float]]] = (),
    logged: Collection[str] = GATE_NAMES,
) -> dict[str, float]:
    """Return gate_scale, gate_center and halt_eps, each from the first source that has a value.

    The order is: flags; what a checkpoint of this repository records, its file name (NAME-SCALE-CENTER.pth), `args`
    in another program's checkpoint, see `Checkpoint.gate_sources`; the defaults.
    logged: names whose value and source are printed, with a warning if another source has a different value.
    """
    sources, resolved = [("the command line", flags), *sources], {}
    for name in GATE_NAMES:
        choices = [(source, values[name]) for source, values in sources if values.get(name) is not None]
        choices = choices or [("the defaults", HALTING_DEFAULTS[name])]
        resolved[name] = choices[0][1]
        if name in logged:
            _log_choice(name, choices)
    return resolved


def _log_choice(name: str, choices: list[tuple[str, float]]) -> None:
    """Print a gate value and its source; warn if another differs. choices: (source, value), the chosen one first."""
    (source, value), *others = choices
    if name in GATE_DEFAULTS or value != HALTING_DEFAULTS[name]:
        log(f"{name} {value:g}, from {source}")
    for other, other_value in others:
        if other_value != value:
            warn(f"{name} is {value:g} in {source} but {other_value:g} in {other}; using {value:g}")


def gate_numbers(record: object) -> dict[str, float]:
    """Return the usable gate values in a record read from a file: finite numbers, and halt_eps in [0, 1)."""
    values = record if isinstance(record, dict) else {}
    gate = {name: values.get(name) for name in GATE_NAMES}
    gate = {name: float(v) for name, v in gate.items() if isinstance(v, int | float) and abs(v) < MAX_GATE}
    return {name: value for name, value in gate.items() if name in GATE_DEFAULTS or 0 <= value < 1}


def gate_in_name(location: str) -> dict[str, float]:
    """Return the gate in the file name NAME-SCALE-CENTER.pth, or of a published file; empty if there is no gate."""
    stem = Path(location).stem
    if stem in PUBLISHED_GATES:
        return dict(zip(GATE_DEFAULTS, PUBLISHED_GATES[stem]))
    match = re.fullmatch(r".+-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", stem)
    return dict(zip(GATE_DEFAULTS, map(float, match.groups()))) if match else {}


# Names and shapes --------------------------------------------------------------------------------


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    location: str,
    replace_head: bool,
    trained_size: tuple[int, int] | None = None,
) -> None:
    """Load weights into a model and resample the position embedding to its image size.

    replace_head: if the class count differs, keep the model's new head and warn; otherwise this is an error.
    trained_size: height and width that the weights were trained at. None means a square image, or the model's own
    size if the embedding fits it.
    Raises UserError if names or shapes do not fit, with the registered models that do fit.
    """
    own, weights = model.state_dict(), _with_timm_names(weights)
    head = {name: value for name, value in own.items() if is_of_head(name)}
    if replace_head and not head.keys() & weights.keys():
        new_head = f"a new head of {model.num_classes} classes"
        warn(f"{location} has no head for these classes; training starts with {new_head}")
        weights |= head
    wrong = state_dict_mismatches(own, weights, may_be_resized)
    if wrong:
        fitting = fitting_models(weights)
        hint = f"; use --model {' or '.join(fitting)}" if fitting else ""
        raise UserError(f"{location} does not fit the model: {first_three(wrong, '; ')}{hint}")
    if "pos_embed" in own:
        weights["pos_embed"] = _resampled(model, weights["pos_embed"], location, trained_size)
    resized = [name for name in head if weights[name].shape != head[name].shape]
    if resized:
        found, expected = len(weights[resized[0]]), len(head[resized[0]])
        mismatch = f"{location} predicts {found} classes but the dataset has {expected}"
        if not replace_head:
            raise UserError(f"{mismatch}; pass a checkpoint that was trained on this dataset")
        warn(f"{mismatch}; training starts with a new head")
        weights |= {name: head[name] for name in resized}
    model.load_state_dict(weights, strict=True)


def load_teacher_weights(model: nn.Module, weights: dict[str, Tensor], location: str) -> None:
    """Load weights into any timm model. Raises UserError if names or shapes do not fit."""
    wrong = state_dict_mismatches(model.state_dict(), weights, resizable=lambda name: False)
    if wrong:
        raise UserError(f"{location} does not fit the teacher: {first_three(wrong, '; ')}")
    model.load_state_dict(weights, strict=True)


def _resampled(model: nn.Module, embedding: Tensor, location: str, trained_size: tuple[int, int] | None) -> Tensor:
    """Resample a position embedding to the model's grid of patches.

    embedding: [1, prefix + old patches, C] -> [1, prefix + the model's patches, C].
    Raises UserError if the old patches do not form a grid.
    """
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches, grid = embedding.shape[1] - prefix, model.patch_embed.grid_size
    old_grid = (math.isqrt(max(patches, 0)),) * 2
    if trained_size is not None:
        ratio = model.patch_embed.feat_ratio(as_scalar=False)
        grid_of_size = tuple(side // patch for side, patch in zip(trained_size, ratio))
        # The ratio of a convolutional stem may depend on the image size, so use the grid only if the count agrees.
        old_grid = grid_of_size if math.prod(grid_of_size) == patches else old_grid
    elif embedding.shape == model.pos_embed.shape:
        old_grid = grid
    if patches < 1 or math.prod(old_grid) != patches:
        raise UserError(
            f"{location} does not fit the model: "
            f"pos_embed has {patches} patches, which do not form a grid of {old_grid[0]} x {old_grid[1]}"
        )
    return resample_abs_pos_embed(embedding, list(grid), list(old_grid), num_prefix_tokens=prefix)


def may_be_resized(name: str) -> bool:
    """Return whether this parameter depends on the image size or the class count."""
    return name == "pos_embed" or is_of_head(name)


def state_dict_mismatches(own: dict, weights: dict, resizable: Callable[[str], bool]) -> list[str]:
    """Return one message per name or shape that differs; resizable: names whose number of rows may differ."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not part of this model" for name in weights if name not in own]
    for name in (name for name in own if name in weights):
        found, expected = tuple(weights[name].shape), tuple(own[name].shape)
        if found != expected and not (resizable(name) and _differ_in_rows(found, expected)):
            wrong.append(f"{name} has shape {found}, expected {expected}")
    return wrong


def _differ_in_rows(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return True for heads [K, C] and [K] of another K, and position embeddings [1, N, C] of another N."""
    different = [i for i, (a, b) in enumerate(zip(found, expected)) if a != b]
    return len(found) == len(expected) and different == [max(len(expected) - 2, 0)]


def _with_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layer scale of DeiT III's release as timm does."""
    return {re.sub(r"gamma_([12])$", r"ls\1.gamma", name): value for name, value in weights.items()}


def fitting_models(weights: dict[str, Tensor]) -> list[str]:
    """Return the registered models that these weights fit; those of the same image size come first."""
    weights = _with_timm_names(weights)
    own = {name: empty_state_dict(name) for name in avit_names()}
    fitting = [name for name in own if not state_dict_mismatches(own[name], weights, may_be_resized)]
    return sorted(fitting, key=lambda name: own[name]["pos_embed"].shape != weights["pos_embed"].shape)


@cache
def empty_state_dict(name: str) -> dict[str, Tensor]:
    """Return the state dict of a model on the meta device: shapes without values."""
    return build_on_meta(name).state_dict()
