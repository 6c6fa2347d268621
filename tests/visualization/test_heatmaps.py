import io

import numpy as np
import pytest
from conftest import make_record
from PIL import Image

from visualization import heatmaps
from visualization.heatmaps import Style

NAMES = ["a class", "b" * 300]


def graded(height: int, width: int, num_blocks: int = 8, side: int = 4, **kwargs):
    """Return a record of height x width patches with depths 1..num_blocks, on a random image."""
    depth = (np.arange(height * width) % num_blocks + 1).reshape(height, width)
    shape = (height * side, width * side, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return make_record(depth=depth, pixels=pixels, **kwargs)


def pixels_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_paper_colormap_gets_whiter_with_depth():
    shades = heatmaps.colors(np.arange(1, 13), Style(12, "hot")).astype(int)
    assert (np.diff(shades.sum(axis=1)) > 0).all()
    assert (shades[-1] == 255).all()


@pytest.mark.parametrize(("grid", "side"), [((4, 4), 4), ((2, 6), 4), ((2, 2), 120)])
def test_heat_map_has_image_size_and_flat_patches(grid, side):
    record, style = graded(*grid, side=side), Style(8)
    drawn = {name: pixels_of(picture) for name, picture in heatmaps.demo_views(record, NAMES, style).items()}
    reference, gap = drawn["ref"], style.gap
    height, width, _ = reference.shape
    assert min(height, width) >= 224
    times = height // len(record.pixels)
    assert (reference == record.pixels.repeat(times, axis=0).repeat(times, axis=1)).all()
    expected = heatmaps.colors(record.depth, style).repeat(side * times, axis=0).repeat(side * times, axis=1)
    assert (drawn["token_depth"][:, :width] == expected).all()
    combined = drawn["combined"][gap : gap + height, gap:]
    assert (combined[:, :width] == reference).all()
    assert (combined[:, width + gap :][:, :width] == expected).all()


@pytest.mark.parametrize("blocks", [4, 12, 24])
def test_legend_shows_every_depth(blocks):
    style = Style(blocks)
    colors = [tuple(c) for c in heatmaps.colors(np.arange(1, blocks + 1), style).tolist()]
    column = [tuple(p) for p in pixels_of(heatmaps.legend(224, style))[:, 6].tolist()]
    assert [color for color in dict.fromkeys(column) if color in colors] == colors[::-1]
    assert heatmaps.legend(8, style).height == 8, "fewer pixels than blocks"


def test_halted_patches_are_gray_and_live_ones_unchanged():
    record, style = graded(2, 4), Style(8, size=8)
    image = pixels_of(heatmaps.enlarge(record.pixels, style))
    for block in range(1, 9):
        shown = pixels_of(heatmaps.in_block(record, block, style))
        live = (record.depth >= block).repeat(4, axis=0).repeat(4, axis=1)
        assert (shown[live] == image[live]).all()
        assert (shown[~live].max(axis=1) == shown[~live].min(axis=1)).all()
        assert (shown[~live] >= heatmaps.HALTED).all()
        assert heatmaps.live_share(record, block) == live.mean() == (9 - block) / 8


@pytest.mark.parametrize("target", [-1, 0, 1])
def test_caption_contains_class_prediction_depth_and_macs(target):
    lines = heatmaps.caption(make_record(target=target, prediction=0), NAMES, Style(8))
    text = "\n".join(line for line, _ in lines)
    assert ("class: " in text) == (target >= 0)
    assert "predicted: a class, 90.0%" in text
    assert "mean depth 3.5 of 8" in text
    assert "M MACs (75% saved)" in text
    assert any(color == heatmaps.WARNING for _, color in lines) == (target == 1)


def test_long_and_unprintable_names_fit_the_width():
    for text in ("x" * 1000, "\x1b[31m\n\t", "", "名前 имя"):
        assert heatmaps.draw_text(text, 100, Style(8)).width == 100
    ink = pixels_of(heatmaps.draw_text("x" * 1000, 100, Style(8)))
    assert ink[:, -2:].min() > 200, "text exceeds the image"


def test_panel_ends_with_last_block_and_sheet_has_a_column_per_image():
    style = Style(5, size=64)
    last = pixels_of(heatmaps.panel(graded(4, 4, 5), NAMES, style))[:, -style.gap - 64 : -style.gap]
    expected = pixels_of(heatmaps.in_block(graded(4, 4, 5), 5, style))
    assert any((last[top : top + 64] == expected).all() for top in range(last.shape[0] - 63))
    one, two = (heatmaps.sheet([graded(2, 2, target=-1)] * count, NAMES, style) for count in (1, 2))
    assert two.width - one.width == 64 + style.gap


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animation_has_a_frame_per_block(kind):
    record, style = graded(4, 4), Style(8, size=64)
    movie = Image.open(io.BytesIO(heatmaps.animation(record, style, kind)))
    assert movie.n_frames == 8
    for number in range(8):
        movie.seek(number)
        shown = pixels_of(movie.convert("RGB"))[style.gap : style.gap + 64, style.gap : -style.gap]
        expected = pixels_of(heatmaps.in_block(record, number + 1, style))
        assert np.abs(shown - expected).mean() < 6  # GIF has 256 colors
