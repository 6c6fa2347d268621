"""Compare evaluations: python compare.py OUTPUT_DIR...

Each folder holds the output of `main_act.py --eval --output-dir OUTPUT_DIR`. The last column of the table is the
difference to the top-1 accuracy of the first folder, with its standard error, paired by image.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.arguments import Parser
from training.command import one_line_errors

HEAD = ("", "top-1", "mean depth", "MACs", "difference in points")
TOLERANCE = 1e-3  # of means that are computed again from rounded values; an image of 50,000 is 2e-3 points


class Evaluation(NamedTuple):
    """The result of an evaluation.

    acc1: top-1 accuracy in percent; depth_mean: mean token depth; gmacs: GMACs per image;
    images: name and class number of each image; correct: [N] float, whether it was classified correctly, 0 or 1;
    names: class name of each image, None in older files; classes: number of classes of the model, None in older files.
    """

    acc1: float
    depth_mean: float
    gmacs: float
    images: list[tuple[str, str]]
    correct: np.ndarray
    names: list[str] | None
    classes: float | None


def read_evaluation(folder: Path) -> Evaluation:
    """Read an output folder. Raises OSError or ValueError if it has no evaluation, or files of several."""
    result = _read_result(folder / "eval.json")
    images, correct, depth, names = read_predictions(folder / "predictions.csv")
    of_table = {"images": len(images), "acc1": 100 * correct.mean()}
    if depth.size:
        of_table["depth_mean"] = depth.mean()
    for key, value in of_table.items():
        if not abs(result.get(key, value) - value) <= TOLERANCE:
            found = f"{key} is {result[key]:g} in eval.json but {value:g} in predictions.csv"
            raise ValueError(f"its two files are of different evaluations: {found}")
    return Evaluation(
        result["acc1"], result["depth_mean"], result["gmacs"], images, correct, names, result.get("classes")
    )


def _read_result(path: Path) -> dict[str, float]:
    """Return the numbers of eval.json by name. Raises OSError or ValueError."""
    result = json.loads(path.read_text(encoding="utf-8"))
    values = result if isinstance(result, dict) else {}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    missing = [key for key in ("acc1", "depth_mean", "gmacs") if key not in numbers]
    if missing:
        raise ValueError(f"{path} is not the result of an evaluation (it has no number {missing[0]})")
    return numbers


class Predictions(NamedTuple):
    """The columns of predictions.csv, see `Evaluation`. depth: [N], or [0] in files without it."""

    images: list[tuple[str, str]]
    correct: np.ndarray
    depth: np.ndarray
    names: list[str] | None


def read_predictions(path: Path) -> Predictions:
    """Read a table of predictions. Raises OSError or ValueError if the file is none, is empty or repeats an image."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        correct = np.array([float(int(row["target"]) == int(row["prediction"])) for row in rows])
        images = [(row["image"], row["target"]) for row in rows]
        depth = np.array([float(row["depth"]) for row in rows if "depth" in row])
        places = [int(row["index"]) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of predictions ({error!r})") from error
    if not rows:
        raise ValueError(f"{path} has no images")
    repeated = next((rows[second]["image"] for second, (a, b) in enumerate(pairwise(places), 1) if a >= b), None)
    if repeated is not None:
        raise ValueError(f"{path} has an image twice or out of order: {repeated}")
    names = [row["target_name"] for row in rows] if "target_name" in rows[0] else None
    return Predictions(images, correct, depth, names)


def check_pair(first: Evaluation, other: Evaluation, first_folder: Path) -> None:
    """Raise ValueError if the images or the names of their classes differ."""
    if first.images != other.images:
        raise ValueError(f"its images differ from those of {first_folder}, or are in another order")
    for (image, number), own, expected in zip(other.images, other.names or (), first.names or ()):
        if own != expected:
            raise ValueError(f"class {number} of {image} is {own!r}, but {expected!r} in {first_folder}")


def row(label: str, evaluation: Evaluation, first: Evaluation) -> tuple[str, ...]:
    """Return a cell for each of HEAD. Raises ValueError if the images cannot be paired."""
    acc1, depth_mean, gmacs = evaluation[:3]
    cells = (label, f"{acc1:.2f} %", f"{depth_mean:.2f}", f"{gmacs * 1e3:.1f} M")
    if evaluation is first:
        return (*cells, "")
    difference, error = paired_difference(first.correct, evaluation.correct)
    return (*cells, f"{difference:+.2f} ± {error:.2f}")


def labels(folders: Sequence[Path]) -> list[str]:
    """Return for each folder the shortest ending of its path that no other folder has."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]

    def endings(path: Path) -> Iterator[tuple[str, ...]]:
        return (path.parts[-count:] for count in range(1, len(path.parts) + 1))

    def is_distinct(ending: tuple[str, ...], path: Path) -> bool:
        return all(other == path or other.parts[-len(ending) :] != ending for other in paths)

    return [
        str(Path(*next((ending for ending in endings(path) if is_distinct(ending, path)), path.parts)))
        for path in paths
    ]


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the top-1 accuracy of the second minus that of the first, and its standard error, both in points.

    first, second: [N] how often each of the same images was classified correctly, 0 to 1

    Raises ValueError if the numbers of images differ, or if there are fewer than 2.
    """
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} images cannot be paired")
    if len(first) < 2:
        raise ValueError(f"the number of images is {len(first)}, and a standard error needs at least 2")
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
    args = parser.parse_args(argv)
    with one_line_errors(parser, args):
        print_table(parser, args.folders)


def print_table(parser: Parser, folders: Sequence[Path]) -> None:
    """Print the table of the folders' evaluations."""
    evaluations, rows = [], [HEAD]
    for folder, label in zip(folders, labels(folders)):
        try:
            evaluations.append(read_evaluation(folder))
            check_pair(evaluations[0], evaluations[-1], folders[0])
            rows.append(row(label, evaluations[-1], evaluations[0]))
        except (OSError, ValueError) as error:
            reason = f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else error
            fix = "Each folder must hold the output of main_act.py --eval --output-dir on the same images."
            parser.error(f"cannot compare {folder}: {reason}. {fix}")
    counts = sorted({int(evaluation.classes) for evaluation in evaluations if evaluation.classes is not None})
    if len(counts) > 1:
        among = f"{' or '.join(map(str, counts))} classes"
        print(f"warning: the models predict among {among}, so their top-1 is not comparable", file=sys.stderr)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)).rstrip())


if __name__ == "__main__":
    main()
