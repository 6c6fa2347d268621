"""Which process sees which images, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from utils import SEEDS_OF_IMAGES

EPOCH_STRIDE = 100_003  # keeps the orders of different seeds apart


class RepeatedAugmentationSampler(RepeatAugSampler):
    """timm's repeated augmentation (three views of an image in one epoch), with a seed."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, seed: int = 0):
        super().__init__(dataset, num_replicas=num_replicas, rank=rank)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed * EPOCH_STRIDE + epoch)


class UnpaddedDistributedSampler(Sampler):
    """Every index once over all processes: no padding, so processes may differ by one image."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int):
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ResumableSampler(Sampler):
    """Yields (index, seeds) from any place of an epoch on.

    The seeds of an image follow from its place in training, so that nothing has to be remembered to
    go on from there.
    """

    def __init__(self, sampler: Sampler, seed: int, rank: int):
        self.sampler, self.seed, self.rank = sampler, seed, rank
        self.start_at(0)

    def start_at(self, epoch: int, first: int = 0) -> None:
        """The next iteration is that of `epoch`, without its first so many images."""
        self.sampler.set_epoch(epoch)
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        for place, index in enumerate(islice(self.sampler, self.first, None), start=self.first):
            yield index, (self.seed, self.rank, self.epoch, place, SEEDS_OF_IMAGES)

    def __len__(self) -> int:
        """Of a whole epoch."""
        return len(self.sampler)


def training_sampler(dataset: Sized, num_replicas: int, rank: int, seed: int, repeated_aug: bool) -> Sampler:
    """Shuffles anew after each `set_epoch(epoch)`; equally many images in every process."""
    if repeated_aug:
        return RepeatedAugmentationSampler(dataset, num_replicas, rank, seed)
    return DistributedSampler(dataset, num_replicas, rank, shuffle=True, seed=seed)
