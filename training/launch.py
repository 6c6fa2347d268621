"""The processes of a run: how they find one another, and the device of each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import RankError, UserError, environment_int, warn

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
TOLD_AFTER = 5.0  # seconds, from which a process that waits for the others says so
PROCESS_TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others before it fails


@contextmanager
def process_group(device_type: str | None, dist_url: str = "env://", size: int | None = None) -> Iterator[torch.device]:
    """Joins the other processes, if the environment speaks of several, and yields this one's device.

    device_type: cuda or cpu, None for cuda where there is one.
    Understands torchrun, torch.distributed.launch and srun. `size` and a `dist_url` of
    tcp://host:port are for processes started by hand, with RANK in their environment.
    """
    _adopt_slurm()  # before the device, whose number follows from it
    size = environment_int("WORLD_SIZE", size or 1)
    device = _device(device_type, size)
    if device.type == "cuda":
        _switch_on_fast_kernels()
    if size <= 1:
        yield device
        return
    number = environment_int("RANK", -1)
    if number < 0:
        raise UserError(f"for {size} processes: start them with torchrun, or set RANK for each, or unset WORLD_SIZE")
    if number >= size:
        raise UserError(f"RANK is {number} in the environment, of {size} processes: unset both, or start with torchrun")
    backend = "nccl" if device.type == "cuda" else "gloo"
    options = {"world_size": size, "rank": number, "timeout": PROCESS_TIMEOUT}
    bound = {"device_id": device} if backend == "nccl" else {}  # NCCL would guess it from the rank
    where = dist_url if dist_url != "env://" else ":".join(os.environ.get(name, "?") for name in MEETING_PLACE)
    told = f"process {number} waits at {where} for the others of {size}, as the environment or the flags ask for"
    waiting = threading.Timer(TOLD_AFTER, warn, (f"{told}; if it is to run alone: unset WORLD_SIZE RANK", True))
    waiting.daemon = True
    waiting.start()
    try:
        store, *_ = next(dist.rendezvous(dist_url, **options))
        # torchrun's store outlives the processes that it brings back, and so would the addresses in it
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=attempt, **options, **bound)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot meet at {dist_url}: {error}") from error
    finally:
        waiting.cancel()
    yield device
    dist.destroy_process_group()  # not after an error: it might wait for processes that wait for this one


@contextmanager
def single_process(device_type: str | None) -> Iterator[torch.device]:
    """As `process_group`, of a command that runs alone, whatever launchers have left in the environment."""
    if "TORCHELASTIC_RUN_ID" in os.environ and environment_int("WORLD_SIZE", 1) > 1:
        raise UserError("this command runs alone: start it without torchrun")
    device = _device(device_type, 1)
    if device.type == "cuda":
        _switch_on_fast_kernels()
    yield device


def _adopt_slurm() -> None:
    """Under srun, sets what torchrun would: Slurm's names for the same things."""
    if os.environ.get("RANK") or environment_int("SLURM_STEP_NUM_TASKS", 1) == 1:
        return
    slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    os.environ.update({name: os.environ[source] for name, source in zip(LAUNCHER, slurm)})
    os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    os.environ.setdefault("MASTER_PORT", "29500")


def _device(device_type: str | None, processes: int) -> torch.device:
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
        each = f"each of the {processes} processes takes a device of its own"
        raise UserError(f"--device {device_type}: {each}; give --device cuda")
    count = torch.cuda.device_count()
    index = device.index
    if index is None:
        index = environment_int("LOCAL_RANK", 0) if processes > 1 else 0
    index = 0 if count == 1 and device.index is None and "SLURM_PROCID" in os.environ else index  # one each
    if index >= count:
        raise RankError(f"--device {device_type}: device {index} is asked for, there are {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _switch_on_fast_kernels() -> None:
    """On CUDA: the fastest convolution of those that there are, and TF32 where numbers are float32."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # convolutions use TF32 of themselves
