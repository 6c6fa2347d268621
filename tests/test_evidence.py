"""The chain of evidence.sh on a few images, and the parts of evidence.py."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, save_halting_micro

import evidence
from checkpoints import load_checkpoint
from datasets import build_dataset

FLAGS = dict.fromkeys(evidence.RECIPE_FLAGS, 1) | {"output_dir": "private"}


def make_fashion(folder, train=120, test=20):
    """Random pixels in Fashion-MNIST's form; every image is another."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, count in {"train": train, "t10k": test}.items():
        arrays = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in zip(evidence.KINDS, arrays):
            evidence._write_idx(folder / f"{part}-{kind}", array)
    return folder


def images_of(folder, train):
    data = build_dataset("FMNIST", str(folder), train, (28, 28))
    return {(image.tobytes(), target) for image, target in zip(data.images, data.targets)}


def test_held_out_images_are_training_images_that_no_training_sees(tmp_path):
    data = make_fashion(tmp_path / "data")
    evidence.split(data, tmp_path / "out")
    full, subset = (images_of(tmp_path / "out" / part, True) for part in ("full", "subset"))
    held_out = images_of(tmp_path / "out" / "full", False)
    assert (len(full), len(subset), len(held_out)) == (110, 40, 10)
    assert images_of(tmp_path / "out" / "subset", False) == held_out
    assert subset < full
    assert full | held_out == images_of(data, True)
    assert not full & held_out
    assert not held_out & images_of(data, False), "test images stay out of it"


def test_what_is_kept_of_a_checkpoint(tmp_path):
    checkpoint = save_halting_micro(tmp_path / "c.pth", 3, classes=["a", "b", "c"], args=FLAGS, optimizer={"lr": 1})
    evidence.export(checkpoint, tmp_path / "kept.pth")
    kept, whole = (load_checkpoint(str(path)) for path in (tmp_path / "kept.pth", checkpoint))
    assert kept.keys() == {"model", "gate", "classes", "args"}
    assert "output_dir" not in kept["args"]
    assert kept["gate"] == whole["gate"]
    assert (tmp_path / "kept.pth").stat().st_size < 0.6 * checkpoint.stat().st_size
    for name, value in whole["model"].items():
        torch.testing.assert_close(kept["model"][name].float(), value, rtol=1e-3, atol=1e-6)


def test_means_over_seeds():
    assert evidence._mean_and_error([1.0]) == "1.00"
    assert evidence._mean_and_error([1.0, 2.0, 3.0]) == "2.00 ± 0.58"


@pytest.mark.slow
def test_the_whole_chain_and_that_nothing_is_done_twice(tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".git", ".venv", "results", "checkpoints"))
    data = make_fashion(tmp_path / "data", train=600)
    short = {"STATIC_EPOCHS": "2", "TUNING_EPOCHS": "1", "SEARCH_EPOCHS": "1", "SEEDS": "0 1", "SEARCH": "10:0.005"}
    environment = {**os.environ, **short, "PYTHON": sys.executable}

    def run():
        command = ["bash", str(repository / "evidence.sh"), str(data)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run().count("\n== ") > 10
    results = repository / "results"
    table = (results / "fashion_mnist.md").read_text()
    for heading in ("Test images", "Speed", "Settings", "Ablation"):
        assert f"## {heading}" in table
    tested = json.loads((results / "test_adaptive_1.json").read_text())
    assert len(tested["hits"]) == 20
    assert tested["hits"].count("1") / 20 == pytest.approx(tested["eval"]["acc1"] / 100)
    assert tested["eval"]["depth_mean"] < 12
    shutil.rmtree(results / "runs")  # as in a fresh clone
    assert "==" not in run()
    assert (results / "fashion_mnist.md").read_text() == table
