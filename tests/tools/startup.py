"""Startup time of the commands: CPU seconds before any work, compared with importing torch or timm alone.

python tests/tools/startup.py --rounds 5
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALONE = {"torch": ["-c", "import torch"], "timm": ["-c", "import timm"]}
COMMANDS = {  # command: the import it is compared with, and the limit of the ratio
    ("main_act.py", "--help"): ("torch", 0.25),
    ("main_act.py", "--no-such-flag"): ("torch", 0.25),
    ("main_act.py", "--epochs", "many"): ("torch", 0.25),
    ("visualize.py", "--help"): ("torch", 0.25),
    ("benchmark.py", "--help"): ("torch", 0.25),
    ("benchmark.py", "--count-ops", "--train"): ("torch", 0.25),
    ("compare.py", "--help"): ("torch", 0.25),
    ("cuda_check.py", "--help"): ("torch", 0.25),
    ("export_onnx.py", "--help"): ("torch", 0.25),
    ("main_act.py", "--eval", "--data-path", "/no/such/folder"): ("timm", 1.1),
}


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure all commands in turn; exit with status 1 if one exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; results are medians")
    parser.add_argument("--tolerance", type=float, default=1.0, help="factor by which the limits may be exceeded")
    args = parser.parse_args()
    commands = [*ALONE.values(), *map(list, COMMANDS)]
    rounds = [[cpu_seconds(command) for command in commands] for _ in range(args.rounds + 1)][1:]  # after a warm-up
    medians = [statistics.median(times) for times in zip(*rounds)]
    alone, missed = dict(zip(ALONE, medians)), 0
    print("  ".join(f"import {name}: {seconds:.2f} s" for name, seconds in alone.items()))
    for (command, (name, limit)), seconds in zip(COMMANDS.items(), medians[len(ALONE) :]):
        ratio = seconds / alone[name]
        missed += ratio > limit * args.tolerance
        print(f"{' '.join(command)}: {seconds:.2f} s, {ratio:.2f} of importing {name} (at most {limit})")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
