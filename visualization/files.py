"""Pictures, charts and galleries as files. LocalError, naming the path, where one cannot be written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import utils
from visualization import html_pages
from visualization.heatmaps import Style
from visualization.records import ImageRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

GALLERY = "index.html"


def write_png(path: Path, picture: Image.Image | Figure) -> bytes:
    """Returns what it has written."""
    file = io.BytesIO()
    save = picture.save if isinstance(picture, Image.Image) else picture.savefig
    save(file, format="png")
    utils.write_bytes(path, file.getvalue())
    return file.getvalue()


def write_jpeg(path: Path, picture: Image.Image) -> None:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    utils.write_bytes(path, file.getvalue())


def write_gallery(folder: Path, title: str, records: Sequence[ImageRecord], names: Sequence[str], style: Style) -> None:
    """index.html in the folder; names: of the classes."""
    html_pages.write_gallery(folder / GALLERY, title, _facts(records), records, names, style)


def _facts(records: Sequence[ImageRecord]) -> list[tuple[str, str]]:
    """Means over the images shown."""
    if not records:
        return [("images", "0")]
    known = [one for one in records if one.target >= 0]
    right = [("top-1", f"{sum(not one.is_wrong for one in known) / len(known):.1%}")] if known else []
    depth = sum(one.mean_depth for one in records) / len(records)
    saved = 1 - sum(one.macs for one in records) / sum(one.static_macs for one in records)
    return [("images", f"{len(records):,}"), *right, ("patch depth", f"{depth:.2f}"), ("saved", f"{saved:.1%}")]
