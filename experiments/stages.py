"""What the chains need beside the ordinary commands: python -m experiments.stages COMMAND

split DATA OUT           # hold 5,000 training images out; OUT/full and OUT/subset
record RUN FILE ...      # what a stage has found, as JSON
logs RESULTS RUNS        # the logs of trainings back from that JSON, where they are not
export CHECKPOINT FILE   # weights, gate and class names alone, in half precision
truncate CHECKPOINT N FILE # weights of the first N blocks
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from compare import read_correct

HELD_OUT_SHARE, SUBSET_SHARE = 1 / 12, 1 / 3  # of the training images: 5,000 and 20,000 of 60,000
KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")


def split(data: Path, out: Path) -> None:
    """Two folders in the data set's form: `full` without the held-out images, `subset` with a part of that.

    In both the test set is the held-out images. The same images each time.
    """
    from datasets import build_dataset

    data.mkdir(parents=True, exist_ok=True)
    images = build_dataset("FMNIST", str(data), True, (28, 28))  # downloaded, where the folder is empty
    pixels = images.data.numpy()
    arrays = (pixels, images.targets.numpy().astype(np.uint8))
    order = np.random.default_rng(0).permutation(len(pixels))
    held_out, rest = np.split(order, [round(len(pixels) * HELD_OUT_SHARE)])
    partial = out.with_name(f"{out.name}.partial")  # a part of it would not be told from torchvision's empty folder
    for name, training in {"full": rest, "subset": rest[: round(len(pixels) * SUBSET_SHARE)]}.items():
        (partial / name).mkdir(parents=True, exist_ok=True)
        for part, chosen in {"train": training, "t10k": held_out}.items():
            for kind, array in zip(KINDS, arrays):
                _write_idx(partial / name / f"{part}-{kind}", array[chosen])
    partial.rename(out)


def _write_idx(path: Path, array: np.ndarray) -> None:
    """array: uint8; an IDX file of bytes, as in the original."""
    head = np.array([0x800 + array.ndim, *array.shape], ">i4")
    path.write_bytes(gzip.compress(head.tobytes() + array.tobytes(), mtime=0))


def record(run: Path, file: Path, seconds: int, command: str) -> None:
    """The log of a training, or the evaluation and which images were recognised; and what it ran on."""
    found = {"command": command, "seconds": seconds, "commit": _commit(), "machine": machine()}
    found["torch"] = importlib.metadata.version("torch")
    if epochs := re.search(r"--epochs (\d+)", command):
        log, wanted = run / "log.txt", int(epochs[1])
        found["epochs"] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if len(found["epochs"]) != wanted:
            raise SystemExit(f"{run}: {len(found['epochs'])} of {wanted} epochs: not done")
        training = sum(epoch["train_seconds"] for epoch in found["epochs"])  # of all attempts, where it was resumed
        found["seconds"] = max(seconds, round(training))
    if (run / "eval.json").exists():
        found["eval"] = json.loads((run / "eval.json").read_text())
        found["correct"] = "".join(str(int(correct)) for correct in read_correct(run / "predictions.csv")[1])
    text = json.dumps(found, indent=1) + "\n"
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)


def logs(results: Path, runs: Path) -> None:
    """RUNS/STAGE/log.txt of every training in `results` that has none, as `record` found it."""
    for path in results.glob("*.json"):
        stage, log = json.loads(path.read_text()), runs / path.stem / "log.txt"
        if "epochs" in stage and not log.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(json.dumps(epoch) + "\n" for epoch in stage["epochs"]))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
    """What a stage runs on: the GPU, where there is one, else the processors."""
    import torch  # here, as it takes seconds

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processors()


def processors() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def export(checkpoint: Path, file: Path) -> None:
    """Small enough to be kept in a repository; loads like any checkpoint of ours."""
    from training.checkpoints import Checkpoint, save_checkpoint

    content = Checkpoint.load(str(checkpoint)).without_training_state(PRIVATE_FLAGS)
    save_checkpoint(content, file)
    print(f"{file}: {sum(value.nbytes for value in content['model'].values()) / 1024:.0f} KiB of weights")


def truncate(checkpoint: Path, blocks: int, file: Path) -> None:
    """A static network's weights without the blocks after the first so many, as a checkpoint."""
    from training.checkpoints import Checkpoint, save_checkpoint

    content = Checkpoint.load(str(checkpoint)).without_training_state(PRIVATE_FLAGS)
    numbers = {name: re.match(r"blocks\.(\d+)\.", name) for name in content["model"]}
    kept = {name for name, number in numbers.items() if number is None or int(number[1]) < blocks}
    content["model"] = {name: value.float() for name, value in content["model"].items() if name in kept}
    save_checkpoint(content, file)


PRIVATE_FLAGS = {
    "output_dir",
    "data_path",
    "pretrained_path",
    "resume",
    "finetune",
    "teacher_path",
}  # of the machine, not the recipe


# For tables -------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    rows = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_and_error(values: list[float], sign: str = "") -> str:
    """Over seeds; sign: "+" to write it always."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def by_seed(stages: dict, prefix: str) -> dict[str, dict]:
    """Stages by their seed."""
    named = {name.removeprefix(prefix): stage for name, stage in stages.items() if name.startswith(prefix)}
    return {seed: stage for seed, stage in sorted(named.items()) if seed.isdecimal()}


def correct_rate(stages: Iterable[dict]) -> np.ndarray:
    """How often each image was recognised, over the seeds: [N], 0 to 1."""
    return np.mean([np.array(list(stage["correct"]), dtype=float) for stage in stages], axis=0)


def share_saved(figures: dict, prefix: str = "") -> float:
    return 1 - figures[f"{prefix}gmacs"] / figures[f"{prefix}gmacs_static"]


HELD_OUT = ("held-out top-1, %", "mean depth", "multiply-adds saved")


def held_out(stage: dict) -> tuple[str, str, str]:
    last = stage["epochs"][-1]
    return f"{last['test_acc1']:.2f}", f"{last['test_depth_mean']:.2f}", f"{share_saved(last, 'test_'):.1%}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="stages.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    paths = {
        split: ("data", "out"),
        logs: ("results", "runs"),
        export: ("checkpoint", "file"),
    }
    for function, names in paths.items():
        command = commands.add_parser(function.__name__)
        for name in names:
            command.add_argument(name, type=Path)
        command.set_defaults(function=function)
    command = commands.add_parser("truncate")
    for name, kind in {"checkpoint": Path, "blocks": int, "file": Path}.items():
        command.add_argument(name, type=kind)
    command.set_defaults(function=truncate)
    command = commands.add_parser("record")
    for name in ("run", "file"):
        command.add_argument(name, type=Path)
    command.add_argument("--seconds", type=int, required=True)
    command.add_argument("--command", required=True)
    command.set_defaults(function=record)
    args = vars(parser.parse_args(argv))
    args.pop("function")(**args)


if __name__ == "__main__":
    main()
