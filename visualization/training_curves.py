"""Charts of training runs, read from their log.txt."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils import UserError, warn
from visualization.charts import GRAY, PALETTE, SMALL_TEXT, legend_above, new_figure, one_line, percent, style_axes

# Reading ------------------------------------------------------------------------------------------

MAX_DRAWN = 1e30  # matplotlib cannot draw axes over the full range of floats

EXPECTED = "Pass the --output-dir of a training run of main_act.py, which contains log.txt."


class Run(NamedTuple):
    """The log of a training run. lines: the entries of log.txt, one per epoch."""

    name: str
    lines: list[dict]
    folder: Path = Path()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in output directories, each once.

    A run is named after its directory or, if two names are equal, after the path below the common parent.
    Raises UserError if a directory has no log.txt with at least one epoch.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        shared = os.path.commonpath([folder.parent for folder in folders])
        names = [str(folder.relative_to(shared)) for folder in folders]
    return [Run(name, _read_log(folder / "log.txt"), folder) for name, folder in zip(names, folders)]


def _read_log(path: Path) -> list[dict]:
    """Read log.txt. Lines without an epoch are skipped with a warning."""
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. {EXPECTED}") from error
    lines = []
    for number, text in enumerate(raw, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and _is_finite(line.get("epoch")):
            lines.append(line)
        elif text.strip():
            warn(f"{path}, line {number} is not a log entry with an epoch. The line is skipped.")
    if not lines:
        raise UserError(f"{path} contains no epoch. {EXPECTED}")
    return lines


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < MAX_DRAWN


def series(run: Run, *names: str) -> np.ndarray:
    """Return an epoch and its metrics per row: [epochs, 1 + names].

    Epochs in which a metric is missing or not finite are skipped. The last entry of a repeated epoch counts.
    """
    by_epoch = {line["epoch"]: line for line in run.lines}
    rows = [[by_epoch[epoch].get(name) for name in ("epoch", *names)] for epoch in sorted(by_epoch)]
    return np.array([row for row in rows if all(map(_is_finite, row))], dtype=float).reshape(-1, 1 + len(names))


# Parts of both charts -----------------------------------------------------------------------------


def run_colors(count: int) -> list:
    return list(PALETTE[:count]) if count <= len(PALETTE) else list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def draw_run_legend(
    figure: Figure, names: Sequence[str], handles: Sequence[Artist], loc: str, columns: int = 1
) -> None:
    """Draw a legend outside of the axes."""
    labels = ["run"] * len(names)  # matplotlib before 3.10 omits names that start with _
    legend = figure.legend(handles, labels, loc=f"outside {loc}", ncols=columns, frameon=False, fontsize=SMALL_TEXT)
    for text, name in zip(legend.get_texts(), names):
        text.set(text=name, parse_math=False)


def draw_no_data(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=GRAY)


def logged_macs_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Return the unit for logged MACs: its size in G, and its prefix."""
    points = [series(run, name)[:, 1] for run in runs for name in (MACS.solid, MACS.other)]
    return (1, "G") if max(np.concatenate(points), default=0) >= 1 else (1e-3, "M")


# Over the epochs ----------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A panel of the curves.

    solid, other: names of metrics; style, key: line style of the other, and its meaning
    band: two metrics between which an area is filled; from_zero: whether the y axis starts at 0
    """

    title: str
    solid: str
    other: str = ""
    style: str = "--"
    key: str = ""
    band: tuple[str, str] | None = None
    from_zero: bool = False


MACS = Panel("MACs", "test_gmacs", "test_gmacs_static", key="dashed: static", from_zero=True)
DEPTHS = ("train_depth_min", "train_depth_max")
PANELS = (
    Panel("top-1 (%)", "test_acc1", "test_ema_acc1", ":", "dotted: EMA weights"),
    Panel("loss", "test_loss", "train_loss", key="dashed: training"),
    Panel("ponder loss", "train_ponder_loss_token", "train_distr_prior_loss", key="dashed: prior"),
    Panel("mean depth", "test_depth_mean", key="band: min to max", band=DEPTHS, from_zero=True),
    MACS,
    Panel("learning rate", "train_lr"),
)


def curves(runs: Sequence[Run]) -> Figure:
    """Draw the metrics of runs over the epochs, one color per run."""
    names = [one_line(run.name, 50) for run in runs]
    columns = max(1, min(len(runs), 110 // (max(map(len, names)) + 9)))
    figure = new_figure(4.9 + 0.2 * -(-len(runs) // columns), width=8.6)
    epochs = np.concatenate([series(run)[:, 0] for run in runs])
    margin = max(0.04 * np.ptp(epochs), 0.5)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS):
        axes.set_xlim(epochs.min() - margin, epochs.max() + margin)
        _draw_panel(axes, panel, runs)
    handles = [Line2D([], [], color=color, linewidth=2) for color in run_colors(len(runs))]
    draw_run_legend(figure, names, handles, "lower center", columns)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    size, unit = logged_macs_unit(runs) if panel is MACS else (1, "")
    title = f"{panel.title} ({unit})" if unit else panel.title
    style_axes(axes, x="epoch").set_title(title, loc="left", fontsize=10, weight="bold")
    for run, color in zip(runs, run_colors(len(runs))):
        for name, style, dot in ((panel.solid, "-", "o"), (panel.other, panel.style, "x")):
            points = series(run, name)
            if len(points):
                marker = dot if len(points) == 1 else None
                axes.plot(points[:, 0], points[:, 1] / size, style, color=color, marker=marker, markersize=5)
        if panel.band and len(band := series(run, *panel.band)):
            axes.fill_between(*band.T, color=color, alpha=0.15 / len(runs), linewidth=0)
    if not axes.lines:
        draw_no_data(axes)
        return
    if any(len(series(run, *(panel.band or [panel.other]))) for run in runs):
        axes.set_title(panel.key, loc="right", fontsize=8, color=GRAY)
    if panel.from_zero:
        axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


# Accuracy against MACs ----------------------------------------------------------------------------


def accuracy_against_macs(runs: Sequence[Run]) -> Figure:
    """Draw top-1 accuracy against MACs for every epoch of each run, with the last epoch marked.

    The legend lists the runs from best to worst. A static model is a square with a dashed line.
    """
    figure = new_figure(max(4.4, 0.2 * len(runs) + 1), width=8.6)
    size, letter = logged_macs_unit(runs)
    axes = style_axes(figure.subplots(), f"MACs per image ({letter})", "top-1 accuracy (%)", grid="both")
    ends, lows, highs = [], [], []
    for run, color in zip(runs, run_colors(len(runs))):
        path = series(run, "test_gmacs", "test_acc1", "test_gmacs_static")
        if not len(path):
            continue
        _, macs, accuracy, static_macs = path.T
        is_static = math.isclose(macs[-1], static_macs[-1], rel_tol=1e-6)
        marker = _draw_path(axes, macs / size, accuracy, color, is_static)
        ends.append((accuracy[-1], f"{one_line(run.name, 28)}: {percent(accuracy[-1] / 100)}", marker))
        lows.append(min(np.median(accuracy), accuracy[-1]))  # low accuracies of early epochs may be cut off
        highs.append(accuracy.max())
    if not ends:
        draw_no_data(axes)
        return figure
    margin = 0.12 * max(max(highs) - min(lows), 4)
    axes.set_ylim(min(lows) - margin, max(highs) + margin)
    axes.margins(x=0.1)
    entries = {
        "last epoch": Line2D([], [], color=GRAY, marker="o", markersize=7, linestyle=""),
        "static model, last epoch": Line2D([], [], color=GRAY, marker="s", markersize=7, linestyle="--", linewidth=1.1),
        "earlier epochs": Line2D([], [], color=GRAY, marker=".", markersize=4, alpha=0.4),
    }
    legend_above(axes, entries)
    _, names, markers = zip(*sorted(ends, key=lambda end: -end[0]))
    draw_run_legend(figure, names, markers, "right center")
    return figure


def _draw_path(axes: Axes, macs: np.ndarray, accuracy: np.ndarray, color: object, is_static: bool) -> Artist:
    """Draw the epochs of one run, and return the marker of the last one."""
    axes.plot(macs, accuracy, ".-", color=color, alpha=0.3, markersize=4, linewidth=1.2)
    if is_static:
        axes.axhline(accuracy[-1], color=color, linewidth=1.1, linestyle="--", alpha=0.8)
    (marker,) = axes.plot(
        macs[-1],
        accuracy[-1],
        "s" if is_static else "o",
        color=color,
        markersize=8,
        markeredgecolor="white",
        linestyle="",
        zorder=3,
    )
    return marker
