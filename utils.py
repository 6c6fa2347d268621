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
import threading
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

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
TOLD_AFTER = 5.0  # seconds, from which a process that waits for the others says so
PROCESS_TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others before it fails


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return _launchers_number("LOCAL_RANK", 0) if dist.is_initialized() else 0


def _launchers_number(name: str, default: int) -> int:
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


@contextmanager
def process_group(device_type: str | None, dist_url: str = "env://", size: int | None = None) -> Iterator[torch.device]:
    """Joins the other processes, if the environment speaks of several, and yields this one's device.

    device_type: cuda or cpu, None for cuda where there is one.
    Understands torchrun, torch.distributed.launch and srun. `size` and a `dist_url` of
    tcp://host:port are for processes started by hand, with RANK in their environment.
    """
    _adopt_slurm()  # before the device, whose number follows from it
    size = _launchers_number("WORLD_SIZE", size or 1)
    device = _device(device_type, size)
    if device.type == "cuda":
        _switch_on_fast_kernels()
    if size <= 1:
        yield device
        return
    number = _launchers_number("RANK", -1)
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
    if "TORCHELASTIC_RUN_ID" in os.environ and _launchers_number("WORLD_SIZE", 1) > 1:
        raise UserError("this command runs alone: start it without torchrun")
    device = _device(device_type, 1)
    if device.type == "cuda":
        _switch_on_fast_kernels()
    yield device


def _adopt_slurm() -> None:
    """Under srun, sets what torchrun would: Slurm's names for the same things."""
    if os.environ.get("RANK") or _launchers_number("SLURM_STEP_NUM_TASKS", 1) == 1:
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
        index = _launchers_number("LOCAL_RANK", 0) if processes > 1 else 0
    index = 0 if count == 1 and device.index is None and "SLURM_PROCID" in os.environ else index  # one each
    if index >= count:
        raise RankError(f"--device {device_type}: device {index} is asked for, there are {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _switch_on_fast_kernels() -> None:
    """On CUDA: the fastest convolution of those that there are, and TF32 where numbers are float32."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # convolutions use TF32 of themselves


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
