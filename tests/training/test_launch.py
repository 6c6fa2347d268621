import os

import pytest
import torch
import torch.distributed as dist

import utils
from training.launch import LAUNCHER, process_group
from utils import UserError


def test_slurm_speaks_torchruns_language(monkeypatch):
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in LAUNCHER})
    os.environ.update(
        SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1", SLURM_LAUNCH_NODE_IPADDR="192.0.2.7"
    )
    with pytest.raises(UserError, match="cannot meet at nowhere://"), process_group("cpu", "nowhere://"):
        pass
    assert [os.environ[name] for name in LAUNCHER] == ["3", "8", "1"]
    assert os.environ["MASTER_ADDR"] == "192.0.2.7"


@pytest.fixture
def chosen(monkeypatch):
    """Fakes CUDA with four devices; those that are chosen. What is switched on for CUDA is restored."""
    chosen, precision = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield chosen
    torch.set_float32_matmul_precision(precision)


def test_each_slurm_task_takes_a_device_of_its_own(monkeypatch, chosen):
    """The process group fails, as there is no NCCL here."""
    for task in range(4):
        slurm = {"SLURM_PROCID": str(4 + task), "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": str(task)}
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in LAUNCHER} | slurm)
        with pytest.raises(UserError, match="cannot meet"), process_group("cuda", "nowhere://"):
            pass
    assert chosen == [0, 1, 2, 3]


def test_a_task_outside_srun_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # sbatch's own shell
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with process_group("cpu"):
        assert "RANK" not in os.environ
        assert utils.world_size() == 1


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no CUDA device"), process_group("cuda"):
        pass


def switches():
    return (
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,  # of convolutions
    )


def test_cuda_multiplies_in_tf32_and_tries_its_convolutions(chosen, recwarn):
    before = switches()
    with process_group("cpu"):
        assert switches() == before == (False, "highest", True)
    with process_group("cuda") as device:
        assert device == torch.device("cuda", 0)
        assert switches() == (True, "high", True)
    assert not recwarn.list


def test_one_process_takes_the_device_that_is_named(chosen):
    with process_group("cuda:1") as device:
        assert device == torch.device("cuda", 1)
    assert chosen == [1]


def two_processes(monkeypatch, rank):
    """In the environment, without there being another; returns what the process group is told."""
    options = {}
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    monkeypatch.setattr(os, "environ", os.environ | environment)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), rank, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: options.update(given, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return options


def test_nccl_is_told_its_device_and_gloo_is_not(monkeypatch, chosen):
    options = two_processes(monkeypatch, rank=1)
    with process_group("cuda") as device:
        assert device == torch.device("cuda", 1)
    assert (options["backend"], options["device_id"]) == ("nccl", torch.device("cuda", 1))
    options.clear()
    with process_group("cpu"):
        assert options["backend"] == "gloo"
        assert "device_id" not in options


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
        {"RANK": "1"},
    ],
    ids=["torchrun", "srun", "by hand"],
)
def test_processes_do_not_share_the_device_that_is_named(monkeypatch, chosen, environment):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in LAUNCHER} | environment)
    message = "--device cuda:1: each of the 2 processes takes a device of its own; give --device cuda"
    with pytest.raises(UserError, match=f"^{message}$"), process_group("cuda:1", "nowhere://", size=2):
        pass
    assert chosen == []
