"""Evaluations side by side: python compare.py OUTPUT_DIR...

Each folder holds what `main_act.py --eval --output_dir OUTPUT_DIR` writes. The last column is the
difference to the first folder's top-1, with its standard error, paired by the images.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np

from training.arguments import Parser

HEAD = ("", "top-1", "mean depth", "multiply-adds", "difference in points")


def row(folder: Path, first: Path) -> tuple[str, ...]:
    """A cell for each of HEAD; ValueError, OSError or the like for no evaluation."""
    result = json.loads((folder / "eval.json").read_text())
    cells = (folder.name, f"{result['acc1']:.2f} %", f"{result['depth_mean']:.2f}", f"{result['gmacs'] * 1e3:.1f} M")
    if folder == first:
        return (*cells, "")
    (images, before), (same_images, now) = (read_correct(place / "predictions.csv") for place in (first, folder))
    if images != same_images:
        raise ValueError(f"{folder} is of other images than {first}, or in another order")
    difference, error = paired_difference(before, now)
    return (*cells, f"{difference:+.2f} ± {error:.2f}")


def read_correct(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Name and class of each image, and which were recognised, [N] float, 0 or 1. OSError or ValueError for none."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        hits = np.array([float(row["target"] == row["prediction"]) for row in rows])
        return [(row["image"], row["target"]) for row in rows], hits
    except (KeyError, csv.Error) as error:
        raise ValueError(f"{path}: no table of predictions: {error}") from error


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Top-1 of the second less that of the first, and its standard error, both in points.

    first, second: [N], how often each of the same images was recognised, 0 to 1. ValueError for other numbers of them.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} images cannot be paired")
    difference = 100 * (second - first)
    return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 2 where a folder holds no evaluation, or one of other images."""
    parser = Parser(prog="compare.py", description=__doc__.splitlines()[0].partition(":")[0] + ".")
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="of main_act.py --eval")
    folders = parser.parse_args(argv).folders
    try:
        rows = [HEAD, *(row(folder, folders[0]) for folder in folders)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"no evaluation: {error}")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)).rstrip())


if __name__ == "__main__":
    main()
