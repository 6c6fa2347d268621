"""Charts of a dataset, the teaser image, and the style of all charts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import MaxNLocator

from visualization.heatmaps import Style, colors, macs_text, printable
from visualization.image_record import ImageRecord
from visualization.records import DatasetStatistics

# Style of all charts -----------------------------------------------------------------------------

DPI, WIDTH = 120, 6.0  # pixels per inch; inches
MAIN, MARK, GRAY, LIGHT = "#0072b2", "#c04c00", "#595959", "#e4e4e4"
# Okabe and Ito's colors, distinct with color blindness too. A gray replaces their yellow, which is too pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#8f8f8f")
SMALL_TEXT = 9  # points; the default is 10

# Matplotlib draws a box for a character that the font lacks. No warning is needed.
warnings.filterwarnings("ignore", message="Glyph .* missing from font")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    return figure


def style_axes(axes: Axes, x: str = "", y: str = "", grid: str = "y", in_percent: bool = False) -> Axes:
    """Set labels and a light grid, remove the frame, and return the axes.

    in_percent: the y axis shows fractions as percentages
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#999999")
    axes.tick_params(labelsize=SMALL_TEXT, color="#999999")
    axes.grid(axis=grid, color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if in_percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")
    return axes


def legend_above(axes: Axes, entries: dict[str, Artist]) -> None:
    """Draw a legend in one row above the axes, where it covers no data."""
    axes.legend(
        entries.values(),
        entries,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=len(entries),
        frameon=False,
        fontsize=SMALL_TEXT,
        columnspacing=1.4,
        handlelength=1.6,
    )


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    axes.set_xticks(range(1, num_blocks + 1, -(-num_blocks // 24)))
    axes.set_xlim(0.4, num_blocks + 0.6)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def one_line(name: str, max_length: int) -> str:
    """Truncate an external name to one line of at most max_length characters. Draw it with parse_math=False."""
    name = printable(" ".join(name.split()))
    return name if len(name) <= max_length else name[: max_length - 1].rstrip() + "…"


# Charts of a dataset ------------------------------------------------------------------------------

MAX_CLASSES = 12  # up to this many classes are all shown
AT_EACH_END = 5  # of more classes, this many of the lowest and of the highest depth are shown
THUMBNAIL = 19  # points, side of the image next to a bar
BINS = 10  # number of groups of images with similar mean depth


class Chart(NamedTuple):
    """A titled figure. explanation: the main numbers in full sentences, used as caption and alt text."""

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
    """Draw the charts of a dataset, by name.

    prior: [L], target of DistributionPriorLoss; examples: an image for some of the class indices
    """
    class_token = {}
    if statistics.class_token_depth is not None:
        class_token["class_token_depth"] = _depth_histogram(statistics.class_token_depth, "class tokens", style)
    return {
        "depth_histogram": _depth_histogram(statistics.depth, "patches", style),
        "live_tokens": _live_tokens(statistics),
        **class_token,
        "class_depths": _class_depths(statistics, class_names, examples, style),
        "accuracy_against_depth": _accuracy_against_depth(statistics),
        "halting_scores": _halting_scores(statistics.layer_scores, prior),
    }


def _depth_histogram(depth: np.ndarray, tokens: str, style: Style) -> Chart:
    """Draw the distribution of depths. tokens: a plural noun for the tokens that have them."""
    figure = new_figure(3.4)
    axes = style_axes(figure.subplots(), "depth (blocks)", f"share of {tokens}", in_percent=True)
    blocks, mean = np.arange(1, style.num_blocks + 1), depth.mean()
    shares = np.bincount(depth.ravel(), minlength=style.num_blocks + 1)[1:] / depth.size
    axes.bar(blocks, shares, width=0.86, color=colors(blocks, style) / 255, edgecolor="#444444", linewidth=0.6)
    axes.axvline(mean, color=MARK, linewidth=1.6, linestyle="--")
    axes.text(mean, 1.02, f"mean {mean:.2f}", transform=axes.get_xaxis_transform(), ha="center", color=MARK)
    _block_ticks(axes, style.num_blocks)
    explanation = (
        f"The mean depth of {tokens} is {mean:.2f} of {style.num_blocks} blocks. "
        f"{percent(shares[-1])} of {tokens} reach full depth."
    )
    return Chart(f"Depth of {tokens}", explanation, figure)


def _live_tokens(statistics: DatasetStatistics) -> Chart:
    figure = new_figure(3.6)
    axes = style_axes(figure.subplots(), "block", "live patches per image", in_percent=True)
    blocks = np.arange(1, statistics.num_blocks + 1)
    live = np.stack([(statistics.depth >= block).mean(axis=1) for block in blocks], axis=1)  # (N, L)
    lowest, low, high, highest = np.percentile(live, [10, 25, 75, 90], axis=0)
    mean = live.mean(axis=0)
    static = axes.axhline(1, color=GRAY, linewidth=1.2, linestyle="--")
    outer = axes.fill_between(blocks, lowest, highest, color=MAIN, alpha=0.17, linewidth=0)
    inner = axes.fill_between(blocks, low, high, color=MAIN, alpha=0.3, linewidth=0)
    (average,) = axes.plot(blocks, mean, color=MAIN, marker="o", markersize=4)
    legend_above(axes, {"mean": average, "middle 50%": inner, "middle 80%": outer, "static model": static})
    macs = float(statistics.macs.mean())
    saved = percent(1 - macs / statistics.static_macs)
    is_free = highest[len(blocks) * 6 // 10 - 1] < 0.75  # above the bands, on the right
    axes.text(
        x=0.98 if is_free else 0.02,
        y=0.9 if is_free else 0.05,
        s=f"{saved} of MACs saved",
        ha="right" if is_free else "left",
        weight="bold",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        transform=axes.transAxes,
    )
    axes.set_ylim(0, 1.03)
    _block_ticks(axes, statistics.num_blocks)
    explanation = (
        f"On average the last block processes {percent(mean[-1])} of the patches. The model uses {macs_text(macs)} of "
        f"the static model's {macs_text(statistics.static_macs)} MACs per image, which saves {saved}."
    )
    return Chart("Live patches per block", explanation, figure)


def _class_depths(
    statistics: DatasetStatistics, class_names: Sequence[str], examples: Mapping[int, ImageRecord], style: Style
) -> Chart:
    classes, members = np.unique(statistics.target, return_inverse=True)
    means = np.bincount(members, weights=statistics.mean_depth) / np.bincount(members)
    order = np.argsort(means, kind="stable")
    classes, means = classes[order], means[order]
    names = [class_names[index] for index in classes]
    figure = _class_figure(means, names, [examples.get(int(index)) for index in classes], style)
    ends = dict.fromkeys(f"{means[end]:.2f} ({one_line(names[end], 60)})" for end in (0, -1))
    explanation = f"Mean patch depth by class ({len(classes):,} in total): {' to '.join(ends)}."
    return Chart("Mean depth by class", explanation, figure)


def _class_figure(means: np.ndarray, names: list[str], examples: list[ImageRecord | None], style: Style) -> Figure:
    """Draw one bar per class, shallowest on top.

    With more than MAX_CLASSES classes: only those at both ends, and a histogram of all.
    """
    count = len(means)
    if count <= MAX_CLASSES:
        figure = new_figure(0.34 * count + 0.8)
        bars = last = figure.subplots()
        rows = {row: row for row in range(count)}
    else:
        figure = new_figure(0.34 * (2 * AT_EACH_END + 1) + 1.9)
        bars, last = figure.subplots(2, 1, height_ratios=[3.6, 1], sharex=True)
        rows = {row: row for row in range(AT_EACH_END)}
        rows |= {AT_EACH_END + 1 + row: count - AT_EACH_END + row for row in range(AT_EACH_END)}
        style_axes(last, y="classes").hist(means, bins=min(20, count), color=MAIN)
        last.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        bars.text(
            style.num_blocks / 80,
            AT_EACH_END,
            f"{count - 2 * AT_EACH_END:,} more classes",
            va="center",
            color=GRAY,
            fontsize=SMALL_TEXT,
            style="italic",
        )
    _draw_class_bars(bars, rows, means, names, examples, style)
    last.set_xlabel("mean patch depth")
    return figure


def _draw_class_bars(
    bars: Axes,
    rows: dict[int, int],
    means: np.ndarray,
    names: list[str],
    examples: list[ImageRecord | None],
    style: Style,
) -> None:
    """Draw a labeled bar per class, with a thumbnail if there is an example. rows: row of the chart -> class."""
    chosen = list(rows.values())
    lengths = style_axes(bars, grid="x").barh(
        list(rows),
        means[chosen],
        height=0.74,
        color=colors(means[chosen], style) / 255,
        edgecolor="#444444",
        linewidth=0.6,
    )
    bars.bar_label(lengths, [f"{mean:.2f}" for mean in means[chosen]], padding=3, fontsize=SMALL_TEXT)
    bars.set_xlim(0, style.num_blocks * 1.08)
    bars.set_xticks(range(0, style.num_blocks + 1, max(style.num_blocks // 6, 1)))
    bars.set_ylim(max(rows) + 0.6, -0.6)
    bars.set_yticks(list(rows), [one_line(names[index], 24) for index in chosen], parse_math=False)
    shown = {row: examples[index] for row, index in rows.items() if examples[index] is not None}
    place = {"xybox": (-4 - THUMBNAIL / 2, 0), "xycoords": ("axes fraction", "data"), "boxcoords": "offset points"}
    for row, record in shown.items():  # a thumbnail left of the axis
        image = OffsetImage(record.pixels, zoom=THUMBNAIL / max(record.pixels.shape[:2]))
        bars.add_artist(AnnotationBbox(image, (0, row), **place, frameon=False, pad=0, annotation_clip=False))
    bars.tick_params(axis="y", length=0, pad=THUMBNAIL + 8 if shown else 4)


def _accuracy_against_depth(statistics: DatasetStatistics) -> Chart:
    figure = new_figure(4.0)
    top, bottom = figure.subplots(2, 1, height_ratios=[2.6, 1], sharex=True)
    depth, correct = statistics.mean_depth, statistics.is_correct
    low, high = depth.min(), depth.max()
    edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low - 0.25, low + 0.25])
    bins, members, counts = np.unique(np.digitize(depth, edges[1:-1]), return_inverse=True, return_counts=True)
    mean_depth, accuracy = (np.bincount(members, weights=values) / counts for values in (depth, correct))
    errors = np.abs(wilson_interval(accuracy, counts) - accuracy)
    overall = top.axhline(correct.mean(), color=GRAY, linewidth=1.2, linestyle="--")
    of_bins = top.errorbar(mean_depth, accuracy, errors, color=MAIN, marker="o", markersize=5, capsize=3)
    legend_above(top, {"images of similar depth, ± standard error": of_bins, "all images": overall})
    low = min(max((accuracy - errors[0]).min(), 0), 0.9)
    top.set_ylim(low - 0.06 * (1 - low), 1 + 0.06 * (1 - low))
    style_axes(top, y="top-1 accuracy", in_percent=True)
    width = edges[1] - edges[0]
    bottom.bar(edges[bins] + width / 2, counts, width=0.94 * width, color="#9db8c9")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    style_axes(bottom, "mean patch depth of an image", "images")
    ends = [f"{percent(accuracy[end])} at a mean depth of {mean_depth[end]:.1f}" for end in (0, -1)]
    by_depth = " and ".join(ends if len(bins) > 1 else ends[:1])
    return Chart("Accuracy by depth", f"Top-1 accuracy is {percent(correct.mean())}: {by_depth}.", figure)


def wilson_interval(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the Wilson score interval of one standard error (Wilson, 1927).

    shares: [K] fractions of counts: [K] trials -> [2, K], lower and upper end
    """
    middle = (shares + 0.5 / counts) / (1 + 1 / counts)
    half = np.sqrt(shares * (1 - shares) / counts + 0.25 / counts**2) / (1 + 1 / counts)
    return np.stack([middle - half, middle + half])


def _halting_scores(layer_scores: np.ndarray, prior: np.ndarray) -> Chart:
    """Draw the mean halting scores and the target of the prior, each scaled to sum 1.

    DistributionPriorLoss is smallest where the two are equal, except for its clamp.
    """
    figure = new_figure(3.4)
    axes = style_axes(figure.subplots(), "block", "share of the sum", in_percent=True)
    blocks, has_scores = np.arange(1, len(prior) + 1), layer_scores.sum() > 0
    shares, target = layer_scores / (layer_scores.sum() if has_scores else 1), prior / prior.sum()
    bars = axes.bar(blocks, shares, width=0.86, color="#7fb2d3", edgecolor="#444444", linewidth=0.6)
    (line,) = axes.plot(blocks, target, color=MARK, marker="o", markersize=4)
    name = "mean halting score" if has_scores else "mean halting score: zero (static model)"
    legend_above(axes, {name: bars, "target of the prior": line})
    axes.set_ylim(bottom=0)
    _block_ticks(axes, len(prior))
    largest = f"is largest in block {shares.argmax() + 1} ({percent(shares.max())} of its sum)"
    explanation = (
        f"The mean halting score {largest if has_scores else 'is 0 in all blocks'}. "
        f"The target of the prior is largest in block {target.argmax() + 1} ({percent(target.max())} of its sum)."
    )
    return Chart("Halting scores and prior", explanation, figure)


# Teaser -------------------------------------------------------------------------------------------

MAX_IMAGES = 8
MAX_INCHES = 1.7  # largest height of an image


def teaser(records: list[ImageRecord], style: Style) -> Figure:
    """Draw inputs, depth maps with MACs relative to the static model, and the live patches of each block.

    At most 8 images are drawn, one color each.
    """
    records = records[:MAX_IMAGES]
    widths = [one.pixels.shape[1] / one.pixels.shape[0] for one in records]
    tall = min(MAX_INCHES, 7.0 / sum(widths))
    upper = 2 * max(tall, 0.45) + 0.5  # at least as high as the axis labels
    figure = new_figure(upper + 2.7, width=max(tall * sum(widths) + 1.3, 5))
    pictures, bars = figure.subfigures(2, 1, height_ratios=[upper, 2.7])
    grid = pictures.add_gridspec(2, len(records) + 1, width_ratios=[*widths, 0.14])
    for column, (one, color) in enumerate(zip(records, PALETTE)):
        height, width = one.pixels.shape[:2]
        for row, pixels in enumerate((one.pixels, colors(one.depth, style))):
            axes = pictures.add_subplot(grid[row, column], xticks=[], yticks=[])
            axes.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
            axes.spines[:].set(color=color, linewidth=3)
            if column == 0:
                axes.set_ylabel(("input", "depth")[row])
        axes.set_xlabel(f"{100 * one.macs / one.static_macs:.0f}% MACs", fontsize=SMALL_TEXT)
    _depth_legend(pictures.add_subplot(grid[:, -1]), style, most=int(15 * tall))
    _teaser_bars(style_axes(bars.subplots(), "block", "live patches"), records, style.num_blocks)
    return figure


def _depth_legend(axes: Axes, style: Style, most: int) -> None:
    """Draw the colors of all depths, with at most `most` labels."""
    blocks = np.arange(1, style.num_blocks + 1)
    extent = (0, 1, 0.5, style.num_blocks + 0.5)
    axes.imshow(colors(blocks[:, None], style), origin="lower", aspect="auto", extent=extent)
    axes.hlines(blocks[1:] - 0.5, 0, 1, color="#666666", linewidth=0.4)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_xticks([])
    axes.set_yticks(blocks[:: style.num_blocks // -most])  # full depth always has a label
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set(color="#666666", linewidth=0.6)
    axes.set_ylabel("depth (blocks)", fontsize=SMALL_TEXT)


def _teaser_bars(axes: Axes, records: list[ImageRecord], num_blocks: int) -> None:
    """Draw a stacked bar for each block. The gray part is what the static model would compute in addition."""
    blocks = np.arange(1, num_blocks + 1)
    top = np.zeros(num_blocks)
    for one, color in zip(records, PALETTE):
        live = (one.depth.reshape(-1, 1) >= blocks).sum(axis=0)
        axes.bar(blocks, live, bottom=top, width=0.86, color=color, edgecolor="white", linewidth=0.5)
        top += live
    total = sum(one.depth.size for one in records)
    axes.bar(blocks, total - top, bottom=top, width=0.86, color="#f0f0f0")
    axes.axhline(total, color=GRAY, linewidth=1.2, linestyle="--")
    axes.text(0.6, total * 1.02, "static model", color=GRAY, fontsize=SMALL_TEXT)
    saved = 1 - sum(one.macs for one in records) / sum(one.static_macs for one in records)
    axes.text(num_blocks + 0.4, total * 1.02, f"{100 * saved:.0f}% of MACs saved", ha="right", weight="bold")
    axes.set_ylim(0, total * 1.13)
    _block_ticks(axes, num_blocks)
