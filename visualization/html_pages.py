"""HTML pages: a gallery of images, and a summary of a dataset."""

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
from visualization.image_record import ImageRecord

MAX_PNG_SIDE = 64  # pixels; larger images are embedded as JPEG
JPEG_QUALITY = 88
GALLERY, SUMMARY = "index.html", "summary.html"
Facts = list[tuple[str, str]]  # names and values, shown at the top of a page


def write_gallery(
    folder: Path, title: str, records: list[ImageRecord], class_names: Sequence[str], style: Style
) -> None:
    """Write index.html, a self-contained page to search, sort and view images and the depths of their patches.

    class_names: by class index. Raises UserError if the file cannot be written.
    """
    palette = colors(np.arange(style.num_blocks + 1), style).tolist()
    data = {  # read by gallery.js; colors: of the depths 0..L
        "colors": ["#{:02x}{:02x}{:02x}".format(*color) for color in palette],
        "halted": HALTED,
        "overlay": OVERLAY,
        "frame_seconds": FRAME_SECONDS,
        "images": [_image_data(record, class_names, style.num_blocks) for record in records],
    }
    _write(folder / GALLERY, "gallery.html", title=title, facts=_means(records), data=data)


def write_summary(
    folder: Path, title: str, facts: Facts, charts: list[tuple[str, str, bytes]], has_gallery: bool = False
) -> Path:
    """Write summary.html, a self-contained page of facts and charts, and return its path.

    charts: title, explanation and PNG of each; has_gallery: whether the page links to a gallery in the same directory
    Raises UserError if the file cannot be written.
    """
    figures = [(name, explanation, _data_uri("png", png)) for name, explanation, png in charts]
    gallery = GALLERY if has_gallery else None
    _write(folder / SUMMARY, "summary.html", title=title, facts=facts, charts=figures, gallery=gallery)
    return folder / SUMMARY


def _means(records: Sequence[ImageRecord]) -> Facts:
    """Return means over the images shown."""
    if not records:
        return [("images", "0")]
    known = [one for one in records if one.target >= 0]
    accuracy = [("top-1 accuracy", f"{sum(not one.is_wrong for one in known) / len(known):.1%}")] if known else []
    depth = sum(one.mean_depth for one in records) / len(records)
    saved = 1 - sum(one.macs for one in records) / sum(one.static_macs for one in records)
    return [("images", f"{len(records):,}"), *accuracy, ("patch depth", f"{depth:.2f}"), ("MACs saved", f"{saved:.1%}")]


def _image_data(record: ImageRecord, class_names: Sequence[str], num_blocks: int) -> dict:
    """Return the numbers that gallery.js draws, sorts and filters by, and every text it shows."""
    height, width = record.pixels.shape[:2]
    label = class_names[record.target] if record.target >= 0 else None
    prediction, wrong = class_names[record.prediction], record.is_wrong
    mark = "" if label is None else "✗" if wrong else "✓"
    is_finite = math.isfinite(record.confidence)  # a diverged model has NaN confidence
    figures = {
        "class": "unknown" if label is None else label,
        "prediction": f"{mark} {'wrong: ' * wrong}{prediction}".strip(),
        "confidence": f"{record.confidence:.1%}" if is_finite else "unknown",
        "mean depth": f"{record.mean_depth:.2f} of {num_blocks}",
        "depth spread": f"{record.depth_spread:.2f}",
        "MACs": macs_text(record.macs),
        "MACs saved": f"{record.saved:.0%}",
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
        "verdict": prediction if wrong else "predicted" if label is None else "correct",
        "sure": f"{record.confidence:.0%}" if is_finite else "unknown",
        "words": [label or "", prediction, record.name],
        "figures": list(figures.items()),
    }


def embedded(pixels: np.ndarray) -> str:
    """Encode an image [H, W, 3] uint8 as a data URI: PNG if it is small, else JPEG."""
    file, kind = BytesIO(), "png" if max(pixels.shape[:2]) <= MAX_PNG_SIDE else "jpeg"
    Image.fromarray(pixels).save(file, kind, **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return _data_uri(kind, file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _write(path: Path, template: str, **values: object) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    utils.write_bytes(path, page.encode(errors="replace"))  # file names may contain bytes that are not valid text
