"""WebDataset shards, read by timm, with images decoded as those in files."""

from __future__ import annotations

from functools import partial
from io import BytesIO

import webdataset
from timm.data.readers.reader_wds import ReaderWds, log_and_continue

from readers.images import load_image


class Shards(ReaderWds):
    """timm's reader of shards, with `load_image` as the decoder."""

    def _lazy_init(self) -> None:
        super()._lazy_init()
        stage = webdataset.map(partial(_decode, keys=self.input_key.split(";")), handler=log_and_continue)
        self.ds.pipeline.insert(-2, stage)  # before timm's decoder and its renaming


def _decode(sample: dict, keys: list[str]) -> dict:
    """Replace the encoded image of a sample by a bitmap, which timm's decoder only copies."""
    key = next(key for key in keys if key in sample)
    bitmap = BytesIO()
    load_image(BytesIO(sample[key]), f"{sample['__url__']}: {sample['__key__']}.{key}").save(bitmap, "PPM")
    return {**sample, key: bitmap.getvalue()}
