"""What run.sh needs beside the ordinary commands: python -m experiments.fashion_mnist.stages COMMAND

split DATA OUT           # hold 5,000 training images out; OUT/full and OUT/subset
keep RUN FILE ...        # what a stage has found, as JSON
logs RESULTS RUNS        # the logs of trainings back from that JSON, where they are not
export CHECKPOINT FILE   # weights, gate and class names alone, in half precision
report RESULTS FILE      # the tables
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

from compare import paired_difference, read_hits

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


def keep(run: Path, file: Path, seconds: int, command: str) -> None:
    """The log of a training, or the evaluation and which images were recognised; and what it ran on."""
    found = {"command": command, "seconds": seconds, "commit": _commit(), "machine": machine()}
    found["torch"] = importlib.metadata.version("torch")
    if (run / "log.txt").exists():
        found["epochs"] = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
        wanted = int(re.search(r"--epochs (\d+)", command)[1])
        if len(found["epochs"]) != wanted:
            raise SystemExit(f"{run}: {len(found['epochs'])} of {wanted} epochs: not done")
        training = sum(epoch["train_seconds"] for epoch in found["epochs"])  # of all attempts, where it was resumed
        found["seconds"] = max(seconds, round(training))
    if (run / "eval.json").exists():
        found["eval"] = json.loads((run / "eval.json").read_text())
        found["hits"] = "".join(str(int(hit)) for hit in read_hits(run / "predictions.csv")[1])
    text = json.dumps(found, indent=1) + "\n"
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)


def logs(results: Path, runs: Path) -> None:
    """RUNS/STAGE/log.txt of every training in `results` that has none, as `keep` found it."""
    for path in results.glob("*.json"):
        stage, log = json.loads(path.read_text()), runs / path.stem / "log.txt"
        if "epochs" in stage and not log.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(json.dumps(epoch) + "\n" for epoch in stage["epochs"]))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def export(checkpoint: Path, file: Path) -> None:
    """Small enough to be kept in a repository; loads like any checkpoint of ours."""
    from training.checkpoints import Checkpoint, save_checkpoint

    content = Checkpoint.load(str(checkpoint)).without_training_state(PRIVATE_FLAGS)
    save_checkpoint(content, file)
    print(f"{file}: {sum(value.nbytes for value in content['model'].values()) / 1024:.0f} KiB of weights")


PRIVATE_FLAGS = {"output_dir", "data_path", "pretrained_path", "resume", "finetune"}  # of the machine, not the recipe


# The tables --------------------------------------------------------------------------------------


def report(results: Path, file: Path, chosen: str) -> None:
    """chosen: gate scale:gate center:ponder scale, one of the search; what seeds and ablations were run with."""
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    name = _search_stage(chosen.split(":"))
    if name not in stages:
        raise SystemExit(f"the chosen setting {chosen} is not among those of the search: no {results / name}.json")
    parts = [table(stages) for table in (_test_table, _speed_table, _held_out_table, _search_table)]
    parts += [_trial_table(stages), _ablation_table(stages, name), _origin(stages)]
    file.write_text("\n\n".join(["# Fashion-MNIST", *parts]) + "\n")
    print(f"{file} written")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    rows = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_and_error(values: list[float], sign: str = "") -> str:
    """Over seeds; sign: "+" to write it always."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def _by_seed(stages: dict, prefix: str) -> dict[str, dict]:
    """Stages by their seed."""
    named = {name.removeprefix(prefix): stage for name, stage in stages.items() if name.startswith(prefix)}
    return {seed: stage for seed, stage in sorted(named.items()) if seed.isdecimal()}


def _pairs(stages: dict, prefix: str = "") -> list[tuple[dict, dict]]:
    """Control and A-ViT of each seed. ValueError where one is missing."""
    control, adaptive = (_by_seed(stages, f"{prefix}{kind}_") for kind in ("control", "adaptive"))
    if not control or control.keys() != adaptive.keys():
        raise ValueError(f"seeds of the control {list(control)}, of A-ViT {list(adaptive)}")
    return [(control[seed], adaptive[seed]) for seed in control]


def _hits(stages: Iterable[dict]) -> np.ndarray:
    """How often each image was recognised, over the seeds: [N], 0 to 1."""
    return np.mean([np.array(list(stage["hits"]), dtype=float) for stage in stages], axis=0)


def _test_table(stages: dict) -> str:
    control, adaptive = zip(*_pairs(stages, "test_"))
    rows = []
    for name, runs in {"(a) static": [stages["test_static"]], "(b) control": control, "(c) A-ViT": adaptive}.items():
        evals = [run["eval"] for run in runs]
        saved = statistics.mean(_saved(e) for e in evals)
        macs = f"{1e3 * statistics.mean(e['gmacs'] for e in evals):.2f} M ({saved:.1%} fewer)"
        depth = _mean_and_error([e["depth_mean"] for e in evals])
        rows.append((name, str(len(runs)), _mean_and_error([e["acc1"] for e in evals]), depth, macs))
    by_seed = [a["eval"]["acc1"] - c["eval"]["acc1"] for c, a in zip(control, adaptive)]
    difference, error = paired_difference(_hits(control), _hits(adaptive))
    head = ("network", "seeds", "top-1, %", "mean depth", "multiply-adds per image")
    text = f"""A-ViT less control: {_mean_and_error(by_seed, "+")} points over the seeds of fine-tuning, which all start
from one static network; {difference:+.2f} ± {error:.2f} points paired by the {len(_hits(control)):,} test images, for
these seeds. ± is one standard error."""
    return f"## Test images\n\n{_table(head, rows)}\n\n{text}"


def _saved(figures: dict, prefix: str = "") -> float:
    return 1 - figures[f"{prefix}gmacs"] / figures[f"{prefix}gmacs_static"]


def _speed_table(stages: dict) -> str:
    figures = ("speed_up", "ideal", "speed_up_of_ideal")
    rows = [
        (str(row["batch_size"]), row["form"], f"{row['images_per_s']:.0f}", *(f"{row[name]:.2f}" for name in figures))
        for row in stages["benchmark"]
    ]
    head = ("batch", "form", "images/s", "speed-up", "ratio of multiply-adds", "speed-up / ratio")
    control, adaptive = (stages[f"epoch_{kind}"]["epochs"][-1] for kind in ("control", "adaptive"))
    shorter = 1 - adaptive["train_seconds"] / control["train_seconds"]
    text = f"""Training, an epoch of each at the same time, a core each, from their starting and their final weights:
{adaptive["train_seconds"]:.1f} s instead of the control's {control["train_seconds"]:.1f} s, {shorter:.1%} shorter, with
{adaptive["train_macs_saved"]:.1%} of the multiply-adds saved."""
    return f"## Speed\n\nInference, all in one run, each form in turn, medians:\n\n{_table(head, rows)}\n\n{text}"


HELD_OUT = ("held-out top-1, %", "mean depth", "multiply-adds saved")


def _held_out(stage: dict) -> tuple[str, str, str]:
    last = stage["epochs"][-1]
    return f"{last['test_acc1']:.2f}", f"{last['test_depth_mean']:.2f}", f"{_saved(last, 'test_'):.1%}"


def _held_out_table(stages: dict) -> str:
    rows = [("(a) static", *_held_out(stages["static"]))]
    for name in ("control", "adaptive"):
        rows += [(f"{name}, seed {seed}", *_held_out(stage)) for seed, stage in _by_seed(stages, f"{name}_").items()]
    kept = {f"test_{name}": value for name, value in stages["kept_weights"]["eval"].items()}
    rows.append(("A-ViT as kept, in half precision", *_held_out({"epochs": [kept]})))
    return f"## Held-out images\n\n{_table(('network', *HELD_OUT), rows)}"


def _search_stage(setting: Iterable[str]) -> str:
    return "_".join(["search", *setting])


def _search_table(stages: dict) -> str:
    rows = [("static", "", "", "", "", *_held_out(stages["search_static"]))]
    settings = [name.split("_")[1:] for name in stages if name.startswith("search_") and name != "search_static"]
    for setting in sorted(settings, key=lambda setting: tuple(map(float, setting))):
        untuned = stages["_".join(["gate", *setting[:2]])]["eval"]
        before = f"{untuned['acc1']:.2f}", f"{untuned['depth_mean']:.2f}"
        rows.append((*setting, *before, *_held_out(stages[_search_stage(setting)])))
    head = ("gate scale", "gate center", "ponder scale", "top-1 untuned", "depth untuned", *HELD_OUT)
    text = "Untuned: the static network under that gate, before any fine-tuning."
    return f"## Settings, on a third of the training images\n\n{_table(head, rows)}\n\n{text}"


def _trial_table(stages: dict) -> str:
    """The chosen setting among those that were tried as it was."""
    control, chosen = _pairs(stages)[0]
    trials = [chosen, *(stage for name, stage in stages.items() if name.startswith(TRIAL))]
    rows = [(*_setting(stage), *_held_out(stage)) for stage in trials]
    rows = [("control", "", "", "", *_held_out(control)), *sorted(rows, key=lambda row: [*map(float, row[:4])])]
    head = ("prior", "gate scale", "gate center", "ponder scale", *HELD_OUT)
    return f"## Settings, on all training images, one seed\n\n{_table(head, rows)}"


def _setting(stage: dict) -> list[str]:
    flags = ("distr_prior_alpha", "gate_scale", "gate_center", "ponder_token_scale")
    return [re.search(rf"--{flag} (\S+)", stage["command"])[1] for flag in flags]


TRIAL = "trial_"


ABLATIONS = {
    "ablation_prior": "with the prior, 0.001",
    "ablation_no_ponder": "without the ponder loss",
    "ablation_scratch_static": "from scratch, static",
    "ablation_scratch_halting": "from scratch, halting on from the start",
}


def _ablation_table(stages: dict, full_recipe: str) -> str:
    names = {full_recipe: "the full recipe"} | ABLATIONS
    rows = [(name, *_held_out(stages[stage])) for stage, name in names.items()]
    return f"## Ablation, on a third of the training images\n\n{_table(('', *HELD_OUT), rows)}"


def _origin(stages: dict) -> str:
    timed = [stage for name, stage in stages.items() if isinstance(stage, dict) and not name.startswith(TRIAL)]
    minutes = sum(stage["seconds"] for stage in timed) / 60
    machines = ", ".join(sorted({stage["machine"] for stage in timed}))
    commits = ", ".join(sorted({stage["commit"] for stage in timed}))
    return f"Measured by `make evidence`: {minutes:.0f} minutes of a core, two at a time, on {machines}, at {commits}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="stages.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    paths = {
        split: ("data", "out"),
        logs: ("results", "runs"),
        export: ("checkpoint", "file"),
        report: ("results", "file"),
    }
    for function, names in paths.items():
        command = commands.add_parser(function.__name__)
        for name in names:
            command.add_argument(name, type=Path)
        command.set_defaults(function=function)
    commands.choices["report"].add_argument("--chosen", required=True)
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
