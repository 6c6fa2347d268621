"""Image files in folders: search, and datasets of class folders or in iNaturalist's layout."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from readers.images import load_image
from utils import UserError, warn

# Folders -----------------------------------------------------------------------------------------

HIDDEN = "hidden"  # a kind of skipped file
SERVICE_NAMES = {
    "@eaDir",
    "__MACOSX",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "Thumbs.db",
    "desktop.ini",
}
EXCLUDED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow cannot read them, or runs a program to do so


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to a system or program and not to the data."""
    return name.startswith(".") or name in SERVICE_NAMES


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of readable image files, in lower case and with the dot."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in formats.items() if kind in Image.OPEN and kind not in EXCLUDED_FORMATS)


def find_image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Find the image files in a folder and its subfolders.

    Returns the files, sorted by folder and name, and the numbers of skipped files by kind. Links are followed, but
    each real folder is read once.
    """
    files, skipped, visited = [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        skipped[HIDDEN] += sum(map(is_hidden, [*folders, *names]))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if not is_hidden(name) and suffix in image_suffixes():
                files.append(Path(place, name))
            elif not is_hidden(name):
                skipped[suffix or "without a suffix"] += 1
    return sorted(files, key=lambda file: (str(file.parent), file.name)), skipped


def warn_skipped_files(folder: Path, skipped: Counter[str]) -> None:
    """Print one warning that counts the files of a folder that were not used as images."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(skipped.items()) if number)
    if kinds:
        warn(f"{folder}: skipped files that are not images: {kinds}")


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder with the files of `find_image_files`.

    skipped: numbers of files and folders that are not images or classes, by kind.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class names, which are folder names, and their indices."""
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = [name for name in folders if not is_hidden(name)]
        self.skipped = Counter({HIDDEN: len(folders) - len(classes)})
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, *_, **__) -> list[tuple[str, int]]:
        """Return the path and class index of each image."""
        samples = []
        for name, number in class_to_idx.items():
            files, skipped = find_image_files(Path(directory, name))
            if not files:
                raise FileNotFoundError(f"Found no image of the class {name} in {directory}.")
            samples += [(str(file), number) for file in files]
            self.skipped += skipped
        return samples


def image_folder(folder: Path, train: bool, transform) -> ImageFolder:
    """Build a dataset from FOLDER/train/CLASS/IMAGE or FOLDER/val/CLASS/IMAGE.

    Raises UserError if a folder is missing or empty.
    """
    expected = f"expected {folder}/train/CLASS/IMAGE and {folder}/val/CLASS/IMAGE"
    part = folder / ("train" if train else "val")
    if not part.is_dir():
        raise UserError(f"--data-path {folder}: {part} is missing; {expected}")
    try:
        images = ClassFolders(part, transform=transform, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(f"--data-path {folder}: {str(error).splitlines()[0].rstrip('.')}; {expected}") from error
    warn_skipped_files(part, images.skipped)
    return images


# iNaturalist -------------------------------------------------------------------------------------


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 in its original layout: {train,val}YEAR.json, categories.json and images.

    category: the entry of categories.json that names the class (name, genus, family, ...). Classes are numbered in the
    order of their first training annotation.
    """

    def __init__(self, year: int, folder: Path, train: bool, transform, category: str = "name"):
        try:
            self.classes, self.samples = self._read(year, folder, train, category)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--data-path {folder}: the JSON files are not in iNaturalist's format: {error!r}"
            ) from error
        self.transform, self.root = transform, folder

    @staticmethod
    def _read(year: int, folder: Path, train: bool, category: str) -> tuple[list[str], list[tuple[Path, int]]]:
        categories = {entry["id"]: entry for entry in _read_json(folder / "categories.json")}
        available = set.intersection(*(set(entry) for entry in categories.values())) - {"id"}
        if category not in available:
            raise UserError(
                f"--inat-category {category}: unknown; {folder / 'categories.json'} has {', '.join(sorted(available))}"
            )
        training = _read_json(folder / f"train{year}.json")
        records = training if train else _read_json(folder / f"val{year}.json")
        classes = list(dict.fromkeys(categories[a["category_id"]][category] for a in training["annotations"]))
        number = {name: index for index, name in enumerate(classes)}
        files = {image["id"]: folder / image["file_name"] for image in records["images"]}
        labeled = [(files[a["image_id"]], categories[a["category_id"]][category]) for a in records["annotations"]]
        return classes, [(file, number[name]) for file, name in labeled]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        return self.transform(load_image(path)), target


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; expected train2018.json, val2018.json (or 2019) and categories.json"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
