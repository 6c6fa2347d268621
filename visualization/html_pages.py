"""Pages to look at in a browser: a gallery of images, and a summary of a data set."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

import utils
from visualization.heatmaps import FRAME_SECONDS, HALTED, OVERLAY, Style, colors, macs_text
from visualization.records import ImageRecord

MAX_PNG_SIDE = 64  # pixels; an image with no longer side is embedded as PNG
JPEG_QUALITY = 88


def write_gallery(
    path: Path,
    title: str,
    facts: list[tuple[str, str]],
    records: list[ImageRecord],
    class_names: Sequence[str],
    style: Style,
) -> None:
    """Writes one file that needs nothing else: images, what became of their patches, and means to look through them.

    facts: names and values, shown at the top; class_names: by class index. Raises UserError if it cannot be written.
    """
    _write(path, "gallery.html", title=title, facts=facts, data=gallery_data(records, class_names, style))


def write_summary(
    path: Path,
    title: str,
    facts: list[tuple[str, str]],
    charts: list[tuple[str, str, bytes]],
    gallery: str | None = None,
) -> None:
    """Writes one file that needs nothing else: facts, and charts, each a title, a sentence about it, and a PNG.

    gallery: a link to a gallery's page, as seen from this one. Raises UserError if it cannot be written.
    """
    figures = [(name, explanation, _data_uri("png", png)) for name, explanation, png in charts]
    _write(path, "summary.html", title=title, facts=facts, charts=figures, gallery=gallery)


def gallery_data(records: list[ImageRecord], class_names: Sequence[str], style: Style) -> dict:
    """Returns what the gallery's script reads, in JSON's types; colors: of the depths 0..L."""
    palette = colors(np.arange(style.num_blocks + 1), style).tolist()
    return {
        "colors": ["#{:02x}{:02x}{:02x}".format(*color) for color in palette],
        "halted": HALTED,
        "overlay": OVERLAY,
        "frame_seconds": FRAME_SECONDS,
        "images": [_image_data(record, class_names, style.num_blocks) for record in records],
    }


def _image_data(record: ImageRecord, class_names: Sequence[str], num_blocks: int) -> dict:
    """Numbers to draw, sort and filter by; every text that is shown."""
    height, width = record.pixels.shape[:2]
    label = class_names[record.target] if record.target >= 0 else None
    prediction, wrong = class_names[record.prediction], record.is_wrong
    mark = "" if label is None else "✗" if wrong else "✓"
    is_finite = math.isfinite(record.confidence)  # not that of a network that has diverged
    figures = {
        "class": "unknown" if label is None else label,
        "prediction": f"{mark} {'wrong: ' * wrong}{prediction}".strip(),
        "confidence": f"{record.confidence:.1%}" if is_finite else "unknown",
        "mean depth": f"{record.mean_depth:.2f} of {num_blocks}",
        "depth spread": f"{record.depth_spread:.2f}",
        "multiply-adds": macs_text(record.macs),
        "share saved": f"{record.saved:.0%}",
        "file": record.name,
    }
    return {
        "index": record.index,
        "image": embedded(record.pixels),
        "width": width,
        "height": height,
        "columns": record.depth.shape[1],
        "depth": record.depth.ravel().tolist(),
        "class": label,
        "wrong": wrong,
        "confidence": round(record.confidence, 4) if is_finite else None,
        "mean_depth": round(record.mean_depth, 4),
        "spread": round(record.depth_spread, 4),
        "title": prediction if label is None else label,
        "mark": mark,
        "verdict": prediction if wrong else "predicted" if label is None else "right",
        "sure": f"{record.confidence:.0%}" if is_finite else "unknown",
        "words": [label or "", prediction, record.name],
        "figures": list(figures.items()),
    }


def embedded(pixels: np.ndarray) -> str:
    """pixels: [H, W, 3] uint8 -> a data URI, of a PNG where the image is small, else of a JPEG."""
    file, kind = BytesIO(), "png" if max(pixels.shape[:2]) <= MAX_PNG_SIDE else "jpeg"
    Image.fromarray(pixels).save(file, kind, **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return _data_uri(kind, file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _write(path: Path, template: str, **values: object) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = Environment(loader=folder, **options).get_template(template).render(**values)
    utils.write_bytes(path, page.encode(errors="replace"))  # names of files may hold bytes that are no text
