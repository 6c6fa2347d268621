"""Write the tables and charts of baselines.sh and cluttered/varied.sh.

Usage: python -m experiments.baselines_report RESULTS TITLE
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compare import paired_difference
from experiments.stages import HELD_OUT, correct_rate, held_out, mean_and_error, table
from training.parser import Parser

FULL, START, TRAINED, OTHER_BUDGET = "full", "static", "direction", "otherbudget"
ADAPTIVE = (TRAINED, "halting", "counts", "anybudget", "shallowhalting")
METHODS = {  # by the METHOD of stages test_METHODSETTING_SEED
    TRAINED: "A-ViT, gate by direction",
    "halting": "A-ViT, gate of one channel",
    "counts": "A-ViT, same counts in every image",
    OTHER_BUDGET: "A-ViT of the smallest budget, run with --budget",
    "anybudget": "A-ViT with --gate-jitter, run with --budget",
    "shallowhalting": "A-ViT on the first 7 blocks",
    "fused": "EViT, three steps",
    "evit": "EViT-style pruning",
    "tome": "ToMe",
    "shallow": "shallower",
    "narrow": "narrower",
    "random": "random patches",
    START: "static, before fine-tuning",
    FULL: "static, full",
}
STYLES = dict(zip(METHODS, ("o-", "o:", "h:", ".-", "s--", "^-", "p:", "D:", "<:", "v:", "P:", "x:", "X", "*")))
COLORS = dict(
    zip(METHODS, ("C0", "C1", "C3", "C4", "C5", "C6", "C2", "C8", "C9", "navy", "olive", "gray", "brown", "black"))
)
BASELINES = ("fused", "evit", "tome", "shallow", "narrow", "random")
RECIPE_ABLATIONS = {  # by stage, in the order of the table
    "halting0.45_{seed}": "full recipe",
    "ablation_prior": "with the paper's prior, weight 0.01",
    "ablation_fixed_weight": "no budget controller: --gate auto, ponder weight 0.001",
    "ablation_no_ponder": "no ponder loss: --gate auto",
    "ablation_paper_gate": "the paper's gate: scale 10, center 30",
    "ablation_no_teacher": "no teacher",
    "ablation_scratch_static": "from scratch, static",
    "ablation_scratch": "from scratch, halting",
}
GATE_ABLATIONS = {
    stage.format(budget): f"{budget}: {name}"
    for budget in ("0.3", "0.2")
    for stage, name in (
        ("direction{}_{{seed}}", "gate by direction"),
        ("ablation_still{}", "gate by direction, center fixed in training"),
        ("ablation_stays_center{}", "gate of one channel, class token stays, center controller"),
        ("ablation_center{}", "gate of one channel, center controller"),
        ("ablation_stays{}", "gate of one channel, class token stays"),
        ("halting{}_{{seed}}", "gate of one channel"),
    )
}

GAP = 0.05  # fraction of the MACs; the line from a baseline's largest model to the full one is too low further away
IMAGES_NOTE = """Nothing is interpolated here. The error over seeds leaves out the choice of the images, and the error
over images that of the seeds. The root of the sum of their squares is a little too large as the error of both."""
HELD_OUT_ACCURACY = "held-out top-1 (%)"
GATES = "Gate by direction minus gate of one channel, paired by seed"
IMAGES = "Gate by direction minus models of equal setting and the full one, paired by seed and by image"
DIFFERENCES = "Accuracy of A-ViT minus that of each baseline at equal MACs, in points"
MODELS_NOTE = """± is one standard error over the seeds. Columns:

* setting: the budget as a fraction of the MACs for A-ViT, on the first 7 blocks as a fraction of their MACs; the same
  fraction for EViT, ToMe and random patches, approximated by fixed numbers of patches; the number of blocks for
  shallower models; the embedding width for narrower ones
* speedup: images/s relative to the full model, first seed, batch size 256, {machine}
* MACs ratio: the MACs of the full model divided by those of the model"""


class Point(NamedTuple):
    """The results of a method at one setting, by seed.

    macs: MACs as a fraction of the full model's; accuracy: top-1 in percent; stages: as recorded.
    """

    method: str
    setting: str
    macs: dict[str, float]
    accuracy: dict[str, float]
    stages: dict[str, dict]

    def of_seeds(self, seeds: list[str]) -> Point:
        macs, accuracy, stages = ({s: of[s] for s in seeds} for of in (self.macs, self.accuracy, self.stages))
        return self._replace(macs=macs, accuracy=accuracy, stages=stages)

    @property
    def seeds_with_images(self) -> set[str]:
        """The seeds whose stages record for each image whether the prediction is correct."""
        return {seed for seed, stage in self.stages.items() if "correct" in stage}


def load_points(results: Path, on_test: bool = True) -> list[Point]:
    """Load the results on the test images, else those on held-out images after training.

    They are ordered by method, then by MACs. There are none before the full model or an A-ViT of it is evaluated.
    """
    found = defaultdict(dict)
    for path in sorted(results.glob("*_*.json")):
        match = re.fullmatch(r"test_([a-z]+)([\d.]*)_(\d+)" if on_test else r"([a-z]+)([\d.]*)_(\d+)", path.stem)
        if match and match[1] in METHODS:
            found[match[1], match[2]][match[3]] = json.loads(path.read_text())
    full_gmacs, points = _full_gmacs(found), []
    if full_gmacs is None:
        return []
    for (method, setting), stages in found.items():
        metrics = {seed: _metrics(stage) for seed, stage in stages.items()}
        macs = {seed: each["gmacs"] / full_gmacs for seed, each in metrics.items()}
        points.append(Point(method, setting, macs, {seed: each["acc1"] for seed, each in metrics.items()}, stages))
    return sorted(points, key=lambda point: (list(METHODS).index(point.method), mean(point.macs)))


def _full_gmacs(found: dict[tuple[str, str], dict[str, dict]]) -> float | None:
    """Return the full model's GMACs from stages by method, setting and seed. A-ViT with all blocks records them too."""
    for method, name in ((FULL, "gmacs"), (TRAINED, "gmacs_static")):
        for key, stages in found.items():
            if key[0] == method:
                return _metrics(next(iter(stages.values())))[name]
    return None


def _metrics(stage: dict) -> dict:
    """Return the metrics of a recorded evaluation, or those after the last epoch of a recorded training."""
    if "eval" in stage:
        return stage["eval"]
    return {name.removeprefix("test_"): value for name, value in stage["epochs"][-1].items()}


def load_throughput(results: Path) -> tuple[dict[str, float], str]:
    """Load images/s by method and setting, and the machine; both are empty before the measurement."""
    file = results / "throughput.json"
    if not file.exists():
        return {}, ""
    recorded = json.loads(file.read_text())
    return recorded["images_per_s"], recorded["machine"]


def mean(values: dict[str, float]) -> float:
    return statistics.mean(values.values())


def models_table(points: list[Point], images_per_s: dict[str, float], accuracy: str = "top-1 (%)") -> str:
    rows = []
    for point in points:
        measured = images_per_s.get(point.method + point.setting)
        rows.append(
            (
                METHODS[point.method],
                point.setting,
                str(len(point.accuracy)),
                f"{1 - mean(point.macs):.1%}",
                mean_and_error([*point.accuracy.values()]),
                f"{measured / images_per_s[FULL]:.2f}" if measured else "",
                f"{1 / mean(point.macs):.2f}",
            )
        )
    return table(("model", "setting", "seeds", "MACs saved", accuracy, "speedup", "MACs ratio"), rows)


def steps_table(results: Path) -> str:
    """Compare training steps of the first seed's model for each budget with timm's static model, without a teacher."""
    rows = []
    for path in sorted(results.glob("step_*.json"), reverse=True):
        step = next(row for row in json.loads(path.read_text()) if row["form"] == "zipped")
        saved, shorter = (f"{1 - 1 / step[ratio]:.1%}" for ratio in ("ideal", "speed_up"))
        rows.append((path.stem.removeprefix("step_"), saved, shorter))
    return table(("budget", "MACs saved in training", "training-step time saved"), rows)


def ablations_table(results: Path, ablations: dict[str, str]) -> str:
    """Tabulate the ablations that were trained: held-out images, first seed. Empty if none was.

    ablations: names by stage. Stages with a seed are rows for comparison, which have been trained in any case.
    """
    if not any((results / f"{stage}.json").exists() for stage in ablations):
        return ""
    seed = min((path.stem.split("_")[1] for path in results.glob("full_*.json")), default="0")
    rows = []
    for stage, name in ablations.items():
        path = results / f"{stage.format(seed=seed)}.json"
        if path.exists():
            rows.append((name, *held_out(json.loads(path.read_text()))))
    return table(("recipe", *HELD_OUT), rows)


def machines_line(results: Path) -> str:
    """Return two sentences on the machines where stages ended, which may have begun elsewhere."""
    stages = [json.loads(path.read_text()) for path in results.glob("*_*.json")]
    machines = Counter(stage["machine"] for stage in stages if "epochs" in stage).most_common()
    trained = " and ".join(f"{name} ({number} stages)" for name, number in machines)
    hours = Counter()
    for stage in stages:
        if "seconds" in stage:
            hours[stage["machine"]] += stage["seconds"] / 3600
    spent = " and ".join(f"{name} ({number:.1f} hours)" for name, number in hours.most_common())
    ended = f"Training stages by the machine where they ended: {trained or 'none'}."
    return f"{ended} Time of all stages: {spent or 'unknown'}."


def accuracy_at(points: list[Point], method: str, seed: str) -> Callable[[float], float | None]:
    """Return a function from MACs to a baseline's accuracy, interpolated linearly between its models and the full one.

    The function returns None below the baseline's models and above the largest known one, with a margin of 0.01, and
    more than GAP above the baseline's models.
    """
    known = [p for p in points if p.method in (method, FULL) and seed in p.macs]
    pairs = sorted((p.macs[seed], p.accuracy[seed]) for p in known)
    own = [p.macs[seed] for p in known if p.method == method]

    def at(macs: float) -> float | None:
        is_known = own and min(own) - 0.01 <= macs <= min(max(own) + GAP, pairs[-1][0] + 0.01)
        return float(np.interp(macs, *zip(*pairs))) if is_known else None

    return at


def differences_table(points: list[Point]) -> str:
    """Tabulate the accuracy of each A-ViT model minus that of each baseline at equal MACs, paired by seed.

    A baseline without models of all seeds of the A-ViT has an empty cell.
    """
    full = next((p for p in points if p.method == FULL), None)
    baselines = [method for method in BASELINES if any(p.method == method for p in points)]
    rows = []
    for point in (p for p in points if p.method in ADAPTIVE):
        row = [METHODS[point.method], f"{1 - mean(point.macs):.1%}"]
        for baseline in baselines:
            differences = [
                point.accuracy[seed] - other
                for seed in point.accuracy
                if (other := accuracy_at(points, baseline, seed)(point.macs[seed])) is not None
            ]
            row.append(mean_and_error(differences, "+") if len(differences) == len(point.accuracy) else "")
        rows.append([*row, paired(point, full)] if full else row)
    heads = [METHODS[method] for method in (*baselines, *([FULL] if full else []))]
    return table(("model", "MACs saved", *heads), rows)


def gates_table(points: list[Point]) -> str:
    """Tabulate the accuracy of the gate by direction minus that of the gate of one channel, for each common budget."""
    directions, channels = ({p.setting: p for p in points if p.method == method} for method in (TRAINED, "halting"))
    rows = [(budget, paired(directions[budget], channels[budget])) for budget in directions if budget in channels]
    return table(("budget", "difference in points"), rows)


def images_table(points: list[Point]) -> str:
    """Tabulate the gate by direction minus each other model of its budget and the full one, paired by seed and image.

    Both columns have the mean over the seeds that both models have, one with its error over seeds, the other with that
    over images.
    """
    rows = []
    for point in (p for p in points if p.method == TRAINED):
        others = (p for p in points if p.method not in (TRAINED, OTHER_BUDGET))
        for other in (p for p in others if p.method in (START, FULL) or p.setting == point.setting):
            seeds = sorted(point.seeds_with_images & other.seeds_with_images)
            if seeds:
                ours, theirs = (p.of_seeds(seeds) for p in (point, other))
                difference, error = paired_difference(*(correct_rate(p.stages.values()) for p in (theirs, ours)))
                by_image = f"{difference:+.2f} ± {error:.2f}"
                rows.append((METHODS[other.method], point.setting, str(len(seeds)), paired(ours, theirs), by_image))
    return table(("other model", "budget", "seeds", "points ± over seeds", "points ± over images"), rows)


def budgets_table(points: list[Point]) -> str:
    """Tabulate the models of the smallest budget, at this and other budgets; differences are paired by seed.

    Where no model with the gate by direction was trained for a budget, one with the gate of one channel stands in.
    """
    trained, others = ({p.setting: p for p in points if p.method == method} for method in (TRAINED, "halting"))
    full = next((p for p in points if p.method == FULL), None)
    rows = []
    for point in at_all_budgets(points):
        same_budget = (others | trained).get(point.setting) if point.method == OTHER_BUDGET else None
        differences = (paired(point, other) for other in (same_budget, full))
        accuracy = mean_and_error([*point.accuracy.values()])
        rows.append((point.setting, f"{mean(point.macs):.3f}", accuracy, *differences))
    return table(("--budget", "MACs", "top-1 (%)", "minus trained for it", "minus static, full"), rows)


def at_all_budgets(points: list[Point]) -> list[Point]:
    """Return the A-ViT of the smallest budget at this and at other budgets, by budget; empty without the others."""
    asked = [p for p in points if p.method == OTHER_BUDGET]
    smallest = min((p for p in points if p.method == TRAINED), key=lambda p: float(p.setting), default=None)
    return sorted([smallest, *asked], key=lambda p: float(p.setting)) if smallest and asked else asked


def paired(point: Point, other: Point | None) -> str:
    """Return the mean difference of two accuracies over the seeds that both have; empty if there are none."""
    seeds = point.accuracy.keys() & other.accuracy.keys() if other else ()
    return mean_and_error([point.accuracy[seed] - other.accuracy[seed] for seed in sorted(seeds)], "+") if seeds else ""


def chart(points: list[Point], place: Callable[[Point], float | None], label: str, title: str, path: Path) -> None:
    """Plot accuracy over the value that `place` returns for each point; bars are standard errors over seeds."""
    from matplotlib.figure import Figure  # after the parser has set the backend

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    lines = {method: [p for p in points if p.method == method] for method in METHODS}
    lines[OTHER_BUDGET] = at_all_budgets(points)
    for method, line in lines.items():
        shown = [(x, p) for p in line if (x := place(p)) is not None]
        if not any(p.method == method for _, p in shown):
            continue
        x, y = [v for v, _ in shown], [mean(p.accuracy) for _, p in shown]
        error = [
            statistics.stdev(a) / len(a) ** 0.5 if len(a) > 1 else 0 for a in ([*p.accuracy.values()] for _, p in shown)
        ]
        style = {"fmt": STYLES[method], "color": COLORS[method], "markersize": 8 if method == FULL else 5}
        axes.errorbar(x, y, error, label=METHODS[method], capsize=3, **style)
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 on the test images (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)


def _section(head: str, rows: str, *notes: str) -> tuple[str, ...]:
    """Return a heading, a table and notes, or nothing for a table without rows."""
    return (f"## {head}", rows, *notes) if rows.count("\n") > 1 else ()


def report(results: Path, title: str) -> None:
    """Write baselines.md, accuracy_macs.png and, once throughput is recorded, accuracy_speed.png.

    Until the full model is tested, baselines.md has the accuracy on held-out images too. Its means are those of models
    that are trained with all seeds; if some are not, the first seed has a table of its own.
    """
    points, (images_per_s, machine) = load_points(results), load_throughput(results)
    sections = _test_sections(results, points, title, images_per_s, machine) if points else []
    if not any(p.method == FULL for p in points):  # most models have not been tested
        sections += _held_out_sections(results, images_per_s)
    head, models, *others = [*sections, *_gate_ablations(results), machines_line(results)]
    note = MODELS_NOTE.format(machine=machine or "not measured yet")
    (results / "baselines.md").write_text("\n\n".join([f"# {title}", head, models, note, *others]) + "\n")
    print(f"{results / 'baselines.md'} written")


def _held_out_sections(results: Path, images_per_s: dict[str, float]) -> list[str]:
    """Return the sections on held-out images, the table of the models first."""
    points = load_points(results, on_test=False)
    seeds = sorted(set().union(*(p.accuracy for p in points)))
    complete = [p for p in points if len(p.accuracy) == len(seeds)]
    sections = ["## Held-out images", models_table(complete, images_per_s, HELD_OUT_ACCURACY)]
    if len(seeds) > 1:
        sections += [f"## {DIFFERENCES}, held-out images", differences_table(complete)]
        sections += _section(f"{GATES}, held-out images", gates_table(complete))
    if len(complete) < len(points):  # a mean over fewer seeds is not comparable
        first = [p.of_seeds(seeds[:1]) for p in points if seeds[0] in p.accuracy]
        sections += ["## First seed, held-out images", models_table(first, images_per_s, HELD_OUT_ACCURACY)]
    return sections


def _gate_ablations(results: Path) -> tuple[str, ...]:
    head = "Parts of the gate by direction, held-out images, first seed"
    return _section(head, ablations_table(results, GATE_ABLATIONS))


def _test_sections(
    results: Path, points: list[Point], title: str, images_per_s: dict[str, float], machine: str
) -> list[str]:
    """Return the sections on test images, the table of the models first, and draw the charts."""
    chart(points, lambda p: mean(p.macs), "MACs (fraction of the full model)", title, results / "accuracy_macs.png")
    if images_per_s:
        label = f"images/s (batch size 256, {machine})"
        chart(points, lambda p: images_per_s.get(p.method + p.setting), label, title, results / "accuracy_speed.png")
    return [
        "## Test images",
        models_table(points, images_per_s),
        f"## {DIFFERENCES}",
        differences_table(points),
        *_section(GATES, gates_table(points)),
        *_section(IMAGES, images_table(points), IMAGES_NOTE),
        *_section("One A-ViT, trained for the smallest budget, at other budgets", budgets_table(points)),
        *_section("Training-step time", steps_table(results)),
        *_section("Ablation on held-out images, first seed, budget 0.45", ablations_table(results, RECIPE_ABLATIONS)),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="baselines_report.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with the recorded stages")
    parser.add_argument("title", help="title of the page and the charts")
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
