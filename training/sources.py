"""The sources of a setting, and what is printed if they differ. docs/sources.md lists them."""

from __future__ import annotations

from collections.abc import Callable

from utils import warn

COMMAND_LINE, RECORD, FILE_NAME, FOREIGN_RECORD = (  # sources of a value, in their order
    "the command line",
    "the checkpoint",
    "the file name",
    "the checkpoint's args",
)

Report = Callable[[str], None]  # `warn` or `log`


def name_differing(
    name: str, choices: list[tuple[str, object]], report: Report = warn, text: Callable[[object], str] = "{:g}".format
) -> None:
    """Print a line for each source whose value differs. choices: (source, value), the chosen one first."""
    (source, value), *others = choices
    for other, other_value in others:
        if other_value != value:
            report(f"{name} is {text(value)} in {source} but {text(other_value)} in {other}; using {text(value)}")
