"""Models by name: ours, and any plain ViT of timm's, made adaptive."""

from __future__ import annotations

import difflib
from functools import cache
from itertools import islice

import timm
from timm.models import get_pretrained_cfg

from datasets import Preprocessing
from models_act import HALTING, AdaptiveTokens, adapt_
from utils import UserError, did_you_mean

MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # timm's, where its plain ViTs are
NEAR = 12  # so many of the nearest names are looked at for some that fit


def own_names() -> list[str]:
    return timm.list_models("avit*")


@cache
def other_names() -> list[str]:
    """Of timm's models in MODULES; most of them fit."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def is_own(name: str) -> bool:
    """With a tag, or without."""
    return name.partition(".")[0] in own_names()


def _build(name: str, halting: dict, **options) -> AdaptiveTokens:
    """halting: options of `AdaptiveTokens`; options: of timm.create_model."""
    if is_own(name):
        return timm.create_model(name, **options, **halting)
    return adapt_(timm.create_model(name, **options), **halting)


def build_on_meta(name: str, **options) -> AdaptiveTokens:
    """Shapes without numbers. ValueError for a model that cannot be adaptive; errors of timm's for a size."""
    return _build(name, {}, device="meta", **options)


@cache
def unsupported_reason(name: str) -> str | None:
    """Why a name is that of no model of ours and of no ViT of timm's that can be adaptive, if so."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return "unknown model"
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", include_tags=True)]
    if tag and tag not in tags:
        return f"{architecture} has no weights of this tag" + did_you_mean(tag, tags)
    if is_own(name):
        return None
    if architecture not in other_names():
        return "not a plain vision transformer"
    try:
        build_on_meta(name)
    except ValueError as error:
        return str(error)
    return None


def check_model_name(name: str) -> None:
    """UserError, with the nearest names that fit, for one that does not."""
    reason = unsupported_reason(name)
    if reason is not None:
        near = difflib.get_close_matches(name, [*own_names(), *other_names()], n=NEAR)
        fitting = ", ".join(islice((other for other in near if unsupported_reason(other) is None), 3))
        hint = f" (did you mean {fitting}?)" if fitting and "did you mean" not in reason else ""
        raise UserError(f"--model {name}: {reason}{hint}")


def default_image_size(name: str) -> tuple[int, int]:
    """Height and width. UserError for a name that does not fit."""
    check_model_name(name)
    return get_pretrained_cfg(name).input_size[1:]


def preprocessing(name: str) -> Preprocessing:
    """How images of this model are made. UserError for a name that does not fit."""
    check_model_name(name)
    return Preprocessing.from_config(get_pretrained_cfg(name).to_dict())


def create_model(name: str, img_size: tuple[int, int], **options) -> AdaptiveTokens:
    """timm.create_model, adaptive; options: its own, and those of `AdaptiveTokens`.

    UserError for a name that does not fit, a size that patches do not fill, or weights out of reach.
    """
    check_model_name(name)
    _check_size(name, img_size)
    halting = {option: options.pop(option) for option in HALTING if option in options}
    try:
        return _build(name, halting, img_size=img_size, **options)
    except Exception as error:  # whatever the hub's client raises
        if not options.get("pretrained"):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(reason if is_own(name) else f"no pretrained weights for {name}: {reason}") from error


def _check_size(name: str, img_size: tuple[int, int]) -> None:
    size = f"--input-size {img_size[0]} x {img_size[1]}"
    try:
        patch = build_on_meta(name, img_size=img_size).patch_embed.feat_ratio(as_scalar=False)
    except (AssertionError, RuntimeError, ValueError) as error:  # of a stem of convolutions
        raise UserError(f"{size}: not for {name}: {error}") from error
    if any(side % p for side, p in zip(img_size, patch)):
        raise UserError(f"{size}: not a multiple of the patches' {patch[0]} x {patch[1]}")
