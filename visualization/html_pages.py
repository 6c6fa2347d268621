"""Pages to look at in a browser: a gallery of images, and a summary of a data set."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import utils
from visualization.heatmaps import FRAME_SECONDS, HALTED, OVERLAY, Style, colors
from visualization.records import ImageRecord

MAX_PNG_SIDE = 64  # pixels; an image with no longer side is embedded as PNG
JPEG_QUALITY = 88
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_gallery(
    path: Path,
    title: str,
    facts: list[tuple[str, str]],
    records: list[ImageRecord],
    class_names: Sequence[str],
    style: Style,
) -> None:
    """One file that needs nothing else: the images, what became of their patches, and the means to look through them.

    facts: names and values, shown at the top; class_names: by class index. UserError if it cannot be written.
    """
    _write(path, "gallery.html", title=title, facts=facts, data=gallery_data(records, class_names, style))


def write_summary(
    path: Path,
    title: str,
    facts: list[tuple[str, str]],
    charts: list[tuple[str, str, bytes]],
    gallery: str | None = None,
) -> None:
    """One file that needs nothing else: facts, and charts, each with its title, a sentence about it, and a PNG.

    gallery: a link to a gallery's page, as seen from this one. UserError if it cannot be written.
    """
    figures = [(name, explanation, _data_uri("png", png)) for name, explanation, png in charts]
    _write(path, "summary.html", title=title, facts=facts, charts=figures, gallery=gallery)


def gallery_data(records: list[ImageRecord], class_names: Sequence[str], style: Style) -> dict:
    """What the gallery's script reads, in JSON's types; colors: of the depths 0..L."""
    palette = colors(np.arange(style.num_blocks + 1), style).tolist()
    return {
        "colors": ["#{:02x}{:02x}{:02x}".format(*color) for color in palette],
        "halted": HALTED,
        "overlay": OVERLAY,
        "frame_seconds": FRAME_SECONDS,
        "images": [_entry(record, class_names) for record in records],
    }


def _entry(record: ImageRecord, class_names: Sequence[str]) -> dict:
    height, width = record.pixels.shape[:2]
    return {
        "index": record.index,
        "name": record.name,
        "image": embedded(record.pixels),
        "width": width,
        "height": height,
        "columns": record.depth.shape[1],
        "depth": record.depth.ravel().tolist(),
        "class": class_names[record.target] if record.target >= 0 else None,
        "prediction": class_names[record.prediction],
        "wrong": record.is_wrong,
        "confidence": _number(record.confidence),
        "mean_depth": _number(record.mean_depth),
        "spread": _number(record.depth_spread),
        "macs": _number(record.macs),
        "saved": _number(record.saved),
    }


def embedded(pixels: np.ndarray) -> str:
    """pixels: [H, W, 3] uint8 -> a data URI, of a PNG where the image is small, else of a JPEG."""
    file, kind = BytesIO(), "png" if max(pixels.shape[:2]) <= MAX_PNG_SIDE else "jpeg"
    Image.fromarray(pixels).save(file, kind, **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return _data_uri(kind, file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float) -> float | None:
    """None for what JSON has no word for: the confidence of a network that has diverged is NaN."""
    return round(value, 4) if math.isfinite(value) else None


def _write(path: Path, template: str, **values: object) -> None:
    page = TEMPLATES.get_template(template).render(**values)
    content = page.encode(errors="replace")  # names of files may hold bytes that are no text
    utils.write_bytes(path, content)
