"""The figure of benchmark.py --plot."""

from __future__ import annotations

from benchmarks.cases import STATIC


def plot(results: list[dict], path: str) -> None:
    """Speed-up against mean depth, with the ideal as a line; time against batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_depth, by_batch = figure.subplots(1, 2)
    largest = max(row["batch_size"] for row in results)
    zipped = [row for row in results if row["form"] == "zipped"]
    at_largest = sorted((row for row in zipped if row["batch_size"] == largest), key=lambda row: row["mean_depth"])
    depths = [row["mean_depth"] for row in at_largest]
    by_depth.plot(depths, [row["ideal"] for row in at_largest], "--", color="gray", label="ideal (multiply-adds)")
    by_depth.plot(depths, [row["speed_up"] for row in at_largest], "o-", color="tab:blue", label="measured")
    by_depth.axhline(1, color="black", linewidth=0.8)
    by_depth.set(xlabel="mean depth of a token", ylabel=f"speed-up over static, batch {largest}", ylim=(0, None))
    by_depth.legend()
    for form, color in ((STATIC, "black"), ("zipped", "tab:blue")):
        shallowest = min(row["mean_depth"] for row in results if row["batch_size"] == largest)
        rows = [r for r in results if r["form"] == form and abs(r["mean_depth"] - shallowest) < 1]
        rows.sort(key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in rows]
        milliseconds = [1e3 * row["batch_size"] / row["images_per_s"] for row in rows]
        by_batch.plot(sizes, milliseconds, "o-", color=color, label=form)
    by_batch.set(xlabel="batch size", ylabel="milliseconds per batch", xlim=(0, None), ylim=(0, None))
    by_batch.legend()
    figure.savefig(path, dpi=150)
