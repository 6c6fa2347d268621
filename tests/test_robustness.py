"""Unusual surroundings: files and folders, environment variables, output streams, checkpoints of other programs."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, halting_model, images, make_image_folder, save_halting_micro
from PIL import Image
from processes import Script
from torch import nn

import benchmark
import compare
import main_act
import utils
import visualize
from datasets import build_dataset, class_names, find_image_files, image_suffixes, load_image
from macs import macs_per_image
from training.arguments import parse_args
from training.checkpoints import Checkpoint
from training.loaders import SkipUnreadable, demo_loader
from utils import UserError

MICRO = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--batch-size", "4"]
CLASSES = ["class_0", "class_1", "class_2"]


def error_of(capsys, command, *argv) -> str:
    """Run a command that must exit with status 2, and return its error message, the last line of stderr."""
    with pytest.raises(SystemExit) as stopped:
        command([*map(str, argv)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_halting_micro(tmp_path / "c.pth", 3, classes=CLASSES)


# Folders and images ------------------------------------------------------------------------------


def test_image_search_skips_hidden_and_other_files(tmp_path, capsys):
    data = make_image_folder(tmp_path / "data")
    cats, image = data / "val" / "class_0", Image.new("RGB", (40, 40), "red")
    for hidden in (data / "val" / ".ipynb_checkpoints", cats / "@eaDir", cats / "deep" / ".cache"):
        hidden.mkdir(parents=True)
        image.save(hidden / "x.png")
    image.save(cats / "._0.png")
    for name in ("a.avif", "b.jp2", "deep/c.JPG"):
        image.save(cats / name)
    image.save(cats / "d.jpg")
    (cats / "d.jpg").rename(cats / "d.jfif")
    (cats / "notes.txt").write_text("no image")
    (cats / "loop").symlink_to(cats)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cats").symlink_to(cats)
    dataset = build_dataset("IMNET", str(data), False, (32, 32))
    assert dataset.classes == CLASSES
    names = [Path(path).relative_to(cats).as_posix() for path, target in dataset.samples if target == 0]
    assert names == ["0.png", "1.png", "2.png", "a.avif", "b.jp2", "d.jfif", "deep/c.JPG"]
    assert "skipped files that are not images: 1 .txt, 4 hidden" in capsys.readouterr().err
    files, _ = find_image_files(tmp_path / "links")
    assert len(files) == len(names)
    assert {".jfif", ".avif", ".webp"} <= image_suffixes()
    assert not {".eps", ".pdf", ".mpg"} & image_suffixes()


def test_compare_ignores_how_the_data_path_is_spelled(tmp_path, checkpoint, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(image_folder.parent)
    for number, folder in enumerate((image_folder.name, image_folder)):
        evaluation = ["--eval", "--finetune", checkpoint, "--data-path", folder, "--output_dir", f"out{number}"]
        main_act.main([*MICRO, *map(str, evaluation)])
    capsys.readouterr()
    compare.main(["out0", "out1"])
    assert "+0.00" in capsys.readouterr().out


def test_image_with_broken_metadata_is_read(tmp_path):
    broken = b"Exif\0\0" + bytes(range(60))
    for name in ("a.webp", "b.png", "c.jpg"):
        Image.new("RGB", (60, 40), "red").save(tmp_path / name, exif=broken)
        assert load_image(tmp_path / name).size == (60, 40)


@pytest.mark.parametrize(
    ("dtype", "white", "name"),
    [(np.uint16, 65535, "x.png"), (np.int32, 65535, "x.tif"), (np.int32, 255, "x.tif"), (np.float32, 1.0, "x.tif")],
)
def test_pixels_of_any_bit_depth_keep_their_range(tmp_path, dtype, white, name):
    pixels = np.linspace(0, white, 256).reshape(16, 16).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / name)
    found = np.asarray(load_image(tmp_path / name))[..., 0].ravel()
    assert np.abs(found - np.linspace(0, 255, 256)).max() <= 1


def test_text_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "names.json").write_bytes(b'\xef\xbb\xbf{"0": "Katze"}')
    assert class_names(["cat"], None, str(tmp_path / "names.json")) == ["Katze"]
    (tmp_path / "run.args").write_bytes(b"\xef\xbb\xbf--epochs 7\n")
    assert parse_args([f"@{tmp_path / 'run.args'}"]).epochs == 7


# Checkpoints -------------------------------------------------------------------------------------


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in weights.items()}


WRAPPERS = {
    "compiled": lambda w: {"model": prefixed(w, "_orig_mod.")},
    "compiled in DDP": lambda w: {"model": prefixed(w, "module._orig_mod.")},
    "DDP in DP": lambda w: {"model": prefixed(w, "module.module.")},
    "timm": lambda w: {"state_dict": w, "arch": "x", "epoch": 3},
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2"},
    "nested": lambda w: {"model": {"state_dict": prefixed(w, "module.")}, "epoch": 1},
    "a tutorial's": lambda w: {"model_state_dict": w, "loss": 0.5},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_weights_are_unwrapped(checkpoint, wrap):
    weights = Checkpoint.load(str(checkpoint)).state_dict()
    found = Checkpoint(wrap(dict(weights)), "x.pth").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_only_averaged_weights_ask_for_use_ema(checkpoint):
    weights = dict(Checkpoint.load(str(checkpoint)).state_dict())
    lone = Checkpoint({"state_dict_ema": weights}, "x.pth")
    with pytest.raises(UserError, match="has only averaged weights; pass --use-ema"):
        lone.state_dict()
    assert lone.state_dict(use_ema=True).keys() == weights.keys()


def test_folder_as_checkpoint_raises(checkpoint):
    with pytest.raises(UserError, match="is a folder, not a checkpoint"):
        Checkpoint.load(str(checkpoint.parent))


def test_model_trained_without_halting_is_evaluated_without(tmp_path, image_folder, capsys):
    path = save_halting_micro(tmp_path / "static.pth", 3, gate=None, classes=CLASSES)
    flags = ["--finetune", str(path), "--data-path", str(image_folder), "--output_dir", str(tmp_path)]
    main_act.main([*MICRO, "--eval", *flags])
    printed = capsys.readouterr()
    assert json.loads((tmp_path / "eval.json").read_text())["depth_mean"] == 12
    assert "MACs per image" in printed.out
    assert not re.search("depth|gate|live tokens", printed.out)
    assert "was trained without halting" in printed.err
    checkpoint = Checkpoint.load(str(path))
    assert not checkpoint.build_model().halting
    assert checkpoint.build_model(gate_center=20.0).halting  # a given gate enables halting
    assert checkpoint.build_model(as_trained=False).halting  # training starts from it with halting


def test_nonfinite_logits_give_no_results(tmp_path, image_folder, capsys):
    path = save_halting_micro(tmp_path / "c.pth", 3)
    content = torch.load(path)
    content["model"]["head.bias"][0] = torch.nan
    torch.save(content, path)
    data = ["--finetune", str(path), "--data-path", str(image_folder)]
    with pytest.raises(SystemExit) as stopped:
        main_act.main([*MICRO, "--eval", *data])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "are not finite" in captured.err
    assert "top-1" not in captured.out
    with pytest.raises(SystemExit):
        visualize.main([*MICRO[2:], "--summary", *data, "--output-dir", str(tmp_path / "out")])
    assert "are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.html").exists()
    assert "are not finite" in error_of(capsys, benchmark.main, "--model", "avit_micro_patch4_32", *data)


def test_atomic_write_keeps_a_symbolic_link(tmp_path):
    real, link = tmp_path / "real.pth", tmp_path / "link.pth"
    real.write_bytes(b"old")
    link.symlink_to(real)
    utils.atomic_write(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_atomic_write_does_not_replace_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    utils.atomic_write(pipe, lambda file: file.write(b"new"))
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    assert pipe.is_fifo()


def test_atomic_write_to_a_folder_without_fsync(tmp_path, monkeypatch):
    flush = os.fsync

    def refuse_folders(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").resolve().is_dir():
            raise OSError(22, "Invalid argument")
        flush(number)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    utils.atomic_write(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new"


# Processes and environments ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_invalid_launcher_variable_raises(name, monkeypatch, capsys, image_folder):
    monkeypatch.setenv(name, "four")
    message = error_of(capsys, main_act.main, *MICRO, "--data-path", image_folder, "--eval")
    assert f"{name} is 'four' in the environment" in message
    monkeypatch.setenv(name, "")
    main_act.main([*MICRO, "--data-path", str(image_folder), "--eval"])


def test_rank_out_of_range_raises(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "5")
    assert "RANK is 5 in the environment, which is out of range: WORLD_SIZE is 2" in error_of(
        capsys, main_act.main, *MICRO, "--eval"
    )


def test_single_process_with_a_local_rank_prints_its_error(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "no such folder" in error_of(capsys, main_act.main, *MICRO, "--data-path", "/nowhere", "--eval")


def test_single_process_command_ignores_world_size(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "test_acc1": 50.0}\n')
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    visualize.main(["--curves", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "curves.png").exists()


def test_waiting_process_prints_a_warning(image_folder, tmp_path):
    environment = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29763",
    }
    argv = (*MICRO, "--data-path", image_folder, "--eval")
    soon = "from training import launch; launch.WAIT_WARNING_SECONDS = 0.2"
    process = Script("main_act.py", *argv, log=tmp_path / "log", environment=environment, prepare=soon)
    try:
        process.wait_until(lambda: "\n" in process.errors())
    finally:
        process.kill()
    assert "process 0 of 2 waits for the others at 127.0.0.1:29763" in process.errors()


HOLDING = """
import pathlib, sys, time, utils
with utils.lock_output_dir(pathlib.Path(sys.argv[2])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_locked_output_folder_raises(tmp_path):
    process = Script("-c", HOLDING, tmp_path, log=tmp_path / "log")
    try:
        process.wait_until(lambda: process.output() == "in\n")
        message = f"another run is using this folder .process {process.pid} on "
        with pytest.raises(UserError, match=message), utils.lock_output_dir(tmp_path):
            pass
    finally:
        process.kill()
    with utils.lock_output_dir(tmp_path):  # a killed run leaves no lock
        pass


# Python sets a stream to None if it is closed at startup.
CLOSED = {
    "stdout": "import os, sys; os.close(1); sys.stdout = sys.__stdout__ = None",
    "stderr": "import os, sys; os.close(2); sys.stderr = sys.__stderr__ = None",
}


@pytest.mark.parametrize("stream", CLOSED)
def test_closed_stream_does_not_stop_evaluation(tmp_path, image_folder, checkpoint, stream):
    argv = [*MICRO, "--data-path", image_folder, "--eval", "--finetune", checkpoint, "--output_dir", tmp_path / "out"]
    assert Script("main_act.py", *argv, log=tmp_path / "log", prepare=CLOSED[stream]).wait() == 0
    assert (tmp_path / "out" / "eval.json").exists()


ENDED_PIPE = """
import os
read, write = os.pipe()
os.dup2(write, 1)
os.close(read)
os.close(write)
"""


def test_closed_pipe_and_ascii_output_do_not_stop_evaluation(tmp_path, image_folder):
    path = save_halting_micro(tmp_path / "c.pth", 3, classes=["ä", "ö", "名"])
    argv = [*MICRO, "--data-path", image_folder, "--eval", "--finetune", path, "--output_dir", tmp_path]
    environment = {"PYTHONIOENCODING": "ascii"}
    process = Script("main_act.py", *argv, log=tmp_path / "log", environment=environment, prepare=ENDED_PIPE)
    assert process.wait() == 0
    assert re.search(r"\\xe4", process.errors())
    assert (tmp_path / "eval.json").exists()


WITHOUT = """
import signal
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "alarm"):
    delattr(signal, name)
"""


def test_evaluation_without_unix_signals(image_folder, checkpoint, tmp_path):
    argv = [*MICRO, "--data-path", image_folder, "--eval", "--finetune", checkpoint, "--num_workers", "1"]
    process = Script("main_act.py", *argv, log=tmp_path / "log", prepare=WITHOUT)
    assert process.wait() == 0, process.errors()


def test_number_of_workers_is_at_most_the_usable_cores(monkeypatch, image_folder):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert utils.usable_cores() == 1
    data = build_dataset("IMNET", str(image_folder), False, (32, 32))
    assert demo_loader(data, 2, num_workers=10, pin_memory=False).num_workers == 1


class Killed(SkipUnreadable):
    def __getitem__(self, place):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)


def test_killed_worker_gives_one_line(image_folder, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("training.loaders.SkipUnreadable", Killed)
    argv = [*MICRO, "--data-path", image_folder, "--eval", "--finetune", checkpoint, "--num_workers", "1"]
    with pytest.raises(SystemExit) as stopped:
        main_act.main([*map(str, argv)])
    assert stopped.value.code == 1
    assert "out of memory; reduce --num-workers" in capsys.readouterr().err


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--epochs", "1", "--warmup-epochs", "0"], "--min-lr 1e-05 is above the learning rate "),
        (
            ["--epochs", "1", "--lr", "1", "--warmup-epochs", "5"],
            "--warmup-epochs 5 is not below --epochs 1; training ends before",
        ),
    ],
)
def test_contradictory_settings_warn(flags, warning, image_folder, capsys):
    main_act.main([*MICRO, "--data-path", str(image_folder), "--no-model-ema", *flags])
    assert warning in capsys.readouterr().err


def test_truncated_log_line_is_kept_apart(tmp_path, image_folder):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "test_acc1": 1.0}\n{"epoch": 1, "test_a')
    argv = [*MICRO, "--data-path", image_folder, "--epochs", 1, "--no-model-ema", "--output_dir", tmp_path]
    main_act.main([*map(str, argv)])
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["epoch"] == 0
    visualize.main(["--curves", str(tmp_path), "--output-dir", str(tmp_path / "out")])


def test_start_epoch_out_of_range_raises(image_folder, capsys):
    message = error_of(capsys, main_act.main, *MICRO, "--data-path", image_folder, "--epochs", 2, "--start_epoch", 5)
    assert "--start-epoch 5 leaves no epoch to train; --epochs is 2" in message


def test_benchmark_checks_its_flags_first(tmp_path, capsys):
    model = ["--model", "avit_micro_patch4_32"]
    assert "cannot be written" in error_of(capsys, benchmark.main, *model, "--json", tmp_path / "no" / "x.json")
    assert "expected one of" in error_of(capsys, benchmark.main, *model, "--plot", tmp_path / "x.xyz")
    assert "a finite number" in error_of(capsys, benchmark.main, *model, "--mean-depth", "nan")
    assert "not a multiple" in error_of(capsys, benchmark.main, *model, "--input-size", 30)


# Other packages and torch tools ------------------------------------------------------------------


IMPORT = """
import os, sys
root, elsewhere = sys.argv[2:]
os.chdir(elsewhere)
sys.path = ["", *(path for path in sys.path if path and not path.startswith(root + "/tests") and path != root), root]
import models_act
from datasets import load_dataset
"""


def test_repository_last_on_the_path_does_not_hide_the_package_datasets(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("def load_dataset(): ...")
    process = Script("-c", IMPORT, ROOT, tmp_path, log=tmp_path / "log")
    assert process.wait() == 0, process.errors()


def test_torch_fx_raises():
    with pytest.raises(NotImplementedError, match=r"torch\.fx is not supported: .* Use torch\.compile"):
        torch.fx.symbolic_trace(halting_model())


def test_macs_of_a_quantized_model():
    model = halting_model().eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    depth = torch.full((2, 17), 5.0)
    assert torch.equal(macs_per_image(quantized, depth), macs_per_image(model, depth))
    assert quantized(images(2)).shape == (2, 7)
