from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers import RepeatedAugmentationSampler, UnpaddedDistributedSampler, training_sampler


@given(st.integers(0, 50), st.integers(1, 7))
def test_evaluation_yields_every_image_once(length, processes):
    found = [i for rank in range(processes) for i in UnpaddedDistributedSampler(range(length), processes, rank)]
    assert sorted(found) == list(range(length))


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
