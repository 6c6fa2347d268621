"""Charts of a data set, the teaser, and the look of all charts."""

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

# The look of all charts ---------------------------------------------------------------------------

DPI, WIDTH = 120, 6.0  # pixels per inch; inches
MAIN, MARK, GREY, LIGHT = "#0072b2", "#c04c00", "#595959", "#e4e4e4"
# Okabe and Ito's colours, told apart by colour-blind eyes too, with a grey for their yellow, which is pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#8f8f8f")
SMALL_TEXT = 9  # points; other text has 10

# Matplotlib draws a letter that the font lacks as a box: that will do, without a warning.
warnings.filterwarnings("ignore", message="Glyph .* missing from font")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    return figure


def style_axes(axes: Axes, x: str = "", y: str = "", grid: str = "y", in_percent: bool = False) -> Axes:
    """Sets labels and a light grid, removes the frame, and returns the axes; in_percent: of 1, upwards."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#999999")
    axes.tick_params(labelsize=SMALL_TEXT, color="#999999")
    axes.grid(axis=grid, color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if in_percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g} %")
    return axes


def legend_above(axes: Axes, entries: dict[str, Artist]) -> None:
    """Draws a legend in one row over the axes, where no data is."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": len(entries)}
    options = {"frameon": False, "fontsize": SMALL_TEXT, "columnspacing": 1.4, "handlelength": 1.6}
    axes.legend(entries.values(), entries, **place, **options)


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    axes.set_xticks(range(1, num_blocks + 1, -(-num_blocks // 24)))
    axes.set_xlim(0.4, num_blocks + 0.6)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def one_line(name: str, max_length: int) -> str:
    """Cuts a name from outside to one line of so many letters; draw it with parse_math=False."""
    name = printable(" ".join(name.split()))
    return name if len(name) <= max_length else name[: max_length - 1].rstrip() + "…"


# Of a data set ------------------------------------------------------------------------------------

MAX_CLASSES, AT_EACH_END = 12, 5  # up to so many classes are all shown; of more, so many at each end
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
    """Draws what the network does with a data set: charts by name.

    prior: [L], DistributionPriorLoss's target; examples: an image by class index, where there is one.
    """
    class_token = statistics.class_token_depth
    return {
        "depth_histogram": _depth_histogram(statistics.depth, "patches", style),
        "live_tokens": _live_tokens(statistics),
        **({} if class_token is None else {"class_token_depth": _depth_histogram(class_token, "class tokens", style)}),
        "class_depths": _class_depths(statistics, class_names, examples, style),
        "accuracy_against_depth": _accuracy_against_depth(statistics),
        "halting_scores": _halting_scores(statistics.layer_scores, prior),
    }


def _depth_histogram(depth: np.ndarray, what: str, style: Style) -> Chart:
    """depth: of each of `what`."""
    figure = new_figure(3.4)
    axes = style_axes(figure.subplots(), "blocks that processed them", f"share of {what}", in_percent=True)
    blocks, mean = np.arange(1, style.num_blocks + 1), depth.mean()
    shares = np.bincount(depth.ravel(), minlength=style.num_blocks + 1)[1:] / depth.size
    axes.bar(blocks, shares, width=0.86, color=colors(blocks, style) / 255, edgecolor="#444444", linewidth=0.6)
    axes.axvline(mean, color=MARK, linewidth=1.6, linestyle="--")
    axes.text(mean, 1.02, f"mean {mean:.2f}", transform=axes.get_xaxis_transform(), ha="center", color=MARK)
    _block_ticks(axes, style.num_blocks)
    full = f"{percent(shares[-1])} of them by all {style.num_blocks}"
    explanation = f"{what.capitalize()} are processed by {mean:.2f} blocks on average, {full}."
    return Chart(f"How deep {what} go", explanation, figure)


def _live_tokens(statistics: DatasetStatistics) -> Chart:
    figure = new_figure(3.6)
    axes = style_axes(figure.subplots(), "block", "live patches of an image", in_percent=True)
    blocks = np.arange(1, statistics.num_blocks + 1)
    live = np.stack([(statistics.depth >= block).mean(axis=1) for block in blocks], axis=1)  # (N, L)
    lowest, low, high, highest = np.percentile(live, [10, 25, 75, 90], axis=0)
    mean = live.mean(axis=0)
    static = axes.axhline(1, color=GREY, linewidth=1.2, linestyle="--")
    outer = axes.fill_between(blocks, lowest, highest, color=MAIN, alpha=0.17, linewidth=0)
    inner = axes.fill_between(blocks, low, high, color=MAIN, alpha=0.3, linewidth=0)
    (average,) = axes.plot(blocks, mean, color=MAIN, marker="o", markersize=4)
    legend_above(axes, {"mean": average, "middle 50 %": inner, "middle 80 %": outer, "static network": static})
    macs = float(statistics.macs.mean())
    saved = percent(1 - macs / statistics.static_macs)
    plate = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    text = {"s": f"saved: {saved}\nof multiply-adds", "linespacing": 1.4, "weight": "bold", "bbox": plate}
    is_free = highest[len(blocks) * 6 // 10 - 1] < 0.75  # above the bands, on the right
    place = {"x": 0.98, "y": 0.8, "ha": "right"} if is_free else {"x": 0.02, "y": 0.05}
    axes.text(**place, **text, transform=axes.transAxes)
    axes.set_ylim(0, 1.03)
    _block_ticks(axes, statistics.num_blocks)
    cost = f"{macs_text(macs)} instead of {macs_text(statistics.static_macs)} per image"
    left = f"the last block processes {percent(mean[-1])} of the patches"
    explanation = f"On average {left}; {saved} of the multiply-adds are saved ({cost})."
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
    ends = dict.fromkeys(f"{means[end]:.2f} ({one_line(names[end], 60)})" for end in (0, -1))
    explanation = f"Mean depth of the patches by class, of {len(classes):,} in all: {' to '.join(ends)}."
    return Chart("Easy and hard classes", explanation, figure)


def _class_figure(means: np.ndarray, names: list[str], examples: list[ImageRecord | None], style: Style) -> Figure:
    """Draws a bar for each class, shallowest on top; of many classes, those at both ends, and a histogram."""
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
        between = f"{count - 2 * AT_EACH_END:,} more classes"
        options = {"va": "center", "color": GREY, "fontsize": SMALL_TEXT, "style": "italic"}
        bars.text(style.num_blocks / 80, AT_EACH_END, between, **options)
    chosen = list(rows.values())
    options = {"color": colors(means[chosen], style) / 255, "edgecolor": "#444444", "linewidth": 0.6}
    lengths = style_axes(bars, grid="x").barh(list(rows), means[chosen], height=0.74, **options)
    bars.bar_label(lengths, [f"{mean:.2f}" for mean in means[chosen]], padding=3, fontsize=SMALL_TEXT)
    bars.set_xlim(0, style.num_blocks * 1.08)
    bars.set_xticks(range(0, style.num_blocks + 1, max(style.num_blocks // 6, 1)))
    bars.set_ylim(max(rows) + 0.6, -0.6)
    bars.set_yticks(list(rows), [one_line(names[index], 24) for index in chosen], parse_math=False)
    shown = {row: examples[index] for row, index in rows.items() if examples[index] is not None}
    place = {"xybox": (-4 - PICTURE / 2, 0), "xycoords": ("axes fraction", "data"), "boxcoords": "offset points"}
    for row, record in shown.items():  # a small picture left of the axis
        image = OffsetImage(record.pixels, zoom=PICTURE / max(record.pixels.shape[:2]))
        bars.add_artist(AnnotationBbox(image, (0, row), **place, frameon=False, pad=0, annotation_clip=False))
    bars.tick_params(axis="y", length=0, pad=PICTURE + 8 if shown else 4)
    last.set_xlabel("mean depth of the patches")
    return figure


def _accuracy_against_depth(statistics: DatasetStatistics) -> Chart:
    figure = new_figure(4.0)
    top, bottom = figure.subplots(2, 1, height_ratios=[2.6, 1], sharex=True)
    depth, right = statistics.mean_depth, statistics.is_right
    low, high = depth.min(), depth.max()
    edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low - 0.25, low + 0.25])
    bins, members, counts = np.unique(np.digitize(depth, edges[1:-1]), return_inverse=True, return_counts=True)
    mean_depth, accuracy = (np.bincount(members, weights=values) / counts for values in (depth, right))
    errors = np.abs(wilson_interval(accuracy, counts) - accuracy)
    overall = top.axhline(right.mean(), color=GREY, linewidth=1.2, linestyle="--")
    of_bins = top.errorbar(mean_depth, accuracy, errors, color=MAIN, marker="o", markersize=5, capsize=3)
    legend_above(top, {"images of like depth, ± standard error": of_bins, "all images": overall})
    low = min(max((accuracy - errors[0]).min(), 0), 0.9)
    top.set_ylim(low - 0.06 * (1 - low), 1 + 0.06 * (1 - low))
    style_axes(top, y="top-1", in_percent=True)
    width = edges[1] - edges[0]
    bottom.bar(edges[bins] + width / 2, counts, width=0.94 * width, color="#9db8c9")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    style_axes(bottom, "mean depth of the image's patches", "images")
    ends = [f"{percent(accuracy[end])} of images about {mean_depth[end]:.1f} deep" for end in (0, -1)]
    ends = " and ".join(ends) if len(bins) > 1 else ends[0]
    return Chart("Accuracy by depth", f"Top-1 is {percent(right.mean())}: {ends} are recognised.", figure)


def wilson_interval(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """shares: [K], each of counts: [K] trials -> [2, K], one standard error below and above (Wilson, 1927)."""
    middle = (shares + 0.5 / counts) / (1 + 1 / counts)
    half = np.sqrt(shares * (1 - shares) / counts + 0.25 / counts**2) / (1 + 1 / counts)
    return np.stack([middle - half, middle + half])


def _halting_scores(layer_scores: np.ndarray, prior: np.ndarray) -> Chart:
    """Both scaled to sum 1: but for its clamp, DistributionPriorLoss is least where they are equal then."""
    figure = new_figure(3.4)
    axes = style_axes(figure.subplots(), "block", "share of the sum", in_percent=True)
    blocks, has_scores = np.arange(1, len(prior) + 1), layer_scores.sum() > 0
    shares, target = layer_scores / (layer_scores.sum() if has_scores else 1), prior / prior.sum()
    bars = axes.bar(blocks, shares, width=0.86, color="#7fb2d3", edgecolor="#444444", linewidth=0.6)
    (line,) = axes.plot(blocks, target, color=MARK, marker="o", markersize=4)
    name = "mean halting score" if has_scores else "mean halting score: none, a static network"
    legend_above(axes, {name: bars, "target of the prior": line})
    axes.set_ylim(bottom=0)
    _block_ticks(axes, len(prior))
    reached = f"is largest in block {shares.argmax() + 1} ({percent(shares.max())} of its sum)"
    wanted = f"the prior's target is largest in block {target.argmax() + 1} ({percent(target.max())})"
    explanation = f"The mean halting score {reached if has_scores else 'is 0 in all blocks'}; {wanted}."
    return Chart("Where patches halt", explanation, figure)


# The teaser: rows that shrink ---------------------------------------------------------------------

MAX_IMAGES = 8
MAX_INCHES = 1.7  # inches, of an image


def teaser(records: list[ImageRecord], style: Style) -> Figure:
    """Draws inputs, depth maps, and how many patches each block processes: of 8 images at most, one colour each."""
    records = records[:MAX_IMAGES]
    widths = [one.pixels.shape[1] / one.pixels.shape[0] for one in records]
    tall = min(MAX_INCHES, 7.0 / sum(widths))
    upper = 2 * max(tall, 0.45) + 0.3  # at least as high as the letters beside it
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
    _depth_legend(pictures.add_subplot(grid[:, -1]), style, most=int(15 * tall))
    _teaser_bars(style_axes(bars.subplots(), "block", "live patches"), records, style.num_blocks)
    return figure


def _depth_legend(axes: Axes, style: Style, most: int) -> None:
    """Draws the colours of all depths, with at most so many labels."""
    blocks = np.arange(1, style.num_blocks + 1)
    extent = (0, 1, 0.5, style.num_blocks + 0.5)
    axes.imshow(colors(blocks[:, None], style), origin="lower", aspect="auto", extent=extent)
    axes.hlines(blocks[1:] - 0.5, 0, 1, color="#666666", linewidth=0.4)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_xticks([])
    axes.set_yticks(blocks[:: style.num_blocks // -most])  # full depth has a label in any case
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set(color="#666666", linewidth=0.6)
    axes.set_ylabel("blocks that\nprocessed\nthe patch", fontsize=SMALL_TEXT)


def _teaser_bars(axes: Axes, records: list[ImageRecord], num_blocks: int) -> None:
    """Draws a stack of bars for each block; a grey area over them is what the static network would do besides."""
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
    text = {"ha": "right", "weight": "bold"}
    axes.text(num_blocks + 0.4, total * 1.02, f"saved: {100 * saved:.0f} % of multiply-adds", **text)
    axes.set_ylim(0, total * 1.13)
    _block_ticks(axes, num_blocks)
