"""Matches the classes of a dataset with the rows of a checkpoint's head."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from datasets import placeholder_names


class ClassMatch(Enum):
    """Relation between the classes of a dataset and the class names that a checkpoint records."""

    UNNAMED = "the checkpoint records no usable names"
    SAME = "the names and their order are equal"
    ALL = "all dataset classes are recorded, in another order or among others"
    SOME = "some dataset classes are recorded"
    NONE_SAME_COUNT = "no dataset class is recorded, but the counts are equal"
    NONE = "no dataset class is recorded, and the counts differ"

    @classmethod
    def of(cls, classes: Sequence[str], recorded: list[str] | None) -> ClassMatch:
        """Compare the names of a dataset's classes with the recorded names, or None if there are none."""
        if recorded is None:
            return cls.UNNAMED
        if recorded == list(classes):
            return cls.SAME
        if recorded == placeholder_names(len(recorded)):
            return cls.UNNAMED
        num_known = len(classes) - len(unknown_classes(classes, recorded))
        if num_known == len(classes):
            return cls.ALL
        if num_known > 0:
            return cls.SOME
        return cls.NONE_SAME_COUNT if len(classes) == len(recorded) else cls.NONE


def unknown_classes(classes: Sequence[str], recorded: Sequence[str]) -> list[str]:
    known = set(recorded)
    return [name for name in classes if name not in known]


def is_of_head(name: str) -> bool:
    return name.startswith("head")


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
