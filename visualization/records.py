"""Records of what the model did with images: per batch, selected by class, and as statistics of a dataset."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import utils
from datasets import Preprocessing
from macs import macs_counter
from models_act import Halting
from utils import autocast
from visualization.image_record import CRITERIA, ImageRecord


class BatchRecords(NamedTuple):
    """Records of the images of a batch, and the mean halting score of its patches after each block, [L]."""

    records: list[ImageRecord]
    layer_scores: Tensor

    def without_pixels(self) -> BatchRecords:
        return self._replace(records=[replace(record, pixels=None) for record in self.records])


def records_of_batch(
    model: nn.Module, batch: tuple, logits: Tensor, halting: Halting, with_pixels: bool = False
) -> list[ImageRecord]:
    """Return one record per image of a batch.

    batch: images [B, 3, H, W], targets [B] (-1: unknown), positions in the dataset, names; logits: [B, K]
    """
    images, targets, indices, names = batch
    confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
    count_macs = macs_counter(model, halting.depth.shape[1])
    macs = count_macs(halting.depth).tolist()
    static_macs = count_macs(torch.full_like(halting.depth[:1], model.num_blocks)).item()
    depth = halting.depth.to("cpu", torch.uint8)
    prefix, patches = depth[:, : model.num_prefix_tokens], depth[:, model.num_prefix_tokens :]
    grids = patches.unflatten(1, model.patch_embed.dynamic_feat_size(images.shape[-2:]))
    pixels = itertools.repeat(None)
    if with_pixels:
        pixels = Preprocessing.from_model(model).denormalize(images).permute(0, 2, 3, 1).numpy()
    numbers = (prediction.tolist(), confidence.tolist(), targets.tolist(), macs)
    rows = zip(indices, names, pixels, grids.numpy(), prefix.numpy(), *numbers)
    return [ImageRecord(*row, static_macs) for row in rows]


@torch.no_grad()
def record_batch(model: nn.Module, batch: tuple, amp: str) -> BatchRecords:
    """Run the model on a batch and record the results with pixels. batch: see `records_of_batch`.

    Raises FloatingPointError if logits are NaN or Inf.
    """
    device = next(model.eval().parameters()).device
    with autocast(device, amp):
        logits, halting = model(batch[0].to(device, non_blocking=True), return_halting=True)
    utils.check_finite(logits)
    return BatchRecords(records_of_batch(model, batch, logits, halting, with_pixels=True), halting.layer_scores.cpu())


# Selection of images ------------------------------------------------------------------------------


class Selection:
    """The first `per_class` images of each class by one of CRITERIA. On a tie, the earlier in the dataset wins.

    The selection does not depend on the order of the images or on the process that adds them.
    """

    def __init__(self, criterion: str = "std", per_class: int = 1):
        self.measure, self.per_class = CRITERIA[criterion], per_class
        self.kept: dict[int, list[ImageRecord]] = {}

    def add(self, records: Iterable[ImageRecord]) -> None:
        for record in records:
            kept = self.kept.setdefault(record.target, [])
            is_full = len(kept) == self.per_class
            if self.measure(record) is None or (is_full and self._order(record) > self._order(kept[-1])):
                continue
            kept.append(replace(record, pixels=record.pixels.copy()))  # a view would keep the batch in memory
            kept.sort(key=self._order)
            del kept[self.per_class :]

    def _order(self, record: ImageRecord) -> tuple[float, int]:
        return -self.measure(record), record.index

    def local_selection(self) -> list[tuple[int, ImageRecord]]:
        """Return the selected images of this process, each with its number within its class, from 1.

        Collective: every process must call it. Only the criterion values are exchanged, not the images.
        """
        own = [record for kept in self.kept.values() for record in kept]
        keys = [(record.target, *self._order(record), utils.rank(), place) for place, record in enumerate(own)]
        chosen, taken = [], Counter()
        for target, _, _, rank, place in sorted(key for keys in utils.all_gather_objects(keys) for key in keys):
            taken[target] += 1
            if taken[target] <= self.per_class and rank == utils.rank():
                chosen.append((taken[target], own[place]))
        return chosen


def gather_to_main(chosen: list[tuple[int, ImageRecord]]) -> list[tuple[int, ImageRecord]]:
    """Return the selected images of all processes, sorted by class, in the main process; elsewhere an empty list.

    Collective: every process must call it.
    """
    everyone = utils.gather_objects_to_main(chosen)
    return sorted((entry for own in everyone for entry in own), key=lambda entry: (entry[1].target, entry[0]))


# Statistics of a dataset --------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetStatistics:
    """Depths, predictions and MACs of N images of n patches each, in no defined order.

    depth: [N, n] uint8, patch depths; class_token_depth: [N] uint8, or None without a class token
    target, prediction: [N] class indices
    macs: [N] MACs; static_macs: MACs of the static model
    layer_scores: [L], mean halting score of the patches after each block; a halted patch counts as 0
    """

    depth: np.ndarray
    class_token_depth: np.ndarray | None
    target: np.ndarray
    prediction: np.ndarray
    macs: np.ndarray
    static_macs: float
    layer_scores: np.ndarray

    @classmethod
    def from_batches(cls, batches: list[BatchRecords], has_class_token: bool) -> DatasetStatistics:
        records = [one for batch in batches for one in batch.records]
        scores, sizes = zip(*((batch.layer_scores.numpy(), len(batch.records)) for batch in batches))
        return cls(
            depth=np.stack([one.depth.ravel() for one in records]),
            class_token_depth=np.array([one.prefix_depth[0] for one in records]) if has_class_token else None,
            target=np.array([one.target for one in records]),
            prediction=np.array([one.prediction for one in records]),
            macs=np.array([one.macs for one in records]),
            static_macs=records[0].static_macs,
            layer_scores=np.average(scores, axis=0, weights=sizes),
        )

    @property
    def num_blocks(self) -> int:
        return len(self.layer_scores)

    @property
    def mean_depth(self) -> np.ndarray:
        """Mean patch depth of each image: [N]."""
        return self.depth.mean(axis=1)

    @property
    def is_correct(self) -> np.ndarray:
        """Return whether each prediction is correct: [N] bool."""
        return self.target == self.prediction
