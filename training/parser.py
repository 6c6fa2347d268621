"""The parser of every command, and the converters of its values. Does not import torch, see `training.arguments`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts dashes and underscores, no abbreviations, and prints errors on one line.

    With fromfile_prefix_chars="@", @FILE reads flags from a file: one or more per line, # starts a comment.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        guard_streams()
        args = sys.argv[1:] if args is None else args
        files = [arg for arg in args if self.fromfile_prefix_chars and arg.startswith("@")]
        missing = [file for file in files if not os.path.isfile(file[1:])]
        if missing:
            self.error(f"{missing[0]}: no such file")
        try:
            return super().parse_args([_with_dashes(arg) for arg in args], namespace)
        except UnicodeDecodeError as error:
            self.error(f"{' '.join(files)}: not a text file: {error}")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return the flags on a line of an @FILE; such a file cannot refer to another."""
        arg_line = arg_line.removeprefix("\ufeff")  # byte order mark
        try:
            args = shlex.split(re.sub(r"(^|\s)#.*", "", arg_line))
        except ValueError as error:
            self.error(f"invalid line in a file of flags ({error}): {arg_line}")
        if any(arg.startswith("@") for arg in args):
            self.error(f"a file of flags cannot refer to another one: {arg_line}")
        return [_with_dashes(arg) for arg in args]

    def error(self, message: str, status: int = 2, everywhere: bool = False):
        """Print one line to stderr and exit; only the first process per machine prints, unless `everywhere`."""
        # A single process prints even if a launcher left LOCAL_RANK in its environment.
        is_alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
        if not (is_alone or everywhere or os.environ.get("LOCAL_RANK", "") in ("", "0")):
            self.exit(status)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        self.exit(status, f"{self.prog}: error: {printable}\n")


class GuardedStream:
    """A standard stream whose failures never end a run: a closed pipe, or characters that it cannot encode."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Replace stdout and stderr by guarded streams; a closed one, which Python sets to None, discards its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, GuardedStream):
            devnull = open(os.devnull, "w") if stream is None else None  # noqa: SIM115 - open for the whole process
            setattr(sys, name, GuardedStream(stream or devnull))


class _Formatter(argparse.HelpFormatter):
    """A help formatter that appends the default, unless there is none or the help text states it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        has_none = default in (None, argparse.SUPPRESS) or (action.nargs == 0 and action.const is not None)
        if has_none or "default" in action.help:
            return action.help
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})".replace("%", "%%")


def _with_dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def _number(kind: type, accepts: Callable[[float], bool], expected: str) -> Callable:
    """Return a converter from text to an accepted number; expected: describes accepted numbers in its error."""

    def convert(text: str) -> float:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it
    return convert


at_least_one = _number(int, lambda value: value >= 1, "at least 1")
budget_share = _number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
count = _number(int, lambda value: value >= 0, "at least 0")
nonnegative = _number(float, lambda value: value >= 0, "at least 0")
positive = _number(float, lambda value: value > 0, "above 0")
fraction = _number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
finite = _number(float, math.isfinite, "a finite number")


def macs(text: str) -> float:
    """Convert a fraction in (0, 1], or a number of MACs with a unit such as 2.9G or 350M."""
    factor = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    value = float(text[:-1]) * factor if factor else float(text)
    if not (1 < value < math.inf if factor else 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"must be a fraction above 0 and at most 1, or a number of MACs such as 2.9G, got {text}"
        )
    return value


macs.__name__ = "fraction or number of MACs"


def add_budget_flag(add: Callable) -> None:
    """Add --budget. add: `add_argument` of a parser or a group."""
    add(
        "--budget",
        type=budget_share,
        metavar="FRACTION",
        help="compute budget as a fraction of the static model's MACs, e.g. 0.4; "
        "requires a checkpoint trained with --target-macs",
    )


def augment_policy(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text
