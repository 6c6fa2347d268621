"""Kill training runs at chosen and random moments, resume them, and compare them with an uninterrupted run.

    python tests/tools/kill_and_resume.py --kills 60

SIGKILL ends the process of `main_act.py` at the n-th call of a function, or after a random time. The same command with
`--resume auto` resumes the run. These must be equal bit for bit: weights, EMA weights, optimizer state, log.txt except
timings, and TensorBoard points.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).parents[1:3])
os.environ["OMP_NUM_THREADS"] = "1"  # forked processes would lose the other threads

import torch  # noqa: E402
from conftest import make_image_folder  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import engine_act  # noqa: E402
import main_act  # noqa: E402
from training import checkpoints, loaders, loop, schedule, tensorboard  # noqa: E402

HALF_WRITTEN, WORKER, ANY_TIME = "half a checkpoint", "data-loader worker", "any time"
# By name of the place: the object and its function, and the last of its calls at which a run may be killed. A complete
# run reaches that call.
PLACES = {
    "start of an epoch": (loaders.ImageLoader, "start_at", 3),
    "data loading": (loaders, "Batch", 18),
    WORKER: (loaders, "collate", 6),  # in a data-loader worker, if there are any
    "forward": (engine_act.Trainer, "micro_batch", 18),
    "update": (engine_act.Trainer, "update", 18),
    "after an update": (schedule.Schedule, "step_update", 21),
    "evaluation": (engine_act, "accuracy", 12),
    "state before writing": (loop.TrainingRun, "state_dict", 17),
    "flushing a checkpoint": (os, "fsync", 30),
    "renaming a checkpoint": (Path, "replace", 16),
    "logging an epoch": (loop.TrainingRun, "log_epoch", 3),
    "TensorBoard": (tensorboard.TensorBoardLogger, "record", 3),
    "deleting old checkpoints": (loop.TrainingRun, "delete_old_checkpoints", 3),
    HALF_WRITTEN: (torch, "save", 15),
}


def flags(data: Path, out: Path, workers: int) -> list[str]:
    """Return the flags of a run of 3 epochs of 6 steps with all kinds of random numbers.

    It writes 6 checkpoints per epoch, and best.pth.
    """
    small = f"--model avit_micro_patch4_32 --input-size 32 --batch-size 4 --num_workers {workers} --no-repeated-aug"
    run = "--epochs 3 --warmup-epochs 1 --lr 0.01 --drop 0.1 --checkpoint-steps 2 --keep 2 --tensorboard --resume auto"
    gate = "--gate_scale 10 --gate_center 5 --device cpu"
    return [*small.split(), *run.split(), *gate.split(), "--data-path", str(data), "--output_dir", str(out)]


def in_a_fork(command: list[str], place: str | None = None, at: float = 0) -> int:
    """Run main_act.py in a fork. Returns its exit status, which is -9 if it was killed.

    place, at: kill it at this call of a place, or after this number of seconds.
    """
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
            torch.set_num_threads(1)
            if place in PLACES:
                set_trap(place, at)
            main_act.main(command)
            status = 0
        os._exit(status)
    if place == ANY_TIME:
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def set_trap(place: str, arrival: int) -> None:
    owner, name, _ = PLACES[place]
    original, arrivals = getattr(owner, name), itertools.count(1)

    def trap(*args, **kwargs):
        if next(arrivals) == arrival:
            if place == HALF_WRITTEN:
                args[1].write(os.urandom(100_000))
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, trap)


def outcome(out: Path) -> dict:
    """Return all outputs of a run except timings."""
    checkpoint = checkpoints.load_checkpoint(str(out / "checkpoint.pth"))
    for name in ("args", "seconds", "data_wait"):
        checkpoint.pop(name)
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    timings = {"train_seconds", "train_data_wait", "test_images_per_s", "saving_seconds"}
    log = [{key: value for key, value in line.items() if key not in timings} for line in log]
    events = EventAccumulator(str(out), size_guidance={"images": 0, "histograms": 0}).Reload()
    kinds = {
        "scalars": (events.Scalars, lambda e: e.value),
        "images": (events.Images, lambda e: e.encoded_image_string),
        "histograms": (events.Histograms, lambda e: list(e.histogram_value.bucket)),
    }
    points = {
        tag: [(event.step, value(event)) for event in read(tag)]
        for kind, (read, value) in kinds.items()
        for tag in events.Tags()[kind]
    }
    for tag in ("train/seconds", "train/data_wait"):
        points.pop(tag)
    files = sorted(p.name for p in out.iterdir() if "events" not in p.name and not p.name.endswith(".partial"))
    best = checkpoints.load_checkpoint(str(out / "best.pth"))["model"]
    return {"checkpoint": checkpoint, "log": log, "points": points, "files": files, "best": best}


def same(a: object, b: object) -> bool:
    """Return whether two nested structures are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="number of runs to kill (default: 60)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="numbers of data-loader workers, in turn (default: 0 2)"
    )
    args, choose = parser.parse_args(), random.Random(0)
    kills, survived, workers_killed, failed, extra = 0, 0, 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        data = make_image_folder(Path(folder) / "data", classes=3, train=8, val=3)
        start = time.perf_counter()
        assert in_a_fork(flags(data, Path(folder) / "whole", 0)) == 0, "the uninterrupted run failed"
        whole_seconds = time.perf_counter() - start
        expected = outcome(Path(folder) / "whole")
        for number, place in zip(range(args.kills), itertools.cycle([*PLACES, ANY_TIME])):
            workers, out = args.workers[number % len(args.workers)], Path(folder) / str(number)
            seconds = choose.uniform(0.05, 0.95) * whole_seconds
            at = seconds if place == ANY_TIME else choose.randint(1, PLACES[place][2])
            start = time.perf_counter()
            status, resumed = in_a_fork(flags(data, out, workers), place, at), in_a_fork(flags(data, out, workers))
            extra.append(time.perf_counter() - start - whole_seconds)
            # If a data-loader worker is killed, the run itself fails with another status.
            in_worker = place == WORKER and workers > 0
            killed = status == -signal.SIGKILL or (in_worker and status != 0)
            equal = resumed == 0 and same(outcome(out), expected)
            kills += killed
            failed += status != 0 and not killed
            survived += equal and killed
            workers_killed += in_worker
            result = "survived" if equal else f"FAILED (resumed with status {resumed})"
            result = result if killed else f"not killed, exited with status {status}"  # it ended before its random time
            print(f"{number:3d}  {place}, {at:.3g}, {workers} data-loader workers: {result}", flush=True)
    print(f"{survived} of {kills} kills survived, {workers_killed} of them of a data-loader worker; ", end="")
    print(f"an uninterrupted run takes {whole_seconds:.1f} s, ", end="")
    print(f"an interruption costs {sorted(extra)[len(extra) // 2]:.1f} s (median, without imports)")
    sys.exit(survived != kills or failed > 0)


if __name__ == "__main__":
    main()
