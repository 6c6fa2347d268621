"""The tables of run.sh: python -m experiments.fashion_mnist.report RESULTS FILE --chosen SETTING"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from compare import paired_difference
from experiments.stages import HELD_OUT, by_seed, correct_rate, held_out, mean_and_error, share_saved, table


def report(results: Path, file: Path, chosen: str) -> None:
    """chosen: gate scale:gate center:ponder scale, one of the search; what seeds and ablations were run with."""
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    name = _search_stage(chosen.split(":"))
    if name not in stages:
        raise SystemExit(f"the chosen setting {chosen} is not among those of the search: no {results / name}.json")
    parts = [part(stages) for part in (_test_table, _speed_table, _held_out_table, _search_table)]
    parts += [_trial_table(stages), _ablation_table(stages, name), _origin(stages)]
    file.write_text("\n\n".join(["# Fashion-MNIST", *parts]) + "\n")
    print(f"{file} written")


def _pairs(stages: dict, prefix: str = "") -> list[tuple[dict, dict]]:
    """Control and A-ViT of each seed. ValueError where one is missing."""
    control, adaptive = (by_seed(stages, f"{prefix}{kind}_") for kind in ("control", "adaptive"))
    if not control or control.keys() != adaptive.keys():
        raise ValueError(f"seeds of the control {list(control)}, of A-ViT {list(adaptive)}")
    return [(control[seed], adaptive[seed]) for seed in control]


def _test_table(stages: dict) -> str:
    control, adaptive = zip(*_pairs(stages, "test_"))
    rows = []
    for name, runs in {"(a) static": [stages["test_static"]], "(b) control": control, "(c) A-ViT": adaptive}.items():
        evals = [run["eval"] for run in runs]
        saved = statistics.mean(share_saved(e) for e in evals)
        macs = f"{1e3 * statistics.mean(e['gmacs'] for e in evals):.2f} M ({saved:.1%} fewer)"
        depth = mean_and_error([e["depth_mean"] for e in evals])
        rows.append((name, str(len(runs)), mean_and_error([e["acc1"] for e in evals]), depth, macs))
    by_seed = [a["eval"]["acc1"] - c["eval"]["acc1"] for c, a in zip(control, adaptive)]
    difference, error = paired_difference(correct_rate(control), correct_rate(adaptive))
    head = ("network", "seeds", "top-1, %", "mean depth", "multiply-adds per image")
    text = f"""A-ViT less control: {mean_and_error(by_seed, "+")} points over the seeds of fine-tuning, which all start
from one static network; {difference:+.2f} ± {error:.2f} points paired by the {len(correct_rate(control)):,} test images, for
these seeds. ± is one standard error."""
    return f"## Test images\n\n{table(head, rows)}\n\n{text}"


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
    return f"## Speed\n\nInference, all in one run, each form in turn, medians:\n\n{table(head, rows)}\n\n{text}"


def _held_out_table(stages: dict) -> str:
    rows = [("(a) static", *held_out(stages["static"]))]
    for name in ("control", "adaptive"):
        rows += [(f"{name}, seed {seed}", *held_out(stage)) for seed, stage in by_seed(stages, f"{name}_").items()]
    kept = {f"test_{name}": value for name, value in stages["exported_weights"]["eval"].items()}
    rows.append(("A-ViT as kept, in half precision", *held_out({"epochs": [kept]})))
    return f"## Held-out images\n\n{table(('network', *HELD_OUT), rows)}"


def _search_stage(setting: Iterable[str]) -> str:
    return "_".join(["search", *setting])


def _search_table(stages: dict) -> str:
    rows = [("static", "", "", "", "", *held_out(stages["search_static"]))]
    settings = [name.split("_")[1:] for name in stages if name.startswith("search_") and name != "search_static"]
    for setting in sorted(settings, key=lambda setting: tuple(map(float, setting))):
        untuned = stages["_".join(["gate", *setting[:2]])]["eval"]
        before = f"{untuned['acc1']:.2f}", f"{untuned['depth_mean']:.2f}"
        rows.append((*setting, *before, *held_out(stages[_search_stage(setting)])))
    head = ("gate scale", "gate center", "ponder scale", "top-1 untuned", "depth untuned", *HELD_OUT)
    text = "Untuned: the static network under that gate, before any fine-tuning."
    return f"## Settings, on a third of the training images\n\n{table(head, rows)}\n\n{text}"


def _trial_table(stages: dict) -> str:
    """The chosen setting among those that were tried as it was."""
    control, chosen = _pairs(stages)[0]
    trials = [chosen, *(stage for name, stage in stages.items() if name.startswith(TRIAL))]
    rows = [(*_setting(stage), *held_out(stage)) for stage in trials]
    rows = [("control", "", "", "", *held_out(control)), *sorted(rows, key=lambda row: [*map(float, row[:4])])]
    head = ("prior", "gate scale", "gate center", "ponder scale", *HELD_OUT)
    return f"## Settings, on all training images, one seed\n\n{table(head, rows)}"


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
    rows = [(name, *held_out(stages[stage])) for stage, name in names.items()]
    return f"## Ablation, on a third of the training images\n\n{table(('', *HELD_OUT), rows)}"


def _origin(stages: dict) -> str:
    timed = [stage for name, stage in stages.items() if isinstance(stage, dict) and not name.startswith(TRIAL)]
    minutes = sum(stage["seconds"] for stage in timed) / 60
    machines = ", ".join(sorted({stage["machine"] for stage in timed}))
    commits = ", ".join(sorted({stage["commit"] for stage in timed}))
    return f"Measured by `make evidence`: {minutes:.0f} minutes of a core, two at a time, on {machines}, at {commits}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0])
    for name in ("results", "file"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--chosen", required=True)
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
