"""What a network said of each image of an evaluation, as a table; compare.py reads it."""

from __future__ import annotations

import csv
import io
import itertools

from torch import Tensor

import utils
from datasets import Stream, image_name
from models_act import Halting
from training.loaders import ImageLoader, plain_images

COLUMNS = ("index", "image", "target", "prediction", "confidence", "depth")


class Predictions:
    """Collects a row for each image of this process's share: see COLUMNS; depth is the mean of all tokens."""

    def __init__(self, loader: ImageLoader):
        self.images = plain_images(loader)
        is_stream = isinstance(self.images, Stream)
        self.places = itertools.count(utils.rank(), utils.world_size()) if is_stream else iter(loader.sampler)
        self.rows: list[tuple] = []

    def note(self, targets: Tensor, logits: Tensor, halting: Halting) -> None:
        """targets: [B]; logits: [B, K]"""
        confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
        depth = halting.depth.mean(dim=1)
        for row in zip(*(column.tolist() for column in (targets, prediction, confidence, depth))):
            place = next(self.places)
            self.rows.append((place, image_name(self.images, place), *row))

    def csv(self) -> bytes:
        """Of all processes, in the order of the data set; every process must call it."""
        rows = sorted(row for own in utils.all_gather_objects(self.rows) for row in own)
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((*row[:4], f"{row[4]:.4f}", f"{row[5]:.4f}") for row in rows)
        return file.getvalue().encode(errors="replace")
