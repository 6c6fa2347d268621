import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, make_record
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from losses import DistributionPriorLoss
from visualization import charts
from visualization.charts import summary_charts, teaser, wilson_interval
from visualization.heatmaps import Style, colors
from visualization.records import DatasetStatistics


def make_statistics(images=40, blocks=8, classes=5, depth=None) -> DatasetStatistics:
    rng = np.random.default_rng(0)
    depths = rng.integers(1, blocks + 1, (images, 9)) if depth is None else np.full((images, 9), depth)
    target = rng.integers(0, classes, images)
    return DatasetStatistics(
        depth=depths.astype(np.uint8),
        class_token_depth=rng.integers(1, blocks + 1, images).astype(np.uint8),
        target=target,
        prediction=np.where(rng.random(images) < 0.7, target, (target + 1) % classes),
        macs=1e6 * depths.mean(axis=1),
        static_macs=1e6 * blocks,
        layer_scores=rng.random(blocks),
    )


def small_record(index=0, size=(12, 12), least_depth=1):
    rng = np.random.default_rng(index)
    depth = rng.integers(least_depth, 9, (3, 3))
    return make_record(index, depth, pixels=rng.integers(0, 255, (*size, 3), dtype=np.uint8), macs=depth.mean())


def summary(statistics, class_names=None, examples=None, style=None):
    blocks = statistics.num_blocks
    prior = DistributionPriorLoss(blocks).target.numpy()
    names = class_names or [f"class {c}" for c in range(statistics.target.max() + 2)]
    return summary_charts(statistics, prior, names, examples or {}, style or Style(blocks))


def heights(axes) -> np.ndarray:
    return np.array([bar.get_height() for bar in axes.patches])


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_text()]


def assert_drawn_well(figure) -> None:
    """Check that drawing does not warn, except of missing glyphs, and that all of the chart is inside the figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).draw()
    drawn = figure.get_tightbbox()
    assert (np.array([drawn.min, figure.bbox_inches.size - drawn.max]) >= -0.01).all(), drawn


# Charts of a dataset ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 8, 5), (1, 8, 2), (9, 4, 5, 4), (60, 24, 1000, 1)], ids=str)
def test_every_chart_is_drawn_inside_its_figure(shape):
    statistics = make_statistics(*shape)
    examples = {int(c): small_record(size=(20, 12)) for c in statistics.target[::2]}
    found = summary(statistics, [f"$class_{c} of a very, very long name" for c in range(1000)], examples)
    for chart in found.values():
        assert re.fullmatch(r".*\d.*\.", chart.explanation)
        assert_drawn_well(chart.figure)


@pytest.mark.parametrize(("name", "field"), [("depth_histogram", "depth"), ("class_token_depth", "class_token_depth")])
def test_depth_histogram_shows_share_of_each_depth(name, field):
    statistics, style = make_statistics(), Style(8, "hot")
    (axes,) = summary(statistics, style=style)[name].figure.axes
    depth = getattr(statistics, field)
    assert heights(axes) == pytest.approx([(depth == d).mean() for d in range(1, 9)])
    fills = np.array([bar.get_facecolor()[:3] for bar in axes.patches]) * 255
    assert fills.round() == pytest.approx(colors(np.arange(1, 9), style))
    assert f"mean {depth.mean():.2f}" in texts(axes.figure)


def test_live_tokens_shows_mean_and_percentiles():
    statistics = make_statistics()
    chart = summary(statistics)["live_tokens"]
    (axes,) = chart.figure.axes
    live = np.array([[(image >= b).mean() for b in range(1, 9)] for image in statistics.depth])
    assert axes.lines[1].get_data() == (pytest.approx(np.arange(1, 9)), pytest.approx(live.mean(axis=0)))
    outer = axes.collections[0].get_paths()[0].vertices
    for block, share in enumerate(live.T, start=1):
        band = outer[outer[:, 0] == block, 1]
        assert (band.min(), band.max()) == pytest.approx(tuple(np.percentile(share, [10, 90])))
    saved = f"{100 * (1 - statistics.macs.mean() / 8e6):.1f}%"
    assert f"{saved} of MACs saved" in texts(chart.figure)


def test_few_classes_are_all_shown_from_shallow_to_deep():
    statistics = make_statistics()
    names = ["$a$", "_b_", "line\nbreak", "日本\x07\udcff", "x" * 99, "never seen"]
    chart = summary(statistics, names, {0: small_record()})["class_depths"]
    (axes,) = chart.figure.axes
    means = [statistics.depth[statistics.target == c].mean() for c in range(5)]
    order = np.argsort(means)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(np.sort(means))
    shown = ["$a$", "_b_", "line break", "日本??", "x" * 23 + "…"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [shown[c] for c in order]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    (picture,) = axes.findobj(charts.AnnotationBbox)
    assert order[picture.xy[1]] == 0
    assert re.search(f"{min(means):.2f} .* to {max(means):.2f}", chart.explanation)
    assert_drawn_well(chart.figure)


def test_many_classes_show_both_ends_and_a_histogram():
    statistics = make_statistics(images=400, classes=30)
    bars, strip = summary(statistics)["class_depths"].figure.axes
    means = np.array([statistics.depth[statistics.target == c].mean() for c in range(30)])
    chosen = np.argsort(means)[[*range(5), *range(-5, 0)]]
    assert [label.get_text() for label in bars.get_yticklabels()] == [f"class {c}" for c in chosen]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(means[chosen])
    assert "20 more classes" in texts(bars.figure)
    assert heights(strip).sum() == 30


def test_accuracy_by_depth_shows_accuracy_of_each_bin():
    statistics = make_statistics()
    statistics.depth[:30], statistics.depth[30:] = 2, 6
    statistics.prediction[:] = statistics.target
    statistics.prediction[[*range(10), *range(30, 35)]] += 1
    chart = summary(statistics)["accuracy_against_depth"]
    top, bottom = chart.figure.axes
    assert top.lines[1].get_data() == (pytest.approx([2, 6]), pytest.approx([2 / 3, 1 / 2]))
    ends = np.array([segment[:, 1] for segment in top.collections[0].get_segments()])
    assert ends == pytest.approx(wilson_interval(np.array([2 / 3, 1 / 2]), np.array([30, 10])).T)
    assert heights(bottom).tolist() == [30, 10]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bottom.patches] == pytest.approx([2.2, 5.8])  # tenths of 2..6
    assert "62.5%: 66.7% at a mean depth of 2.0 and 50.0% at a mean depth of 6.0" in chart.explanation
    statistics.depth[:] = 8
    top, bottom = summary(statistics)["accuracy_against_depth"].figure.axes
    assert heights(bottom).tolist() == [40]
    assert top.lines[1].get_data() == (pytest.approx([8]), pytest.approx([25 / 40]))


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_wilson_interval_ends_are_one_standard_error_away(count, share):
    share = round(share * count) / count
    low, high = wilson_interval(np.array([share]), np.array([count]))[:, 0]
    assert -1e-9 <= low <= share + 1e-9 <= high + 2e-9 <= 1 + 3e-9
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(end * (1 - end) / count, abs=1e-9)


def test_halting_scores_and_prior_sum_to_one():
    statistics = make_statistics(blocks=12)
    prior = DistributionPriorLoss(12).target.numpy()
    (axes,) = summary(statistics)["halting_scores"].figure.axes
    assert heights(axes) == pytest.approx(statistics.layer_scores / statistics.layer_scores.sum())
    assert axes.lines[0].get_ydata() == pytest.approx(prior / prior.sum())
    chart = summary(replace(statistics, layer_scores=np.zeros(12)))["halting_scores"]
    assert "is 0 in all blocks" in chart.explanation


# Teaser -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size", "least_depth"), [(1, (12, 12), 8), (8, (8, 24), 1), (10, (24, 8), 1)])
def test_teaser_shows_images_depths_and_live_patches(count, size, least_depth):
    records = [small_record(n, size, least_depth) for n in range(count)]
    style, first = Style(8), records[:8]
    figure = teaser(records, style)
    *pictures, legend, bars = figure.findobj(charts.Axes)
    live = [[(one.depth >= b).sum() for b in range(1, 9)] for one in first]
    drawn = heights(bars).reshape(len(first) + 1, 8)
    assert drawn[:-1].tolist() == live
    assert drawn.sum(axis=0).tolist() == [9 * len(first)] * 8  # the last bars fill up to the static model
    bottoms = np.array([bar.get_y() for bar in bars.patches]).reshape(drawn.shape)
    assert bottoms.tolist() == (drawn.cumsum(axis=0) - drawn).tolist()  # stacked
    saved = 1 - sum(one.macs for one in first) / sum(one.static_macs for one in first)
    assert f"{100 * saved:.0f}% of MACs saved" in texts(figure)
    assert len(pictures) == 2 * len(first)
    for number, one in enumerate(first):
        image, patches = pictures[2 * number : 2 * number + 2]
        assert (image.images[0].get_array() == one.pixels).all()
        assert (patches.images[0].get_array() == colors(one.depth, style)).all()
        assert patches.get_xlabel() == f"{100 * one.macs / one.static_macs:.0f}% MACs"
        assert patches.spines["left"].get_edgecolor() == bars.patches[8 * number].get_facecolor()
    assert legend.images[0].get_array()[:, 0].tolist() == colors(np.arange(1, 9), style).tolist()
    assert_drawn_well(figure)


def test_missing_glyph_does_not_warn():
    script = "from visualization import charts; figure = charts.new_figure(1); figure.text(0, 0, '猫')"
    script += "; figure.savefig('/dev/null', format='png')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
