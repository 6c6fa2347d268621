"""Charts with matplotlib: of a data set, of training runs, and of shrinking rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from utils import UserError, warn
from visualization.heatmaps import Style, colors
from visualization.records import DatasetStatistics, ImageRecord

# The look of all charts ---------------------------------------------------------------------------

DPI, WIDTH = 120, 6.0  # pixels per inch; inches
MAIN, MARK, GREY, LIGHT = "#0072b2", "#c04c00", "#595959", "#e4e4e4"
# Okabe and Ito's colours, told apart by colour-blind eyes too, with a grey for their yellow, which is pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#8f8f8f")
SMALL_TEXT = 9  # points; other text has 10
PLATE_PAD = 0.15  # of the size of the font
PLATE = {"boxstyle": f"square,pad={PLATE_PAD}", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}  # behind text
MISSING = "□"  # in place of a letter that the font lacks


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    return figure


def _dress(axes: Axes, x: str = "", y: str = "", grid: str = "y") -> Axes:
    """Labels, a light grid, and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#999999")
    axes.tick_params(labelsize=SMALL_TEXT, color="#999999")
    axes.grid(axis=grid, color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _legend_above(axes: Axes, entries: dict[str, Artist]) -> None:
    """In one row over the axes, where no data is."""
    options = {"ncols": len(entries), "columnspacing": 1.4, "handlelength": 1.6, "borderaxespad": 0.2}
    axes.legend(
        entries.values(),
        entries,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        fontsize=SMALL_TEXT,
        **options,
    )


def _say(axes: Axes, text: str) -> None:
    """In the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    axes.set_xticks(range(1, num_blocks + 1, -(-num_blocks // 24)))
    axes.set_xlim(0.4, num_blocks + 0.6)


def _in_percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g} %")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _unit(largest: float) -> tuple[float, str]:
    """For numbers of multiply-adds up to `largest`: the size of the unit, and its letter."""
    return (1e9, "G") if largest >= 1e9 else (1e6, "M")


def _macs(macs: float, static_macs: float) -> str:
    size, letter = _unit(static_macs)
    return f"{macs / size:,.2f} {letter} instead of {static_macs / size:,.2f} {letter}"


@cache
def _letters() -> frozenset[int]:
    """Those that the font has."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _cut(name: str, length: int) -> str:
    """A name from outside in one line of at most so many letters."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def _drawable(name: str, length: int) -> str:
    """The same, of letters that the font has; to be drawn with parse_math=False."""
    letters = _cut(name, length)
    return "".join(letter if letter.isprintable() and ord(letter) in _letters() else MISSING for letter in letters)


# Of a data set ------------------------------------------------------------------------------------

ALL_CLASSES, AT_EACH_END = 12, 5  # up to so many classes are all shown; of more, so many at each end
PICTURE = 19  # points, the side of a picture beside a bar
BINS = 10  # of images, by their mean depth


class Chart(NamedTuple):
    """explanation: a sentence with the main numbers, both caption and alt text."""

    title: str
    explanation: str
    figure: Figure


def summary_charts(
    statistics: DatasetStatistics,
    prior: np.ndarray,
    class_names: Sequence[str],
    examples: Mapping[int, ImageRecord],
    style: Style,
) -> dict[str, Chart]:
    """What the network does with a data set: charts by name.

    prior: [L], DistributionPriorLoss's target; examples: an image by class index, where there is one.
    """
    return {
        "depth_histogram": _depth_histogram(statistics, style),
        "live_tokens": _live_tokens(statistics),
        "class_token_depth": _class_token_depth(statistics, style),
        "class_depths": _class_depths(statistics, class_names, examples, style),
        "accuracy_against_depth": _accuracy_against_depth(statistics),
        "halting_scores": _halting_scores(statistics.layer_scores, prior),
    }


def _depth_histogram(statistics: DatasetStatistics, style: Style) -> Chart:
    figure = _figure(3.4)
    axes = _dress(figure.subplots(), "blocks that processed the patch", "share of patches")
    shares, mean = _depth_bars(axes, statistics.depth, style)
    full = f"{_percent(shares[-1])} of them by all {statistics.num_blocks}"
    return Chart("How deep patches go", f"Patches are processed by {mean:.2f} blocks on average, {full}.", figure)


def _class_token_depth(statistics: DatasetStatistics, style: Style) -> Chart:
    figure = _figure(3.4)
    axes = _dress(figure.subplots(), "blocks that processed the class token", "share of images")
    shares, mean = _depth_bars(axes, statistics.class_token_depth, style)
    full = f"in {_percent(shares[-1])} of the images by all {statistics.num_blocks}"
    explanation = f"The class token is processed by {mean:.2f} blocks on average, {full}."
    return Chart("How deep the class token goes", explanation, figure)


def _depth_bars(axes: Axes, depth: np.ndarray, style: Style) -> tuple[np.ndarray, float]:
    """Draws and returns the share of each depth, [L], and the mean."""
    blocks = np.arange(1, style.num_blocks + 1)
    shares = np.bincount(depth.ravel(), minlength=style.num_blocks + 1)[1:] / depth.size
    mean = float(depth.mean())
    axes.bar(blocks, shares, width=0.86, color=colors(blocks, style) / 255, edgecolor="#444444", linewidth=0.6)
    axes.axvline(mean, color=MARK, linewidth=1.6, linestyle="--")
    axes.text(mean, 1.02, f"mean {mean:.2f}", transform=axes.get_xaxis_transform(), ha="center", color=MARK)
    _block_ticks(axes, style.num_blocks)
    _in_percent(axes)
    return shares, mean


def live_shares(depth: np.ndarray, num_blocks: int) -> np.ndarray:
    """depth: [N, n], of patches -> [N, L], the share of an image's patches that each block processes."""
    live = [np.count_nonzero(depth >= block, axis=1) for block in range(1, num_blocks + 1)]
    return np.stack(live, axis=1) / depth.shape[1]


def _live_tokens(statistics: DatasetStatistics) -> Chart:
    figure = _figure(3.6)
    axes = _dress(figure.subplots(), "block", "live patches of an image")
    blocks, live = np.arange(1, statistics.num_blocks + 1), live_shares(statistics.depth, statistics.num_blocks)
    lowest, low, high, highest = np.percentile(live, [10, 25, 75, 90], axis=0)
    mean = live.mean(axis=0)
    static = axes.axhline(1, color=GREY, linewidth=1.2, linestyle="--")
    outer = axes.fill_between(blocks, lowest, highest, color=MAIN, alpha=0.17, linewidth=0)
    inner = axes.fill_between(blocks, low, high, color=MAIN, alpha=0.3, linewidth=0)
    (average,) = axes.plot(blocks, mean, color=MAIN, marker="o", markersize=4)
    bands = {"middle 50 %": inner, "middle 80 %": outer}
    _legend_above(axes, {"mean": average, **bands, "static network": static})
    macs = float(statistics.macs.mean())
    saved = f"{_percent(1 - macs / statistics.static_macs)} of the multiply-adds"
    text = {"s": f"saved: {_percent(1 - macs / statistics.static_macs)}\nof multiply-adds", "linespacing": 1.4}
    is_free = highest[len(blocks) * 6 // 10 - 1] < 0.75  # above the curve
    place = {"x": 0.98, "y": 0.78, "ha": "right"} if is_free else {"x": 0.02, "y": 0.05, "ha": "left"}
    axes.text(**text, **place, transform=axes.transAxes, weight="bold", bbox=PLATE)
    axes.set_ylim(0, 1.03)
    _block_ticks(axes, statistics.num_blocks)
    _in_percent(axes)
    left = f"the last block processes {_percent(mean[-1])} of the patches"
    explanation = f"On average {left}; {saved} are saved ({_macs(macs, statistics.static_macs)} per image)."
    return Chart("How many patches are left", explanation, figure)


def _class_depths(
    statistics: DatasetStatistics, class_names: Sequence[str], examples: Mapping[int, ImageRecord], style: Style
) -> Chart:
    classes, members = np.unique(statistics.target, return_inverse=True)
    means = np.bincount(members, weights=statistics.mean_depth) / np.bincount(members)
    order = np.argsort(means, kind="stable")
    classes, means = classes[order], means[order]
    names = [class_names[index] for index in classes]
    figure = _class_figure(means, names, [examples.get(int(index)) for index in classes], style)
    ends = dict.fromkeys(f"{means[end]:.2f} ({_cut(names[end], 60)})" for end in (0, -1))
    explanation = f"Mean depth of the patches by class, of {len(classes):,} in all: {' to '.join(ends)}."
    return Chart("Easy and hard classes", explanation, figure)


def _class_figure(means: np.ndarray, names: list[str], examples: list[ImageRecord | None], style: Style) -> Figure:
    """A bar for each class, shallowest on top; of many classes, for those at both ends, and a histogram of all."""
    count = len(means)
    if count <= ALL_CLASSES:
        figure = _figure(0.34 * count + 0.8)
        bars = last = figure.subplots()
        rows = {row: row for row in range(count)}
    else:
        figure = _figure(0.34 * (2 * AT_EACH_END + 1) + 1.9)
        bars, last = figure.subplots(2, 1, height_ratios=[3.6, 1], sharex=True)
        rows = {row: row for row in range(AT_EACH_END)}
        rows |= {AT_EACH_END + 1 + row: count - AT_EACH_END + row for row in range(AT_EACH_END)}
        _class_histogram(last, means)
        between = f"{count - 2 * AT_EACH_END:,} more classes"
        bars.text(
            style.num_blocks / 80, AT_EACH_END, between, va="center", color=GREY, fontsize=SMALL_TEXT, style="italic"
        )
    chosen = list(rows.values())
    _class_bars(_dress(bars, grid="x"), list(rows), means[chosen], style)
    bars.set_yticks(list(rows), [_drawable(names[index], 24) for index in chosen], parse_math=False)
    shown = {row: examples[index] for row, index in rows.items() if examples[index] is not None}
    for row, record in shown.items():
        _beside_the_axis(bars, row, record.pixels)
    bars.tick_params(axis="y", length=0, pad=PICTURE + 8 if shown else 4)
    last.set_xlabel("mean depth of the patches")
    return figure


def _class_bars(axes: Axes, rows: list[int], means: np.ndarray, style: Style) -> None:
    fill = colors(means, style) / 255
    bars = axes.barh(rows, means, height=0.74, color=fill, edgecolor="#444444", linewidth=0.6)
    axes.bar_label(bars, [f"{mean:.2f}" for mean in means], padding=3, fontsize=SMALL_TEXT)
    axes.set_xlim(0, style.num_blocks * 1.08)
    axes.set_xticks(range(0, style.num_blocks + 1, max(style.num_blocks // 6, 1)))
    axes.set_ylim(max(rows) + 0.6, -0.6)


def _class_histogram(axes: Axes, means: np.ndarray) -> None:
    _dress(axes, y="classes").hist(means, bins=min(20, len(means)), color=MAIN)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _beside_the_axis(axes: Axes, row: float, pixels: np.ndarray) -> None:
    """pixels: [H, W, 3] uint8"""
    image = OffsetImage(pixels, zoom=PICTURE / max(pixels.shape[:2]))
    place = {"xybox": (-4 - PICTURE / 2, 0), "xycoords": ("axes fraction", "data"), "boxcoords": "offset points"}
    axes.add_artist(AnnotationBbox(image, (0, row), **place, frameon=False, pad=0, annotation_clip=False))


def _accuracy_against_depth(statistics: DatasetStatistics) -> Chart:
    figure = _figure(4.0)
    top, bottom = figure.subplots(2, 1, height_ratios=[2.6, 1], sharex=True)
    depth, right = statistics.mean_depth, statistics.is_right
    edges, groups = _equal_bins(depth)
    mean_depth = np.array([depth[group].mean() for group in groups.values()])
    accuracy = np.array([right[group].mean() for group in groups.values()])
    counts = np.array([np.count_nonzero(group) for group in groups.values()])
    errors = np.abs(wilson_interval(accuracy, counts) - accuracy)
    overall = top.axhline(right.mean(), color=GREY, linewidth=1.2, linestyle="--")
    of_bins = top.errorbar(mean_depth, accuracy, errors, color=MAIN, marker="o", markersize=5, capsize=3)
    _legend_above(top, {"images of like depth, ± standard error": of_bins, "all images": overall})
    low = min(max((accuracy - errors[0]).min(), 0), 0.9)
    top.set_ylim(low - 0.06 * (1 - low), 1 + 0.06 * (1 - low))
    _in_percent(_dress(top, y="top-1"))
    width = edges[1] - edges[0]
    bottom.bar(edges[list(groups)] + width / 2, counts, width=0.94 * width, color="#9db8c9")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    _dress(bottom, "mean depth of the image's patches", "images")
    ends = [f"{_percent(accuracy[end])} of images about {mean_depth[end]:.1f} deep" for end in (0, -1)]
    ends = " and ".join(ends) if len(groups) > 1 else ends[0]
    return Chart("Accuracy by depth", f"Top-1 is {_percent(right.mean())}: {ends} are recognised.", figure)


def _equal_bins(values: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """values: [N] -> the bins' edges, and by the number of each bin that has any: which values, [N] bool."""
    low, high = values.min(), values.max()
    if high - low < 1e-6:
        return np.array([low - 0.25, low + 0.25]), {0: np.ones(len(values), dtype=bool)}
    edges = np.linspace(low, high, BINS + 1)
    number = np.digitize(values, edges[1:-1])
    return edges, {int(n): number == n for n in np.unique(number)}


def wilson_interval(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """shares: [K], each of counts: [K] trials -> [2, K], one standard error below and above (Wilson, 1927)."""
    middle = (shares + 0.5 / counts) / (1 + 1 / counts)
    half = np.sqrt(shares * (1 - shares) / counts + 0.25 / counts**2) / (1 + 1 / counts)
    return np.stack([middle - half, middle + half])


def _halting_scores(layer_scores: np.ndarray, prior: np.ndarray) -> Chart:
    """Both scaled to sum 1: but for its clamp, DistributionPriorLoss is least where they are equal then."""
    figure = _figure(3.4)
    axes = _dress(figure.subplots(), "block", "share of the sum")
    blocks, has_scores = np.arange(1, len(prior) + 1), layer_scores.sum() > 0
    shares, target = layer_scores / (layer_scores.sum() if has_scores else 1), prior / prior.sum()
    bars = axes.bar(blocks, shares, width=0.86, color="#7fb2d3", edgecolor="#444444", linewidth=0.6)
    (line,) = axes.plot(blocks, target, color=MARK, marker="o", markersize=4)
    name = "mean halting score" if has_scores else "mean halting score: none, a static network"
    _legend_above(axes, {name: bars, "target of the prior": line})
    axes.set_ylim(bottom=0)
    _block_ticks(axes, len(prior))
    _in_percent(axes)
    reached = f"is largest in block {shares.argmax() + 1} ({_percent(shares.max())} of its sum)"
    wanted = f"the prior's target is largest in block {target.argmax() + 1} ({_percent(target.max())})"
    explanation = f"The mean halting score {reached if has_scores else 'is 0 in all blocks'}; {wanted}."
    return Chart("Where patches halt", explanation, figure)


# Of training runs ---------------------------------------------------------------------------------


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
    names = [_drawable(run.name, 50) for run in runs]
    columns = max(1, min(len(runs), 100 // (max(map(len, names)) + 6)))
    figure = _figure(4.9 + 0.2 * -(-len(runs) // columns), width=8.6)
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
    _dress(axes, x="epoch")
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
    size, letter = _unit(1e9 * max(np.concatenate(points), default=0))
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
    figure = _figure(4.4, width=6.4)
    size, letter = _macs_unit(runs)
    axes = _dress(figure.subplots(), f"multiply-adds per image ({letter})", "top-1 (%)", grid="both")
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
    _legend_above(axes, {"last epoch": last, "of a static network": last_static, "epochs before": before})
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
        label = axes.annotate(_drawable(end.name, 28), **place, **font)
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


# Of shrinking rows --------------------------------------------------------------------------------

MAX_IMAGES = 8
BESIDE_UP_TO = 3  # images: of so few, the bars stand beside them, else below
MAX_INCHES = 1.7  # inches, of an image


def teaser(records: list[ImageRecord], style: Style) -> Figure:
    """Inputs, depth maps, and how many patches each block processes, of the first 8 images, one colour each."""
    records = records[:MAX_IMAGES]
    widths = [one.pixels.shape[1] / one.pixels.shape[0] for one in records]
    if len(records) <= BESIDE_UP_TO:
        tall = min(MAX_INCHES, 3.9 / sum(widths))
        left = tall * sum(widths) + 1.3
        figure = _figure(max(2 * tall + 0.4, 3.0), width=left + 4.2)
        pictures, bars = figure.subfigures(1, 2, width_ratios=[left, 4.2])
    else:
        tall = min(MAX_INCHES, 7.0 / sum(widths))
        upper = 2 * max(tall, 0.45) + 0.3  # at least as high as the letters beside it
        figure = _figure(upper + 2.7, width=8.2)
        pictures, bars = figure.subfigures(2, 1, height_ratios=[upper, 2.7])
    _teaser_pictures(pictures, records, widths, tall, style)
    _teaser_bars(_dress(bars.subplots(), "block", "live patches"), records, style.num_blocks)
    return figure


def _teaser_pictures(
    figure: SubFigure, records: list[ImageRecord], widths: list[float], tall: float, style: Style
) -> None:
    grid = figure.add_gridspec(2, len(records) + 1, width_ratios=[*widths, 0.14])
    for column, (one, color) in enumerate(zip(records, PALETTE)):
        height, width = one.pixels.shape[:2]
        for row, pixels in enumerate((one.pixels, colors(one.depth, style))):
            axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            axes.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
            axes.spines[:].set(color=color, linewidth=3)
            if column == 0:
                axes.set_ylabel(("input", "depth")[row])
    _depth_legend(figure.add_subplot(grid[:, -1]), style, most=int(15 * tall))


def _depth_legend(axes: Axes, style: Style, most: int) -> None:
    """With at most so many labels."""
    blocks = np.arange(1, style.num_blocks + 1)
    axes.imshow(
        colors(blocks[:, None], style), origin="lower", aspect="auto", extent=(0, 1, 0.5, style.num_blocks + 0.5)
    )
    axes.hlines(blocks[1:] - 0.5, 0, 1, color="#666666", linewidth=0.4)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_xticks([])
    axes.set_yticks(blocks[:: style.num_blocks // -most])  # full depth has a label in any case
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set(color="#666666", linewidth=0.6)
    axes.set_ylabel("blocks that\nprocessed\nthe patch", fontsize=SMALL_TEXT)


def _teaser_bars(axes: Axes, records: list[ImageRecord], num_blocks: int) -> None:
    """What the static network would do besides is a grey area over the bars."""
    blocks = np.arange(1, num_blocks + 1)
    top = np.zeros(num_blocks)
    for one, color in zip(records, PALETTE):
        live = (one.depth.reshape(-1, 1) >= blocks).sum(axis=0)
        axes.bar(blocks, live, bottom=top, width=0.86, color=color, edgecolor="white", linewidth=0.5)
        top += live
    total = sum(one.depth.size for one in records)
    axes.bar(blocks, total - top, bottom=top, width=0.86, color="#f0f0f0")
    axes.axhline(total, color=GREY, linewidth=1.2, linestyle="--")
    axes.text(0.6, total * 1.02, "static network", color=GREY, fontsize=SMALL_TEXT)
    saved = 1 - sum(one.macs for one in records) / sum(one.static_macs for one in records)
    free = total - top[num_blocks * 6 // 10 - 1]  # over the blocks that the text may cover
    text = {"s": f"saved: {100 * saved:.0f} %\nof multiply-adds", "y": total - free / 2, "va": "center"}
    if free < 0.25 * total:  # then above the line
        text = {"s": text["s"].replace("\n", " "), "y": total * 1.02, "va": "bottom"}
    axes.text(num_blocks + 0.4, **text, ha="right", weight="bold", linespacing=1.4)
    axes.set_ylim(0, total * 1.13)
    _block_ticks(axes, num_blocks)
