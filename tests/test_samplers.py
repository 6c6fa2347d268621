from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from samplers import RepeatedAugmentationSampler, ResumableSampler, UnpaddedDistributedSampler, training_sampler


@given(st.integers(0, 50), st.integers(1, 7))
def test_evaluation_yields_every_image_once(length, processes):
    found = [i for rank in range(processes) for i in UnpaddedDistributedSampler(range(length), processes, rank)]
    assert sorted(found) == list(range(length))


@given(st.integers(0, 50), st.integers(1, 7), st.integers(0, 60))
def test_evaluation_starts_after_any_image(length, processes, images):
    samplers = [UnpaddedDistributedSampler(range(length), processes, rank) for rank in range(processes)]
    for sampler in samplers:
        order = list(sampler)
        sampler.start_at(0, images)
        assert list(sampler) == [index for index in order if index >= images]
        sampler.start_at(0)
        assert list(sampler) == order


@pytest.mark.parametrize("repeated_aug", [False, True])
@given(st.integers(1, 600), st.integers(1, 4), st.integers(0, 5))
def test_training_yields_equal_numbers_of_images(repeated_aug, length, processes, seed):
    samplers = [training_sampler(range(length), processes, rank, seed, repeated_aug) for rank in range(processes)]
    orders = [list(sampler) for sampler in samplers]
    assert len({len(order) for order in orders}) == 1
    assert all(len(order) == len(sampler) > 0 for order, sampler in zip(orders, samplers))


def test_order_depends_on_epoch_and_seed():
    def order(seed, epoch):
        sampler = RepeatedAugmentationSampler(range(300), 1, 0, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_repeated_augmentation_yields_an_image_three_times():
    counts = Counter(RepeatedAugmentationSampler(range(600), 1, 0))
    assert set(counts.values()) <= {1, 2, 3}
    assert max(counts.values()) == 3


def epoch_steps(length, repeated_aug, processes, batch_size, accum_steps, done=0):
    """Return the images of each optimizer step of an epoch over all processes, after its first `done` images."""
    samplers = [
        ResumableSampler(training_sampler(range(length), processes, rank, seed=0, repeated_aug=repeated_aug), seed=0)
        for rank in range(processes)
    ]
    drop_last = len(samplers[0]) >= batch_size  # as in training.loaders.training_loader
    for sampler in samplers:
        sampler.start_at(0, done)
    assert len({len(sampler) for sampler in samplers}) == 1
    batches = [[list(batch) for batch in BatchSampler(sampler, batch_size, drop_last)] for sampler in samplers]
    joint = [[index for batch in step for index, _ in batch] for step in zip(*batches, strict=True)]
    return [list(chain(*joint[first : first + accum_steps])) for first in range(0, len(joint), accum_steps)]


settings = st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 3))  # processes, batch size, accumulation


@pytest.mark.parametrize("repeated_aug", [False, True])
@given(st.integers(1, 600), st.lists(st.tuples(settings, st.floats(0, 1)), min_size=1, max_size=3), settings)
def test_epoch_resumed_with_other_batches_and_processes_reads_each_image_as_often(repeated_aug, length, parts, last):
    """Each part of the epoch has its own settings and ends after a share of its steps; at most a batch is left out."""
    seen = []
    for part, share in parts:
        steps = epoch_steps(length, repeated_aug, *part, done=len(seen))
        seen += chain(*steps[: int(share * len(steps))])
    seen += chain(*epoch_steps(length, repeated_aug, *last, done=len(seen)))
    processes, batch_size, _ = last
    samplers = [iter(training_sampler(range(length), processes, rank, 0, repeated_aug)) for rank in range(processes)]
    whole = [index for step in zip(*samplers) for index in step]
    assert Counter(seen[: len(whole)]) == Counter(whole[: len(seen)])
    assert len(seen) > len(whole) - processes * batch_size


@pytest.mark.parametrize("repeated_aug", [False, True])
def test_images_of_a_resumed_epoch_keep_their_random_numbers(repeated_aug):
    sampler = ResumableSampler(training_sampler(range(600), 2, 1, 0, repeated_aug), seed=0)
    sampler.start_at(3)
    whole = list(sampler)
    sampler.start_at(3, images=40)
    assert list(sampler) == whole[20:]
    sampler.start_at(3, images=10**6)
    assert list(sampler) == []
