"""Charts of training runs, from their log.txt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from utils import UserError, warn
from visualization.charts import (
    DPI,
    GREY,
    PALETTE,
    PLATE,
    PLATE_PAD,
    SMALL_TEXT,
    drawable,
    dress,
    legend_above,
    macs_unit,
    new_figure,
)

# Reading ------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """lines: what log.txt holds, one for each epoch."""

    name: str
    lines: list[dict]


def read_run(folder: Path) -> Run:
    """Of an --output_dir; UserError if it has no readable log.txt. Says which lines are broken, and leaves them out."""
    path = folder / "log.txt"
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path}: {reason}; expected an --output_dir of main_act.py, with log.txt") from error
    lines = []
    for number, text in enumerate(raw, start=1):
        line = _parsed(text)
        if line is not None:
            lines.append(line)
        elif text.strip():
            warn(f"{path}, line {number}: not an epoch's figures; it is left out")
    if not lines:
        raise UserError(f"{path}: no epoch in it; expected an --output_dir of main_act.py, with log.txt")
    return Run(folder.resolve().name, lines)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Names them apart by as many of their parents as that takes; a folder given twice counts once."""
    places = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [read_run(place)._replace(name=_distinct_name(place, places)) for place in places]


def _distinct_name(place: Path, places: list[Path]) -> str:
    for length in range(1, len(place.parts)):
        own = place.parts[-length:]
        if sum(other.parts[-length:] == own for other in places) == 1:
            return "/".join(own)
    return str(place)


def _parsed(text: bytes) -> dict | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _is_finite(line.get("epoch")) else None


MAX_DRAWN = 1e30  # matplotlib cannot draw axes from one end of the floats to the other


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(float(value)) < MAX_DRAWN
    except OverflowError:  # an int beyond all floats
        return False


def series(run: Run, *names: str) -> np.ndarray:
    """[epochs, 1 + names]: the epochs where all of these figures are finite numbers; of a repeated one, the last."""
    by_epoch = {line["epoch"]: line for line in run.lines}
    rows = [[by_epoch[epoch].get(name) for name in ("epoch", *names)] for epoch in sorted(by_epoch)]
    return np.array([row for row in rows if all(map(_is_finite, row))], dtype=float).reshape(-1, 1 + len(names))


# Drawing ------------------------------------------------------------------------------------------


def _say(axes: Axes, text: str) -> None:
    """In the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _run_colors(count: int) -> list:
    return list(PALETTE[:count]) if count <= len(PALETTE) else list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


class Panel(NamedTuple):
    """solid, other: figures of log.txt; key: the other's style, and what it is; band: between which two figures."""

    title: str
    solid: str
    other: str = ""
    key: str = ""
    band: tuple[str, str] | None = None
    from_zero: bool = False


MACS = Panel("multiply-adds", "test_gmacs", "test_gmacs_static", "dashed: static", from_zero=True)
DEPTHS = ("train_depth_min", "train_depth_max")
PANELS = (
    Panel("top-1 (%)", "test_acc1", "test_ema_acc1", "dotted: averaged weights"),
    Panel("loss", "test_loss", "train_loss", "dashed: training"),
    Panel("ponder loss", "train_ponder_loss_token", "train_distr_prior_loss", "dashed: prior"),
    Panel("mean depth", "test_depth_mean", key="band: least to most", band=DEPTHS, from_zero=True),
    MACS,
    Panel("learning rate", "train_lr"),
)


def curves(runs: Sequence[Run]) -> Figure:
    """Everything of interest over the epochs, one colour a run."""
    names = [drawable(run.name, 50) for run in runs]
    columns = max(1, min(len(runs), 100 // (max(map(len, names)) + 6)))
    figure = new_figure(4.9 + 0.2 * -(-len(runs) // columns), width=8.6)
    epochs = np.concatenate([series(run)[:, 0] for run in runs])
    margin = max(0.04 * np.ptp(epochs), 0.5)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS):
        axes.set_xlim(epochs.min() - margin, epochs.max() + margin)
        _draw_panel(axes, panel, runs)
    handles = [Line2D([], [], color=color, linewidth=2) for color in _run_colors(len(runs))]
    labels = ["run"] * len(runs)  # matplotlib before 3.10 would leave out a name that begins with _
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for text, name in zip(legend.get_texts(), names):
        text.set(text=name, parse_math=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    dress(axes, x="epoch")
    size, letter = _macs_unit(runs) if panel is MACS else (1, "")
    axes.set_title(panel.title + (f" ({letter})" if letter else ""), loc="left", fontsize=10, weight="bold")
    other_style = ":" if panel.key.startswith("dotted") else "--"
    for run, color in zip(runs, _run_colors(len(runs))):
        for name, style in ((panel.solid, "-"), (panel.other, other_style)):
            points = series(run, name)
            if len(points):
                marker = ("o" if style == "-" else "x") if len(points) == 1 else None
                axes.plot(points[:, 0], points[:, 1] / size, style, color=color, marker=marker, markersize=5)
        if panel.band and len(band := series(run, *panel.band)):
            axes.fill_between(*band.T, color=color, alpha=0.15 / len(runs), linewidth=0)
    if not axes.lines:
        axes.set_axis_off()
        return _say(axes, "no data")
    if any(len(series(run, *(panel.band or [panel.other]))) for run in runs):
        axes.set_title(panel.key, loc="right", fontsize=8, color=GREY)
    if panel.from_zero:
        axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _macs_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Of logged multiply-adds, which are in G: how many of these one unit is, and its letter."""
    points = [series(run, name)[:, 1] for run in runs for name in (MACS.solid, MACS.other)]
    size, letter = macs_unit(1e9 * max(np.concatenate(points), default=0))
    return size / 1e9, letter


class End(NamedTuple):
    """Where a run ended."""

    name: str
    color: object
    macs: float
    accuracy: float
    static: bool


def accuracy_against_macs(runs: Sequence[Run]) -> Figure:
    """The way of each run over its epochs, and where it ended; static networks are squares with a dashed line."""
    figure = new_figure(4.4, width=6.4)
    size, letter = _macs_unit(runs)
    axes = dress(figure.subplots(), f"multiply-adds per image ({letter})", "top-1 (%)", grid="both")
    ends, usual = [], []
    for run, color in zip(runs, _run_colors(len(runs))):
        way = series(run, "test_gmacs", "test_acc1", "test_gmacs_static")
        if len(way) == 0:
            continue
        _, macs, accuracy, static_macs = way.T
        macs = macs / size
        axes.plot(macs, accuracy, color=color, alpha=0.3, marker=".", markersize=4, linewidth=1.2)
        static = math.isclose(way[-1, 1], static_macs[-1], rel_tol=1e-6)
        ends.append(End(run.name, color, macs[-1], accuracy[-1], static))
        usual.append(np.median(accuracy))
    if not ends:
        _say(axes, "no data")
        return figure
    for end in ends:
        if end.static:
            axes.axhline(end.accuracy, color=end.color, linewidth=1.1, linestyle="--", alpha=0.8)
        marker = "s" if end.static else "o"
        axes.plot(end.macs, end.accuracy, marker, color=end.color, markersize=8, markeredgecolor="white")
    axes.margins(0.1)
    low, high = min(*usual, *(end.accuracy for end in ends)), max(np.max(line.get_ydata()) for line in axes.lines)
    margin = max(high - low, 4) * 0.12  # the first half of a training may lie below
    axes.set_ylim(low - margin, high + margin)
    last = Line2D([], [], color=GREY, marker="o", markersize=7, linestyle="")
    last_static = Line2D([], [], color=GREY, marker="s", markersize=7, linestyle="--", linewidth=1.1)
    before = Line2D([], [], color=GREY, marker=".", markersize=4, alpha=0.4)
    legend_above(axes, {"last epoch": last, "of a static network": last_static, "epochs before": before})
    _label_ends(axes, ends)
    return figure


# Offsets of a label's middle line from its point, in points, and the side that it is flush with; the best come first.
LABEL_PLACES = [(8, 0, "left"), (-8, 0, "right"), (0, 13, "center"), (0, -13, "center")]
LABEL_PLACES += [
    (8 * way, dy, side) for dy in (13, -13, 26, -26, 39, -39) for way, side in ((1, "left"), (-1, "right"))
]


def _label_ends(axes: Axes, ends: list[End]) -> None:
    """Each beside its point, at the first place where it covers no other label and no point, as far as there is one."""
    axes.figure.draw_without_rendering()  # from here on it is known where things lie
    points = [axes.transData.transform((end.macs, end.accuracy)) for end in ends]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    for end, point in zip(ends, points):
        font = {"color": "#222222", "fontsize": SMALL_TEXT, "weight": "bold", "bbox": PLATE, "parse_math": False}
        place = {"xy": (end.macs, end.accuracy), "xytext": (0, 0), "textcoords": "offset points", "va": "center"}
        label = axes.annotate(drawable(end.name, 28), **place, **font)
        label.set_in_layout(False)
        size = label.get_window_extent().size + 2 * PLATE_PAD * SMALL_TEXT * DPI / 72
        boxes = [_label_box(point, size, *place) for place in LABEL_PLACES]
        costs = [sum(map(box.overlaps, taken)) + 2 * _sticks_out(box, axes.bbox) for box in boxes]
        best = costs.index(min(costs))
        dx, dy, side = LABEL_PLACES[best]
        label.set(position=(dx, dy), horizontalalignment=side)
        taken.append(boxes[best])


def _label_box(point: np.ndarray, size: np.ndarray, dx: float, dy: float, side: str) -> Bbox:
    """In pixels; point, size: [2]"""
    x, y = point + np.array([dx, dy]) * DPI / 72 - size * ({"left": 0, "center": 0.5, "right": 1}[side], 0.5)
    return Bbox.from_bounds(x, y, *size)


def _sticks_out(box: Bbox, of: Bbox) -> bool:
    return box.x0 < of.x0 or box.x1 > of.x1 or box.y0 < of.y0 or box.y1 > of.y1
