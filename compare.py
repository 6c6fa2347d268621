"""Compare evaluations: python compare.py OUTPUT_DIR...

Each folder holds the output of `main_act.py --eval --output_dir OUTPUT_DIR`. The last column of the table is the
difference to the top-1 accuracy of the first folder, with its standard error, paired by image.
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
    """Return a cell for each of HEAD.

    Raises OSError or ValueError if the folder has no evaluation, or one of other images than the first folder.
    """
    acc1, depth_mean, gmacs = read_result(folder / "eval.json")
    cells = (folder.name, f"{acc1:.2f} %", f"{depth_mean:.2f}", f"{gmacs * 1e3:.1f} M")
    if folder == first:
        return (*cells, "")
    first_images, first_correct = read_correct(first / "predictions.csv")
    images, correct = read_correct(folder / "predictions.csv")
    if images != first_images:
        raise ValueError(f"its images differ from those of {first}, or are in another order")
    difference, error = paired_difference(first_correct, correct)
    return (*cells, f"{difference:+.2f} ± {error:.2f}")


def read_result(path: Path) -> tuple[float, ...]:
    """Return top-1 accuracy in percent, mean token depth and GMACs per image. Raises OSError or ValueError."""
    result = json.loads(path.read_text())
    try:
        return tuple(float(result[key]) for key in ("acc1", "depth_mean", "gmacs"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the result of an evaluation ({error!r})") from error


def read_correct(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return name and class of each image, and whether it was classified correctly, [N] float, 0 or 1.

    Raises OSError or ValueError if the file is not a table of predictions.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        correct = np.array([float(row["target"] == row["prediction"]) for row in rows])
        return [(row["image"], row["target"]) for row in rows], correct
    except (KeyError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of predictions ({error!r})") from error


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the top-1 accuracy of the second minus that of the first, and its standard error, both in points.

    first, second: [N] how often each of the same images was classified correctly, 0 to 1

    Raises ValueError if the numbers of images differ, or if there are fewer than 2.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} images cannot be paired")
    difference = 100 * (second - first)
    return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with status 2 if a folder has no evaluation, or one of other images."""
    parser = Parser(prog="compare.py", description="Compare evaluations on the same images.")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="OUTPUT_DIR",
        help="output folder of main_act.py --eval; differences are to the first one",
    )
    folders = parser.parse_args(argv).folders
    rows = [HEAD]
    for folder in folders:
        try:
            rows.append(row(folder, folders[0]))
        except (OSError, ValueError) as error:
            reason = f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else error
            fix = "Each folder must hold the output of main_act.py --eval --output-dir on the same images."
            parser.error(f"cannot compare {folder}: {reason}. {fix}")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)).rstrip())


if __name__ == "__main__":
    main()
