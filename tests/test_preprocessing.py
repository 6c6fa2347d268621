"""Evaluation preprocessing: one definition, recorded in checkpoints, and the same pixels in every command."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from datasets import CROP_MODES, IMAGENET, INTERPOLATIONS, Preprocessing, build_dataset, evaluation_transform
from training.checkpoints import Checkpoint
from training.models import create_model, run_preprocessing

WHOLE = Preprocessing(interpolation="bilinear", crop_pct=1.0, crop_mode="squash")
LARGE, SMALL = (56, 56), (32, 32)
HALF = (0.5, 0.5, 0.5)  # mean and std of timm's augreg models
AUGREG = "vit_tiny_patch16_224.augreg_in21k"

numbers = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(tuple)
preprocessings = st.builds(
    Preprocessing, numbers, numbers, st.sampled_from(INTERPOLATIONS), st.floats(0.5, 1), st.sampled_from(CROP_MODES)
)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (56, 56)])
@pytest.mark.parametrize("image_size", [(28, 28), (30, 100), (640, 480)])
def test_whole_images_are_resized_as_by_torchvision(size, image_size):
    image = random_image(*image_size)
    normalize = transforms.Normalize(HALF, HALF)
    resized = transforms.Compose([transforms.Resize(size), transforms.ToTensor(), normalize])(image)
    assert torch.equal(evaluation_transform(size, WHOLE._replace(mean=HALF, std=HALF))(image), resized)


def test_small_images_and_those_of_placed_datasets_are_whole():
    assert IMAGENET.for_run(SMALL) == IMAGENET.for_run(LARGE, "CLUTTERED") == IMAGENET.for_run(LARGE, "DIGITS") == WHOLE
    assert IMAGENET.for_run(LARGE) == IMAGENET.for_run((32, 33), "IMNET") == IMAGENET


def test_dataset_uses_the_given_preprocessing_else_its_own(image_folder):
    given_one = build_dataset("IMNET", str(image_folder), False, LARGE, preprocessing=WHOLE)
    own = build_dataset("IMNET", str(image_folder), False, LARGE)
    image = Image.open(own.samples[0][0])
    assert torch.equal(given_one[0][0], evaluation_transform(LARGE, WHOLE)(image))
    assert torch.equal(own[0][0], evaluation_transform(LARGE, IMAGENET)(image))
    assert not torch.equal(own[0][0], given_one[0][0])


# Records ------------------------------------------------------------------------------------------


@given(preprocessings)
def test_record_is_read_back(preprocessing):
    assert Preprocessing.from_record(preprocessing.record()) == preprocessing


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, math.nan]},
        {"mean": [0.5, 0.5, 1e30]},
        {"mean": [True, 0.5, 0.5]},
        {"mean": "abc"},
        {"mean": torch.zeros(3)},
        {"std": [0.5, 0.5, 0.0]},
        {"std": [0.5, 0.5, -1.0]},
        {"std": None},
        {"interpolation": "random"},
        {"interpolation": ["bicubic"]},
        {"crop_pct": 0.0},
        {"crop_pct": 1e-9},
        {"crop_pct": 1.1},
        {"crop_pct": math.nan},
        {"crop_pct": "1"},
        {"crop_mode": "corner"},
        {"crop_mode": {}},
    ],
    ids=str,
)
def test_unusable_record_is_ignored(change):
    assert Preprocessing.from_record(IMAGENET.record()) == IMAGENET
    assert Preprocessing.from_record(IMAGENET.record() | change) is None


@pytest.mark.parametrize("record", [None, 3, [], {}, "bicubic", {"mean": HALF}], ids=str)
def test_incomplete_record_is_ignored(record):
    assert Preprocessing.from_record(record) is None


# Checkpoints --------------------------------------------------------------------------------------


def checkpoint(args: dict | None = None, **entries) -> Checkpoint:
    """Return a native checkpoint of avit_micro_patch4_32 for 3 classes, trained at 56 pixels."""
    weights = timm.create_model("avit_micro_patch4_32", num_classes=3, img_size=56).state_dict()
    flags = {"model": "avit_micro_patch4_32", "input_size": [56], "data_set": "IMNET"}
    return Checkpoint({"model": weights, "gate": None, "args": flags | (args or {}), **entries}, "c.pth")


@pytest.mark.parametrize(
    ("args", "entry", "expected"),
    [
        ({}, None, IMAGENET),
        ({"data_set": "CLUTTERED"}, None, WHOLE),
        ({"input_size": [28]}, None, WHOLE),
        ({"data_set": []}, None, IMAGENET),
        ({"model": "unknown"}, None, None),
        ({"input_size": "28"}, None, None),
        ({}, WHOLE.record(), WHOLE),
        ({"data_set": "CLUTTERED"}, IMAGENET.record(), IMAGENET),
        ({"data_set": "CLUTTERED"}, {"crop_pct": 0}, WHOLE),
    ],
)
def test_recorded_preprocessing_is_the_entry_else_follows_from_the_flags(args, entry, expected):
    assert checkpoint(args, preprocessing=entry).recorded_preprocessing() == expected
    foreign = checkpoint(args, preprocessing=entry)
    del foreign.content["gate"]
    assert foreign.recorded_preprocessing() is None


@pytest.mark.parametrize("size", [SMALL, LARGE, (224, 224)])
def test_loaded_model_keeps_the_recorded_preprocessing(size, capsys):
    for recorded in (WHOLE, IMAGENET):
        model = checkpoint(preprocessing=recorded.record()).build_model(img_size=size, halting=False)
        assert Preprocessing.from_model(model) == recorded
    whole = checkpoint({"data_set": "CLUTTERED"}).build_model(img_size=size, halting=False)
    assert Preprocessing.from_model(whole) == WHOLE
    assert "preprocessed" not in capsys.readouterr().err


def test_model_without_a_record_has_the_preprocessing_of_its_size():
    assert Preprocessing.from_model(create_model("avit_micro_patch4_32", SMALL)) == WHOLE
    assert Preprocessing.from_model(create_model("avit_micro_patch4_32", LARGE)) == IMAGENET
    assert Preprocessing.from_model(create_model(AUGREG, SMALL)) == WHOLE._replace(mean=HALF, std=HALF)


@given(
    st.sampled_from([None, "avit_micro_patch4_32", AUGREG, "deit_tiny_patch16_224"]),
    st.sampled_from([None, "IMNET", "CLUTTERED"]),
    st.sampled_from([16, 28, 56, 64]),
    st.sampled_from(["avit_micro_patch4_32", AUGREG]),
    st.sampled_from(["IMNET", "CLUTTERED"]),
    st.sampled_from([SMALL, LARGE]),
    st.booleans(),
)
def test_record_wins_in_evaluation_and_a_line_names_a_difference(
    model, recorded_data, recorded_size, name, data_set, size, is_new_task
):
    """Only another model or dataset is a difference: another image size keeps the recorded preprocessing."""
    lines = []
    loaded = checkpoint({"model": model, "data_set": recorded_data, "input_size": [recorded_size]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.checkpoints.warn", lines.append)
        patch.setattr("training.checkpoints.log", lines.append)
        chosen = loaded.preprocessing_for(name, size, data_set, is_new_task)
    own, recorded = run_preprocessing(name, size, data_set), loaded.recorded_preprocessing()
    assert chosen == (own if is_new_task or recorded is None else recorded)
    compared = own if is_new_task else run_preprocessing(name, (recorded_size, recorded_size), data_set)
    differs = recorded is not None and recorded not in (own, compared)
    differs &= is_new_task or (name, data_set) != (model, recorded_data)
    assert len(lines) == differs
    for field, first, second in zip(Preprocessing._fields, recorded or own, compared):
        assert not differs or first == second or f"{field} {second if is_new_task else first}" in lines[0]


def test_exported_weights_keep_the_preprocessing():
    whole = checkpoint({"data_set": "CLUTTERED"}, classes=["a", "b", "c"])
    exported = Checkpoint(whole.without_training_state(["data_set"]), "kept.pth")
    assert exported.recorded_preprocessing() == WHOLE
