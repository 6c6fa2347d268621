"""Helpers of the experiment pipelines.

Usage: python -m experiments.stages COMMAND

split DATA OUT             # hold out 5,000 training images; write OUT/full and OUT/subset
record RUN FILE ...        # record the result of a stage as JSON
logs RESULTS RUNS          # restore missing training logs from the recorded JSON files
export CHECKPOINT FILE     # keep weights, gate and class names only, in half precision
truncate CHECKPOINT N FILE # keep the weights of the first N blocks
regate CHECKPOINT WEIGHTS FILE  # keep the gate of a trained A-ViT with the static weights that it started from
counts STAGE.json PATCHES  # print the KIND, see baselines.py, that keeps a trained A-ViT's mean number of patches
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

from compare import read_predictions

HELD_OUT_SHARE, SUBSET_SHARE = 1 / 12, 1 / 3  # fractions: 5,000 and 20,000 of the 60,000 training images
KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
# Flags that describe the machine, not the recipe. Exported checkpoints do not contain them.
PRIVATE_FLAGS = {"output_dir", "data_path", "pretrained_path", "resume", "finetune", "teacher_path"}


def split(data: Path, out: Path) -> None:
    """Write two folders in Fashion-MNIST's format, with the held-out images as the test set of both.

    `full` has all other training images, `subset` a part of those. The split is the same every time. If `data` is
    empty, Fashion-MNIST is downloaded into it.
    """
    from datasets import build_dataset

    data.mkdir(parents=True, exist_ok=True)
    images = build_dataset("FMNIST", str(data), True, (28, 28))
    pixels = images.data.numpy()
    arrays = (pixels, images.targets.numpy().astype(np.uint8))
    order = np.random.default_rng(0).permutation(len(pixels))
    held_out, rest = np.split(order, [round(len(pixels) * HELD_OUT_SHARE)])
    # The folder is renamed when it is complete: torchvision would fill up a folder that lacks a file.
    partial = out.with_name(f"{out.name}.partial")
    for name, training in {"full": rest, "subset": rest[: round(len(pixels) * SUBSET_SHARE)]}.items():
        (partial / name).mkdir(parents=True, exist_ok=True)
        for part, chosen in {"train": training, "t10k": held_out}.items():
            for kind, array in zip(KINDS, arrays):
                _write_idx(partial / name / f"{part}-{kind}", array[chosen])
    partial.rename(out)


def _write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as a compressed IDX file, the original's format."""
    head = np.array([0x800 + array.ndim, *array.shape], ">i4")
    path.write_bytes(gzip.compress(head.tobytes() + array.tobytes(), mtime=0))


def record(run: Path, file: Path, seconds: int, command: str) -> None:
    """Write the result of a stage as JSON: its command and machine, and its training log or evaluation.

    Exits with an error if a training has not completed all its epochs. The file is written atomically.
    """
    result = {"command": command, "seconds": seconds, "commit": _commit(), "machine": machine()}
    result["torch"] = importlib.metadata.version("torch")
    if epochs := re.search(r"--epochs (\d+)", command):
        log, expected = run / "log.txt", int(epochs[1])
        result["epochs"] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if len(result["epochs"]) != expected:
            raise SystemExit(f"{run}/log.txt has {len(result['epochs'])} of {expected} epochs: training is incomplete")
        training = sum(epoch["train_seconds"] for epoch in result["epochs"])
        result["seconds"] = max(seconds, round(training))  # a resumed training took longer than its last attempt
    if (run / "eval.json").exists():
        result["eval"] = json.loads((run / "eval.json").read_text())
        result["correct"] = "".join(str(int(correct)) for correct in read_predictions(run / "predictions.csv").correct)
    text = json.dumps(result, indent=1) + "\n"
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)


def logs(results: Path, runs: Path) -> None:
    """Write RUNS/STAGE/log.txt for every recorded training that has none."""
    for path in results.glob("*.json"):
        stage, log = json.loads(path.read_text()), runs / path.stem / "log.txt"
        if "epochs" in stage and not log.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(json.dumps(epoch) + "\n" for epoch in stage["epochs"]))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
    """Return the name of the GPU if there is one, else the number and name of the CPUs."""
    import torch  # imported here because it takes seconds

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processors()


def processors() -> str:
    """Return the number and name of the CPUs, for example "2 x AMD EPYC"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def export(checkpoint: Path, file: Path) -> None:
    """Write a checkpoint without training state, small enough for the repository."""
    from training.checkpoints import Checkpoint, save_checkpoint

    content = Checkpoint.load(str(checkpoint)).without_training_state(PRIVATE_FLAGS)
    save_checkpoint(content, file)
    print(f"{file}: {sum(value.nbytes for value in content['model'].values()) / 1024:.0f} KiB of weights")


def truncate(checkpoint: Path, blocks: int, file: Path) -> None:
    """Write a checkpoint with the first `blocks` blocks of a static model, in float32."""
    from training.checkpoints import Checkpoint, save_checkpoint

    content = Checkpoint.load(str(checkpoint)).without_training_state(PRIVATE_FLAGS)
    numbers = {name: re.match(r"blocks\.(\d+)\.", name) for name in content["model"]}
    kept = {name for name, number in numbers.items() if number is None or int(number[1]) < blocks}
    content["model"] = {name: value.float() for name, value in content["model"].items() if name in kept}
    save_checkpoint(content, file)


def regate(checkpoint: Path, weights: Path, file: Path) -> None:
    """Write static weights, in float32, with the gate of an A-ViT that was trained from them.

    Exits with an error if its gate reads a channel: it has traded places with channel 0 in the A-ViT's weights.
    """
    from training.checkpoints import Checkpoint, save_checkpoint

    gate = Checkpoint.load(str(checkpoint)).content["gate"]
    if "gate_directions" not in gate:
        raise SystemExit(f"{checkpoint}: expected a gate by direction")
    content = Checkpoint.load(str(weights)).without_training_state(PRIVATE_FLAGS) | {"gate": gate}
    content["model"] = {name: value.float() for name, value in content["model"].items()}
    save_checkpoint(content, file)


def counts(file: Path, patches: int) -> None:
    """Print the KIND of the same mean number of live patches per block as in a recorded stage, in every image.

    patches: the number of patches of an image. One token of each image counts as the class token in every block.
    """
    stage = json.loads(file.read_text())
    live_share = stage["eval"]["live_share"] if "eval" in stage else stage["epochs"][-1]["test_live_share"]
    numbers = (max(0, round(share * (1 + patches)) - 1) for share in live_share[1:])
    print("counts:" + ",".join(map(str, numbers)))


# For tables -------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    rows = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_and_error(values: list[float], sign: str = "") -> str:
    """Format the mean and standard error over seeds. sign: "+" writes the sign of positive means too."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def by_seed(stages: dict, prefix: str) -> dict[str, dict]:
    """Return the stages named PREFIX and a seed, by seed."""
    named = {name.removeprefix(prefix): stage for name, stage in stages.items() if name.startswith(prefix)}
    return {seed: stage for seed, stage in sorted(named.items()) if seed.isdecimal()}


def correct_rate(stages: Iterable[dict]) -> np.ndarray:
    """Return, for each image, the fraction of seeds whose prediction is correct: [N]."""
    return np.mean([np.array(list(stage["correct"]), dtype=float) for stage in stages], axis=0)


def share_saved(metrics: dict, prefix: str = "") -> float:
    """Return the fraction of the static model's MACs that halting saves."""
    return 1 - metrics[f"{prefix}gmacs"] / metrics[f"{prefix}gmacs_static"]


HELD_OUT = ("held-out top-1 (%)", "mean depth", "MACs saved")


def held_out(stage: dict) -> tuple[str, str, str]:
    """Return the cells of the columns HELD_OUT, measured after the last epoch."""
    last = stage["epochs"][-1]
    return f"{last['test_acc1']:.2f}", f"{last['test_depth_mean']:.2f}", f"{share_saved(last, 'test_'):.1%}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="stages.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    arguments = {
        split: {"data": Path, "out": Path},
        record: {"run": Path, "file": Path, "--seconds": int, "--command": str},
        logs: {"results": Path, "runs": Path},
        export: {"checkpoint": Path, "file": Path},
        truncate: {"checkpoint": Path, "blocks": int, "file": Path},
        regate: {"checkpoint": Path, "weights": Path, "file": Path},
        counts: {"file": Path, "patches": int},
    }
    for function, types in arguments.items():
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        for name, kind in types.items():
            command.add_argument(name, type=kind, **({"required": True} if name.startswith("--") else {}))
        command.set_defaults(function=function)
    args = vars(parser.parse_args(argv))
    args.pop("function")(**args)


if __name__ == "__main__":
    main()
