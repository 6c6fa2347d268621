"""Stop signals from the launcher, the user or Slurm."""

import json
import os
import signal

import pytest
import torch
from conftest import halting_model, images, make_image_folder
from processes import Script, in_processes, start_group

from engine_act import evaluate
from training.signals import StopRequest
from utils import any_rank

SMALL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--batch-size", "4", "--epochs", "400"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("interrupts") / "data", classes=3, train=8, val=3)


def flags(data, out, *more):
    return [*SMALL, "--data-path", data, "--output_dir", out, *more]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_saves_and_exits_with_0(data, tmp_path, name):
    """The signal goes to the whole process group, including data-loader workers, as from terminals and Slurm."""
    out = tmp_path / "out"
    process = Script("main_act.py", *flags(data, out, "--num_workers", 2), log=tmp_path / "log")
    process.wait_until((out / "log.txt").exists)
    os.killpg(process.pid, getattr(signal, name))
    assert process.wait() == 0, process.errors()
    last = process.output().splitlines()[-1]
    assert f"stopped by {name}" in last
    assert "the same command with --resume auto" in last
    assert "Traceback" not in process.errors()
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    epochs = [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()]
    assert epochs == list(range(checkpoint["epoch"] + 1))


def _evaluate_until_asked(rank, path):
    stop = StopRequest()
    loader = [(images(2), torch.arange(2))] * 4
    with stop.listening():
        if rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        result = evaluate(halting_model(), loader, torch.device("cpu"), should_stop=stop.asked)
        assert any_rank(stop.asked(), torch.device("cpu"))
    (path / str(rank)).write_text(str(result["images"]))


def test_signal_to_one_process_stops_all_evaluations(tmp_path):
    in_processes(_evaluate_until_asked, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["10", "10"]  # 8 and 2


def test_second_signal_takes_effect_immediately(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    stop = StopRequest()
    before = signal.getsignal(signal.SIGUSR1)
    with stop.listening():
        signal.raise_signal(signal.SIGUSR1)
        assert stop.signal == "SIGUSR1"
        assert stop.asked()
        assert not killed
        signal.raise_signal(signal.SIGUSR1)
        assert killed == [(os.getpid(), signal.SIGUSR1)]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == before


def test_signal_to_one_process_stops_all(data, tmp_path):
    """Only one process gets the signal, and only the main process prints and logs."""
    out = tmp_path / "out"
    group = start_group(2, flags(data, out, "--num_workers", 0), tmp_path)
    group[0].wait_until((out / "log.txt").exists)
    os.kill(group[1].pid, signal.SIGUSR1)
    assert [process.wait() for process in group] == [0, 0], group[0].errors() + group[1].errors()
    output = group[0].output() + group[1].output()
    assert output.count("stopped by SIGUSR1") == 1
    epochs = (out / "log.txt").read_text().splitlines()
    assert output.count("Accuracy of the network on the 9 test images") == len(epochs) >= 1
