"""Aims for the speed of A-ViT against the static model in the same form, and what cuda_check.py has measured."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from benchmarks.cases import EARLY_EXIT, STATIC, ZIPPED
from benchmarks.gpu_checks import Check
from benchmarks.graphed import COMPILED_GRAPHED, GRAPHED, eager_variant, same_form


class Aim(NamedTuple):
    """A speedup to reach in each form. variant: the eager variant it holds for."""

    size: str
    batch: int
    train: bool
    speedup: float
    variant: str = ZIPPED


AIMS = (
    Aim("tiny", 128, False, 1.2),
    Aim("small", 128, False, 1.35),
    Aim("base", 128, False, 1.45),
    Aim("tiny", 32, False, 1.1),
    Aim("base", 32, False, 1.3),
    Aim("tiny", 1, False, 1.2, EARLY_EXIT),
    Aim("tiny", 128, True, 1.15),
    Aim("small", 128, True, 1.3),
    Aim("base", 128, True, 1.4),
)


def report_aims(check: Check) -> None:
    """Report for each aim the speedup over static in each form, and that of the fastest forms. Nothing can fail."""
    speeds = measured_speeds(check)
    measured = [aim for aim in AIMS if (aim.size, aim.batch, aim.train) in speeds]
    if measured:
        names = "".join(f"{name:>20}" for name in ("eager", GRAPHED, COMPILED_GRAPHED, "fastest forms"))
        print(f"  {'speedup over static in the same form':40}{'aim':>6}{names}", flush=True)
    for aim in measured:
        label = f"{aim.size} {'training' if aim.train else 'inference'} {aim.batch}, {aim.variant}"
        report = ratios(speeds[aim.size, aim.batch, aim.train], aim.variant)
        cells = "".join(f"{'' if ratio is None else f'{ratio:.2f}':>20}" for ratio in report.values())
        check.report(f"{label:40}{aim.speedup:>6.2f}{cells}", aim=label, speed_up=aim.speedup, measured=report)


def measured_speeds(check: Check) -> dict[tuple, dict[str, float]]:
    """Return the images/s of each form by model size, batch size and mode. Later measurements replace earlier ones."""
    speeds = defaultdict(dict)
    for row in check.measured:
        if row.get("amp") == check.amp and "images_per_s" in row:
            speeds[row["size"], row["batch"], row["train"]][row["form"]] = row["images_per_s"]
    return speeds


def ratios(speeds: dict[str, float], variant: str) -> dict[str, float | None]:
    """Return the ratio of the variant to static in each form, and of the fastest form of A-ViT to that of static.

    speeds: images/s of each form. A ratio is None if a form was not measured.
    """
    names = {"eager": variant, **{form: f"{variant}, {form}" for form in (GRAPHED, COMPILED_GRAPHED)}}
    found = {form: _ratio(speeds.get(name), speeds.get(same_form(name))) for form, name in names.items()}
    static = [speed for name, speed in speeds.items() if eager_variant(name) == STATIC]
    adaptive = [speed for name, speed in speeds.items() if eager_variant(name) != STATIC]
    return found | {"fastest": _ratio(max(adaptive, default=None), max(static, default=None))}


def _ratio(speed: float | None, baseline: float | None) -> float | None:
    return speed / baseline if speed and baseline else None
