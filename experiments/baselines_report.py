"""Tables and charts of baselines.sh: python -m experiments.baselines_report RESULTS TITLE"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.stages import HELD_OUT, held_out, mean_and_error, processors, table

FULL, HALTING, ANY_BUDGET = "full", "halting", "anybudget"
METHODS = {  # stages test_METHODSETTING_SEED, and what they are
    HALTING: "A-ViT, trained for each budget",
    ANY_BUDGET: "A-ViT, one network, --budget",
    "shallowhalting": "A-ViT on the first 7 blocks",
    "evit": "static, patches by attention",
    "shallow": "static, fewer blocks",
    "narrow": "static, narrower",
    "random": "static, random patches",
    FULL: "static, uncut",
}
STYLES = dict(zip(METHODS, ("o-", "s--", "^-", "D:", "v:", "P:", "x:", "*")))
BASELINES = ("evit", "shallow", "narrow", "random")


class Point(NamedTuple):
    """A network on the test images, by seed: cost, share of the uncut network's multiply-adds, and accuracy, %."""

    method: str
    setting: str
    cost: dict[str, float]
    accuracy: dict[str, float]


def points_of(results: Path) -> list[Point]:
    """Of every stage that was tested, cheap ones first."""
    stages = {path.stem: json.loads(path.read_text())["eval"] for path in sorted(results.glob("test_*_*.json"))}
    named = {name: re.fullmatch(r"test_([a-z]+)([\d.]*)_(\d+)", name) for name in stages}
    found = defaultdict(dict)
    for name, match in named.items():
        if match and match[1] in METHODS:
            found[match[1], match[2]][match[3]] = stages[name]
    static = next(iter(found[FULL, ""].values()))["gmacs"]
    points = []
    for (method, setting), evals in found.items():
        cost = {seed: figures["gmacs"] / static for seed, figures in evals.items()}
        points.append(Point(method, setting, cost, {seed: figures["acc1"] for seed, figures in evals.items()}))
    return sorted(points, key=lambda point: (list(METHODS).index(point.method), mean(point.cost)))


def mean(values: dict[str, float]) -> float:
    return statistics.mean(values.values())


def networks_table(points: list[Point], speeds: dict[str, float]) -> str:
    rows = []
    for point in points:
        speed = speeds.get(point.method + point.setting)
        shown = f"{speed / speeds[FULL]:.2f}" if speed else ""
        fewer = f"{1 - mean(point.cost):.1%}"
        seeds, accuracy = str(len(point.accuracy)), mean_and_error([*point.accuracy.values()])
        rows.append(
            (METHODS[point.method], point.setting, seeds, fewer, accuracy, shown, f"{1 / mean(point.cost):.2f}")
        )
    head = (
        "network",
        "setting",
        "seeds",
        "fewer multiply-adds",
        "top-1, %",
        "images/s / uncut",
        "if multiply-adds told",
    )
    return table(head, rows)


def steps_table(results: Path) -> str:
    """Training steps of the first seed's network for each budget, beside timm's static ones; no teacher."""
    rows = []
    for path in sorted(results.glob("step_*.json"), reverse=True):
        step = next(row for row in json.loads(path.read_text()) if row["form"] == "zipped")
        saved, shorter = (f"{1 - 1 / step[ratio]:.1%}" for ratio in ("ideal", "speed_up"))
        rows.append((path.stem.removeprefix("step_"), saved, shorter))
    return table(("budget", "multiply-adds saved in training", "a training step is shorter by"), rows)


ABLATIONS = {
    "halting0.45_{seed}": "the recipe",
    "ablation_prior": "with the paper's prior, 0.01",
    "ablation_fixed_weight": "without the controller: gate auto, ponder weight 0.001",
    "ablation_no_ponder": "without the ponder loss: gate auto",
    "ablation_paper_gate": "with the paper's gate, 10 and 30",
    "ablation_no_teacher": "without a teacher",
    "ablation_scratch_static": "from scratch, static",
    "ablation_scratch": "from scratch",
}


def ablations_table(results: Path) -> str:
    """Of those that were trained, on the held-out images, first seed."""
    seed = min((path.stem.split("_")[1] for path in results.glob("full_*.json")), default="0")
    rows = []
    for stage, name in ABLATIONS.items():
        path = results / f"{stage.format(seed=seed)}.json"
        if path.exists():
            rows.append((name, *held_out(json.loads(path.read_text()))))
    return table(("", *HELD_OUT), rows)


def machines_line(results: Path) -> str:
    """Where trainings ended, which may have begun elsewhere; images/s are always of the processors."""
    stages = [json.loads(path.read_text()) for path in results.glob("*_*.json")]
    machines = Counter(stage["machine"] for stage in stages if "epochs" in stage).most_common()
    trained = " and ".join(f"{name} ({number} stages)" for name, number in machines)
    return f"Trainings ended on {trained or 'no machine'}; images/s of {processors()}."


def accuracy_at(points: list[Point], method: str, seed: str) -> Callable[[float], float | None]:
    """Accuracy of a static method at a cost, linear between its networks and the uncut one; None where it has none."""
    known = [p for p in points if p.method in (method, FULL) and seed in p.cost]
    pairs = sorted((p.cost[seed], p.accuracy[seed]) for p in known)

    def at(cost: float) -> float | None:
        return float(np.interp(cost, *zip(*pairs))) if len(pairs) > 1 and pairs[0][0] - 0.01 <= cost else None

    return at


def differences_table(points: list[Point]) -> str:
    """Of each halting network, its accuracy less that of each rival at the same cost, seed by seed."""
    rows = []
    for point in (p for p in points if p.method in (HALTING, ANY_BUDGET, "shallowhalting")):
        row = [METHODS[point.method], f"{1 - mean(point.cost):.1%}"]
        for rival in BASELINES:
            by_seed = [
                point.accuracy[seed] - other
                for seed in point.accuracy
                if (other := accuracy_at(points, rival, seed)(point.cost[seed])) is not None
            ]
            row.append(mean_and_error(by_seed, "+") if by_seed else "")
        uncut = next(p for p in points if p.method == FULL)
        row.append(
            mean_and_error([point.accuracy[s] - uncut.accuracy[s] for s in point.accuracy if s in uncut.accuracy], "+")
        )
        rows.append(row)
    return table(("less, in points", "fewer multiply-adds", *(METHODS[r] for r in BASELINES), "static, uncut"), rows)


def chart(points: list[Point], place: Callable[[Point], float | None], label: str, title: str, path: Path) -> None:
    """Accuracy against what `place` says of each network; bars are standard errors over seeds."""
    figure, axes = plt.subplots(figsize=(7.2, 5.2), layout="constrained")
    for number, (method, name) in enumerate(METHODS.items()):
        shown = [(place(p), p) for p in points if p.method == method and place(p) is not None]
        if not shown:
            continue
        x, y = [v for v, _ in shown], [mean(p.accuracy) for _, p in shown]
        error = [
            statistics.stdev(a) / len(a) ** 0.5 if len(a) > 1 else 0 for a in ([*p.accuracy.values()] for _, p in shown)
        ]
        style = {"fmt": STYLES[method], "color": f"C{number}", "markersize": 8 if method == FULL else 5}
        axes.errorbar(x, y, error, label=name, capsize=3, **style)
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 of the test images, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(results: Path, title: str) -> None:
    points = points_of(results)
    speeds = json.loads((results / "throughput.json").read_text()) if (results / "throughput.json").exists() else {}
    text = [
        f"# {title}",
        networks_table(points, speeds),
        differences_table(points),
        steps_table(results),
        ablations_table(results),
        machines_line(results),
    ]
    (results / "baselines.md").write_text("\n\n".join(text) + "\n")
    fewer = "multiply-adds, share of the uncut network's"
    chart(points, lambda point: mean(point.cost), fewer, title, results / "accuracy_macs.png")
    if speeds:
        per_second = "images/s, logits"
        chart(points, lambda p: speeds.get(p.method + p.setting), per_second, title, results / "accuracy_speed.png")
    print(f"{results / 'baselines.md'} written")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="baselines_report.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("title")
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
