"""Models by name: the registered avit_* models, and any plain timm ViT made adaptive."""

from __future__ import annotations

import difflib
from functools import cache
from itertools import islice

import timm
from timm.models import get_pretrained_cfg

from datasets import Preprocessing
from models_act import HALTING_DEFAULTS, SOURCES, AdaptiveTokens, adapt_
from utils import UserError, did_you_mean

TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")  # the timm modules with plain ViTs
MAX_SIMILAR = 12  # number of similar names that are checked before they are suggested


def avit_names() -> list[str]:
    return timm.list_models("avit*")


@cache
def timm_vit_names() -> list[str]:
    """Return the timm models in TIMM_MODULES; most of them can be adaptive."""
    return [name for module in TIMM_MODULES for name in timm.list_models(module=module)]


def is_avit(name: str) -> bool:
    """Return whether this is a registered avit_* model, with or without a tag."""
    return name.partition(".")[0] in avit_names()


def _build(name: str, halting: dict, **options) -> AdaptiveTokens:
    """Build a model; halting: options of `AdaptiveTokens`; options: of timm.create_model."""
    if is_avit(name):
        return timm.create_model(name, **options, **halting)
    return adapt_(timm.create_model(name, **options), **halting)


def build_on_meta(name: str, **options) -> AdaptiveTokens:
    """Build a model on the meta device: shapes without values.

    Raises ValueError if the model cannot be adaptive, and timm's errors for an invalid image size.
    """
    return _build(name, {}, device="meta", **options)


@cache
def unsupported_reason(name: str) -> str | None:
    """Return why a model of this name is not supported, or None if it is."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return "unknown model"
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", include_tags=True)]
    if tag and tag not in tags:
        return f"timm has no weights for {architecture} with this tag" + did_you_mean(tag, tags)
    if is_avit(name):
        return None
    if architecture not in timm_vit_names():
        return "not a plain vision transformer"
    try:
        build_on_meta(name)
    except ValueError as error:
        return str(error)
    return None


def check_model_name(name: str) -> None:
    """Raise UserError, with similar supported names, if a model of this name is not supported."""
    reason = unsupported_reason(name)
    if reason is not None:
        similar = difflib.get_close_matches(name, [*avit_names(), *timm_vit_names()], n=MAX_SIMILAR)
        fitting = ", ".join(islice((other for other in similar if unsupported_reason(other) is None), 3))
        hint = f" (did you mean {fitting}?)" if fitting and "did you mean" not in reason else ""
        raise UserError(f"--model {name}: {reason}{hint}")


def default_image_size(name: str) -> tuple[int, int]:
    """Return height and width. Raises UserError if the model is not supported."""
    check_model_name(name)
    return get_pretrained_cfg(name).input_size[1:]


def preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of the model's images. Raises UserError if the model is not supported."""
    check_model_name(name)
    return Preprocessing.from_config(get_pretrained_cfg(name).to_dict())


def run_preprocessing(name: str, img_size: tuple[int, int], data_set: str | None = None) -> Preprocessing:
    """Return the preprocessing of a run that has no checkpoint to follow.

    data_set: name of the run's dataset, or None for image files
    Raises UserError if the model is not supported.
    """
    return preprocessing(name).for_run(img_size, data_set)


def create_model(
    name: str, img_size: tuple[int, int], preprocessing: Preprocessing | None = None, **options
) -> AdaptiveTokens:
    """Build an adaptive model; options: of timm.create_model and `AdaptiveTokens`.

    preprocessing: of its images, kept in the model's pretrained_cfg with the size; None: see `run_preprocessing`
    Raises UserError if the model or the image size is not supported, or if the weights cannot be loaded.
    """
    check_model_name(name)
    check_size(name, img_size)
    halting = {option: options.pop(option) for option in HALTING_DEFAULTS if option in options}
    try:
        model = _build(name, halting, img_size=img_size, **options)
    except Exception as error:  # the hub's client may raise anything
        if not options.get("pretrained"):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        is_complete = SOURCES.get(name.partition(".")[0]) is not None  # then models_act's message names the flag
        raise UserError(
            reason if is_complete else f"--pretrained: the weights of {name} cannot be loaded: {reason}"
        ) from error
    preprocessing = preprocessing or run_preprocessing(name, img_size)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *img_size), **preprocessing._asdict()}
    return model


def check_size(name: str, img_size: tuple[int, int], source: str = "--input-size") -> None:
    """Raise UserError if the model does not accept images of this height and width. source: named in the error."""
    size = f"{source} {img_size[0]} {img_size[1]}"
    try:
        patch = _patch_size(name, img_size)
    except (AssertionError, RuntimeError, ValueError) as error:  # raised by convolutional stems
        raise UserError(f"{size} is not supported by {name}: {error}") from error
    if any(side % p for side, p in zip(img_size, patch)):
        raise UserError(f"{size} is not a multiple of the patch size {patch[0]} x {patch[1]} of {name}")


@cache
def _patch_size(name: str, img_size: tuple[int, int]) -> tuple[int, int]:
    return build_on_meta(name, img_size=img_size).patch_embed.feat_ratio(as_scalar=False)
