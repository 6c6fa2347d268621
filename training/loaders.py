"""From a data set to batches: which images in which order, their random numbers, and unreadable ones."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import utils
from datasets import Stream, UnreadableImage, image_name
from samplers import EPOCH_STRIDE, ResumableSampler, UnpaddedDistributedSampler, training_sampler
from training.signals import ignore_signals_in_worker
from utils import RankError

MAX_TRIES = 20  # images in a row that may be unreadable


class Sample(NamedTuple):
    """image: [3, H, W] or None where it could not be read; unreadable: what could not be, on the way to this one."""

    image: Tensor | None
    target: int | None
    index: int | None = None
    unreadable: tuple[str, ...] = ()


class Batch(NamedTuple):
    """images: [B, 3, H, W] float; targets: [B] int64; indices: B places in the data set; names: of their files."""

    images: Tensor
    targets: Tensor
    indices: list[int]
    names: list[str]


class SkipUnreadable(Dataset):
    """Takes an index, or (index, seeds), to a Sample.

    The seeds alone decide the image's augmentation, whichever process loads it. In place of an unreadable image comes
    the next one, `tries` in all; if none can be read, none.
    """

    def __init__(self, images: Dataset, tries: int = 1):
        self.images, self.tries = images, tries

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int | tuple[int, tuple[int, ...]]) -> Sample:
        first, seeds = place if isinstance(place, tuple) else (place, None)
        unreadable = []
        for index in range(first, first + self.tries):
            if seeds is not None:
                utils.seed_everything(*seeds)
            try:
                return Sample(*self.images[index % len(self)], index % len(self), tuple(unreadable))
            except UnreadableImage as error:
                unreadable.append(str(error))
        return Sample(None, None, None, tuple(unreadable))


def collate(samples: list[tuple]) -> tuple[Tensor | None, Tensor | None, list[int], list[str]]:
    """Samples -> images [B, 3, H, W] and targets [B] of those that could be read, indices, and what could not be.

    Of a stream, whose samples are (image, target), the indices are None.
    """
    samples = [Sample(*sample) for sample in samples]
    whole = [sample for sample in samples if sample.image is not None]
    images, targets = default_collate([sample[:2] for sample in whole]) if whole else (None, None)
    return images, targets, [sample.index for sample in whole], [name for s in samples for name in s.unreadable]


class ImageLoader(DataLoader):
    """Yields a Batch at a time.

    Errors are raised here, not in the loader processes, which send what they found with the batch.

    images: the data set of ([3, H, W] float, class index) that a map-style `dataset` reads;
    num_images: of the data set, over all processes, 0 where that is not known;
    bad_images: what could not be read so far, each once; each is named on stderr;
    max_bad_images: RankError where there are more than that;
    allow_empty_batches: a batch of which nothing can be read is left out; else it is a RankError.
    """

    def __init__(self, dataset: Dataset, *args, max_bad_images: float = 0, allow_empty_batches: bool = False, **kwargs):
        options = {"collate_fn": collate, "worker_init_fn": ignore_signals_in_worker, "generator": torch.Generator()}
        super().__init__(dataset, *args, **options, **kwargs)
        self.images = getattr(dataset, "images", dataset)
        self.num_images = len(self.images)
        self.bad_images: list[str] = []
        self.max_bad_images, self.allow_empty_batches = max_bad_images, allow_empty_batches

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """From which batch of which epoch on the next iteration goes."""
        self.sampler.start_at(epoch, batch * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for images, targets, indices, unreadable in super().__iter__():
            self._note(unreadable)
            if images is not None:
                yield Batch(images, targets, indices, [image_name(self.images, index) for index in indices])
            elif not self.allow_empty_batches:
                raise RankError(f"a whole batch cannot be read; {unreadable[-1]}")

    def _note(self, unreadable: list[str]) -> None:
        for message in dict.fromkeys(unreadable):
            if message in self.bad_images:
                continue
            self.bad_images.append(message)
            if len(self.bad_images) > self.max_bad_images:
                limit = self.max_bad_images
                raise RankError(message + (f"; these are more than --max-bad-images {limit}" if limit else ""))
            utils.warn(f"{message}; it is passed over", everywhere=True)

    def state_dict(self) -> dict:
        """The entry of a checkpoint that this keeps up; every process must call it."""
        return {"bad_images": utils.all_gather_objects(self.bad_images)}

    def load_state_dict(self, checkpoint: dict) -> None:
        """KeyError, ValueError or the like where it does not fit."""
        bad_images = checkpoint["bad_images"]
        if utils.rank() < len(bad_images):
            self.bad_images = list(map(str, bad_images[utils.rank()]))


class StreamLoader(ImageLoader):
    """The same of a Stream, whose images have no places: they are numbered as they come."""

    def __init__(self, stream: Stream, batch_size: int, **kwargs):
        super().__init__(stream, batch_size, **kwargs)
        self.num_images = stream.num_images
        self.first_batch = 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """From which batch of which epoch on the next iteration goes; it reads its way to it."""
        self.dataset.set_epoch(epoch)
        seed = self.dataset.seed * EPOCH_STRIDE + epoch
        self.generator.manual_seed(seed)  # of the loader processes, and so of the reader's shuffling
        self.first_batch = batch

    def __iter__(self) -> Iterator[Batch]:
        if self.first_batch and self.first_batch >= len(self):
            return
        places, classes = itertools.count(utils.rank(), utils.world_size()), len(self.dataset.classes)
        for number, (images, targets, *_) in enumerate(DataLoader.__iter__(self)):
            if not ((targets >= 0) & (targets < classes)).all():  # its labels are seen only when read
                raise RankError(f"an image is labelled {targets.max()}, but there are {classes} classes")
            indices = list(itertools.islice(places, len(images)))
            if number >= self.first_batch:
                yield Batch(images, targets, indices, [image_name(self.dataset, index) for index in indices])


def training_loader(
    images: Dataset,
    batch_size: int,
    *,
    seed: int,
    repeated_aug: bool,
    num_workers: int,
    pin_memory: bool,
    max_bad_images: int,
) -> ImageLoader:
    """Drops an incomplete last batch, unless it is the only one."""
    if isinstance(images, Stream):
        return _stream_loader(images, batch_size, num_workers, pin_memory, persistent=False, drop_last=True)
    sampler = training_sampler(images, utils.world_size(), utils.rank(), seed, repeated_aug)
    sampler = ResumableSampler(sampler, seed, utils.rank())
    options = _workers(_at_most_cores(num_workers), pin_memory)
    options |= {"max_bad_images": max_bad_images, "drop_last": len(sampler) >= batch_size}
    return ImageLoader(SkipUnreadable(images, MAX_TRIES), batch_size, sampler=sampler, **options)


def evaluation_loader(
    images: Dataset, batch_size: int, *, num_workers: int, pin_memory: bool, skip_unreadable: bool = False
) -> ImageLoader:
    """Over all processes each image once; an unreadable one ends the evaluation, or is named and passed over."""
    if isinstance(images, Stream):
        return _stream_loader(images, batch_size, num_workers, pin_memory)
    sampler = UnpaddedDistributedSampler(images, utils.world_size(), utils.rank())
    options = _workers(_at_most_cores(num_workers), pin_memory)
    if skip_unreadable:
        options |= {"max_bad_images": math.inf, "allow_empty_batches": True}
    return ImageLoader(SkipUnreadable(images), batch_size, sampler=sampler, **options)


def demo_loader(images: Dataset, batch_size: int, **options) -> ImageLoader:
    """An `evaluation_loader` for looking at single images: an unreadable one is named and passed over."""
    return evaluation_loader(images, batch_size, skip_unreadable=True, **options)


def _stream_loader(
    stream: Stream, batch_size: int, num_workers: int, pin_memory: bool, persistent: bool = True, **options
) -> StreamLoader:
    options |= _workers(stream.prepare_workers(_at_most_cores(num_workers)), pin_memory, persistent)
    return StreamLoader(stream, batch_size, **options)


def _at_most_cores(num_workers: int) -> int:
    return min(num_workers, utils.usable_cores())


def _workers(count: int, pin_memory: bool, persistent: bool = True) -> dict:
    """Processes are forked: what a signal has asked of the main one is then known to them."""
    context = "fork" if count > 0 and "fork" in multiprocessing.get_all_start_methods() else None
    options = {"persistent_workers": persistent and count > 0, "multiprocessing_context": context}
    return {"num_workers": count, "pin_memory": pin_memory, **options}
