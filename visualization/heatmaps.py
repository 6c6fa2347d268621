"""Images of single inputs and the depths of their patches, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import utils
from visualization.image_record import ImageRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

PAPER, INK, WARNING = "white", "black", "#b3261e"  # colors of background, text, and wrong predictions
HALTED = 160  # darkest gray of a halted patch
OVERLAY = 0.6  # opacity of the depth map over the image
FRAME_SECONDS = 0.45  # each frame of an animation is shown this long; the last frame lasts four times as long
MAX_LETTERS = 400  # letters drawn per line of text; no image is wide enough for more
PAPERS_COLORMAP = "hot"  # the paper's colormap, from black to white: whiter is deeper


@dataclass(frozen=True)
class Style:
    """Appearance of depth maps.

    num_blocks: depth L of the model; colormap: name of a matplotlib colormap; size: smallest side of an image (pixels)
    """

    num_blocks: int
    colormap: str = "viridis"  # perceptually uniform, and readable with color blindness
    size: int = 224

    @property
    def gap(self) -> int:
        """Space between images, in pixels."""
        return max(self.size // 28, 4)

    @property
    def text_height(self) -> int:
        """Font size, in pixels."""
        return max(self.size // 15, 11)


# Parts --------------------------------------------------------------------------------------------


def colors(depth: np.ndarray, style: Style) -> np.ndarray:
    """Map depths to colors: [...], 0..num_blocks -> [..., 3] uint8. Full depth is the last color of the map."""
    from matplotlib import colormaps

    rgba = np.asarray(colormaps[style.colormap](depth / style.num_blocks))
    return (rgba[..., :3] * 255).round().astype(np.uint8)


def enlarge(pixels: np.ndarray, style: Style) -> Image.Image:
    """Scale an image [H, W, 3] uint8 by an integer factor, without smoothing, to at least the style's size."""
    picture = Image.fromarray(pixels)
    factor = -(-style.size // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def heat_map(depth: np.ndarray, size: tuple[int, int], style: Style) -> Image.Image:
    """Draw depths [grid height, grid width] as an image of `size` (width, height), one flat rectangle per patch."""
    return Image.fromarray(colors(depth, style)).resize(size, Image.Resampling.NEAREST)


def overlay(record: ImageRecord, style: Style) -> Image.Image:
    """Blend the depth map over the image in grayscale."""
    image = enlarge(record.pixels, style)
    return Image.blend(image.convert("L").convert("RGB"), heat_map(record.depth, image.size, style), OVERLAY)


def in_block(record: ImageRecord, block: int, style: Style) -> Image.Image:
    """Gray out the patches that halted before this block (1 is the first)."""
    image = enlarge(record.pixels, style)
    gray = image.convert("L").point(lambda value: HALTED + value // 8)
    halted = Image.fromarray(((record.depth < block) * 255).astype(np.uint8))
    return Image.composite(gray.convert("RGB"), image, halted.resize(image.size, Image.Resampling.NEAREST))


def live_share(record: ImageRecord, block: int) -> float:
    """Return the fraction of patches that this block processes."""
    return float((record.depth >= block).mean())


@cache
def font(height: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", height)


def printable(text: str) -> str:
    """Replace each control character, line break and lone surrogate by a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def draw_text(text: str, width: int, style: Style, color: str = INK) -> Image.Image:
    """Draw one line of text as an image of this width. Text that is too long is truncated."""
    letters, text = font(style.text_height), printable(text[:MAX_LETTERS])
    if letters.getlength(text) > width:
        while text and letters.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    picture = Image.new("RGB", (width, style.text_height * 3 // 2), PAPER)
    ImageDraw.Draw(picture).text((0, picture.height / 2), text, fill=color, font=letters, anchor="lm")
    return picture


def legend(height: int, style: Style) -> Image.Image:
    """Draw the colors of all depths, from 1 at the bottom to full depth at the top."""
    blocks, letters = style.num_blocks, font(style.text_height)
    swatch, label = max(height // 14, 8), int(letters.getlength(str(blocks))) + 1
    picture = Image.new("RGB", (swatch + style.gap // 2 + label, height), PAPER)
    draw, step = ImageDraw.Draw(picture), height / blocks
    every = -(-blocks * style.text_height // height)  # label every n-th depth, so that labels do not overlap
    for depth in range(1, blocks + 1):
        top, bottom = round(height - depth * step), round(height - (depth - 1) * step) - 1
        fill = tuple(colors(np.array(depth), style).tolist())
        draw.rectangle([0, top, swatch - 1, max(top, bottom)], fill=fill, outline="gray")
        if (blocks - depth) % every == 0:
            middle = min(max((top + bottom) / 2, style.text_height / 2), height - style.text_height / 2)
            draw.text((swatch + style.gap // 2, middle), str(depth), fill=INK, font=letters, anchor="lm")
    return picture


def hstack(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Join images in a row on white, aligned at the top."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap
    return canvas


def vstack(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Join images in a column on white, aligned at the left."""
    flipped = [image.transpose(Image.Transpose.TRANSPOSE) for image in images]
    return hstack(flipped, gap).transpose(Image.Transpose.TRANSPOSE)


# Complete images ----------------------------------------------------------------------------------


def caption(record: ImageRecord, class_names: Sequence[str], style: Style) -> list[tuple[str, str]]:
    """Return the lines of text under an image, each with its color: class, prediction, depth."""
    predicted = f"{class_names[record.prediction]}, {record.confidence:.1%}"
    lines = [(f"predicted: {predicted}", WARNING if record.is_wrong else INK)]
    if record.target >= 0:
        lines.insert(0, (f"class: {class_names[record.target]}", INK))
    macs = f"{macs_text(record.macs)} MACs ({record.saved:.0%} saved)"
    return [*lines, (f"mean depth {record.mean_depth:.1f} of {style.num_blocks}, {macs}", INK)]


def macs_text(macs: float) -> str:
    """Format a number of MACs with three digits and a prefix: 0.8e9 is '800M'."""
    return f"{macs / 1e9:.3g}G" if macs >= 1e9 else f"{macs / 1e6:.3g}M"


def captioned(picture: Image.Image, lines: list[tuple[str, str]], style: Style) -> Image.Image:
    """Add lines of text under an image."""
    texts = [draw_text(text, picture.width, style, color) for text, color in lines]
    return vstack([picture, *texts], gap=style.gap // 4)


def demo_views(record: ImageRecord, class_names: Sequence[str], style: Style) -> dict[str, Image.Image]:
    """Draw the images of --demo, by name: the input, its depth map with a legend, and both with a caption."""
    reference = enlarge(record.pixels, style)
    depth_map = heat_map(record.depth, reference.size, style)
    depth_map = hstack([depth_map, legend(reference.height, style)], style.gap)
    combined = hstack([reference, depth_map], style.gap)
    combined = ImageOps.expand(captioned(combined, caption(record, class_names, style), style), style.gap, PAPER)
    left, top = style.gap + reference.width + style.gap, style.gap
    outline = (left - 1, top - 1, left + reference.width, top + reference.height)  # shows where white patches end
    ImageDraw.Draw(combined).rectangle(outline, outline="gray")
    return {"ref": reference, "token_depth": depth_map, "combined": combined}


def panel(record: ImageRecord, class_names: Sequence[str], style: Style) -> Image.Image:
    """Draw an image, its depth map, both blended, and the patches that are live in four of the blocks."""
    image = enlarge(record.pixels, style)
    depth_map = heat_map(record.depth, image.size, style)
    scale = legend(image.height, style)
    columns = [("input", image), ("depth", hstack([depth_map, scale], style.gap)), ("overlay", overlay(record, style))]
    for quarter in range(1, 5):
        block = max(style.num_blocks * quarter // 4, 1)
        title = f"block {block}: {live_share(record, block):.0%} live"
        columns.append((title, in_block(record, block, style)))
    titled = [vstack([draw_text(title, picture.width, style), picture]) for title, picture in columns]
    row = hstack(titled, style.gap)
    name = draw_text(Path(record.name).name, row.width, style)
    return ImageOps.expand(captioned(vstack([name, row]), caption(record, class_names, style), style), style.gap, PAPER)


def sheet(records: Sequence[ImageRecord], class_names: Sequence[str], style: Style) -> Image.Image:
    """Draw several images in a row, with their depth maps, predictions and mean depths under them."""
    columns = []
    for one in records:
        image = enlarge(one.pixels, style)
        predicted = (class_names[one.prediction], WARNING if one.is_wrong else INK)
        pair = vstack([image, heat_map(one.depth, image.size, style)], style.gap)
        columns.append(captioned(pair, [predicted, (f"depth {one.mean_depth:.1f}", INK)], style))
    return ImageOps.expand(hstack([*columns, legend(columns[0].height, style)], style.gap), style.gap, PAPER)


def animation(record: ImageRecord, style: Style, kind: str) -> bytes:
    """Encode a looping animation of the patches that each block processes. kind: "gif" or "webp"."""
    pictures = []
    for block in range(1, style.num_blocks + 1):
        picture = in_block(record, block, style)
        text = draw_text(f"block {block}: {live_share(record, block):.0%} live", picture.width, style)
        pictures.append(ImageOps.expand(vstack([picture, text], style.gap // 2), style.gap, PAPER))
    times = [int(FRAME_SECONDS * 1000)] * (len(pictures) - 1) + [int(FRAME_SECONDS * 4000)]
    if kind == "gif":  # one palette for all frames, from those with the most and the fewest colors
        palette = vstack([pictures[0], pictures[-1]]).quantize()
        pictures = [picture.quantize(palette=palette) for picture in pictures]  # with dithering
    first, *others = pictures
    file = BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    first.save(file, kind.upper(), save_all=True, append_images=others, duration=times, loop=0, **options)
    return file.getvalue()


def write_image(path: Path, picture: Image.Image | Figure) -> bytes:
    """Write an image as PNG or JPEG, or a figure as PNG, by the suffix of the path, and return the bytes.

    Raises UserError if the file cannot be written.
    """
    file = BytesIO()
    if path.suffix == ".jpg":
        picture.save(file, "JPEG", quality=95, subsampling=0)
    else:
        (picture.save if isinstance(picture, Image.Image) else picture.savefig)(file, format="png")
    utils.write_bytes(path, file.getvalue())
    return file.getvalue()
