"""Fits a checkpoint's weights to a model: parameter names and shapes, and the size of the position embedding."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from training.classes import first_three, is_of_head, without_head
from training.models import avit_names, build_on_meta, default_image_size
from utils import UserError, warn

MAX_SIDE = 1024  # pixels; larger image sizes in a checkpoint are ignored

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
    own = model.state_dict()
    weights = _with_timm_names(weights, own)
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
    ratio = model.patch_embed.feat_ratio(as_scalar=False)
    grid_of_size = tuple(side // patch for side, patch in zip(trained_size or (0, 0), ratio))
    # The ratio of a convolutional stem may depend on the image size, and a record may be wrong, so use the grid of
    # the trained size only if the count agrees.
    if patches > 0 and math.prod(grid_of_size) == patches:
        old_grid = grid_of_size
    elif embedding.shape == model.pos_embed.shape:
        old_grid = grid
    else:
        old_grid = (math.isqrt(max(patches, 0)),) * 2
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


def _with_timm_names(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layer scale of DeiT III's release as timm does. own: the model's, which may have the same names."""
    return {
        name if name in own else re.sub(r"gamma_([12])$", r"ls\1.gamma", name): value for name, value in weights.items()
    }


def fits(name: str, weights: dict[str, Tensor]) -> bool:
    """Return whether weights fit a model, at any image size and class count. Either may lack a head."""
    own = empty_state_dict(name)
    weights = _with_timm_names(weights, own)
    if not (any(map(is_of_head, weights)) and any(map(is_of_head, own))):
        own, weights = without_head(own), without_head(weights)
    return not state_dict_mismatches(own, weights, may_be_resized)


def fitting_models(weights: dict[str, Tensor]) -> list[str]:
    """Return the registered models that these weights fit; those of the same image size come first."""
    fitting = [name for name in avit_names() if fits(name, weights)]
    return sorted(fitting, key=lambda name: empty_state_dict(name)["pos_embed"].shape != weights["pos_embed"].shape)


@cache
def empty_state_dict(name: str, img_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Return the state dict of a model on the meta device: shapes without values.

    img_size: None means the model's default.
    """
    return build_on_meta(name, **({"img_size": img_size} if img_size else {})).state_dict()


# The image size of a position embedding ----------------------------------------------------------


def embedded_size(name: str, weights: dict[str, Tensor]) -> tuple[int, int] | None:
    """Return the image size (height, width) of the position embedding: the model's default, or a square.

    Returns None if there is no embedding, or if its patches form no square grid of this model.
    """
    default, embedding = default_image_size(name), weights.get("pos_embed")
    if embedding is None or embedding.ndim != 3 or has_grid_of(name, default, weights):
        return None if embedding is None or embedding.ndim != 3 else default
    model = build_on_meta(name)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = math.isqrt(max(embedding.shape[1] - prefix, 0))
    height, width = (side * patch for patch in model.patch_embed.feat_ratio(as_scalar=False))
    return (height, width) if has_grid_of(name, (height, width), weights) else None


def has_grid_of(name: str, img_size: tuple[int, int], weights: dict[str, Tensor]) -> bool:
    """Return whether the position embedding has as many tokens as this model has at an image size."""
    if not 1 <= min(img_size) <= max(img_size) <= MAX_SIDE or "pos_embed" not in weights:
        return False
    try:
        own = empty_state_dict(name, img_size)
    except (AssertionError, RuntimeError, ValueError):  # raised by convolutional stems
        return False
    return "pos_embed" in own and own["pos_embed"].shape == weights["pos_embed"].shape
