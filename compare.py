"""Evaluations side by side: python compare.py OUTPUT_DIR...

Each folder holds the eval.json that `main_act.py --eval --output_dir OUTPUT_DIR` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def row(folder: Path) -> tuple[str, ...]:
    """Name, top-1, mean depth, multiply-adds per image; ValueError or OSError for no evaluation."""
    result = json.loads((folder / "eval.json").read_text())
    return (folder.name, f"{result['acc1']:.2f} %", f"{result['depth_mean']:.2f}", f"{result['gmacs'] * 1e3:.1f} M")


def main(argv: list[str]) -> None:
    try:
        rows = [("", "top-1", "mean depth", "multiply-adds"), *(row(Path(folder)) for folder in argv)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"compare.py: error: no evaluation: {error}\n")
        raise SystemExit(2) from error
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


if __name__ == "__main__":
    main(sys.argv[1:])
