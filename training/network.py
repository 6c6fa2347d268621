"""The network of a run: model, image size, preprocessing and gate, each from the first source that has a value.

Every command asks `resolve_network`. It prints a line that names both values where two sources differ. docs/models.md
lists the sources.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, NamedTuple

from datasets import Preprocessing
from models_act import HALTING_DEFAULTS
from training.arguments import GATE_DEFAULTS
from training.budget import BudgetCurve
from training.budget_table import NEAR, BudgetPoint
from training.models import (
    build_on_meta,
    check_model_name,
    check_size,
    default_image_size,
    preprocessing,
    run_preprocessing,
)
from training.weights import embedded_size, fits, has_grid_of
from utils import UserError, log, warn

if TYPE_CHECKING:
    from training.checkpoints import Checkpoint

COMMAND_LINE, RECORD, FILE_NAME, FOREIGN_RECORD = (  # sources of a value, in their order
    "the command line",
    "the checkpoint",
    "the file name",
    "the checkpoint's args",
)
DEFAULT_MODEL, DEFAULT_SIZE = "avit_tiny_patch16_224", (224, 224)  # without a checkpoint, as in the original
GATE_NAMES = (*GATE_DEFAULTS, "halt_eps")
MAX_GATE = 1e6  # gate values read from files must be smaller in magnitude, which also excludes infinity and NaN
MAX_GATE_IN_NAME = 100  # larger numbers in file names are years and image sizes
TOLERANCE = 1e-3  # of the largest budget: a curve may end just below 1
MAX_SAFE_STEP = 0.05  # a budget above the one trained for by more than this needs mixed weights
INITIALIZATION = {"weight_init_mode", "fix_init"}  # options of a model that loaded weights replace
PUBLISHED_GATES = {  # by file name; the last one does not contain the gate
    "tiny-10-30": (10.0, 30.0),
    "small-10-75": (10.0, 75.0),
    "visualization-tiny": (5.0, 50.0),
}

Report = Callable[[str], None]  # `warn` or `log`


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
        flags = flags._replace(**_unchanged_gate(checkpoint, flags))
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
        return NetworkSettings(model, img_size, images, halting, _gate_of(checkpoint, flags, logged))
    point = budget_settings(checkpoint, flags.budget, flags.use_ema)
    gate = _gate_of(checkpoint, flags, logged, point)
    return NetworkSettings(model, img_size, images, halting and not point.is_static, gate, point.mixing)


# Image size --------------------------------------------------------------------------------------


def _size_without_checkpoint(
    model: str, flag: tuple[int, int] | None, pretrained: bool, purpose: Purpose
) -> tuple[int, int]:
    """Return the flag's size, else the original's default; the model's own is named if it differs."""
    choices = [(COMMAND_LINE, flag) if flag else ("the defaults", DEFAULT_SIZE), (model, default_image_size(model))]
    if pretrained or flag is None:
        report = warn if pretrained and purpose is Purpose.EVALUATION else log
        _name_differing("the image size", choices, report, size_text)
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
    _name_differing("the image size", choices, warn if purpose is Purpose.EVALUATION else log, size_text)
    return size


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _name_differing(
    name: str, choices: list[tuple[str, object]], report: Report = warn, text: Callable[[object], str] = "{:g}".format
) -> None:
    """Print a line for each source whose value differs. choices: (source, value), the chosen one first."""
    (source, value), *others = choices
    for other, other_value in others:
        if other_value != value:
            report(f"{name} is {text(value)} in {source} but {text(other_value)} in {other}; using {text(value)}")


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


# Halting and gate --------------------------------------------------------------------------------


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


def budget_settings(checkpoint: Checkpoint, budget: float, use_ema: bool = False) -> BudgetPoint:
    """Return the settings at which the weights use this fraction of the static model's MACs.

    Without a budget table, the gate center alone changes. Warns if more compute than at the budget of the training
    gives, or may give, worse predictions. Raises UserError if there is no budget curve or the budget is outside its
    range.
    """
    table, curve = checkpoint.budget_table(use_ema), checkpoint.budget_curve(use_ema)
    known = table or curve
    if known is None:
        raise UserError(
            f"{checkpoint.location} has no budget curve, so --budget cannot be used; "
            "train with --target-macs to record one"
        )
    if not known.min_cost <= budget <= min(known.max_cost + TOLERANCE, 1):
        low, high = math.ceil(1000 * known.min_cost) / 1000, math.floor(1000 * known.max_cost) / 1000
        raise UserError(
            f"--budget {budget:g} is out of range: {checkpoint.location} supports budgets from {low:g} to {high:g}"
        )
    point = table.at(budget) if table else BudgetPoint(budget, 1.0, curve.center(budget))
    _warn_above_trained_budget(checkpoint, point, use_ema)
    return point


def _warn_above_trained_budget(checkpoint: Checkpoint, point: BudgetPoint, use_ema: bool) -> None:
    """Warn if more compute than at the budget of the training gave, or may give, worse predictions.

    Without mixed weights, the blocks have never seen the tokens that now stay.
    """
    trained = _trained_budget(checkpoint, use_ema)
    if trained is None or point.cost <= trained + NEAR:
        return
    start = f"--budget {point.cost:g}: {checkpoint.location} was trained for a budget of {trained:.2f}"
    if point.is_less_accurate:
        warn(
            f"{start} and was more accurate there. On the calibration images, top-1 is {point.change_text} points "
            f"(one standard error) relative to {trained:.2f}. Omit --budget to run there, with fewer MACs"
        )
    is_measured = point.accuracy is not None or checkpoint.recorded_flag("gate_jitter")
    if is_measured or point.cost <= trained + MAX_SAFE_STEP:
        return
    if checkpoint.budget_table(use_ema) is not None:
        warn(f"{start} and records no accuracies, so this budget may be less accurate. Train again to record them")
        return
    warn(
        f"{start} and has no starting weights to mix with, so accuracy may be far lower at this budget than at the one "
        "trained for. Train from the weights of a static model, which are then recorded, or with --gate-jitter"
    )


def safe_budget_curve(checkpoint: Checkpoint, use_ema: bool) -> BudgetCurve | None:
    """Return the budget curve of the weights, up to the budgets that need no other weights; None if there is none."""
    curve, trained = checkpoint.budget_curve(use_ema), _trained_budget(checkpoint, use_ema)
    if curve is None or trained is None or checkpoint.recorded_flag("gate_jitter"):
        return curve
    limit = min(trained + MAX_SAFE_STEP, curve.max_cost)
    below = [point for point in curve.points if point[1] < limit]
    return BudgetCurve((*below, (curve.center(limit), limit))) if below else curve


def _trained_budget(checkpoint: Checkpoint, use_ema: bool) -> float | None:
    """Return the budget of the recorded gate, None if it is unknown."""
    center = dict(checkpoint.gate_sources(use_ema))[RECORD].get("gate_center")
    table, curve = checkpoint.budget_table(use_ema), checkpoint.budget_curve(use_ema)
    costs = [point.cost for point in table.points if point.center == center] if table else []
    if costs or curve is None or center is None:
        return costs[0] if costs else None
    return curve.cost(center)


def _gate_of(
    checkpoint: Checkpoint | None, flags: NetworkFlags, logged: Collection[str], point: BudgetPoint | None = None
) -> dict[str, float]:
    """Resolve the gate, whose center is that of `point`, if given. See `resolve_gate`."""
    if checkpoint is None:
        return resolve_gate(flags.gate, logged=logged)
    sources = checkpoint.gate_sources(flags.use_ema)
    if logged:
        _warn_if_partial(checkpoint, flags, sources)
        _warn_if_only_named(checkpoint, flags, sources)
    if point is None:
        return resolve_gate(flags.gate, sources, logged)
    gate_logged = [] if point.is_static else [name for name in logged if name != "gate_center"]
    gate = resolve_gate(flags.gate, sources, gate_logged)
    gate["gate_center"] = point.center
    if "gate_center" in logged:
        log(_describe(point, flags.budget))
    return gate


def _unchanged_gate(checkpoint: Checkpoint | None, flags: NetworkFlags) -> dict[str, None]:
    """Return None for each gate flag that a resumed run had too: training may have moved its value since."""
    if checkpoint is None:
        return {}
    recorded = {name: checkpoint.recorded_flag(name) for name in flags.gate}
    return {name: None for name, value in flags.gate.items() if value is not None and value == recorded[name]}


def _describe(point: BudgetPoint, budget: float) -> str:
    """Return a line about the settings of a budget."""
    line, measured = f"gate_center {point.center:g}, for a budget of {budget:g}", []
    if point.is_static:
        line = "budget 1: the static model that training started from, without halting"
    elif point.agreement is not None:
        line += f"; weights: {point.mixing:.2f} x trained + {1 - point.mixing:.2f} x static"
        measured.append(f"{point.agreement:.1%} of the predictions are the static model's")
    if point.accuracy is not None:
        measured.append(f"top-1 is {point.accuracy:.1%}, {point.change_text} points relative to the trained budget")
    return f"{line}; on the calibration images, {', and '.join(measured)}" if measured else line


def _warn_if_partial(checkpoint: Checkpoint, flags: NetworkFlags, sources: list[tuple[str, dict]]) -> None:
    """Warn if the checkpoint has a gate scale but no center, or the reverse, and no flag sets the other."""
    known = {name: value for _, values in sources for name, value in values.items() if name in GATE_DEFAULTS}
    given = {name for name, value in flags.gate.items() if value is not None}
    given |= set() if flags.budget is None else {"gate_center"}
    missing = GATE_DEFAULTS.keys() - known - given
    if known and missing:
        ((name, value),), (other,) = known.items(), missing
        default, flag = f"using the default {GATE_DEFAULTS[other]:g}", f"--{other.replace('_', '-')}"
        warn(f"{checkpoint.location} records {name} {value:g} but no {other}; {default}. Pass {flag}")


def _warn_if_only_named(checkpoint: Checkpoint, flags: NetworkFlags, sources: list[tuple[str, dict]]) -> None:
    """Warn if only the name of an unpublished file has a gate: the numbers may mean something else, such as a day."""
    gates = [values for _, values in sources if values.keys() & GATE_DEFAULTS]
    named = gate_in_name(checkpoint.location)
    is_published = Path(checkpoint.location).stem in PUBLISHED_GATES
    if named and gates == [named] and not is_published and flags.gate_scale is flags.gate_center is None:
        scale, center = named.values()
        warn(
            f"{checkpoint.location} records no gate; gate_scale {scale:g} and gate_center {center:g} are only in its "
            "name. Rename the file if the numbers mean something else"
        )


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
    sources, resolved = [(COMMAND_LINE, flags), *sources], {}
    for name in GATE_NAMES:
        choices = [(source, values[name]) for source, values in sources if values.get(name) is not None]
        choices = choices or [("the defaults", HALTING_DEFAULTS[name])]
        source, resolved[name] = choices[0]
        if name in logged:
            if name in GATE_DEFAULTS or resolved[name] != HALTING_DEFAULTS[name]:
                log(f"{name} {resolved[name]:g}, from {source}")
            _name_differing(name, choices)
    return resolved


def gate_numbers(record: object) -> dict[str, float]:
    """Return the usable gate values in a record read from a file: finite numbers, and halt_eps in [0, 1)."""
    values = record if isinstance(record, dict) else {}
    gate = {name: values.get(name) for name in GATE_NAMES}
    gate = {name: float(v) for name, v in gate.items() if type(v) in (int, float) and abs(v) < MAX_GATE}
    return {name: value for name, value in gate.items() if name in GATE_DEFAULTS or 0 <= value < 1}


def gate_in_name(location: str) -> dict[str, float]:
    """Return the gate in the file name NAME-SCALE-CENTER.pth, or of a published file; empty if there is no gate.

    Dates, versions and image sizes are not gates: both numbers are at most MAX_GATE_IN_NAME and have no leading zeros,
    and NAME does not end in a number of its own or in a year.
    """
    stem = Path(location).stem
    if stem in PUBLISHED_GATES:
        return dict(zip(GATE_DEFAULTS, PUBLISHED_GATES[stem]))
    number = r"-([1-9]\d{0,2}(?:\.\d+)?|0\.\d+)"
    match = re.fullmatch(rf"(.+?){number}{number}", stem)
    if not match or re.search(r"(^|-)v?[\d.]+$|\d{4}$", match[1]):
        return {}
    gate = dict(zip(GATE_DEFAULTS, map(float, match.groups()[1:])))
    return gate if max(gate.values()) <= MAX_GATE_IN_NAME else {}
