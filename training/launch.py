"""Start-up of a command: join the process group, and choose the device of this process."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.rendezvous import PROCESS_TIMEOUT, meet
from utils import RankError, UserError, environment_int, warn

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # Slurm's names, in the same order
WAIT_WARNING_SECONDS = 5.0  # a process that waits longer for the others prints a warning


class LaunchEnvironment(NamedTuple):
    """The position of this process among the processes of the run."""

    rank: int
    world_size: int


def resolve_launch_environment(world_size: int | None = None) -> LaunchEnvironment:
    """Read rank and world size from the variables of torchrun, torch.distributed.launch or srun.

    world_size: number of processes if WORLD_SIZE is not set. A single process ignores RANK.
    Under srun, torchrun's variables are first set from Slurm's.
    Raises RankError if a variable is missing, invalid or out of range.
    """
    if environment_int("SLURM_STEP_NUM_TASKS", 1) > 1 and not _is_set("RANK"):
        _adopt_slurm_variables()
    elif environment_int("SLURM_STEP_NUM_TASKS", 1) > 1 and not _is_set("WORLD_SIZE") and world_size is None:
        raise RankError(
            f"RANK is {os.environ['RANK']} but WORLD_SIZE is not set, and SLURM_STEP_NUM_TASKS is "
            f"{os.environ['SLURM_STEP_NUM_TASKS']}. Unset RANK to use Slurm's variables, or set WORLD_SIZE too."
        )
    source, flag = "WORLD_SIZE" if _is_set("WORLD_SIZE") else "--world-size", world_size
    world_size = environment_int("WORLD_SIZE", flag or 1)
    if flag not in (None, world_size):
        warn(f"--world-size is {flag} but WORLD_SIZE is {world_size} in the environment; using {world_size}")
    if world_size <= 1:
        return LaunchEnvironment(0, 1)
    rank = environment_int("RANK", -1)
    if rank < 0:
        raise RankError(
            f"{source} is {world_size} but RANK is not set. "
            f"Launch with torchrun, set RANK in each process, or do not set {source} to run one process."
        )
    if rank >= world_size:
        raise RankError(
            f"RANK is {rank} in the environment, which is out of range: {source} is {world_size}. "
            "Launch with torchrun, or set neither to run one process."
        )
    environment_int("LOCAL_RANK", 0)  # is valid, where it is set
    return LaunchEnvironment(rank, world_size)


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name, "").strip())


def _adopt_slurm_variables() -> None:
    """Set torchrun's variables from those of a Slurm step with several tasks."""
    values = {name: environment_int(name, -1) for name in SLURM_VARIABLES}
    tasks = values["SLURM_STEP_NUM_TASKS"]
    for name, value in values.items():
        problem = "is not set" if value < 0 else f"is {value}, which is out of range"
        if value < 0 or (value >= tasks and name != "SLURM_STEP_NUM_TASKS"):
            raise RankError(
                f"SLURM_STEP_NUM_TASKS is {tasks} but {name} {problem}. "
                "Start the processes with srun, or unset SLURM_STEP_NUM_TASKS to run one process."
            )
    if environment_int("WORLD_SIZE", tasks) != tasks:
        raise RankError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but SLURM_STEP_NUM_TASKS is {tasks}, and RANK is not set. "
            "Unset WORLD_SIZE to use Slurm's variables, or set RANK in each process."
        )
    os.environ.update({name: str(values[slurm]) for name, slurm in zip(LAUNCHER_VARIABLES, SLURM_VARIABLES)})
    os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    os.environ.setdefault("MASTER_PORT", str(_slurm_port()))


def _slurm_port() -> int:
    """Return a port below the ephemeral ones; jobs that share a machine have different ones with high probability."""
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10_000 + zlib.crc32(f"{job}.{step}".encode()) % 20_000


@contextmanager
def process_group(
    device_type: str | None,
    dist_url: str = "env://",
    world_size: int | None = None,
    settings: Callable[[], dict[str, str]] = dict,
) -> Iterator[torch.device]:
    """Join the process group that the environment describes, and yield the device of this process.

    device_type: cuda, cuda:N or cpu; None selects CUDA if it is available.
    dist_url, world_size: a tcp://host:port URL and the number of processes, for processes that are started manually
    with RANK set. torchrun, torch.distributed.launch and srun need neither.
    settings: returns values that must be the same in all processes, by name; called if there are several
    A single process joins no group. Raises UserError if the processes cannot connect, or do not belong together.
    """
    launch = resolve_launch_environment(world_size)  # before the device, whose index is the local rank
    device = _device(device_type, launch.world_size)
    if device.type == "cuda":
        _enable_fast_kernels()
    if launch.world_size == 1:
        yield device
        return
    with _warning_while_waiting(launch, dist_url):
        _init_group(launch, dist_url, device, {"the device": device.type, **settings()})
    yield device
    dist.destroy_process_group()  # not after an error: it could block on processes that wait for this one


@contextmanager
def _warning_while_waiting(launch: LaunchEnvironment, dist_url: str) -> Iterator[None]:
    """Print a warning if the body takes longer than WAIT_WARNING_SECONDS."""
    address = dist_url
    if dist_url == "env://":
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    message = (
        f"process {launch.rank} of {launch.world_size} waits for the others at {address}. "
        "To run a single process, unset WORLD_SIZE and RANK."
    )
    timer = threading.Timer(WAIT_WARNING_SECONDS, warn, (message, True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _init_group(launch: LaunchEnvironment, dist_url: str, device: torch.device, settings: dict[str, str]) -> None:
    """Initialize torch.distributed, or raise UserError if the processes cannot connect, see `meet`."""
    store = meet(dist_url, launch.rank, launch.world_size, settings)
    position = {"world_size": launch.world_size, "rank": launch.rank, "timeout": PROCESS_TIMEOUT}
    backend = "nccl" if device.type == "cuda" else "gloo"
    options = {"device_id": device} if backend == "nccl" else {}  # otherwise NCCL guesses it from the rank
    try:
        dist.init_process_group(backend, store=store, **position, **options)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot connect at {dist_url}: {error}") from error


@contextmanager
def single_process(device_type: str | None) -> Iterator[torch.device]:
    """Yield the device for a command that runs in one process, and ignore the variables that launchers leave behind.

    Raises UserError under torchrun with several processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and environment_int("WORLD_SIZE", 1) > 1:
        raise UserError("this command runs in one process, but torchrun started several. Start it without torchrun.")
    device = _device(device_type, 1)
    if device.type == "cuda":
        _enable_fast_kernels()
    yield device


def _device(device_type: str | None, processes: int) -> torch.device:
    """Return the device for this process, and make it the current CUDA device.

    Raises UserError if the device is invalid or not available.
    """
    try:
        device = torch.device(device_type or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device: unknown device {device_type!r}; expected cuda or cpu") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {device_type}: expected cuda or cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    if device.index is not None and processes > 1:
        raise UserError(
            f"--device {device_type}: each of the {processes} processes needs its own device; use --device cuda"
        )
    count, index = torch.cuda.device_count(), device.index
    if index is None:
        index = environment_int("LOCAL_RANK", 0) if processes > 1 else 0
        if count == 1 and "SLURM_PROCID" in os.environ:
            index = 0  # Slurm may show each task its own device only
    if index >= count:
        fix = (
            f"start at most {count} processes per machine"
            if processes > 1
            else f"use one from cuda:0 to cuda:{count - 1}"
        )
        raise RankError(f"--device {device_type or 'cuda'}: no CUDA device {index}; number of devices: {count}; {fix}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _enable_fast_kernels() -> None:
    """Let cuDNN choose the fastest convolution, and use TF32 for float32 matrix products."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # convolutions use TF32 by default
