"""What evidence.sh needs beside the ordinary commands.

python evidence.py split DATA OUT           # hold 5,000 training images out; OUT/full and OUT/subset
python evidence.py keep RUN FILE ...        # what a stage has found, as JSON
python evidence.py export CHECKPOINT FILE   # weights, gate and class names alone, in half precision
python evidence.py report RESULTS FILE      # the tables
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from compare import paired_difference, read_hits

HELD_OUT, SUBSET = 1 / 12, 1 / 3  # of the training images: 5,000 and 20,000 of 60,000
KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")


def split(data: Path, out: Path) -> None:
    """Two folders in the data set's form: `full` without the held-out images, `subset` with a part of that.

    In both the test set is the held-out images. The same images each time.
    """
    from datasets import build_dataset

    data.mkdir(parents=True, exist_ok=True)
    images = build_dataset("FMNIST", str(data), True, (28, 28))  # our files, or torchvision's, downloaded
    pixels = images.images if hasattr(images, "images") else images.data.numpy()
    arrays = (pixels, np.asarray(images.targets, dtype=np.uint8))
    order = np.random.default_rng(0).permutation(len(pixels))
    held_out, rest = np.split(order, [round(len(pixels) * HELD_OUT)])
    for name, training in {"full": rest, "subset": rest[: round(len(pixels) * SUBSET)]}.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, chosen in {"train": training, "t10k": held_out}.items():
            for kind, array in zip(KINDS, arrays):
                _write_idx(out / name / f"{part}-{kind}", array[chosen])


def _write_idx(path: Path, array: np.ndarray) -> None:
    """array: uint8; an IDX file of bytes, as in the original."""
    head = np.array([0x800 + array.ndim, *array.shape], ">i4")
    path.write_bytes(gzip.compress(head.tobytes() + array.tobytes(), mtime=0))


def keep(run: Path, file: Path, seconds: int, command: str) -> None:
    """The log of a training, or the evaluation and which images were recognised; and what it ran on."""
    import torch

    from checkpoints import write_whole

    found = {"command": command, "seconds": seconds, "commit": _commit(), "machine": machine()}
    found["torch"] = torch.__version__
    if (run / "log.txt").exists():
        found["epochs"] = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    if (run / "eval.json").exists():
        found["eval"] = json.loads((run / "eval.json").read_text())
        found["hits"] = "".join(str(int(hit)) for hit in read_hits(run / "predictions.csv"))
    text = json.dumps(found, indent=1) + "\n"
    write_whole(file, lambda out: out.write(text.encode()))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def export(checkpoint: Path, file: Path) -> None:
    """Small enough to be kept in a repository; loads like any checkpoint of ours."""
    import torch

    from checkpoints import load_checkpoint, save_checkpoint

    whole = load_checkpoint(str(checkpoint))
    flags = {name: whole["args"][name] for name in RECIPE_FLAGS}
    weights = {name: value.half() for name, value in whole["model"].items()}
    save_checkpoint({"model": weights, "gate": whole["gate"], "classes": whole["classes"], "args": flags}, file)
    size = sum(value.numel() * torch.finfo(value.dtype).bits // 8 for value in weights.values())
    print(f"{file}: {size / 1024:.0f} KiB of weights")


RECIPE_FLAGS = ("model", "input_size", "data_set", "batch_size", "opt", "lr", "epochs", "warmup_epochs", "seed")
RECIPE_FLAGS += ("gate_scale", "gate_center", "ponder_token_scale", "distr_prior_alpha")


# The tables --------------------------------------------------------------------------------------


def report(results: Path, file: Path) -> None:
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    parts = [_test_table(stages), _speed_table(stages), _search_table(stages), _ablation_table(stages), _origin(stages)]
    file.write_text("\n\n".join(["# Fashion-MNIST", *parts]) + "\n")
    print(f"{file} written")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    rows = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_and_error(values: list[float], digits: int = 2) -> str:
    """Over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def _of(stages: dict, prefix: str) -> list[dict]:
    """Stages of all seeds."""
    return [stage for name, stage in stages.items() if name.removeprefix(prefix).isdecimal()]


def _hits(stages: list[dict]) -> np.ndarray:
    """How often each image was recognised, over the seeds: [N], 0 to 1."""
    return np.mean([np.array(list(stage["hits"]), dtype=float) for stage in stages], axis=0)


def _test_table(stages: dict) -> str:
    control, adaptive = _of(stages, "test_control_"), _of(stages, "test_adaptive_")
    rows = []
    for name, runs in {"(a) static": [stages["test_static"]], "(b) control": control, "(c) A-ViT": adaptive}.items():
        evals = [run["eval"] for run in runs]
        saved = statistics.mean(1 - e["gmacs"] / e["gmacs_static"] for e in evals)
        macs = f"{1e3 * statistics.mean(e['gmacs'] for e in evals):.2f} M ({saved:.1%} fewer)"
        depth = _mean_and_error([e["depth_mean"] for e in evals])
        rows.append((name, str(len(runs)), _mean_and_error([e["acc1"] for e in evals]), depth, macs))
    by_seed = [a["eval"]["acc1"] - c["eval"]["acc1"] for a, c in zip(adaptive, control)]
    difference, error = paired_difference(_hits(control), _hits(adaptive))
    head = ("network", "seeds", "top-1, %", "mean depth", "multiply-adds per image")
    text = f"A-ViT less control: {_mean_and_error(by_seed)} points over the seeds;"
    text += f" {difference:.2f} ± {error:.2f} points paired by the {len(_hits(control)):,} test images."
    return f"## Test images\n\n{_table(head, rows)}\n\n{text} ± is one standard error."


def _speed_table(stages: dict) -> str:
    figures = ("speed_up", "ideal", "speed_up_of_ideal")
    rows = [
        (row["form"], f"{row['images_per_s']:.0f}", *(f"{row[name]:.2f}" for name in figures))
        for row in stages["benchmark"]
    ]
    head = ("form", "images/s", "speed-up", "ratio of multiply-adds", "speed-up / ratio")
    seconds = {
        kind: [epoch["train_seconds"] for run in _of(stages, f"{kind}_") for epoch in run["epochs"]]
        for kind in ("control", "adaptive")
    }
    control, adaptive = (statistics.median(seconds[kind]) for kind in ("control", "adaptive"))
    saved = statistics.mean(epoch["train_macs_saved"] for run in _of(stages, "adaptive_") for epoch in run["epochs"])
    text = f"A training epoch takes {adaptive:.0f} s instead of the control's {control:.0f} s (medians over all epochs"
    text += (
        f" and seeds): {1 - adaptive / control:.1%} shorter, with {saved:.1%} of the multiply-adds saved in training."
    )
    batch = stages["benchmark"][0]["batch_size"]
    return f"## Speed\n\nInference, batches of {batch}, in one run:\n\n{_table(head, rows)}\n\n{text}"


def _validation_row(stage: dict) -> tuple[str, str, str]:
    last = stage["epochs"][-1]
    saved = 1 - last["test_gmacs"] / last["test_gmacs_static"]
    return f"{last['test_acc1']:.2f}", f"{last['test_depth_mean']:.2f}", f"{saved:.1%}"


def _search_table(stages: dict) -> str:
    rows = [("static", "", *_validation_row(stages["search_static"]))]
    for name, stage in stages.items():
        _, center, ponder = name.split("_") if name.count("_") == 2 and name.startswith("search_") else ("", "", "")
        if center:
            rows.append((center, ponder, *_validation_row(stage)))
    head = ("gate center", "ponder scale", "held-out top-1, %", "mean depth", "multiply-adds saved")
    return f"## Settings, on a third of the training images\n\n{_table(head, rows)}"


def _ablation_table(stages: dict) -> str:
    rows = [
        (name.removeprefix("ablation_").replace("_", " "), *_validation_row(stage))
        for name, stage in stages.items()
        if name.startswith("ablation_")
    ]
    head = ("ablation", "held-out top-1, %", "mean depth", "multiply-adds saved")
    return f"## Ablation, on a third of the training images\n\n{_table(head, rows)}"


def _origin(stages: dict) -> str:
    timed = [stage for stage in stages.values() if isinstance(stage, dict)]
    minutes = sum(stage["seconds"] for stage in timed) / 60
    machines = ", ".join(sorted({stage["machine"] for stage in timed}))
    commits = ", ".join(sorted({stage["commit"] for stage in timed}))
    return f"Measured by `make evidence` in {minutes:.0f} minutes, on {machines}, at {commits}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evidence.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    paths = {split: ("data", "out"), export: ("checkpoint", "file"), report: ("results", "file")}
    for function, names in paths.items():
        command = commands.add_parser(function.__name__)
        for name in names:
            command.add_argument(name, type=Path)
        command.set_defaults(function=function)
    command = commands.add_parser("keep")
    for name in ("run", "file"):
        command.add_argument(name, type=Path)
    command.add_argument("--seconds", type=int, required=True)
    command.add_argument("--command", required=True)
    command.set_defaults(function=keep)
    args = vars(parser.parse_args(argv))
    args.pop("function")(**args)


if __name__ == "__main__":
    main()
