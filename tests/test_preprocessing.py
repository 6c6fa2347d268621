"""Evaluation preprocessing: one definition, recorded in checkpoints, and the same pixels in every command."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from conftest import save_halting_micro
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import PatchEmbed
from torchvision import transforms

import benchmark
import export_onnx
import main_act
import visualize
from datasets import (
    CROP_MODES,
    IMAGENET,
    INTERPOLATIONS,
    Preprocessing,
    build_dataset,
    evaluation_transform,
    load_image,
)
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


def test_timm_builds_the_same_transform_from_a_loaded_model():
    model, image = checkpoint({"data_set": "CLUTTERED"}).build_model(halting=False), random_image(90, 60)
    by_timm = create_transform(**resolve_model_data_config(model))
    assert torch.equal(by_timm(image), evaluation_transform(LARGE, Preprocessing.from_model(model))(image))


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


# Commands -----------------------------------------------------------------------------------------


class FirstImages(Exception):
    """Ends a command with the images that its model receives first: [B, 3, H, W]."""


def first_images(command, *argv) -> torch.Tensor:
    """Return the images that the model of a command receives first."""

    def stop(module, inputs):
        if isinstance(module, PatchEmbed):
            raise FirstImages(inputs[0].detach().clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(FirstImages) as found:
            command([*map(str, argv)])
    finally:
        hook.remove()
    return found.value.args[0]


@settings(max_examples=12)
@given(
    st.one_of(st.none(), preprocessings),
    st.sampled_from(["IMNET", "CLUTTERED", "DIGITS"]),
    st.sampled_from([32, 56]),
    st.sampled_from([32, 48]),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
)
def test_every_command_sees_the_same_pixels(tmp_path_factory, entry, data_set, trained_size, size, image_size):
    """Compare what the models receive: images of a dataset, and the same images as files, at any image size."""
    folder = tmp_path_factory.mktemp("pixels")
    for part in ("train", "val"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            random_image(*image_size).save(folder / part / name / "image.png")
    entries = {"args": {"model": "avit_micro_patch4_32", "data_set": data_set, "input_size": [trained_size]}}
    if entry is not None:
        entries["preprocessing"] = entry.record()
    path = save_halting_micro(folder / "c.pth", num_classes=2, **entries)
    expected = entry or IMAGENET.for_run((trained_size, trained_size), data_set)
    image = evaluation_transform((size, size), expected)(load_image(folder / "val" / "a" / "image.png"))

    network, data = ("--finetune", path, "--input-size", size), ("--data-path", folder)
    act = (*data, *network, "--model", "avit_micro_patch4_32", "--num_workers", "0", "--demo-dir", folder)
    pictures = (*network, "--output-dir", folder)
    seen = {
        "--eval": first_images(main_act.main, *act, "--eval"),
        "--demo": first_images(main_act.main, *act, "--demo"),
        "--summary": first_images(visualize.main, "--summary", *data, *pictures, "--num_workers", "0"),
        "files": first_images(visualize.main, folder / "val", *pictures),
        "benchmark": first_images(benchmark.main, *data, *network, "--rounds", "1"),
    }
    for door, images in seen.items():
        assert torch.equal(images[0], image), door

    loaded = Checkpoint.load(str(path))
    metadata = export_onnx.metadata(loaded, loaded.build_model(img_size=(size, size)), use_ema=False)
    exported = {name: json.loads(value) for name, value in metadata.items()}
    assert {name: exported[name] for name in Preprocessing._fields} == expected.record()
    assert exported["image_size"] == [size, size]


def test_training_records_the_preprocessing_and_a_new_task_has_its_own(image_folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    train = ["--data-path", str(image_folder), "--num_workers", "0", "--epochs", "1", "--batch-size", "8"]
    train += ["--model", "avit_micro_patch4_32", "--no-repeated-aug", "--no-model-ema"]
    main_act.main([*train, "--input-size", "32", "--output_dir", str(first)])
    assert "another way" not in capsys.readouterr().out
    start = ["--finetune", str(first / "checkpoint.pth"), "--input-size", "48"]
    main_act.main([*train, *start, "--output_dir", str(second)])
    assert "crop_pct 0.875 instead of 1.0, crop_mode center instead of squash" in capsys.readouterr().out
    for folder, expected in {first: WHOLE, second: IMAGENET}.items():
        content = Checkpoint.load(str(folder / "checkpoint.pth")).content
        assert Preprocessing.from_record(content["preprocessing"]) == expected
