"""Samplers: the images of each process, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from utils import SEEDS_OF_IMAGES

EPOCH_STRIDE = 100_003  # epochs of different seeds get different shuffling seeds


class RepeatedAugmentationSampler(RepeatAugSampler):
    """timm's repeated augmentation (three views of an image per epoch), with a seed."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, seed: int = 0):
        super().__init__(dataset, num_replicas=num_replicas, rank=rank)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        super().set_epoch(self.seed * EPOCH_STRIDE + epoch)


class UnpaddedDistributedSampler(Sampler):
    """All indices, each in one process, without padding, so lengths may differ by one."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int):
        self.dataset, self.num_replicas, self.rank = dataset, num_replicas, rank
        self.start_at(0)

    def start_at(self, epoch: int, images: int = 0) -> None:
        """Make the next iteration start after the first `images` images over all processes. All epochs are equal."""
        first = images + (self.rank - images) % self.num_replicas
        self.indices = range(first, len(self.dataset), self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ResumableSampler(Sampler):
    """A sampler that can start anywhere in an epoch and yields (index, seeds).

    sampler: distributes one order of the images over `num_replicas` processes in turn, as DistributedSampler does.
    The seeds of an image depend only on its position in training, so a resumed run needs no other state.
    """

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed, self.rank = sampler, seed, sampler.rank
        self.start_at(0)

    def start_at(self, epoch: int, images: int = 0) -> None:
        """Make the next iteration start in `epoch`, after its first `images` images over all processes.

        These may have been read by another number of processes. Each process yields the same number of images.
        """
        self.sampler.set_epoch(epoch)
        self.epoch = epoch
        processes, total = self.sampler.num_replicas, len(self.sampler) * self.sampler.num_replicas
        # Position p of the order belongs to process p mod `processes`. This one continues at `images + rank`.
        self.first, self.sampler.rank = divmod(images + self.rank, processes)
        self.length = max(total - images, 0) // processes

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        rest = islice(self.sampler, self.first, self.first + self.length)
        for position, index in enumerate(rest, start=self.first):
            yield index, (self.seed, self.sampler.rank, self.epoch, position, SEEDS_OF_IMAGES)

    def __len__(self) -> int:
        """Return the number of images of the next iteration."""
        return self.length


def training_sampler(dataset: Sized, num_replicas: int, rank: int, seed: int, repeated_aug: bool) -> Sampler:
    """Return a sampler that shuffles in each epoch and yields the same number of images in every process."""
    if repeated_aug:
        return RepeatedAugmentationSampler(dataset, num_replicas, rank, seed)
    return DistributedSampler(dataset, num_replicas, rank, shuffle=True, seed=seed)
