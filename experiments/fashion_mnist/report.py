"""Write the tables of run.sh.

Usage: python -m experiments.fashion_mnist.report RESULTS FILE --chosen SETTING
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from compare import paired_difference
from experiments.stages import HELD_OUT, by_seed, correct_rate, held_out, mean_and_error, share_saved, table

TRIAL = "trial_"
ABLATIONS = {  # by stage, in the order of the table
    "ablation_prior": "with the prior, weight 0.001",
    "ablation_no_ponder": "no ponder loss",
    "ablation_scratch_static": "from scratch, static",
    "ablation_scratch_halting": "from scratch, halting",
}


def report(results: Path, file: Path, chosen: str) -> None:
    """Write all tables to `file`.

    chosen: "GATE_SCALE:GATE_CENTER:PONDER_SCALE", the setting of the search that seeds and ablations use. Exits with an
    error if the search has no such setting. Raises ValueError if the seeds of control and A-ViT differ.
    """
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    name = _search_stage(chosen.split(":"))
    if name not in stages:
        raise SystemExit(
            f"--chosen {chosen}: the search has no such setting, {results / name}.json does not exist. "
            "Choose one of SEARCH in run.sh."
        )
    parts = [
        _test_table(stages),
        _speed_table(stages),
        _held_out_table(stages),
        _search_table(stages),
        _trial_table(stages),
        _ablation_table(stages, name),
        _origin(stages),
    ]
    file.write_text("\n\n".join(["# Fashion-MNIST", *parts]) + "\n")
    print(f"{file} written")


def _pairs(stages: dict, prefix: str = "") -> list[tuple[dict, dict]]:
    """Return control and A-ViT of each seed. Raises ValueError if one of the two is missing."""
    control, adaptive = (by_seed(stages, f"{prefix}{kind}_") for kind in ("control", "adaptive"))
    if not control or control.keys() != adaptive.keys():
        raise ValueError(f"the control has seeds {list(control)}, A-ViT has {list(adaptive)}; run the missing ones")
    return [(control[seed], adaptive[seed]) for seed in control]


def _test_table(stages: dict) -> str:
    control, adaptive = zip(*_pairs(stages, "test_"))
    rows = []
    for name, runs in {"(a) static": [stages["test_static"]], "(b) control": control, "(c) A-ViT": adaptive}.items():
        evals = [run["eval"] for run in runs]
        saved = statistics.mean(share_saved(e) for e in evals)
        macs = f"{1e3 * statistics.mean(e['gmacs'] for e in evals):.2f} M ({saved:.1%} saved)"
        depth = mean_and_error([e["depth_mean"] for e in evals])
        rows.append((name, str(len(runs)), mean_and_error([e["acc1"] for e in evals]), depth, macs))
    differences = [a["eval"]["acc1"] - c["eval"]["acc1"] for c, a in zip(control, adaptive)]
    control_rate, adaptive_rate = correct_rate(control), correct_rate(adaptive)
    difference, error = paired_difference(control_rate, adaptive_rate)
    head = ("model", "seeds", "top-1 (%)", "mean depth", "MACs per image")
    text = f"""A-ViT minus control:

* {mean_and_error(differences, "+")} points over the seeds of fine-tuning, all from the same static model
* {difference:+.2f} ± {error:.2f} points paired by image, over the {len(control_rate):,} test images, for these seeds

± is one standard error."""
    return f"## Test images\n\n{table(head, rows)}\n\n{text}"


def _speed_table(stages: dict) -> str:
    ratios = ("speed_up", "ideal", "speed_up_of_ideal")
    rows = [
        (str(row["batch_size"]), row["form"], f"{row['images_per_s']:.0f}", *(f"{row[name]:.2f}" for name in ratios))
        for row in stages["benchmark"]
    ]
    head = ("batch size", "mode", "images/s", "speedup", "MACs ratio", "speedup / MACs ratio")
    control, adaptive = (stages[f"epoch_{kind}"]["epochs"][-1] for kind in ("control", "adaptive"))
    shorter = 1 - adaptive["train_seconds"] / control["train_seconds"]
    text = f"""Training: one more epoch of each from its initial weights (control) or its final ones (A-ViT), run at the
same time on one core each. A-ViT takes {adaptive["train_seconds"]:.1f} s, the control {control["train_seconds"]:.1f} s
({shorter:.1%} shorter); {adaptive["train_macs_saved"]:.1%} of the MACs are saved."""
    return f"## Speed\n\nInference: all modes in one run, in turn, medians.\n\n{table(head, rows)}\n\n{text}"


def _held_out_table(stages: dict) -> str:
    rows = [("(a) static", *held_out(stages["static"]))]
    for kind, name in {"control": "(b) control", "adaptive": "(c) A-ViT"}.items():
        stages_of = by_seed(stages, f"{kind}_")
        rows += [(f"{name}, seed {seed}", *held_out(stage)) for seed, stage in stages_of.items()]
    exported = {f"test_{name}": value for name, value in stages["exported_weights"]["eval"].items()}
    rows.append(("(c) A-ViT, first seed, exported in half precision", *held_out({"epochs": [exported]})))
    return f"## Held-out images\n\n{table(('model', *HELD_OUT), rows)}"


def _search_stage(setting: Iterable[str]) -> str:
    return "_".join(["search", *setting])


def _search_table(stages: dict) -> str:
    rows = [("static", "", "", "", "", *held_out(stages["search_static"]))]
    settings = [name.split("_")[1:] for name in stages if name.startswith("search_") and name != "search_static"]
    for setting in sorted(settings, key=lambda setting: tuple(map(float, setting))):
        untuned = stages["_".join(["gate", *setting[:2]])]["eval"]
        before = f"{untuned['acc1']:.2f}", f"{untuned['depth_mean']:.2f}"
        rows.append((*setting, *before, *held_out(stages[_search_stage(setting)])))
    head = ("gate scale", "gate center", "ponder scale", "initial top-1 (%)", "initial depth", *HELD_OUT)
    text = "Initial: the static model with this gate, before any fine-tuning."
    return f"## Gate and ponder scale, a third of the training images\n\n{table(head, rows)}\n\n{text}"


def _trial_table(stages: dict) -> str:
    """Compare the chosen setting, first seed, with the trials, which were trained the same way."""
    control, chosen = _pairs(stages)[0]
    trials = [chosen, *(stage for name, stage in stages.items() if name.startswith(TRIAL))]
    rows = [(*_setting(stage), *held_out(stage)) for stage in trials]
    rows = [("control", "", "", "", *held_out(control)), *sorted(rows, key=lambda row: [*map(float, row[:4])])]
    head = ("prior", "gate scale", "gate center", "ponder scale", *HELD_OUT)
    return f"## Prior and ponder scale, all training images, first seed\n\n{table(head, rows)}"


def _setting(stage: dict) -> list[str]:
    flags = ("distr_prior_alpha", "gate_scale", "gate_center", "ponder_token_scale")
    return [re.search(rf"--{flag} (\S+)", stage["command"])[1] for flag in flags]


def _ablation_table(stages: dict, full_recipe: str) -> str:
    names = {full_recipe: "full recipe"} | ABLATIONS
    rows = [(name, *held_out(stages[stage])) for stage, name in names.items()]
    return f"## Ablation, a third of the training images\n\n{table(('recipe', *HELD_OUT), rows)}"


def _origin(stages: dict) -> str:
    timed = [stage for name, stage in stages.items() if isinstance(stage, dict) and not name.startswith(TRIAL)]
    minutes = sum(stage["seconds"] for stage in timed) / 60
    machines = ", ".join(sorted({stage["machine"] for stage in timed}))
    commits = ", ".join(sorted({stage["commit"] for stage in timed}))
    text = f"Measured by `make experiments`: {minutes:.0f} minutes of one core, two stages at a time, on {machines}."
    return f"## Origin\n\n{text} Commits: {commits}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with the recorded stages")
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.add_argument("--chosen", required=True, metavar="SETTING", help="GATE_SCALE:GATE_CENTER:PONDER_SCALE")
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
