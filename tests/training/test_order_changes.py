"""Warnings of a run that resumes with other data, or with another order of its images."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import AUGMENTATION, images, make_image_folder, make_shards
from test_loop import make_run
from torch.utils.data import TensorDataset

from datasets import build_dataset, dataset_digest
from training.checkpoints import Checkpoint, load_checkpoint
from training.loaders import training_loader
from training.resume import OrderChanges, data_record, warn_changed_flags, warn_skipped_images

SIZE = (32, 32)


def loader_of(data, batch_size=4, workers=0):
    options = {"seed": 0, "repeated_aug": False, "pin_memory": False, "max_bad_images": 0}
    return training_loader(data, batch_size, num_workers=workers, **options)


def folder(root):
    return build_dataset("IMNET", str(root), True, SIZE, AUGMENTATION)


def test_digest_follows_names_and_labels(tmp_path):
    root = make_image_folder(tmp_path / "a", classes=2, train=3, val=1)
    digest = dataset_digest(folder(root))
    data = folder(root.rename(tmp_path / "moved"))
    assert dataset_digest(data) == digest
    assert dataset_digest(SimpleNamespace(root=f"{data.root}/", samples=data.samples)) == digest
    first = next((tmp_path / "moved" / "train" / "class_0").iterdir())
    first.rename(first.with_name("other.png"))
    assert dataset_digest(folder(tmp_path / "moved")) != digest


def test_digest_of_images_in_memory_and_of_a_stream(tmp_path):
    digits = build_dataset("DIGITS", None, True, SIZE, AUGMENTATION)
    stream = build_dataset("wds/", str(make_shards(tmp_path / "wds")), True, SIZE, AUGMENTATION, num_classes=16)
    in_tensors = [SimpleNamespace(targets=targets) for targets in (torch.arange(4), [0, 1, 2, 3])]
    digests = [dataset_digest(data) for data in (digits, stream, *in_tensors)]
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]
    digits.targets[0] += 1
    assert dataset_digest(digits) != digests[0]


def warning_of(changes, done, capsys, total=12):
    changes.warn(3, done, total)
    return capsys.readouterr().err


BASE = {"seed": 0, "repeated_aug": True}


@pytest.mark.parametrize(
    ("recorded", "data", "inside", "at_border"),
    [
        ({}, {}, "", ""),
        ({"seed": 1}, {}, "warning: --seed changed, so epoch 3 cannot continue exactly", ""),
        ({"repeated_aug": False, "seed": 1}, {}, "--seed and --repeated-aug changed, so", ""),
        ({}, {"images": 9}, "had 9 images and now has 12, so epoch 3 cannot", "had 9 images and now has 12; the run"),
        ({}, {"digest": "0"}, "12 training images have other names or labels", "have other names or labels"),
        ({"seed": 1}, {"images": 9}, "had 9 images and now has 12; --seed changed, so epoch 3", "now has 12; the run"),
    ],
)
def test_changes_warn_once_with_numbers(recorded, data, inside, at_border, capsys):
    loader = loader_of(TensorDataset(images(12), torch.arange(12)))
    record = data_record(loader) | data
    changes = OrderChanges.between(BASE | recorded, BASE, record, loader, 4)
    for done, expected in ((4, inside), (0, at_border)):
        warning = warning_of(changes, done, capsys)
        assert expected in warning
        assert warning.count("\n") == bool(expected)
    if inside:
        assert "after 4 of 12 images" in warning_of(changes, 4, capsys)
        assert "may repeat up to 4 images and skip as many" in warning_of(changes, 4, capsys)


def test_checkpoint_without_a_record_of_the_data_warns_about_nothing(capsys):
    loader = loader_of(TensorDataset(images(12), torch.arange(12)))
    for record in (None, 3, []):
        assert warning_of(OrderChanges.between(BASE, BASE, record, loader, 4), 4, capsys) == ""


@pytest.mark.parametrize(
    ("before", "images", "expected"),
    [
        ([4, 0, 1], 4, ""),
        ([2, 0, 1], 4, ""),  # both are at a border of batches
        (
            [2, 0, 1],
            6,
            "a stream is divided by batch size 2 -> 4, so epoch 3 .* after 6 of 16 images .* up to 2 images",
        ),
        ([4, 2, 1], 4, "divided by data-loader workers 2 -> 0, so .* up to 4 images"),
        ([8, 0, 2], 8, "divided by batch size 8 -> 4, processes 2 -> 1, so .* up to 8 images"),
    ],
)
def test_stream_of_another_division_warns(before, images, expected, tmp_path, capsys):
    stream = build_dataset("wds/", str(make_shards(tmp_path / "wds")), True, SIZE, AUGMENTATION, num_classes=16)
    loader = loader_of(stream)
    changes = OrderChanges.between(BASE, BASE, data_record(loader) | {"stream": before}, loader, images)
    warning = warning_of(changes, images, capsys, total=16)
    assert bool(warning) == bool(expected)
    assert re.search(expected, warning)


def test_resumed_run_reports_its_place_before_it_writes(tmp_path, capsys, monkeypatch):
    make_run(tmp_path, epochs=1).train()
    checkpoint = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    checkpoint["data"]["images"] = 9
    run = make_run(tmp_path / "new")
    run.load_state_dict(Checkpoint(checkpoint, "c.pth", "resume"))
    monkeypatch.setattr("utils.prepare_output_dir", lambda folder: 1 / 0)
    capsys.readouterr()
    with pytest.raises(ZeroDivisionError):
        run.train()
    captured = capsys.readouterr()
    assert "resuming at epoch 1 (the first is 0), after 0 of its batches (0 images)" in captured.out
    assert "had 9 images and now has 12; the run continues with the present data from epoch 1 on" in captured.err


@pytest.mark.parametrize("done", [12, 40])
def test_data_that_shrank_to_less_than_what_is_done_ends_the_epoch(done, capsys):
    warning = warning_of(OrderChanges("the training data had 99 images and now has 12"), done, capsys, total=12)
    end = f"epoch 3 ends after the {done} images that are done, and the run continues with the present data from"
    assert f"{end} epoch 4" in warning


@pytest.mark.parametrize(
    ("batch_size", "done", "skipped"),
    [(4, 8, 0), (5, 8, 4), (7, 8, 0), (5, 9, 3), (12, 4, 0), (15, 4, 13), (17, 3, 14), (18, 4, 0), (4, 17, 0)],
)
def test_images_that_no_batch_contains_are_counted(batch_size, done, skipped, capsys):
    """17 images; a run without interruption skips those after the last complete batch."""
    loader = loader_of(TensorDataset(torch.zeros(17, 3, 8, 8), torch.zeros(17).long()), batch_size)
    warn_skipped_images(loader, 3, done)
    warning = capsys.readouterr().err
    assert bool(skipped) == bool(warning)
    if skipped:
        assert warning.startswith(
            f"warning: the last {skipped} images of epoch 3 are skipped: they do not fill a batch of "
        )


def test_spelling_of_the_optimizer_is_no_change(capsys):
    warn_changed_flags({"opt": "adamw"}, {"opt": "AdamW"}, 1)
    assert capsys.readouterr().err == ""
