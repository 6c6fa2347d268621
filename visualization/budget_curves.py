"""Chart of how well networks predict at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from visualization.charts import GRAY, legend_above, new_figure, one_line, style_axes
from visualization.training_curves import draw_run_legend, run_colors


class Budgets(NamedTuple):
    """The budgets of a run, by ascending cost.

    costs: fractions of the static model's MACs; agreements: fractions of predictions that are the static model's;
    accuracies: top-1, fractions, None in older tables; trained: places of the budget of the training.
    """

    name: str
    costs: list[float]
    agreements: list[float]
    accuracies: list[float] | None
    trained: list[int]


def quality_against_macs(budgets: Sequence[Budgets]) -> Figure:
    """Draw top-1 against MACs, or the agreement with the static model if a run has no top-1; one color per run."""
    figure = new_figure(max(4.4, 0.2 * len(budgets) + 1), width=8.6)
    has_accuracies = all(each.accuracies for each in budgets)
    quality = "top-1 on calibration images (%)" if has_accuracies else "predictions equal to the static model's (%)"
    axes = style_axes(figure.subplots(), "MACs (fraction of the static model's)", quality, grid="both")
    lines = []
    for each, color in zip(budgets, run_colors(len(budgets))):
        percent = [100 * value for value in (each.accuracies if has_accuracies else each.agreements)]
        (line,) = axes.plot(each.costs, percent, ".-", color=color, markersize=5, linewidth=1.4)
        mark = [each.costs[place] for place in each.trained], [percent[place] for place in each.trained]
        axes.plot(*mark, "o", color=color, markersize=9, markeredgecolor="white")
        lines.append(line)
    axes.set_xlim(0, 1.03)
    legend_above(axes, {"budget of the training": Line2D([], [], color=GRAY, marker="o", markersize=8, linestyle="")})
    draw_run_legend(figure, [one_line(each.name, 28) for each in budgets], lines, "right center")
    return figure
