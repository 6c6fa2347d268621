"""The figure of benchmark.py --plot."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import STATIC, ZIPPED
from utils import write_bytes


def plot(results: list[dict], path: str) -> None:
    """Draw speedup against mean depth, and time per batch against batch size.

    results: rows of `timing.measure`, with batch_size and mean_depth
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_depth, by_batch = figure.subplots(1, 2)
    largest = max(row["batch_size"] for row in results)
    at_largest = [row for row in results if row["batch_size"] == largest]
    _plot_speedup(by_depth, at_largest, largest)
    smallest_depth = min(row["mean_depth"] for row in at_largest)
    _plot_time(by_batch, [row for row in results if abs(row["mean_depth"] - smallest_depth) < 1])
    file = io.BytesIO()
    figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=150)
    write_bytes(Path(path), file.getvalue())


def _plot_speedup(axes: Axes, rows: list[dict], batch_size: int) -> None:
    rows = sorted((row for row in rows if row["form"] == ZIPPED), key=lambda row: row["mean_depth"])
    depths = [row["mean_depth"] for row in rows]
    axes.plot(depths, [row["ideal"] for row in rows], "--", color="gray", label="ideal (ratio of MACs)")
    axes.plot(depths, [row["speed_up"] for row in rows], "o-", color="tab:blue", label="measured")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="mean token depth", ylabel=f"speedup over the static model, batch {batch_size}", ylim=(0, None))
    axes.legend()


def _plot_time(axes: Axes, rows: list[dict]) -> None:
    for variant, color in ((STATIC, "black"), (ZIPPED, "tab:blue")):
        points = sorted((row for row in rows if row["form"] == variant), key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in points]
        milliseconds = [1e3 * row["batch_size"] / row["images_per_s"] for row in points]
        axes.plot(sizes, milliseconds, "o-", color=color, label=variant)
    axes.set(xlabel="batch size", ylabel="milliseconds per batch", xlim=(0, None), ylim=(0, None))
    axes.legend()
