"""Models by name: ours, and any plain ViT of timm's, made adaptive."""

from __future__ import annotations

import difflib
from functools import cache
from itertools import islice

import timm
from timm.models import get_pretrained_cfg

from datasets import Preprocessing
from models_act import HALTING, AdaptiveTokens, adapt
from utils import UserError

MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # timm's, where its plain ViTs are
NEAR = 12  # so many of the nearest names are looked at for some that fit


def own_names() -> list[str]:
    return timm.list_models("avit*")


@cache
def other_names() -> list[str]:
    """Of timm's models in MODULES; most of them fit."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


@cache
def misfit(name: str) -> str | None:
    """Why a name is that of no model of ours and of no ViT of timm's that can be adaptive, if so."""
    if name in own_names():
        return None
    if not timm.is_model(name):
        return "unknown model"
    if name.split(".", maxsplit=1)[0] not in other_names():
        return "not a plain vision transformer"
    try:
        get_pretrained_cfg(name, allow_unregistered=False)  # is the tag known?
        adapt(timm.create_model(name, device="meta"))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def check_model_name(name: str) -> None:
    """UserError, with the nearest names that fit, for one that does not."""
    reason = misfit(name)
    if reason is not None:
        near = difflib.get_close_matches(name, [*own_names(), *other_names()], n=NEAR)
        fitting = ", ".join(islice((other for other in near if misfit(other) is None), 3))
        raise UserError(f"--model {name}: {reason}" + (f" (did you mean {fitting}?)" if fitting else ""))


def default_image_size(name: str) -> tuple[int, int]:
    """Height and width. UserError for a name that does not fit."""
    check_model_name(name)
    return get_pretrained_cfg(name).input_size[1:]


def preprocessing(name: str) -> Preprocessing:
    """How images of this model are made. UserError for a name that does not fit."""
    check_model_name(name)
    return Preprocessing.of(get_pretrained_cfg(name).to_dict())


def create_model(name: str, img_size: tuple[int, int], **options) -> AdaptiveTokens:
    """timm.create_model, adaptive; options: its own, and those of `AdaptiveTokens`.

    UserError for a name that does not fit, a size that patches do not fill, or weights out of reach.
    """
    check_model_name(name)
    halting = {option: options.pop(option) for option in HALTING if option in options}
    try:
        if name in own_names():
            model = timm.create_model(name, img_size=img_size, **options, **halting)
        else:
            model = adapt(timm.create_model(name, img_size=img_size, **options), **halting)
    except Exception as error:  # whatever the hub's client raises
        if not options.get("pretrained"):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(reason if name in own_names() else f"no pretrained weights for {name}: {reason}") from error
    patch = model.patch_embed.feat_ratio(as_scalar=False)
    if any(side % p for side, p in zip(img_size, patch)):
        sizes = f"{img_size[0]} x {img_size[1]}: not a multiple of the patches' {patch[0]} x {patch[1]}"
        raise UserError(f"--input-size {sizes}")
    return model
