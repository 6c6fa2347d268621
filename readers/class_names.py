"""Class names: the form in which they are compared, the numbers in them, and files of names to show."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from utils import UserError, warn

# Comparison --------------------------------------------------------------------------------------


def normal_name(name: str) -> str:
    """Return the form in which class names are compared: Unicode NFC without surrounding space."""
    return unicodedata.normalize("NFC", name).strip() or name


def by_normal_name(names: Iterable[str], place: str) -> dict[str, str]:
    """Return the names by their normal form, sorted by it.

    place: the folder or dataset, for the message. Raises UserError if two names have the same form.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        other = found.setdefault(normal_name(name), name)
        if other != name:
            raise UserError(
                f"{place}: the classes {other!a} and {name!a} have the same name, written in two ways; "
                "merge them or rename one"
            )
    return dict(sorted(found.items()))


def placeholder_names(num_classes: int) -> list[str]:
    """Return names for classes without names."""
    return [f"class {number}" for number in range(num_classes)]


def class_numbers(names: Sequence[str]) -> list[int] | None:
    """Return the numbers of classes named "7", "007" or "class 7", or None if not all are different numbers."""
    matches = [re.fullmatch(r"(?:class )?([0-9]{1,18})", name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if len(set(numbers)) == len(names) else None


def positions(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Return the position of each name among the known names, or None where there is none.

    Names are compared as numbers if all of both lists are numbers, else in their normal form.
    """
    keys, known_keys = class_numbers(names), class_numbers(known)
    if keys is None or known_keys is None:
        keys, known_keys = map(normal_name, names), map(normal_name, known)
    position = {key: index for index, key in enumerate(known_keys)}
    return [position.get(key) for key in keys]


# Names to show -----------------------------------------------------------------------------------

CLASS_INDEX_FILES = "*class_index.json"


class IndexEntry(NamedTuple):
    """An entry of a class index. key: class name or number; identifier: WordNet ID, else the key; name: to show."""

    key: str
    identifier: str
    name: str


def class_names(
    classes: Sequence[str],
    data_path: str | None,
    index_file: str | None,
    numbered: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Return the class names to show: those of a class-index file, else `classes`.

    index_file: a JSON file; None looks for one in the dataset's folder. Its content is {"0": "tench", ...},
    {"0": ["n01440764", "tench"], ...}, {"n01440764": "tench", ...} or ["tench", ...].
    numbered: the dataset's classes and those of the network, each in the order that numbers may refer to.
    Raises UserError if `index_file` cannot be used. A file from the dataset's folder is then ignored with a warning.
    """
    numbered = numbered or (classes,)
    if index_file is not None:
        return _names_to_show(classes, numbered, Path(index_file))
    problems = []
    for path in sorted(Path(data_path).glob(CLASS_INDEX_FILES)) if data_path else ():
        try:
            return _names_to_show(classes, numbered, path)
        except UserError as error:
            problems.append(error)
    if problems:
        warn(f"{problems[0]}. The file is ignored.")
    return list(classes)


def _names_to_show(classes: Sequence[str], numbered: Sequence[Sequence[str]], path: Path) -> list[str]:
    """Return the name of each class by a class index: by class name, else by number if all numbers fit.

    Raises UserError if the index is not of these classes.
    """
    entries = _read_class_index(path)
    names = _by_name(entries)
    known = sum(normal_name(name) in names for name in numbered[0])
    if not known:
        names = next(filter(None, (_by_number(entries, order) for order in numbered)), None)
        if names is None:
            counts = " or ".join(dict.fromkeys(f"{len(order)} classes" for order in numbered))
            raise UserError(
                f"{path}: the class index does not fit: none of its {len(entries)} entries has the name of a class, "
                f"and its numbers are not those of {counts}"
            )
    elif known < len(numbered[0]):
        warn(f"{path}: the class index has names for {known} of {len(numbered[0])} classes; the others keep their own")
    return [names.get(normal_name(name), name) for name in classes]


def _by_name(entries: Sequence[IndexEntry]) -> dict[str, str]:
    """Return the names to show by class name; none if the index has numbers only."""
    keys = [entry.identifier for entry in entries]
    return {} if class_numbers(keys) else {normal_name(key): entry.name for key, entry in zip(keys, entries)}


def _by_number(entries: Sequence[IndexEntry], order: Sequence[str]) -> dict[str, str] | None:
    """Return the names to show by class name, or None unless the numbers of both are the same.

    The number of a class is its name if all are numbers, else its place in the order.
    """
    own, numbers = class_numbers(order) or list(range(len(order))), class_numbers([entry.key for entry in entries])
    if numbers is None or sorted(numbers) != sorted(own):
        return None
    name_of = dict(zip(numbers, (entry.name for entry in entries)))
    return {normal_name(name): name_of[number] for name, number in zip(order, own)}


def _read_class_index(path: Path) -> list[IndexEntry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        items = enumerate(content) if isinstance(content, list) else content.items()
        pairs = [(str(key), *((key, value) if isinstance(value, str) else value[:2])) for key, value in items]
        return [IndexEntry(key, str(identifier), " ".join(name.split())) for key, identifier, name in pairs]
    except OSError as error:
        raise UserError(f"{path}: the class index cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: not a class index; expected {{"0": ["n01440764", "tench"], ...}}') from error
