"""Rendezvous of the processes of a run: they find each other, refuse strangers, and compare their settings."""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import utils
from datasets import Stream, dataset_digest
from utils import RankError, all_gather_objects, environment_int

PROCESS_TIMEOUT = timedelta(minutes=30)  # a process that waits longer for the others fails
CONNECT_TIMEOUT = timedelta(minutes=1)  # for the handshake, once something listens at the address
RESOLVE_SECONDS = 30.0  # a host name may become known only after the machine has started
FAREWELL_SECONDS = 5.0  # how long process 0, which hosts the store, lets the others read the settings that differ
PER_PROCESS = {"device", "dist_url", "num_workers", "pin_mem", "world_size"}  # flags that may differ
FOLDERS = {"data_path", "demo_dir", "output_dir"}  # flags whose values may differ, as machines mount disks differently
FILES = {"class_index", "finetune", "pretrained_path", "resume", "teacher_path"}  # flags whose files must be equal
JOB_VARIABLES = {
    "SLURM_HET_JOB_ID": "Slurm job",  # common to the components of a job, each of which has its own SLURM_JOB_ID
    "SLURM_JOB_ID": "Slurm job",
    "PBS_JOBID": "PBS job",
    "LSB_JOBID": "LSF job",
}
JOB = "the scheduler's job"  # a setting; without one, a process fits any job
OTHER_RUN = "If they belong to different runs, set another MASTER_PORT for one of them."


def meet(dist_url: str, rank: int, world_size: int, settings: dict[str, str]) -> dist.Store:
    """Connect to the other processes of this run, and return the store that they share.

    settings: values that must be the same in all processes, by name, see `settings_of`.
    Raises RankError if the address is invalid or in use, if process 0 belongs to another job, if another process has
    this rank, or if settings differ.
    """
    has_launcher = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun gives each run a store and each process a rank
    address = _address(dist_url)
    if address is not None:
        _wait_for_host(*address, is_host=rank == 0 and not has_launcher)
    try:
        store = _connect(dist_url, rank, world_size, address)
        if not has_launcher:
            _refuse_strangers(store, rank, _text(address))
        # torchrun's store outlives the processes it restarts. A prefix hides the entries of earlier attempts.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _compare(store, rank, world_size, {JOB: job_name(), **settings})
    except dist.DistNetworkError as error:
        raise RankError(
            f"process {rank} lost the connection to process 0 at {_text(address)}, which has probably ended. "
            "See the error of process 0."
        ) from error
    return store


# Address -----------------------------------------------------------------------------------------


def _address(dist_url: str) -> tuple[str, int] | None:
    """Return host and port of process 0, or None if the URL has neither. Raises RankError if they are invalid."""
    if dist_url == "env://":
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name, "").strip():
                raise RankError(
                    f"{name} is not set. Set MASTER_ADDR to the machine of process 0 and MASTER_PORT to a free port "
                    "there, or launch with torchrun, which sets both."
                )
        host, port = os.environ["MASTER_ADDR"].strip(), environment_int("MASTER_PORT", 0)
        if not 1 <= port <= 65535:
            raise RankError(f"MASTER_PORT is {port} in the environment, expected a free port from 1 to 65535.")
        return host, port
    if not dist_url.startswith("tcp://"):
        return None
    try:
        host, port = urlparse(dist_url).hostname, urlparse(dist_url).port
    except ValueError:
        host, port = None, None
    if not (host and port):
        raise RankError(f"--dist-url {dist_url}: expected tcp://HOST:PORT with a port from 1 to 65535")
    return host, port


def _text(address: tuple[str, int] | None) -> str:
    return ":".join(map(str, address)) if address else "the given URL"


def _retry(call: Callable[[], object], seconds: float) -> Exception | None:
    """Repeat a call until it succeeds. Returns the last OSError or UnicodeError if it fails for the given time.

    Unlike the waits of a store, it can be interrupted by signals.
    """
    deadline, pause = time.monotonic() + seconds, 0.01
    while True:
        try:
            call()
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                return error
        else:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def _wait_for_host(host: str, port: int, is_host: bool) -> None:
    """Wait until the machine of process 0 is known and, in the other processes, until it listens at the port."""
    problem = _retry(lambda: socket.getaddrinfo(host, port), RESOLVE_SECONDS)
    if problem is not None:
        raise RankError(
            f"the host {host!r} of process 0 cannot be resolved ({problem}). "
            "Set MASTER_ADDR (or --dist-url) to the name or the IP address of its machine."
        )
    if is_host:
        return
    connect = partial(socket.create_connection, (host, port), timeout=5)
    if _retry(lambda: connect().close(), PROCESS_TIMEOUT.total_seconds()):
        raise RankError(
            f"process 0 does not listen at {host}:{port} after {PROCESS_TIMEOUT}. "
            "Start it, or correct MASTER_ADDR and MASTER_PORT."
        )


def _connect(dist_url: str, rank: int, world_size: int, address: tuple[str, int] | None) -> dist.Store:
    """Return the store of process 0 or of torchrun. Raises RankError if that fails."""
    # A host that waits for world_size clients counts strangers too. It waits for its own processes in `_compare`.
    clients = world_size if address is None else 1
    try:
        store, *_ = next(dist.rendezvous(dist_url, rank, clients, timeout=CONNECT_TIMEOUT))
    except (ValueError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise RankError(
                f"port {address[1]} of this machine is in use, probably by another run. "
                "Set MASTER_PORT to a free port, the same in all processes of this run."
            ) from error
        raise RankError(f"the processes cannot connect at {dist_url}: {str(error).splitlines()[0]}") from error
    store.set_timeout(PROCESS_TIMEOUT)
    return store


# Strangers ---------------------------------------------------------------------------------------


def job_name() -> str:
    """Return the name of the scheduler's job of this process, or "" outside of jobs.

    It includes Slurm's step if that has several tasks: each such step is a run of its own.
    """
    name = next((f"{kind} {os.environ[key]}" for key, kind in JOB_VARIABLES.items() if os.environ.get(key)), "")
    if name and environment_int("SLURM_STEP_NUM_TASKS", 1) > 1:
        name += f", step {os.environ.get('SLURM_STEP_ID', 'unknown')}"
    return name


def _refuse_strangers(store: dist.Store, rank: int, place: str) -> None:
    """Raise RankError if process 0 belongs to another job than this process, or if another process has its rank.

    Processes outside of jobs fit any job.
    """
    own = job_name()
    if rank == 0 and not store.check(["job of process 0"]):
        store.set("job of process 0", own)
    host = _read(store, "job of process 0")
    if own and host and own != host:
        raise RankError(
            f"process {rank} belongs to {own}, but process 0 at {place} belongs to {host}. "
            "Set another MASTER_PORT for one of them."
        )
    if store.add(f"processes with rank {rank}", 1) > 1:
        raise RankError(
            f"another process {rank} is already connected to process 0 at {place}. "
            f"Set RANK to another number in each process. {OTHER_RUN}"
        )


def _has(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Wait for entries of the store, and return whether they are there."""

    def check() -> None:
        if not store.check(keys):
            raise TimeoutError

    return _retry(check, seconds) is None


def _read(store: dist.Store, key: str) -> str:
    """Wait for an entry of the store and return it. Raises RankError if it is missing after PROCESS_TIMEOUT."""
    if not _has(store, [key], PROCESS_TIMEOUT.total_seconds()):
        raise RankError(f"{key} has not started within {PROCESS_TIMEOUT}. Start all processes of the run.")
    return store.get(key).decode()


# Settings ----------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that must be the same in all processes, and the versions of the code, by name."""
    settings = {"the version of torch": torch.__version__, "the version of timm": timm.__version__}
    for name, value in vars(args).items():
        if name in PER_PROCESS:
            continue
        if name in FOLDERS:
            value = "given" if value else "not given"
        elif name in FILES and value and Path(value).is_file():
            value = f"a file with checksum {checksum(Path(value))}"
        settings[f"--{name.replace('_', '-')}"] = str(value)
    return settings


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file, 8 hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def difference(own: dict[str, str], first: dict[str, str], rank: int) -> str:
    """Return an error message that names the settings of a process that differ from those of process 0, else ""."""
    changed = [name for name in {**first, **own} if first.get(name) != own.get(name)]
    if JOB in changed and not (first.get(JOB) and own.get(JOB)):
        changed.remove(JOB)
    if not changed:
        return ""
    some = "; ".join(f"{name} is {own.get(name)} instead of {first.get(name)}" for name in changed[:5])
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return (
        f"process {rank} differs from process 0: {some}{more}. "
        f"Start all processes of a run with the same command and files. {OTHER_RUN}"
    )


def _compare(store: dist.Store, rank: int, world_size: int, settings: dict[str, str]) -> None:
    """Raise RankError in every process if the settings of any differ from those of process 0."""
    store.set(f"process {rank}", json.dumps({"WORLD_SIZE": str(world_size), **settings}))
    first = json.loads(_read(store, "process 0"))
    # The own settings come first: with another WORLD_SIZE, some of the others may never start.
    for other in (rank, *range(1, world_size)):
        message = difference(json.loads(_read(store, f"process {other}")), first, other)
        if not message:
            continue
        store.set(f"process {rank} has read", "")
        if rank == 0:  # the store ends with process 0
            _has(store, [f"process {other} has read" for other in range(1, world_size)], FAREWELL_SECONDS)
        raise RankError(message)


def require_same(settings: dict[str, object]) -> None:
    """Raise RankError in every process if values differ between processes, each of which must call this."""
    ranks = [{name: str(value) for name, value in own.items()} for own in all_gather_objects(settings)]
    message = next(filter(None, (difference(own, ranks[0], rank) for rank, own in enumerate(ranks))), "")
    if message:
        raise RankError(message)


def require_same_images(images: Dataset) -> Dataset:
    """Return the dataset. Raises RankError in every process if its images or classes differ between processes."""
    if utils.world_size() == 1:
        return images
    is_stream = isinstance(images, Stream)
    classes = zlib.crc32("\n".join(images.classes).encode(errors="surrogateescape"))
    settings = {
        "the number of images in --data-path": images.num_images if is_stream else len(images),
        "the number of classes": len(images.classes),
        "the checksum of the class names": f"{classes:08x}",
    }
    if not is_stream or images.train:  # in validation, each process has shards of its own
        settings["the checksum of the image names and labels"] = dataset_digest(images)[:8]
    require_same(settings)
    return images
