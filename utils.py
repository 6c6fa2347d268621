"""Helpers shared by all commands: user errors, ranks, seeds, files, restored state, averages and progress output."""

from __future__ import annotations

import difflib
import errno
import fcntl
import math
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


class UserError(Exception):
    """An error that the user can fix, printed in one line before the command exits with status 2."""


class RankError(UserError):
    """A UserError raised by some ranks only, each of which prints it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the hint " (did you mean a, b?)", or "" if no known name is similar."""
    similar = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {', '.join(similar)}?)" if similar else ""


# Processes ---------------------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of processes, 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the rank of this process on its machine, 0 outside a process group."""
    return environment_int("LOCAL_RANK", 0) if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the main process (rank 0)."""
    return rank() == 0


def usable_cores() -> int:
    """Return the number of CPU cores available to this process.

    taskset, Slurm and containers may allow fewer cores than the machine has.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment_int(name: str, default: int) -> int:
    """Return an environment variable as an int, or the default if it is unset or empty.

    Raises RankError if it is not an integer >= 0, or has more than 9 digits.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise RankError(f"{name} is {text!r} in the environment, expected an integer >= 0. Unset it, or use torchrun.")
    return int(text)


SEEDS_OF_STEPS, SEEDS_OF_IMAGES = 1, 2  # last number of a seed key: the purpose of the random numbers


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (CPU, and CUDA if it is in use) from all numbers of a key."""
    python, numpy, torch_low, torch_high = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch_seed = (torch_high << 32 | torch_low) >> 1  # below 2**63
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch_seed)


def any_rank(condition: bool, device: torch.device) -> bool:
    """Return whether the condition holds on any rank.

    Every rank must call this at the same point.
    """
    if not dist.is_initialized():
        return condition
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body in the first process of each machine before the others, for downloads."""
    if dist.is_initialized() and local_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and local_rank() == 0:
            dist.barrier()


AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def amp_dtype_name(amp: str | None, device: torch.device) -> str:
    """Return a key of AMP_DTYPES, by default fp16 on CUDA and none on the CPU.

    Raises UserError for fp16 on the CPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs CUDA; use --amp bf16")
    return amp or ("fp16" if device.type == "cuda" else "none")


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the mixed-precision context for a key of AMP_DTYPES."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "none")


def check_finite(logits: Tensor) -> None:
    """Raise FloatingPointError if the logits of any image are not finite: no accuracy or speed can be reported.

    logits: [B, K]
    """
    broken = len(logits) - int(logits.isfinite().all(dim=1).sum())
    if broken:
        raise FloatingPointError(
            f"the logits of {broken} of {len(logits)} images are not finite: the weights have diverged, "
            "or half precision overflows. Use an earlier checkpoint, or --amp none."
        )


# Files -------------------------------------------------------------------------------------------


def prepare_output_dir(path: str | Path | None, flag: str = "--output-dir") -> Path | None:
    """Create the folder and check that it is writable.

    Returns None for no path. Raises UserError if the folder is not writable.
    """
    if not path:
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write to this folder: {error.strerror}") from error
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a RankError that names the path."""
    try:
        yield
    except OSError as error:
        raise RankError(f"{path}: cannot be written: {error.strerror or error}") from error


def atomic_write(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Write a temporary file next to `path`, then rename it, so that `path` is always the old or the new file.

    durable: flush the file and its folder to the disk. A symbolic link stays a link.
    An OSError leaves the old file in place. A device or a pipe, such as /dev/stdout, is written to directly.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        with open(path, "wb") as device:
            write(device)
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, where the file system supports it."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file by `atomic_write`, or raise a RankError that names the path."""
    with writing(path):
        atomic_write(path, lambda file: file.write(content), durable)


@contextmanager
def lock_output_dir(folder: Path | None) -> Iterator[None]:
    """Hold a lock on the folder in the main process.

    Raises UserError if another run holds it. The lock disappears with its process, even if
    that is killed. A file system without locks allows every run.
    """
    file, holder = None, ""
    if folder and is_main():
        with writing(folder / ".lock"):
            file = (folder / ".lock").open("a+")
    try:
        if file is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read(100) or "another process"
    holder = all_gather_objects(holder)[0]
    if holder:
        raise UserError(f"--output-dir {folder}: another run is using this folder ({holder}). Choose another folder.")
    try:
        yield
    finally:
        if file is not None:
            file.close()


# State from checkpoints --------------------------------------------------------------------------


def is_plain_tensor(value: object) -> bool:
    """Return whether a value is a dense tensor of real numbers on the CPU, not quantized."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized:
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_complex()


# Numbers and progress ----------------------------------------------------------------------------


class MetricAverages:
    """Weighted means of named scalars and vectors, over all batches and processes.

    Sums stay on the device until they are read, so `add` causes no host-device sync.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, weight: float, **values: Tensor) -> None:
        """Add values, each a scalar or a vector, with the same weight."""
        self.weight += weight
        for name, value in values.items():
            added = weight * value.detach().double()
            self.sums[name] = self.sums[name].to(added.device) + added if name in self.sums else added

    def state_dict(self) -> dict:
        """Return the sums over all processes, each of which must call this."""
        weight, sums = self._global_sums()
        return {"weight": weight, "sums": sums}

    def load_state_dict(self, state: dict) -> None:
        """Restore the sums of all processes, in one process only."""
        weight, sums = float(state["weight"]), {str(name): value.double() for name, value in state["sums"].items()}
        is_plain = all(is_plain_tensor(value) and value.ndim <= 1 and value.isfinite().all() for value in sums.values())
        if not (is_plain and 0 <= weight < math.inf):
            raise ValueError("the averages are not finite scalars and vectors")
        self.weight, self.sums = weight, sums

    def local(self) -> dict[str, float]:
        """Return the means of this process, scalars only."""
        return {name: (s / self.weight).item() for name, s in self.sums.items() if s.ndim == 0}

    def reduced(self) -> tuple[float, dict[str, float | list[float]]]:
        """Return the total weight and the means over all processes.

        Every process must call this, even without values. Raises UserError if no process has any, because no image
        could be read or because gradient scaling skipped every training step.
        """
        total, sums = self._global_sums()
        if total == 0:
            raise UserError("no metrics: no image could be read, or every training step was skipped")
        return total, {name: (s / total).tolist() for name, s in sums.items()}

    def _global_sums(self) -> tuple[float, dict[str, Tensor]]:
        ranks = all_gather_objects((self.weight, {name: s.cpu() for name, s in self.sums.items()}))
        names = {name: None for _, sums in ranks for name in sums}
        sums = {name: torch.stack([own[name] for _, own in ranks if name in own]).sum(dim=0) for name in names}
        return sum(weight for weight, _ in ranks), sums


def all_gather_objects(value: object) -> list:
    """Return the values of all processes, ordered by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_objects_to_main(value: object) -> list:
    """Return the values of all processes, ordered by rank, in the main process and [] in the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


class _MeanOverProcesses(torch.autograd.Function):
    """An all-reduce forward and backward, as in torch.distributed.nn, which is deprecated since torch 2.14."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        mean = value.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(ctx, grad)


def mean_over_processes(value: Tensor) -> Tensor:
    """Average a tensor over all processes, differentiably, so that DDP's gradient is that of the global batch."""
    return _MeanOverProcesses.apply(value) if dist.is_initialized() else value


def synchronized_time(device: torch.device) -> float:
    """Return a time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_interleaved(
    calls: dict[str, Callable[[], None]], device: torch.device, rounds: int, min_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Time each call once per round, in turn, after a warm-up call of each.

    min_seconds: repeat each call until the slowest takes this long, and use the mean.
    Returns the seconds of each call, one number per round.
    """

    def measure(call: Callable[[], None], repeats: int) -> float:
        start = synchronized_time(device)
        for _ in range(repeats):
            call()
        return (synchronized_time(device) - start) / repeats

    for call in calls.values():
        call()
    slowest = max(measure(call, 1) for call in calls.values()) if min_seconds else math.inf
    repeats = max(math.ceil(min_seconds / max(slowest, 1e-9)), 1)
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(measure(call, repeats))
    return seconds


def log(message: str) -> None:
    """Print a message to stdout in the main process."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def warn(message: str, everywhere: bool = False) -> None:
    """Print a warning to stderr in the main process, or in each process that calls this if `everywhere`."""
    if is_main() or everywhere:
        tqdm.write(f"warning: {message}", file=sys.stderr)


class TimedLoader:
    """A loader that measures how long its consumer waits for batches.

    seconds: time spent waiting, including the start of the workers
    """

    def __init__(self, loader: Iterable):
        self.loader, self.seconds = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        start = time.perf_counter()
        for batch in self.loader:
            self.seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def with_progress(
    batches, title: str, describe: Callable[[], dict[str, str]], every: int = 50, done: int = 0
) -> Iterator:
    """Yield the batches and show progress: a bar on a terminal, else a printed line every `every` batches.

    describe: returns the metrics to show, called every `every` batches; done: number of batches before these.
    """
    on_terminal = sys.stderr.isatty()
    hidden = not (is_main() and on_terminal)
    total = done + len(batches)
    bar = tqdm(batches, desc=title, leave=False, disable=hidden, initial=done, total=total)
    start = time.perf_counter()
    for number, batch in enumerate(bar, start=done + 1):
        yield batch
        if number % every == 0 or number == total:
            if on_terminal:
                bar.set_postfix(describe())
                continue
            per_batch = (time.perf_counter() - start) / (number - done)
            left = timedelta(seconds=int(per_batch * (total - number)))
            metrics = [f"{k} {v}" for k, v in describe().items()]
            log("  ".join([f"{title} [{number}/{total}]", *metrics, f"left {left}"]))


def table(rows: list[tuple[str, str]]) -> str:
    """Return (name, value) rows as text with aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
