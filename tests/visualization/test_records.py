import dataclasses
import random

import numpy as np
import pytest
import torch
from conftest import assert_halting, halting_model, images, make_record
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from datasets import IMAGENET
from macs import macs_per_image
from training.loaders import demo_loader
from visualization.image_record import CRITERIA
from visualization.records import DatasetStatistics, Selection, gather_to_main, record_batch


def test_record_equals_model_output():
    model, x = halting_model(), images(6)
    targets = [0, 1, 2, 3, 4, -1]
    found = record_batch(model, (x, torch.tensor(targets), range(10, 16), list("abcdef")), "none")
    with torch.no_grad():
        logits, halting = model(x, return_halting=True)
    assert_halting(halting)
    torch.testing.assert_close(found.layer_scores, halting.layer_scores)
    confidence, prediction = logits.softmax(dim=1).max(dim=1)
    macs = macs_per_image(model, halting.depth)
    for i, one in enumerate(found.records):
        assert (one.index, one.name, one.target) == (10 + i, "abcdef"[i], targets[i])
        assert one.depth.tolist() == halting.depth[i, 1:].view(4, 4).tolist()
        assert one.prefix_depth.tolist() == halting.depth[i, :1].tolist()
        assert one.mean_depth == pytest.approx(halting.depth[i, 1:].mean().item())
        assert one.depth_spread == pytest.approx(halting.depth[i, 1:].std(correction=0).item())
        assert (one.prediction, one.confidence) == (prediction[i], pytest.approx(confidence[i].item()))
        assert one.macs == pytest.approx(macs[i].item())
        assert one.macs < one.static_macs
        assert (one.pixels == IMAGENET.denormalize(x[i]).permute(1, 2, 0).numpy()).all()
        assert one.is_wrong == (i < 5 and prediction[i] != targets[i])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8), st.booleans()), max_size=30), st.integers(1, 3))
def test_selection_does_not_depend_on_order(rows, per_class):
    population = [make_record(i, ((1, d), (1, 1)), t, t + wrong) for i, (t, d, wrong) in enumerate(rows)]
    for criterion in CRITERIA:
        chosen = []
        for order in (population, random.Random(0).sample(population, len(population))):
            selection = Selection(criterion, per_class)
            selection.add(order)
            chosen.append(
                [(one.target, number, one.index) for number, one in gather_to_main(selection.local_selection())]
            )
        assert chosen[0] == chosen[1]
        assert chosen[0] == sorted(chosen[0])
        assert all(1 <= number <= per_class for _, number, _ in chosen[0])


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [("std", [1, 3]), ("deepest", [3, 2]), ("shallowest", [0, 1]), ("wrong", [2, 0]), ("random", [2, 0])],
)
def test_criterion_selects_largest_first(criterion, expected):
    depths = [((1, 1), (1, 1)), ((1, 1), (1, 8)), ((5, 5), (5, 5)), ((8, 8), (8, 2))]
    population = [make_record(i, depth) for i, depth in enumerate(depths)]
    for index, confidence in {0: 0.5, 2: 0.8, 3: float("nan")}.items():  # NaN: a diverged model
        population[index] = dataclasses.replace(population[index], prediction=1, confidence=confidence)
    selection = Selection(criterion, 2)
    selection.add(population)
    assert [one.index for _, one in selection.local_selection()] == expected


def test_selection_does_not_keep_batches_in_memory():
    batch = np.zeros((50, 4, 4, 3), np.uint8)
    selection = Selection()
    selection.add([make_record(pixels=batch[3])])
    ((_, one),) = selection.local_selection()
    assert one.pixels.base is None or one.pixels.base.nbytes == one.pixels.nbytes


def test_dataset_statistics_counts_every_image_once():
    model = halting_model()
    data = TensorDataset(images(11), torch.arange(11) % 7)
    loader = demo_loader(data, 4, num_workers=0, pin_memory=False)
    batches = [record_batch(model, batch, "none") for batch in loader]
    assert [one.index for batch in batches for one in batch.records] == list(range(11))
    statistics = DatasetStatistics.from_batches([batch.without_pixels() for batch in batches], has_class_token=True)
    with torch.no_grad():
        logits, halting = model(data.tensors[0], return_halting=True)
    assert (statistics.depth == halting.depth[:, 1:].numpy()).all()
    assert (statistics.class_token_depth == halting.depth[:, 0].numpy()).all()
    assert (statistics.is_correct == (logits.argmax(dim=1) == data.tensors[1]).numpy()).all()
    assert statistics.layer_scores == pytest.approx(halting.layer_scores.numpy(), rel=1e-5)
    assert statistics.macs == pytest.approx(macs_per_image(model, halting.depth).numpy())
