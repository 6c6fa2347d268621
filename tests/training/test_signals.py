"""Signals, as they reach a run from its launcher, its user, or Slurm."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, halting_model, images, make_image_folder
from processes import in_processes

from engine_act import evaluate
from training.signals import StopRequest
from utils import any_rank

SMALL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--batch-size", "4", "--epochs", "400"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("interrupts") / "data", classes=3, train=8, val=3)


def start(data, out, *flags, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "main_act.py"), *SMALL, "--data-path", str(data)]
    command += ["--output_dir", str(out), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while not (out / "log.txt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGUSR1"))])
def test_a_signal_saves_and_ends_well(data, tmp_path, name):
    """Sent to the whole group, loader processes too, as terminals and Slurm do."""
    process = start(data, tmp_path / "out", "--num_workers", 2)
    os.killpg(process.pid, getattr(signal, name))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"stopped by {name}" in output.splitlines()[-1]
    assert "the same command with --resume auto" in output.splitlines()[-1]
    assert "Traceback" not in errors
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
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


def test_a_signal_to_one_process_stops_the_evaluation_of_all(tmp_path):
    in_processes(_evaluate_until_asked, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["10", "10"]  # 8 and 2


def test_a_second_signal_acts_at_once(monkeypatch):
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


def test_processes_stop_together(data, tmp_path):
    """Only one of them gets the signal; only one of them tells and logs."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611")
    process = start(data, tmp_path / "out", "--num_workers", 0, launcher=launcher)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.count("stopped by SIGUSR1") == 1
    epochs = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert output.count("Accuracy of the network on the 9 test images") == len(epochs) >= 1
