"""WebDataset shards, read by timm, with images decoded as those in files."""

from __future__ import annotations

from functools import partial
from io import BytesIO

import webdataset
from timm.data.readers.reader_wds import ReaderWds, log_and_continue

from readers.images import UnreadableImage, load_image
from utils import warn


class Shards(ReaderWds):
    """timm's reader of shards, with `load_image` as the decoder."""

    def _lazy_init(self) -> None:
        super()._lazy_init()
        stage = webdataset.map(partial(_decode, keys=self.input_key.split(";")), handler=_skip)
        self.ds.pipeline.insert(-2, stage)  # before timm's decoder and its renaming


def _decode(sample: dict, keys: list[str]) -> dict:
    """Replace the encoded image of a sample by a bitmap, which timm's decoder only copies."""
    name = f"{sample['__url__']}: {sample['__key__']}"
    key = next((key for key in keys if key in sample), None)
    if key is None:
        raise UnreadableImage(f"{name}: has no image; expected an entry .{', .'.join(keys)}")
    bitmap = BytesIO()
    load_image(BytesIO(sample[key]), f"{name}.{key}").save(bitmap, "PPM")
    return {**sample, key: bitmap.getvalue()}


def _skip(error: Exception) -> bool:
    """Handle an error of `_decode`, as webdataset requires: True goes on with the next sample."""
    if isinstance(error, UnreadableImage):
        warn(f"{error}; the image is skipped", everywhere=True)
        return True
    return log_and_continue(error)
