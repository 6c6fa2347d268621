"""The network of a run: model, image size, preprocessing and gate, each from the first source that has a value.

Every command asks `resolve_network`. It prints a line that names both values where two sources differ.
docs/sources.md lists the sources. gate_settings.py resolves the gate and the budget.
"""

from __future__ import annotations

import argparse
from enum import Enum
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, NamedTuple

from datasets import Preprocessing
from training.arguments import GATE_DEFAULTS
from training.gate_settings import GATE_NAMES, budget_settings, gate_in_name, gate_of, unchanged_gate
from training.models import (
    build_on_meta,
    check_model_name,
    check_size,
    default_image_size,
    preprocessing,
    run_preprocessing,
)
from training.sources import COMMAND_LINE, FOREIGN_RECORD, RECORD, name_differing
from training.weights import embedded_size, fits, has_grid_of
from utils import UserError, log, warn

if TYPE_CHECKING:
    from training.checkpoints import Checkpoint

DEFAULT_MODEL, DEFAULT_SIZE = "avit_tiny_patch16_224", (224, 224)  # without a checkpoint, as in the original
INITIALIZATION = {"weight_init_mode", "fix_init"}  # options of a model that loaded weights replace


class Purpose(Enum):
    """The use of a network, which decides whether a difference from the checkpoint is an error, a warning or a log."""

    EVALUATION = "evaluation, drawing, export or measurement"
    NEW_TASK = "training that starts from the weights"
    RESUME = "training that continues a run"


class NetworkFlags(NamedTuple):
    """The flags that select a network; None: not given.

    img_size: height, width. budget: fraction of the static model's MACs that sets the gate center.
    data_set: name of the run's dataset; None: image files, preprocessed as those of the checkpoint's dataset.
    """

    model: str | None = None
    img_size: tuple[int, int] | None = None
    gate_scale: float | None = None
    gate_center: float | None = None
    budget: float | None = None
    halting: bool = True
    use_ema: bool = False
    data_set: str | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> NetworkFlags:
        """Read them from the flags of main_act.py or visualize.py."""
        size = args.input_size and (args.input_size[0], args.input_size[-1])
        gate = (args.gate_scale, args.gate_center, args.budget)
        return cls(args.model, size, *gate, args.halting, args.use_ema, args.data_set)

    @property
    def gate(self) -> dict[str, float | None]:
        return {"gate_scale": self.gate_scale, "gate_center": self.gate_center}

    @property
    def sets_gate(self) -> bool:
        return not (self.gate_scale is self.gate_center is self.budget is None)


class NetworkSettings(NamedTuple):
    """The settings of a network.

    img_size: height, width; gate: gate_scale, gate_center and halt_eps; mixing: of the weights, see `BudgetTable`.
    """

    model: str
    img_size: tuple[int, int]
    preprocessing: Preprocessing
    halting: bool
    gate: dict[str, float]
    mixing: float = 1.0


def resolve_network(
    checkpoint: Checkpoint | None,
    flags: NetworkFlags,
    purpose: Purpose,
    pretrained: bool = False,
    log_gate: bool = True,
) -> NetworkSettings:
    """Return the settings of a network, and print where its sources differ.

    checkpoint: the weights to load, or None for the hub's (`pretrained`) or random weights.
    log_gate: print the gate of a halting model.
    Raises UserError if the model, the image size or the budget does not suit the checkpoint.
    """
    evaluates = purpose is Purpose.EVALUATION
    if purpose is Purpose.RESUME:
        flags = flags._replace(**unchanged_gate(checkpoint, flags))
    model = flags.model or (checkpoint.model_name(flags.use_ema) if checkpoint else DEFAULT_MODEL)
    check_model_name(model)
    source = "--input-size" if flags.img_size else "the image size"
    if checkpoint is None:
        img_size = _size_without_checkpoint(model, flags.img_size, pretrained, purpose)
        check_size(model, img_size, source)
        images = run_preprocessing(model, img_size, flags.data_set)
    else:
        img_size = _size_of_checkpoint(checkpoint, model, flags, purpose)
        check_size(model, img_size, source)
        _check_model(checkpoint, model, img_size, flags, purpose)
        if flags.use_ema:
            checkpoint.warn_about_average()
        checkpoint.warn_about_class_names(flags.use_ema)
        images = checkpoint.preprocessing_for(model, img_size, flags.data_set, purpose is Purpose.NEW_TASK)
    halting = flags.halting and not (evaluates and _must_be_static(checkpoint, flags, pretrained))
    logged = GATE_NAMES if halting and log_gate else ()
    if checkpoint is None or flags.budget is None:
        return NetworkSettings(model, img_size, images, halting, gate_of(checkpoint, flags, logged))
    of_budget = budget_settings(checkpoint, flags.budget, flags.use_ema)
    measured_size = checkpoint.image_size()
    if measured_size is not None and measured_size != img_size and not of_budget.is_static:
        warn(
            f"--budget {flags.budget:g}: {checkpoint.location} was calibrated at {size_text(measured_size)}; "
            f"at {size_text(img_size)} it uses another fraction of the static model's MACs"
        )
    gate = gate_of(checkpoint, flags, logged, of_budget)
    return NetworkSettings(model, img_size, images, halting and not of_budget.is_static, gate, of_budget.mixing)


# Image size --------------------------------------------------------------------------------------


def _size_without_checkpoint(
    model: str, flag: tuple[int, int] | None, pretrained: bool, purpose: Purpose
) -> tuple[int, int]:
    """Return the flag's size, else the original's default; the model's own is named if it differs."""
    choices = [(COMMAND_LINE, flag) if flag else ("the defaults", DEFAULT_SIZE), (model, default_image_size(model))]
    if pretrained or flag is None:
        report = warn if pretrained and purpose is Purpose.EVALUATION else log
        name_differing("the image size", choices, report, size_text)
    return choices[0][1]


def _size_of_checkpoint(checkpoint: Checkpoint, model: str, flags: NetworkFlags, purpose: Purpose) -> tuple[int, int]:
    """Return the flag's size, else the recorded one, that of the position embedding, or the model's default.

    Raises UserError if a resumed run had another size.
    """
    weights, recorded = checkpoint.state_dict(flags.use_ema), checkpoint.image_size()
    embedded = None if recorded and has_grid_of(model, recorded, weights) else embedded_size(model, weights)
    sources = {
        COMMAND_LINE: flags.img_size,
        RECORD if checkpoint.is_native else FOREIGN_RECORD: recorded,
        "the position embedding": embedded,
    }
    choices = [(source, size) for source, size in sources.items() if size is not None]
    choices = choices or [("the defaults", default_image_size(model))]
    size, trained = choices[0][1], recorded or embedded or choices[0][1]
    if purpose is Purpose.RESUME and size != trained:
        raise UserError(
            f"--input-size {size_text(size)}: {checkpoint.location} continues at {size_text(trained)}; omit "
            "--input-size, or pass the file with --finetune to train at another size"
        )
    name_differing("the image size", choices, warn if purpose is Purpose.EVALUATION else log, size_text)
    return size


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


# Model -------------------------------------------------------------------------------------------


def _check_model(
    checkpoint: Checkpoint, model: str, img_size: tuple[int, int], flags: NetworkFlags, purpose: Purpose
) -> None:
    """Compare the model with the one that the checkpoint records.

    Raises UserError if they differ in more than their names; for a new task, prints a warning instead.
    """
    recorded = checkpoint.recorded_model()
    unsupported = checkpoint.recorded_flag("model") or checkpoint.content.get("arch")
    weights, location = checkpoint.state_dict(flags.use_ema), checkpoint.location
    if recorded == model or not fits(model, weights):  # weights that do not fit are an error of `load_weights`
        return
    if recorded is None:
        if isinstance(unsupported, str):
            report = log if flags.model or purpose is not Purpose.EVALUATION else warn
            report(f"{location} records model {unsupported[:60]!r}, which is not supported; it runs as {model}")
        return
    if not fits(recorded, weights):
        warn(f"{location} records model {recorded}, which its weights do not fit; it runs as {model}")
        return
    differing = differences(recorded, model, img_size)
    if not differing:
        _name_preprocessing(checkpoint, recorded, model, purpose)
        return
    mismatch = (
        f"{location} was trained as {recorded}, which has the parameters of {model} but computes other results "
        f"({', '.join(differing[:3])})"
    )
    if purpose is not Purpose.NEW_TASK:
        raise UserError(f"{mismatch}; pass --model {recorded}")
    warn(f"{mismatch}; training uses {model}. Pass --model {recorded} to keep the network")


def _name_preprocessing(checkpoint: Checkpoint, recorded: str, model: str, purpose: Purpose) -> None:
    """Print that the weights run as the same network of another name.

    Warn if evaluation normalizes the images of another program's checkpoint otherwise than its model. Checkpoints of
    this repository record their preprocessing, see `Checkpoint.preprocessing_for`.
    """
    line = f"{checkpoint.location} was trained as {recorded}; it runs as {model}, which is the same network"
    own, trained = preprocessing(model), preprocessing(recorded)
    if checkpoint.is_native or own == trained:
        log(line)
        return
    line = f"{line} with other preprocessing: {own.difference(trained)}"
    if purpose is Purpose.EVALUATION and (own.mean, own.std) != (trained.mean, trained.std):
        warn(f"{line}. Pass --model {recorded} to preprocess images as that model")
    else:
        log(line)


def differences(name: str, other: str, img_size: tuple[int, int]) -> list[str]:
    """Return what two models of the same parameters compute differently, such as "GELU instead of QuickGELU"."""
    own, others = _structure(name, img_size), _structure(other, img_size)
    keys = [key for key in own | others if own.get(key) != others.get(key)]
    return list(dict.fromkeys(f"{key[1]} {others.get(key)} instead of {own.get(key)}" for key in keys))


@cache
def _structure(name: str, img_size: tuple[int, int]) -> dict[tuple[str, str], str]:
    """Return the type and the options of each module, by its path and the option's name.

    The options are the plain attributes, such as num_heads, eps and no_embed_class, and functions.
    """
    structure = {}
    for path, module in build_on_meta(name, img_size=img_size, num_classes=1).named_modules():
        structure[path, "module"] = type(module).__name__
        for option, value in vars(module).items():
            is_plain = isinstance(value, bool | int | float | str | tuple | Enum | FunctionType)
            if is_plain and option not in INITIALIZATION:
                structure[path, option] = getattr(value, "__qualname__", None) or str(value)
    return structure


# Halting -----------------------------------------------------------------------------------------


def _must_be_static(checkpoint: Checkpoint | None, flags: NetworkFlags, pretrained: bool) -> bool:
    """Return whether to evaluate without halting, with a warning: the weights were not trained to halt.

    A given gate or budget makes them halt.
    """
    if not flags.halting or flags.sets_gate or (checkpoint is None and not pretrained):
        return False
    hint = "Pass --gate-scale and --gate-center to halt anyway, or train it"
    if checkpoint is None:
        warn(f"the --pretrained weights were not trained to halt, so they run as a static model. {hint}")
        return True
    if checkpoint.is_static:
        ignored = "; the gate in its file name is not used" if gate_in_name(checkpoint.location) else ""
        warn(f"{checkpoint.location} was trained without halting, so it runs as a static model{ignored}")
        return True
    if any(values.keys() & GATE_DEFAULTS for _, values in checkpoint.gate_sources(flags.use_ema)):
        return False
    warn(f"{checkpoint.location} records no gate, so it runs as a static model. {hint}")
    return True
