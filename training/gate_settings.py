"""The gate of a run, which a budget may set: each value is that of the first source that has one."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models_act import HALTING_DEFAULTS
from training.arguments import GATE_DEFAULTS
from training.budget import BudgetCurve
from training.budget_table import NEAR, BudgetSettings
from training.parser import MAX_GATE
from training.sources import COMMAND_LINE, RECORD, name_differing
from utils import UserError, log, warn

if TYPE_CHECKING:
    from training.checkpoints import Checkpoint
    from training.network import NetworkFlags

GATE_NAMES = (*GATE_DEFAULTS, "halt_eps")
MAX_GATE_IN_NAME = 100  # larger numbers in file names are years and image sizes
TOLERANCE = 1e-3  # of the largest budget: a curve may end just below 1
MAX_SAFE_STEP = 0.05  # a budget above the one trained for by more than this needs mixed weights
PUBLISHED_GATES = {  # by file name; the last one does not contain the gate
    "tiny-10-30": (10.0, 30.0),
    "small-10-75": (10.0, 75.0),
    "visualization-tiny": (5.0, 50.0),
}


# Budget ------------------------------------------------------------------------------------------


def budget_settings(checkpoint: Checkpoint, budget: float, use_ema: bool = False) -> BudgetSettings:
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
    settings = table.at(budget) if table else BudgetSettings(budget, 1.0, curve.center(budget))
    if table is None and checkpoint.records_table(use_ema):
        warn(
            f"--budget {budget:g}: the budget table or the starting weights of {checkpoint.location} are damaged, so "
            "the gate alone changes, and accuracy may be far lower above the budget trained for"
        )
    else:
        _warn_above_trained_budget(checkpoint, settings, use_ema)
    return settings


def _warn_above_trained_budget(checkpoint: Checkpoint, settings: BudgetSettings, use_ema: bool) -> None:
    """Warn if more compute than at the budget of the training gave, or may give, worse predictions.

    Without mixed weights, the blocks have never seen the tokens that now stay.
    """
    trained = _trained_budget(checkpoint, use_ema)
    budget, measured = settings.budget, settings.nearest
    if trained is None or budget <= trained + NEAR:
        return
    start = f"--budget {budget:g}: {checkpoint.location} was trained for a budget of {trained:.2f}"
    if measured and measured.is_less_accurate:
        chance = "This is less than two standard errors, so it may be chance. " if measured.may_be_chance else ""
        warn(
            f"{start} and was more accurate there on the calibration images. Top-1 at budget {measured.cost:.3g} is "
            f"{measured.change_text} points (one standard error) relative to {trained:.2f}. {chance}"
            "Omit --budget to run there, with fewer MACs"
        )
    is_measured = measured is not None and measured.accuracy is not None
    if is_measured or checkpoint.recorded_flag("gate_jitter") or budget <= trained + MAX_SAFE_STEP:
        return
    if measured is not None:
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


def _describe(settings: BudgetSettings) -> str:
    """Return a line about the settings of a budget."""
    line, row = f"gate_center {settings.center:g}, for a budget of {settings.budget:g}", settings.nearest
    if row is None:
        return line
    measured = []
    if settings.is_static:
        line = "budget 1: the static model that training started from, without halting"
    else:
        line += f"; weights: {settings.mixing:.2f} x trained + {1 - settings.mixing:.2f} x static"
        measured.append(f"{row.agreement:.1%} of the predictions are the static model's")
    if row.accuracy is not None:
        measured.append(f"top-1 is {row.accuracy:.1%}, {row.change_text} points relative to the trained budget")
    if not measured:
        return line
    return f"{line}; on the calibration images, at budget {row.cost:.3g}, {', and '.join(measured)}"


# Gate --------------------------------------------------------------------------------------------


def gate_of(
    checkpoint: Checkpoint | None, flags: NetworkFlags, logged: Collection[str], of_budget: BudgetSettings | None = None
) -> dict[str, float]:
    """Resolve the gate, whose center is that of a budget, if given. See `resolve_gate`."""
    if checkpoint is None:
        return resolve_gate(flags.gate, logged=logged)
    sources = checkpoint.gate_sources(flags.use_ema)
    if logged:
        _warn_if_partial(checkpoint, flags, sources)
        _warn_if_only_named(checkpoint, flags, sources)
    if of_budget is None:
        return resolve_gate(flags.gate, sources, logged)
    gate_logged = [] if of_budget.is_static else [name for name in logged if name != "gate_center"]
    gate = resolve_gate(flags.gate, sources, gate_logged)
    gate["gate_center"] = of_budget.center
    if "gate_center" in logged:
        log(_describe(of_budget))
    return gate


def unchanged_gate(checkpoint: Checkpoint | None, flags: NetworkFlags) -> dict[str, None]:
    """Return None for each gate flag that a resumed run had too: training may have moved its value since."""
    if checkpoint is None:
        return {}
    recorded = {name: checkpoint.recorded_flag(name) for name in flags.gate}
    return {name: None for name, value in flags.gate.items() if value is not None and value == recorded[name]}


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
            name_differing(name, choices)
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
