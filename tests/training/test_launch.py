import os

import pytest
import torch
import torch.distributed as dist

import utils
from training.launch import LAUNCHER_VARIABLES, process_group, resolve_launch_environment
from utils import UserError


def test_slurm_variables_set_those_of_torchrun(monkeypatch):
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    )
    os.environ.update(
        SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1", SLURM_LAUNCH_NODE_IPADDR="192.0.2.7"
    )
    with pytest.raises(UserError, match="cannot connect at nowhere://"), process_group("cpu", "nowhere://"):
        pass
    assert [os.environ[name] for name in LAUNCHER_VARIABLES] == ["3", "8", "1"]
    assert os.environ["MASTER_ADDR"] == "192.0.2.7"


@pytest.fixture
def chosen(monkeypatch):
    """Fake CUDA with four devices, and list the devices that are chosen. Restores the settings that CUDA changes."""
    chosen, precision = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield chosen
    torch.set_float32_matmul_precision(precision)


def test_slurm_tasks_choose_different_devices(monkeypatch, chosen):
    """The process group itself fails, because NCCL is not available here."""
    for task in range(4):
        slurm = {"SLURM_PROCID": str(4 + task), "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": str(task)}
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | slurm)
        with pytest.raises(UserError, match="cannot connect"), process_group("cuda", "nowhere://"):
            pass
    assert chosen == [0, 1, 2, 3]


def test_sbatch_without_srun_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in the shell of sbatch
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with process_group("cpu"):
        assert "RANK" not in os.environ
        assert utils.world_size() == 1


def test_missing_cuda_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no CUDA device"), process_group("cuda"):
        pass


def cuda_settings():
    return (
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,  # convolutions
    )


def test_cuda_enables_tf32_and_cudnn_benchmark(chosen, recwarn):
    before = cuda_settings()
    with process_group("cpu"):
        assert cuda_settings() == before == (False, "highest", True)
    with process_group("cuda") as device:
        assert device == torch.device("cuda", 0)
        assert cuda_settings() == (True, "high", True)
    assert not recwarn.list


def test_one_process_uses_the_named_device(chosen):
    with process_group("cuda:1") as device:
        assert device == torch.device("cuda", 1)
    assert chosen == [1]


def two_processes(monkeypatch, rank):
    """Describe two processes in the environment and fake the connection. Returns the options of init_process_group."""
    options = {}
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    monkeypatch.setattr(os, "environ", os.environ | environment)
    monkeypatch.setattr("training.launch.meet", lambda *_: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: options.update(given, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return options


def test_only_nccl_gets_a_device_id(monkeypatch, chosen):
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
    ids=["torchrun", "srun", "manual"],
)
def test_named_device_for_two_processes_raises(monkeypatch, chosen, environment):
    monkeypatch.setattr(
        os, "environ", {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | environment
    )
    message = "--device cuda:1: each of the 2 processes needs its own device; use --device cuda"
    with pytest.raises(UserError, match=f"^{message}$"), process_group("cuda:1", "nowhere://", world_size=2):
        pass
    assert chosen == []


@pytest.mark.parametrize(
    ("environment", "world_size", "message"),
    [
        ({"WORLD_SIZE": "4"}, None, "WORLD_SIZE is 4 but RANK is not set"),
        ({}, 4, "--world-size is 4 but RANK is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            None,
            "RANK is 2 in the environment, which is out of range: WORLD_SIZE is 2",
        ),
        (
            {"WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
            None,
            "WORLD_SIZE is 4 but SLURM_STEP_NUM_TASKS is 2, and RANK is not set. Unset WORLD_SIZE",
        ),
        (
            {"RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
            None,
            "RANK is 1 but WORLD_SIZE is not set, and SLURM_STEP_NUM_TASKS is 2. Unset RANK",
        ),
        ({"WORLD_SIZE": "four"}, None, "WORLD_SIZE is 'four' in the environment, expected an integer >= 0"),
    ],
)
def test_invalid_launch_environment_raises(monkeypatch, environment, world_size, message):
    monkeypatch.setattr(
        os, "environ", {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | environment
    )
    with pytest.raises(UserError, match=f"^{message}"):
        resolve_launch_environment(world_size)


def test_world_size_of_the_environment_wins_with_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2", "RANK": "1"})
    assert resolve_launch_environment(4).world_size == 2
    assert "--world-size is 4 but WORLD_SIZE is 2 in the environment; using 2" in capsys.readouterr().err
    resolve_launch_environment(2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "flag", "position"),
    [
        ({"WORLD_SIZE": "2"}, None, (1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, None, (3, 8)),  # torchrun in each task
        ({"RANK": "0", "WORLD_SIZE": "1"}, None, (0, 1)),
        ({"RANK": "3"}, 4, (3, 4)),
    ],
)
def test_variables_of_torchrun_in_a_slurm_step(monkeypatch, environment, flag, position):
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    others = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    monkeypatch.setattr(os, "environ", others | slurm | environment)
    assert resolve_launch_environment(flag) == position
