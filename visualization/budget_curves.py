"""Chart of what networks answer at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from visualization.charts import GRAY, legend_above, new_figure, one_line, style_axes
from visualization.training_curves import draw_run_legend, run_colors


class Budgets(NamedTuple):
    """The budgets of a run.

    points: (cost, agreement) by ascending cost: fractions of the static model's MACs, and of its own predictions;
    trained: the points at the budget of the training.
    """

    name: str
    points: list[tuple[float, float]]
    trained: list[tuple[float, float]]


def agreement_against_macs(budgets: Sequence[Budgets]) -> Figure:
    """Draw the agreement with the static model against MACs, one color per run."""
    figure = new_figure(max(4.4, 0.2 * len(budgets) + 1), width=8.6)
    labels = "MACs (fraction of the static model's)", "predictions equal to the static model's (%)"
    axes = style_axes(figure.subplots(), *labels, grid="both")
    lines = []
    for each, color in zip(budgets, run_colors(len(budgets))):
        (line,) = axes.plot(*_percent(each.points), ".-", color=color, markersize=5, linewidth=1.4)
        axes.plot(*_percent(each.trained), "o", color=color, markersize=9, markeredgecolor="white")
        lines.append(line)
    axes.set_xlim(0, 1.03)
    legend_above(axes, {"budget of the training": Line2D([], [], color=GRAY, marker="o", markersize=8, linestyle="")})
    draw_run_legend(figure, [one_line(each.name, 28) for each in budgets], lines, "right center")
    return figure


def _percent(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the costs, and the agreements in percent."""
    return [cost for cost, _ in points], [100 * agreement for _, agreement in points]
