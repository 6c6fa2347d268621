"""Matches the classes of a dataset with the rows of a checkpoint's head."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from datasets import class_numbers, placeholder_names, positions
from utils import UserError, log, warn

IMAGENET_CLASSES = 1000


class Head(NamedTuple):
    """The classes that a model predicts, and the rows of a checkpoint's head that predict them.

    names: class of each row, the dataset's classes first;
    rows: rows of the checkpoint's head, in this order; None leaves the head unchanged;
    is_new: whether the checkpoint's head is dropped.
    """

    names: list[str]
    rows: list[int] | None = None
    is_new: bool = False

    def select(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with this head: its rows of the checkpoint's head, or none if it is new."""
        if self.is_new:
            return without_head(weights)
        return weights if self.rows is None else select_head_rows(weights, self.rows)

    def sort_rows(self, model: nn.Module) -> None:
        """Sort the rows of a timm model's own head, of as many classes."""
        classifiers = model.get_classifier()
        with torch.no_grad():
            for part in classifiers if isinstance(classifiers, tuple) else (classifiers,):
                for value in part.parameters():
                    if self.rows is not None and len(value) == len(self.rows):
                        value.copy_(value[self.rows])

    def in_order_of_network(self) -> list[str]:
        """Return the names in the order of the checkpoint's head."""
        return self.names if self.rows is None else [name for _, name in sorted(zip(self.rows, self.names))]


class ClassMatch(Enum):
    """Relation between the classes of a dataset and the rows of a head, which a checkpoint may name.

    `match_head` chooses these rows for a new task (with replace_head) and otherwise:

    | match | with replace_head | without |
    | --- | --- | --- |
    | UNNAMED | unchanged | unchanged; `load_weights` raises UserError if the counts differ |
    | NAMED, NUMBERED | rows in the dataset's order | the same, then the others with keep_others |
    | SOME | new head | UserError |
    | NONE_SAME_COUNT | unchanged, with a warning | unchanged, with a warning |
    | NONE | new head | unchanged; `load_weights` raises UserError |
    """

    UNNAMED = "neither names nor numbers assign the rows"
    NAMED = "each dataset class has a row of its name"
    NUMBERED = "the dataset classes are numbers, and each has a row of its number"
    SOME = "some dataset classes have a row of their name"
    NONE_SAME_COUNT = "no dataset class has a row of its name, but the counts are equal"
    NONE = "no dataset class has a row of its name, and the counts differ"


def match_classes(
    classes: Sequence[str], recorded: Sequence[str] | None, num_rows: int, by_row_number: bool = False
) -> tuple[ClassMatch, list[int]]:
    """Find the row of each dataset class in a head of `num_rows` rows. Returns the rows if `NAMED` or `NUMBERED`.

    recorded: names of the rows, or None; placeholders ("class 7") count as numbers, not as names;
    by_row_number: whether some numbers may stand for rows that have other names, or none.
    """
    if len(set(classes)) < len(classes):
        return ClassMatch.UNNAMED, []
    is_named = recorded is not None and list(recorded) != placeholder_names(num_rows)
    if is_named:
        rows = positions(classes, recorded)
        num_known = len(rows) - rows.count(None)
        if num_known == len(classes):
            is_by_number = class_numbers(classes) is not None and not set(classes) <= set(recorded)
            return ClassMatch.NUMBERED if is_by_number else ClassMatch.NAMED, rows
        if num_known:
            return ClassMatch.SOME, []
    has_numbers = recorded is not None and not is_named
    rows = _rows_of_numbers(class_numbers(classes), num_rows, by_row_number or has_numbers)
    if rows:
        return ClassMatch.NUMBERED, rows
    if not is_named:
        return ClassMatch.UNNAMED, []
    return (ClassMatch.NONE_SAME_COUNT if len(classes) == num_rows else ClassMatch.NONE), []


def _rows_of_numbers(numbers: list[int] | None, num_rows: int, may_be_part: bool) -> list[int]:
    """Return the row of each number; none if some class is not a number, or if they may mean other rows.

    may_be_part: whether fewer numbers than rows are allowed.
    """
    if numbers is None:
        return []
    if len(numbers) == num_rows:
        row = {number: row for row, number in enumerate(sorted(numbers))}  # numbers from 0 on are their own rows
        return [row[number] for number in numbers]
    return numbers if may_be_part and max(numbers) < num_rows else []


def match_head(
    location: str,
    classes: Sequence[str],
    recorded: list[str] | None,
    num_rows: int,
    *,
    replace_head: bool = False,
    keep_others: bool = False,
    same_order: bool = False,
) -> Head:
    """Choose the rows of a checkpoint's head for the classes of a dataset. See `ClassMatch`.

    recorded: names of the `num_rows` rows, or None; replace_head: allow a new head, for training a new task;
    keep_others: keep the rows of other classes after those of the dataset, for evaluation;
    same_order: raise UserError unless rows and classes are in the same order, for resuming.
    """
    own, row_names = list(classes), recorded or list(default_names(num_rows))
    if keep_others and set(own) <= set(row_names):
        recorded = row_names
    match, rows = match_classes(own, recorded, num_rows, by_row_number=keep_others)
    names = f"the dataset has {first_names(own)}; the checkpoint has {first_names(row_names)}"
    if same_order and match is not ClassMatch.UNNAMED and rows != list(range(num_rows)):
        raise UserError(f"{location}: --resume requires the same classes in the same order: {names}")
    if match is ClassMatch.SOME and not replace_head:
        unknown = first_names([name for name, row in zip(own, positions(own, row_names)) if row is None])
        raise UserError(f"{location} cannot predict {unknown}: {names}")
    if match is ClassMatch.UNNAMED and len(own) == num_rows:
        _report_position(location, own, recorded, names)
    if match is ClassMatch.NONE_SAME_COUNT:
        warn(f"{location}: no class name matches: {names}. Classes are matched by position instead.")
    if not rows:
        return Head(own, is_new=replace_head and match in (ClassMatch.SOME, ClassMatch.NONE))
    _report_order(f"{location}: classes are matched by", match, rows, recorded, num_rows, names)
    others = sorted(set(range(num_rows)) - set(rows)) if keep_others else []
    if others:
        warn(
            f"the dataset has {len(own)} of the network's {num_rows} classes; predictions are among all {num_rows}, "
            "so top-1 is the recall of the dataset's classes"
        )
    return Head([*own, *(row_names[row] for row in others)], [*rows, *others])


def _report_position(location: str, own: list[str], recorded: list[str] | None, names: str) -> None:
    """Print that rows without names are matched by position, unless the dataset's classes are those of ImageNet.

    A warning if the rows have numbers that the dataset lacks, or are as many as ImageNet's. Otherwise a line.
    """
    if own == list(default_names(len(own))):
        return
    if recorded is None and len(own) != IMAGENET_CLASSES:
        log(f"{location} records no class names; classes are matched by position: {first_names(own)}")
    else:
        fix = "If the network numbers its classes in another way, name the folders by these numbers."
        warn(f"{location}: classes are matched by position: {names}. {fix}")


def _report_order(
    by: str, match: ClassMatch, rows: list[int], recorded: list[str] | None, num_rows: int, names: str
) -> None:
    """Print how classes were matched, unless their order is that of the rows; warn if numbers may mean another order.

    by: start of the message.
    """
    is_in_order = rows == sorted(rows)
    has_numbers = len(rows) == num_rows if recorded is None else class_numbers(recorded) is not None
    if match is ClassMatch.NUMBERED and not (is_in_order and has_numbers):
        fix = "Rename the classes if the network numbers them in another way."
        number = "number" if len(rows) == num_rows else "number (the first is 0)"
        warn(f"{by} {number}, not in the order of their names: {names}. {fix}")
    elif not is_in_order:
        log(f"{by} name: {names}")


def hub_head(name: str, source: str, classes: list[str]) -> Head:
    """Match the classes of a dataset with the rows of a timm model's pretrained head, if their numbers are equal.

    name: of the model; source: for messages.
    """
    has_head = get_pretrained_cfg(name).num_classes == len(classes)
    return match_head(source, classes, None, len(classes)) if has_head else Head(classes)


def default_names(num_rows: int) -> dict[str, str]:
    """Return names for the rows of a head without names, each with a name to show: those of ImageNet, or "class N"."""
    if num_rows != IMAGENET_CLASSES:
        return {name: name for name in placeholder_names(num_rows)}
    info = ImageNetInfo("imagenet-1k")
    return dict(zip(info.label_names(), info.label_descriptions()))


def is_of_head(name: str) -> bool:
    return name.startswith(("head", "fc.", "classifier."))


def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not is_of_head(name)}


def select_head_rows(weights: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Return the weights with only these rows (classes) of the head, in this order."""
    return {name: value[rows] if is_of_head(name) else value for name, value in weights.items()}


def first_names(classes: Sequence[str]) -> str:
    """Return up to three names, safe to print: short and without control characters."""
    return first_three([name if name.isprintable() and len(name) < 40 else ascii(name[:40]) for name in classes])


def first_three(texts: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return separator.join(texts[:3]) + more
