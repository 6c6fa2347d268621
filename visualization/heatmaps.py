"""Pictures of single images and the depths of their patches, drawn with Pillow."""

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

PAPER, INK, WARNING, HALTED = "white", "black", "#b3261e", 160  # HALTED: the grey of a patch that has left
OVERLAY = 0.6  # share of the depth's colour over the image
FRAME_SECONDS = 0.45
MAX_LETTERS = 400  # no picture is wider
PAPERS_COLORMAP = "hot"  # from black to white, whiter is deeper


@dataclass(frozen=True)
class Style:
    """How depths 1..num_blocks are drawn: in which of matplotlib's colour maps, sides of how many pixels at least."""

    num_blocks: int
    colormap: str = "viridis"  # perceptually uniform, and read alike by colour-blind eyes
    size: int = 224

    @property
    def gap(self) -> int:
        return max(self.size // 28, 4)

    @property
    def text_height(self) -> int:
        """Of the letters, in pixels."""
        return max(self.size // 15, 11)


# Parts --------------------------------------------------------------------------------------------


def colors(depth: np.ndarray, style: Style) -> np.ndarray:
    """depth: [...], 0..num_blocks -> [..., 3] uint8; full depth is always the map's last colour."""
    from matplotlib import colormaps

    rgba = np.asarray(colormaps[style.colormap](depth / style.num_blocks))
    return (rgba[..., :3] * 255).round().astype(np.uint8)


def enlarge(pixels: np.ndarray, style: Style) -> Image.Image:
    """Enlarges pixels, [H, W, 3] uint8, by a whole factor, without smoothing, to at least the style's size."""
    picture = Image.fromarray(pixels)
    factor = -(-style.size // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def heat_map(depth: np.ndarray, size: tuple[int, int], style: Style) -> Image.Image:
    """depth: [grid height, grid width] -> a picture of `size` (width, height), one flat rectangle per patch."""
    return Image.fromarray(colors(depth, style)).resize(size, Image.Resampling.NEAREST)


def overlay(record: ImageRecord, style: Style) -> Image.Image:
    """Lays the depth map over the image in grey."""
    image = enlarge(record.pixels, style)
    return Image.blend(image.convert("L").convert("RGB"), heat_map(record.depth, image.size, style), OVERLAY)


def in_block(record: ImageRecord, block: int, style: Style) -> Image.Image:
    """Greys out the patches that halted before this block (1 is the first)."""
    image = enlarge(record.pixels, style)
    grey = image.convert("L").point(lambda value: HALTED + value // 8)
    halted = Image.fromarray(((record.depth < block) * 255).astype(np.uint8))
    return Image.composite(grey.convert("RGB"), image, halted.resize(image.size, Image.Resampling.NEAREST))


def live_share(record: ImageRecord, block: int) -> float:
    """Returns the share of patches that this block processes."""
    return float((record.depth >= block).mean())


@cache
def font(height: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", height)


def printable(text: str) -> str:
    """Puts a ? for each control character, line break and lone surrogate."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def line(text: str, width: int, style: Style, color: str = INK) -> Image.Image:
    """Draws one line of text in a picture of this width; cuts it short where it is too long."""
    letters, text = font(style.text_height), printable(text[:MAX_LETTERS])
    if letters.getlength(text) > width:
        while text and letters.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    picture = Image.new("RGB", (width, style.text_height * 3 // 2), PAPER)
    ImageDraw.Draw(picture).text((0, picture.height / 2), text, fill=color, font=letters, anchor="lm")
    return picture


def legend(height: int, style: Style) -> Image.Image:
    """Draws the colours of all depths, from 1 at the bottom to full depth at the top."""
    blocks, letters = style.num_blocks, font(style.text_height)
    swatch, label = max(height // 14, 8), int(letters.getlength(str(blocks))) + 1
    picture = Image.new("RGB", (swatch + style.gap // 2 + label, height), PAPER)
    draw, step = ImageDraw.Draw(picture), height / blocks
    every = -(-blocks * style.text_height // height)  # labels do not overlap
    for depth in range(1, blocks + 1):
        top, bottom = round(height - depth * step), round(height - (depth - 1) * step) - 1
        fill = tuple(colors(np.array(depth), style).tolist())
        draw.rectangle([0, top, swatch - 1, max(top, bottom)], fill=fill, outline="gray")
        if (blocks - depth) % every == 0:
            middle = min(max((top + bottom) / 2, style.text_height / 2), height - style.text_height / 2)
            draw.text((swatch + style.gap // 2, middle), str(depth), fill=INK, font=letters, anchor="lm")
    return picture


def beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Puts pictures in a row on white, with their tops at one height."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures)), PAPER)
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def below(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Puts pictures in a column on white, flush left."""
    flipped = [picture.transpose(Image.Transpose.TRANSPOSE) for picture in pictures]
    return beside(flipped, gap).transpose(Image.Transpose.TRANSPOSE)


# Whole pictures -----------------------------------------------------------------------------------


def caption(record: ImageRecord, class_names: Sequence[str], style: Style) -> list[tuple[str, str]]:
    """Returns lines of text about an image, each with its colour: class, prediction, depth."""
    predicted = f"{class_names[record.prediction]}, {record.confidence:.1%}"
    lines = [(f"predicted: {predicted}", WARNING if record.is_wrong else INK)]
    if record.target >= 0:
        lines.insert(0, (f"class: {class_names[record.target]}", INK))
    cost = f"{macs_text(record.macs)} multiply-adds, {record.saved:.0%} saved"
    return [*lines, (f"mean depth {record.mean_depth:.1f} of {style.num_blocks}; {cost}", INK)]


def macs_text(macs: float) -> str:
    """Writes three digits and a unit: 0.8e9 is '800 M'."""
    return f"{macs / 1e9:.3g} G" if macs >= 1e9 else f"{macs / 1e6:.3g} M"


def captioned(picture: Image.Image, lines: list[tuple[str, str]], style: Style) -> Image.Image:
    """Puts lines of text under a picture."""
    texts = [line(text, picture.width, style, color) for text, color in lines]
    return below([picture, *texts], gap=style.gap // 4)


def demo_pictures(record: ImageRecord, class_names: Sequence[str], style: Style) -> dict[str, Image.Image]:
    """Draws the image, its depth map with a legend, and the two side by side with a caption, by name."""
    reference = enlarge(record.pixels, style)
    depth_map = heat_map(record.depth, reference.size, style)
    depth_map = beside([depth_map, legend(reference.height, style)], style.gap)
    combined = beside([reference, depth_map], style.gap)
    combined = ImageOps.expand(captioned(combined, caption(record, class_names, style), style), style.gap, PAPER)
    left, top = style.gap + reference.width + style.gap, style.gap
    outline = (left - 1, top - 1, left + reference.width, top + reference.height)  # white patches end somewhere
    ImageDraw.Draw(combined).rectangle(outline, outline="gray")
    return {"ref": reference, "token_depth": depth_map, "combined": combined}


def panel(record: ImageRecord, class_names: Sequence[str], style: Style) -> Image.Image:
    """Draws an image, its depth map, the two laid over each other, and what is left in four of the blocks."""
    image = enlarge(record.pixels, style)
    depth_map = heat_map(record.depth, image.size, style)
    scale = legend(image.height, style)
    columns = [("input", image), ("depth", beside([depth_map, scale], style.gap)), ("both", overlay(record, style))]
    for quarter in range(1, 5):
        block = max(style.num_blocks * quarter // 4, 1)
        title = f"in block {block}: {live_share(record, block):.0%}"
        columns.append((title, in_block(record, block, style)))
    titled = [below([line(title, picture.width, style), picture]) for title, picture in columns]
    row = beside(titled, style.gap)
    name = line(Path(record.name).name, row.width, style)
    return ImageOps.expand(captioned(below([name, row]), caption(record, class_names, style), style), style.gap, PAPER)


def sheet(records: Sequence[ImageRecord], class_names: Sequence[str], style: Style) -> Image.Image:
    """Draws several images in a row, their depth maps under them, with predictions and mean depths."""
    columns = []
    for one in records:
        image = enlarge(one.pixels, style)
        predicted = (class_names[one.prediction], WARNING if one.is_wrong else INK)
        pair = below([image, heat_map(one.depth, image.size, style)], style.gap)
        columns.append(captioned(pair, [predicted, (f"depth {one.mean_depth:.1f}", INK)], style))
    return ImageOps.expand(beside([*columns, legend(columns[0].height, style)], style.gap), style.gap, PAPER)


def animation(record: ImageRecord, style: Style, kind: str) -> bytes:
    """Encodes an endless "gif" or "webp" of what each block processes, and how much; it rests on its last picture."""
    pictures = []
    for block in range(1, style.num_blocks + 1):
        picture = in_block(record, block, style)
        text = line(f"block {block}: {live_share(record, block):.0%} live", picture.width, style)
        pictures.append(ImageOps.expand(below([picture, text], style.gap // 2), style.gap, PAPER))
    times = [int(FRAME_SECONDS * 1000)] * (len(pictures) - 1) + [int(FRAME_SECONDS * 4000)]
    if kind == "gif":  # one palette, of the pictures with the most and the fewest colours, for all
        palette = below([pictures[0], pictures[-1]]).quantize()
        pictures = [picture.quantize(palette=palette) for picture in pictures]  # dithered
    first, *others = pictures
    file = BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    first.save(file, kind.upper(), save_all=True, append_images=others, duration=times, loop=0, **options)
    return file.getvalue()


def write_picture(path: Path, picture: Image.Image | Figure) -> bytes:
    """Writes a PNG or, of an image, a JPEG, as the path ends; returns what it has written. UserError if it cannot."""
    file = BytesIO()
    if path.suffix == ".jpg":
        picture.save(file, "JPEG", quality=95, subsampling=0)
    else:
        (picture.save if isinstance(picture, Image.Image) else picture.savefig)(file, format="png")
    utils.write_bytes(path, file.getvalue())
    return file.getvalue()
