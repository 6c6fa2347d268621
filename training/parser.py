"""The parser of every command, and the converters of its values. Does not import torch, see `training.arguments`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class Flags(argparse.Namespace):
    """The parsed flags.

    given: those on the command line or in an @FILE, as spelled there, by attribute. It is in a slot and thus not among
    `vars`, which checkpoints record.
    """

    __slots__ = ("given",)


MAX_GATE = 1e6  # magnitude that gate scale, center and jitter must stay below, so no float32 overflows
SILENT_SECONDS = 0.5  # torchrun ends all processes after the first: the one that prints must not be later


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts dashes and underscores, no abbreviations, and prints errors on one line.

    With fromfile_prefix_chars="@", @FILE reads flags from a file: one or more per line, # starts a comment.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        # No flag begins like a number, so whatever does is a value: argparse itself knows no -1e3 and no -inf.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def parse_args(self, args: Iterable[str] | None = None) -> Flags:
        guard_streams()
        draw_to_files()
        words = [_with_dashes(word) for word in self._with_files_read(sys.argv[1:] if args is None else args)]
        flags, unknown = self.parse_known_args(words, Flags())
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._did_you_mean(unknown)}")
        names = (word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words))
        flags.given = {self._option_string_actions[n].dest: n for n in names if n in self._option_string_actions}
        return flags

    def _with_files_read(self, args: Iterable[str]) -> Iterator[str]:
        """Yield the arguments, with those of a file in place of each @FILE."""
        for arg in args:
            if not (self.fromfile_prefix_chars and arg.startswith("@")):
                yield arg
                continue
            if not os.path.isfile(arg[1:]):
                self.error(f"{arg}: no such file")
            try:
                lines = Path(arg[1:]).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                self.error(f"{arg}: not a text file that can be read: {error}")
            yield from itertools.chain.from_iterable(map(self.convert_arg_line_to_args, lines))

    def _did_you_mean(self, unknown: list[str]) -> str:
        """Return a hint at the flags that resemble the unknown ones, or ""."""
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        flags = list(self._option_string_actions)
        similar = [match for name in names for match in difflib.get_close_matches(name, flags, n=1, cutoff=0.7)]
        return f" (did you mean {', '.join(similar)}?)" if similar else ""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return the flags on a line of an @FILE; such a file cannot refer to another."""
        try:
            args = shlex.split(re.sub(r"(^|\s)#.*", "", arg_line))
        except ValueError as error:
            self.error(f"invalid line in a file of flags ({error}): {arg_line}")
        if any(arg.startswith("@") for arg in args):
            self.error(f"a file of flags cannot refer to another one: {arg_line}")
        return [_with_dashes(arg) for arg in args]

    def error(self, message: str, status: int = 2, everywhere: bool = False):
        """Print one line to stderr and exit; only the first process per machine prints, unless `everywhere`."""
        self.end(f"error: {message}", status, everywhere)

    def end(self, line: str, status: int, everywhere: bool = False):
        """Exit like `error`, with another line."""
        # A single process prints even if a launcher left LOCAL_RANK in its environment.
        is_alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
        if not (is_alone or everywhere or os.environ.get("LOCAL_RANK", "") in ("", "0")):
            time.sleep(SILENT_SECONDS)
            self.exit(status)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(line.split()))
        self.exit(status, f"{self.prog}: {printable}\n")


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


def draw_to_files() -> None:
    """Make matplotlib draw to files in this process and its children, whatever backend a notebook has set.

    Must be called before matplotlib is imported, because that fails if the package of the backend is missing.
    """
    os.environ["MPLBACKEND"] = "agg"


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
nonnegative = _number(float, lambda value: 0 <= value < math.inf, "at least 0 and finite")
positive = _number(float, lambda value: 0 < value < math.inf, "above 0 and finite")
fraction = _number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
finite = _number(float, math.isfinite, "a finite number")
gate_number = _number(float, lambda value: abs(value) < MAX_GATE, f"between -{MAX_GATE:g} and {MAX_GATE:g}")
gate_jitter = _number(float, lambda value: 0 <= value < MAX_GATE, f"at least 0 and below {MAX_GATE:g}")


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


def add_model_flags(add: Callable) -> None:
    """Add --model and --input-size, which override those of a checkpoint. add: see `add_budget_flag`."""
    add(
        "--model",
        metavar="NAME",
        help="model name: a registered avit_* model or any plain timm ViT (default: the checkpoint's model)",
    )
    add(
        "--input-size",
        type=at_least_one,
        nargs="+",
        metavar="PIXELS",
        help="image size in pixels, or height and width (default: the checkpoint's size)",
    )


def augment_policy(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text
