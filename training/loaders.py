"""From a data set to batches: which images in which order, their random numbers, and unreadable ones."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import utils
from datasets import Stream, UnreadableImage
from samplers import EPOCH_STRIDE, ResumableSampler, UnpaddedDistributedSampler, training_sampler
from training.signals import ignore_signals_in_worker
from utils import LocalError

TRIES = 20  # images in a row that may be unreadable


class TrainingImages(Dataset):
    """Takes (index, seeds) to (image, target, what could not be read).

    The seeds alone decide the image's augmentation, whichever process loads it. An unreadable image
    is passed over: the next readable one takes its place, if it is near.
    """

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, tuple[int, ...]]) -> tuple[Tensor | None, int | None, list[str]]:
        index, seeds = place
        unreadable = []
        for number in range(index, index + TRIES):
            utils.seed_everything(*seeds)
            try:
                return *self.images[number % len(self)], unreadable
            except UnreadableImage as error:
                unreadable.append(str(error))
        return None, None, unreadable


class EvaluationImages(Dataset):
    """Takes an index to (image, target, what could not be read), without the first two where it cannot be.

    numbered: the target comes with the index: (target, index).
    """

    def __init__(self, images: Dataset, numbered: bool = False):
        self.images, self.numbered = images, numbered

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int | None, list[str]]:
        try:
            image, target = self.images[index]
        except UnreadableImage as error:
            return None, None, [str(error)]
        return image, (target, index) if self.numbered else target, []


def collate(samples: list[tuple]) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """Samples (image, target[, what could not be read]) -> images [B, 3, H, W], targets [B], all that could not."""
    unreadable = [name for sample in samples for name in (sample[2] if len(sample) > 2 else ())]
    whole = [sample[:2] for sample in samples if sample[0] is not None]
    return *(default_collate(whole) if whole else (None, None)), unreadable


class ImageLoader(DataLoader):
    """Yields images [B, 3, H, W] and targets [B].

    Errors are raised here, not in the loader processes, which send what they found with the batch.

    num_images: of the data set, over all processes, 0 where that is not known;
    bad_images: what could not be read so far, each once; each is named on stderr;
    max_bad_images: LocalError where there are more than that;
    may_shrink: a batch of which nothing can be read is left out; else it is a LocalError.
    """

    def __init__(self, images: Dataset, *args, max_bad_images: float = 0, may_shrink: bool = False, **kwargs):
        options = {"collate_fn": collate, "worker_init_fn": ignore_signals_in_worker, "generator": torch.Generator()}
        super().__init__(images, *args, **options, **kwargs)
        is_stream = isinstance(images, Stream)
        self.num_images = images.num_images if is_stream else len(images)
        self.num_classes = len(images.classes) if is_stream else None  # its labels are seen only when read
        self.bad_images: list[str] = []
        self.max_bad_images, self.may_shrink = max_bad_images, may_shrink
        self.first_batch = 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """From which batch of which epoch on the next iteration goes; a stream reads its way to it."""
        if isinstance(self.dataset, Stream):
            self.dataset.set_epoch(epoch)
            seed = self.dataset.seed * EPOCH_STRIDE + epoch
            self.generator.manual_seed(seed)  # of the loader processes, and so of the reader's shuffling
            self.first_batch = batch
        else:
            self.sampler.start_at(epoch, batch * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.first_batch and self.first_batch >= len(self):
            return
        for number, (images, targets, unreadable) in enumerate(super().__iter__()):
            self._note(unreadable)
            if images is None and self.may_shrink:
                continue
            if images is None:
                raise LocalError(f"a whole batch cannot be read; {unreadable[-1]}")
            if self.num_classes is not None and not ((targets >= 0) & (targets < self.num_classes)).all():
                raise LocalError(f"an image is labelled {targets.max()}, but there are {self.num_classes} classes")
            if number >= self.first_batch:
                yield images, targets

    def _note(self, unreadable: list[str]) -> None:
        for message in dict.fromkeys(unreadable):
            if message in self.bad_images:
                continue
            self.bad_images.append(message)
            if len(self.bad_images) > self.max_bad_images:
                limit = self.max_bad_images
                raise LocalError(message + (f"; these are more than --max-bad-images {limit}" if limit else ""))
            utils.warn(f"{message}; it is passed over", everywhere=True)


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
        options = _workers(images.prepare_workers(_at_most_cores(num_workers)), pin_memory, persistent=False)
        return ImageLoader(images, batch_size, drop_last=True, **options)
    sampler = training_sampler(images, utils.world_size(), utils.rank(), seed, repeated_aug)
    sampler = ResumableSampler(sampler, seed, utils.rank())
    options = _workers(_at_most_cores(num_workers), pin_memory) | {"max_bad_images": max_bad_images}
    return ImageLoader(
        TrainingImages(images), batch_size, sampler=sampler, drop_last=len(sampler) >= batch_size, **options
    )


def evaluation_loader(images: Dataset, batch_size: int, *, num_workers: int, pin_memory: bool) -> ImageLoader:
    """Over all processes each image once; an unreadable one ends the evaluation."""
    if isinstance(images, Stream):
        options = _workers(images.prepare_workers(_at_most_cores(num_workers)), pin_memory)
        return ImageLoader(images, batch_size, **options)
    sampler = UnpaddedDistributedSampler(images, utils.world_size(), utils.rank())
    options = _workers(_at_most_cores(num_workers), pin_memory)
    return ImageLoader(EvaluationImages(images), batch_size, sampler=sampler, **options)


def plain_images(loader: ImageLoader) -> Dataset:
    """The data set of ([3, H, W] float, class index) that a loader was made for."""
    return loader.dataset if isinstance(loader.dataset, Stream) else loader.dataset.images


def demo_loader(images: Dataset, batch_size: int, *, num_workers: int, pin_memory: bool) -> ImageLoader:
    """For looking at single images: an unreadable one is named and passed over.

    Yields [B, 3, H, W] and a pair, targets [B] and places in the data set [B]; of a stream, targets alone.
    """
    if isinstance(images, Stream):
        return evaluation_loader(images, batch_size, num_workers=num_workers, pin_memory=pin_memory)
    sampler = UnpaddedDistributedSampler(images, utils.world_size(), utils.rank())
    options = _workers(_at_most_cores(num_workers), pin_memory) | {"max_bad_images": math.inf, "may_shrink": True}
    return ImageLoader(EvaluationImages(images, numbered=True), batch_size, sampler=sampler, **options)


def _at_most_cores(num_workers: int) -> int:
    return min(num_workers, os.cpu_count() or 1)


def _workers(count: int, pin_memory: bool, persistent: bool = True) -> dict:
    return {"num_workers": count, "pin_memory": pin_memory, "persistent_workers": persistent and count > 0}
