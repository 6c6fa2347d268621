"""Chart of what networks answer at each budget, from the tables in their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from training.budget_table import BudgetTable
from training.checkpoints import Checkpoint
from training.network import RECORD
from visualization.charts import GRAY, legend_above, new_figure, one_line, style_axes
from visualization.training_curves import Run, draw_run_legend, run_colors


class Budgets(NamedTuple):
    """The budget table of a run, and the gate center of the budget that it was trained for."""

    name: str
    table: BudgetTable
    center: float | None


def read_budgets(runs: Sequence[Run]) -> list[Budgets]:
    """Read the tables of the runs whose folder has a checkpoint.pth with one.

    Raises UserError for a file that is no checkpoint.
    """
    found = []
    for run in runs:
        path = run.folder / "checkpoint.pth"
        if path.is_file():
            checkpoint = Checkpoint.load(str(path))
            if (table := checkpoint.budget_table()) is not None:
                center = dict(checkpoint.gate_sources())[RECORD].get("gate_center")
                found.append(Budgets(run.name, table, center))
    return found


def agreement_against_macs(budgets: Sequence[Budgets]) -> Figure:
    """Draw the agreement with the static model against MACs, with the budget of the training marked."""
    figure = new_figure(max(4.4, 0.2 * len(budgets) + 1), width=8.6)
    axes = style_axes(
        figure.subplots(),
        "MACs (fraction of the static model's)",
        "predictions equal to the static model's (%)",
        grid="both",
    )
    markers = []
    for (_, table, center), color in zip(budgets, run_colors(len(budgets))):
        points = [(point.cost, 100 * point.agreement) for point in table.points]
        (line,) = axes.plot(*zip(*points), ".-", color=color, markersize=5, linewidth=1.4)
        trained = [place for place, point in zip(points, table.points) if point.center == center]
        for cost, agreement in trained:
            axes.plot(cost, agreement, "o", color=color, markersize=9, markeredgecolor="white")
        markers.append(line)
    axes.set_xlim(0, 1.03)
    entries = {"budget of the training": Line2D([], [], color=GRAY, marker="o", markersize=8, linestyle="")}
    legend_above(axes, entries)
    draw_run_legend(figure, [one_line(each.name, 28) for each in budgets], markers, "right center")
    return figure
