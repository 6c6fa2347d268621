"""What every command needs: errors for users, processes, averages, messages and progress."""

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
    """Something the user can mend. The command line prints it in one line and exits with status 2."""


class RankError(UserError):
    """One that other processes do not meet: each process that does prints it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean a, b?)', or '' where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {', '.join(near)}?)" if near else ""


# Processes ---------------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return environment_int("LOCAL_RANK", 0) if dist.is_initialized() else 0


def environment_int(name: str, default: int) -> int:
    """From the environment. UserError where it is none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment, which is no number: unset it, or start with torchrun")
    return int(text)


def usable_cores() -> int:
    """That this process may use, which are fewer than there are under taskset, Slurm and in containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main() -> bool:
    return rank() == 0


RANDOM_OF_STEPS, RANDOM_OF_IMAGES = 1, 2  # the last number of a key: what the random numbers are for


def seed_everything(*key: int) -> None:
    """Seeds Python, NumPy and torch (CPU, and CUDA where it is in use) from numbers, all of which matter."""
    python, numpy, torch_low, torch_high = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch_seed = (torch_high << 32 | torch_low) >> 1  # below 2**63
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch_seed)


def any_rank(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in any process. All must call it at the same place."""
    if not dist.is_initialized():
        return condition
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def main_process_first() -> Iterator[None]:
    """The body runs in each machine's first process before the others: for downloads."""
    if dist.is_initialized() and local_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and local_rank() == 0:
            dist.barrier()


def amp_dtype_name(amp: str | None, device: torch.device) -> str:
    """One of AMP_DTYPES; None: fp16 on CUDA, none on the CPU. UserError for fp16 on the CPU."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs CUDA; use --amp bf16")
    return amp or ("fp16" if device.type == "cuda" else "none")


def check_finite(logits: Tensor) -> None:
    """logits: [B, K]; FloatingPointError where some are not finite: such a network has no accuracy, and no speed."""
    broken = len(logits) - int(logits.isfinite().all(dim=1).sum())
    if broken:
        raise FloatingPointError(f"{broken} of {len(logits)} answers of the network are no finite numbers")


AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision by its name on the command line."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "none")


# Files -------------------------------------------------------------------------------------------


def prepare_output_dir(path: str | Path | None, flag: str = "--output_dir") -> Path | None:
    """Makes the folder, if one is named, and writes to it once. UserError if that fails."""
    if not path:
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there: {error.strerror}") from error
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RankError, naming the path, where something cannot be written."""
    try:
        yield
    except OSError as error:
        raise RankError(f"{path}: cannot be written: {error.strerror or error}") from error


def atomic_write(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Writes a file beside its place, flushes it to the disk if it is to be durable, then renames it.

    At every instant the old file is there or the new one. OSError leaves the old one. A link stays one.
    """
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
    if not durable:
        return
    with suppress(OSError):  # some file systems refuse it; the file is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renaming too
        finally:
            os.close(folder)


@contextmanager
def lock_output_dir(folder: Path | None) -> Iterator[None]:
    """Holds the folder for this run, by a lock of its main process. UserError where another run holds it.

    A run that is killed leaves no lock; where the file system has no locks, nobody is kept out.
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
        raise UserError(f"--output_dir {folder}: another run is at work there ({holder}); choose another folder")
    try:
        yield
    finally:
        if file is not None:
            file.close()


def is_plain_tensor(value: object) -> bool:
    """Whether something read from a file is a tensor of real numbers on the CPU."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return is_plain and value.device.type == "cpu" and not value.is_complex()


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Whole or not at all, see `atomic_write`. RankError, naming the path, where it cannot be written."""
    with writing(path):
        atomic_write(path, lambda file: file.write(content), durable)


# Numbers and progress ----------------------------------------------------------------------------


class MetricAverages:
    """Weighted means by name, over all batches and processes; scalars or vectors.

    Sums stay on the device until they are asked for, so that adding never waits for it.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, weight: float, **values: Tensor) -> None:
        self.weight += weight
        for name, value in values.items():
            added = weight * value.detach().double()
            self.sums[name] = self.sums[name].to(added.device) + added if name in self.sums else added

    def state_dict(self) -> dict:
        """What has been added in all processes; every process must call it."""
        weight, sums = self._joint()
        return {"weight": weight, "sums": sums}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from the `state_dict` of all processes: to be called in one of them."""
        self.weight = float(state["weight"])
        self.sums = {str(name): value.double() for name, value in state["sums"].items()}

    def local(self) -> dict[str, float]:
        """Means of this process's scalars so far."""
        return {name: (s / self.weight).item() for name, s in self.sums.items() if s.ndim == 0}

    def reduced(self) -> tuple[float, dict[str, float | list[float]]]:
        """Total weight and means over all processes; every process must call it, with or without values.

        UserError if no process has any.
        """
        total, sums = self._joint()
        if total == 0:
            raise UserError("not one image could be read")
        return total, {name: (s / total).tolist() for name, s in sums.items()}

    def _joint(self) -> tuple[float, dict[str, Tensor]]:
        everyone = all_gather_objects((self.weight, {name: s.cpu() for name, s in self.sums.items()}))
        names = {name: None for _, sums in everyone for name in sums}
        sums = {name: torch.stack([own[name] for _, own in everyone if name in own]).sum(dim=0) for name in names}
        return sum(weight for weight, _ in everyone), sums


def all_gather_objects(value: object) -> list:
    """The values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_objects_to_main(value: object) -> list:
    """The values of all processes in the main one, in the order of their ranks; [] in the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def synchronized_time(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_interleaved(
    calls: dict[str, Callable[[], None]], device: torch.device, rounds: int, min_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds that each call takes, once in every round, in turn, when all have been called once to warm up.

    min_seconds: calls are repeated until the slowest takes that long, and their mean counts.
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
    """Prints in the main process."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def warn(message: str, everywhere: bool = False) -> None:
    """Prints a warning to stderr, in the main process or in every process that meets it."""
    if is_main() or everywhere:
        tqdm.write(f"warning: {message}", file=sys.stderr)


class TimedLoader:
    """The batches of a loader; `seconds`: how long they have been waited for, the start of its workers included."""

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
    """Yields the batches; shows a bar on a terminal, else a line every so many batches.

    `describe` is called for the figures to show, every `every` batches; `done`: how many came before.
    """
    on_terminal = sys.stderr.isatty()
    hidden = not (is_main() and on_terminal)
    bar = tqdm(batches, desc=title, leave=False, disable=hidden, initial=done, total=len(batches))
    start = time.perf_counter()
    for number, batch in enumerate(bar, start=done + 1):
        yield batch
        if number % every == 0 or number == len(batches):
            if on_terminal:
                bar.set_postfix(describe())
                continue
            per_batch = (time.perf_counter() - start) / (number - done)
            left = timedelta(seconds=int(per_batch * (len(batches) - number)))
            figures = "  ".join(f"{k} {v}" for k, v in describe().items())
            log(f"{title} [{number}/{len(batches)}]  {figures}  left {left}")


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
