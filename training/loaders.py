"""Data loaders: the order of the images, their random numbers, and unreadable images."""

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

MAX_TRIES = 20  # number of images that are tried in place of an unreadable one


class Sample(NamedTuple):
    """One image; unreadable: messages about the images that were skipped before it.

    image: [3, H, W], or None if none could be read.
    """

    image: Tensor | None
    target: int | None
    index: int | None = None
    unreadable: tuple[str, ...] = ()


class Batch(NamedTuple):
    """images: [B, 3, H, W] float; targets: [B] int64; indices: B positions in the dataset; names: B file names."""

    images: Tensor
    targets: Tensor
    indices: list[int]
    names: list[str]


class SkipUnreadable(Dataset):
    """A dataset that maps an index, or (index, seeds), to a Sample and skips unreadable images.

    The augmentation of an image depends on the seeds only, so it is the same in every process.
    An unreadable image is replaced by the next readable one of `tries` images in a row, or by None.
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
    """Return images [B, 3, H, W], targets [B] and indices of the readable samples, and messages about the others.

    The samples of a stream are (image, target), so their indices are None.
    """
    samples = [Sample(*sample) for sample in samples]
    readable = [sample for sample in samples if sample.image is not None]
    images, targets = default_collate([sample[:2] for sample in readable]) if readable else (None, None)
    return images, targets, [sample.index for sample in readable], [name for s in samples for name in s.unreadable]


class ImageLoader(DataLoader):
    """A data loader that yields a Batch at a time.

    Errors about images are raised here, not in the data-loader workers, which send messages with the batch.

    The length is the number of batches of the next iteration.

    images: the dataset of ([3, H, W] float, class index) that a map-style `dataset` reads;
    num_images: size of the dataset over all processes, 0 if unknown;
    batches_per_epoch: number of batches of a complete epoch;
    images_per_batch: number of images of a batch over all processes;
    bad_images: one message per unreadable image so far; each is printed once as a warning;
    max_bad_images: raise RankError if there are more;
    allow_empty_batches: skip a batch without readable images instead of raising RankError.
    """

    def __init__(self, dataset: Dataset, *args, max_bad_images: float = 0, allow_empty_batches: bool = False, **kwargs):
        options = {"collate_fn": collate, "worker_init_fn": ignore_signals_in_worker, "generator": torch.Generator()}
        super().__init__(dataset, *args, **options, **kwargs)
        self.images = getattr(dataset, "images", dataset)
        self.num_images = len(self.images)
        self.batches_per_epoch = len(self)
        self.images_per_batch = self.batch_size * utils.world_size()
        self.bad_images: list[str] = []
        self.max_bad_images, self.allow_empty_batches = max_bad_images, allow_empty_batches

    def start_at(self, epoch: int, images: int = 0) -> None:
        """Make the next iteration start in this epoch, after its first `images` images over all processes."""
        self.sampler.start_at(epoch, images)

    def __iter__(self) -> Iterator[Batch]:
        for images, targets, indices, unreadable in super().__iter__():
            self._note(unreadable)
            if images is not None:
                yield Batch(images, targets, indices, [image_name(self.images, index) for index in indices])
            elif not self.allow_empty_batches:
                raise RankError(f"no image of a batch can be read: {unreadable[-1]}")

    def _note(self, unreadable: list[str]) -> None:
        for message in dict.fromkeys(unreadable):
            if message in self.bad_images:
                continue
            self.bad_images.append(message)
            if len(self.bad_images) > self.max_bad_images:
                limit = self.max_bad_images
                hint = f"; more than {limit} images are unreadable; repair them or raise --max-bad-images"
                raise RankError(message + hint if limit else message)
            utils.warn(f"{message}; the image is skipped", everywhere=True)

    def state_dict(self) -> dict:
        """Return the loader's entry of a checkpoint. Every process must call it."""
        return {"bad_images": utils.all_gather_objects(self.bad_images)}

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore the loader. Raises KeyError, ValueError or the like if the entry does not fit."""
        own = checkpoint["bad_images"][utils.rank() :: utils.world_size()]  # of several processes if they were more
        self.bad_images = list(dict.fromkeys(str(message) for messages in own for message in messages))


class StreamLoader(ImageLoader):
    """A loader of a Stream, whose images have no positions: they are numbered in the order they arrive."""

    first_batch = 0  # of the next iteration

    def __init__(self, stream: Stream, batch_size: int, **kwargs):
        super().__init__(stream, batch_size, **kwargs)
        self.num_images = stream.num_images

    def __len__(self) -> int:
        return super().__len__() - min(self.first_batch, super().__len__())

    def start_at(self, epoch: int, images: int = 0) -> None:
        """Make the next iteration start in this epoch, after its first `images` images, rounded down to whole batches.

        It reads and skips the batches before.
        """
        self.dataset.set_epoch(epoch)
        seed = self.dataset.seed * EPOCH_STRIDE + epoch
        self.generator.manual_seed(seed)  # seeds the workers, and through them the reader's shuffling
        self.first_batch = images // self.images_per_batch

    def __iter__(self) -> Iterator[Batch]:
        if self.first_batch and not len(self):
            return
        places, classes = itertools.count(utils.rank(), utils.world_size()), len(self.dataset.classes)
        for number, (images, targets, *_) in enumerate(DataLoader.__iter__(self)):
            if not ((targets >= 0) & (targets < classes)).all():  # a stream's labels can be checked only when read
                raise RankError(
                    f"a batch has labels from {targets.min()} to {targets.max()} but there are {classes} classes; "
                    "check --num-classes"
                )
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
    """Build the loader of training images; it drops an incomplete last batch, unless it is the only one.

    A `Stream` drops it in any case, and ignores seed, repeated_aug and max_bad_images.
    """
    if isinstance(images, Stream):
        return _stream_loader(images, batch_size, num_workers, pin_memory, persistent=False, drop_last=True)
    sampler = training_sampler(images, utils.world_size(), utils.rank(), seed, repeated_aug)
    sampler = ResumableSampler(sampler, seed)
    return ImageLoader(
        SkipUnreadable(images, MAX_TRIES),
        batch_size,
        sampler=sampler,
        max_bad_images=max_bad_images,
        drop_last=len(sampler) >= batch_size,
        **_worker_options(_at_most_cores(num_workers), pin_memory),
    )


def evaluation_loader(
    images: Dataset, batch_size: int, *, num_workers: int, pin_memory: bool, skip_unreadable: bool = False
) -> ImageLoader:
    """Build a loader that reads each image once over all processes.

    skip_unreadable: skip unreadable images with a warning instead of raising RankError. A `Stream` ignores it.
    """
    if isinstance(images, Stream):
        return _stream_loader(images, batch_size, num_workers, pin_memory)
    sampler = UnpaddedDistributedSampler(images, utils.world_size(), utils.rank())
    return ImageLoader(
        SkipUnreadable(images),
        batch_size,
        sampler=sampler,
        max_bad_images=math.inf if skip_unreadable else 0,
        allow_empty_batches=skip_unreadable,
        **_worker_options(_at_most_cores(num_workers), pin_memory),
    )


def demo_loader(images: Dataset, batch_size: int, **options) -> ImageLoader:
    """Build an `evaluation_loader` that skips unreadable images with a warning."""
    return evaluation_loader(images, batch_size, skip_unreadable=True, **options)


def _stream_loader(
    stream: Stream, batch_size: int, num_workers: int, pin_memory: bool, persistent: bool = True, **options
) -> StreamLoader:
    num_workers = stream.prepare_workers(_at_most_cores(num_workers))
    return StreamLoader(stream, batch_size, **_worker_options(num_workers, pin_memory, persistent), **options)


def _at_most_cores(num_workers: int) -> int:
    return min(num_workers, utils.usable_cores())


def _worker_options(count: int, pin_memory: bool, persistent: bool = True) -> dict:
    # Workers are forked so that they share the flag of `training.signals` with the main process.
    can_fork = count > 0 and "fork" in multiprocessing.get_all_start_methods()
    return {
        "num_workers": count,
        "pin_memory": pin_memory,
        "persistent_workers": persistent and count > 0,
        "multiprocessing_context": "fork" if can_fork else None,
    }
