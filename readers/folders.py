"""Image files in folders: search, and datasets of class folders or in iNaturalist's layout."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder, ImageNet

from readers.class_names import by_normal_name, normal_name
from readers.images import load_image
from utils import UserError, warn

# Folders -----------------------------------------------------------------------------------------

HIDDEN = "hidden"  # a kind of skipped file
SERVICE_NAMES = {
    "@eaDir",
    "__MACOSX",
    "#recycle",
    "$RECYCLE.BIN",
    "@Recycle",
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

    Returns the files, sorted by folder and name, and the numbers of skipped files by kind. A hidden folder counts as
    one file. Links are followed, but each real folder is read once. Raises UserError if a folder cannot be read.
    """
    files, skipped = [], Counter()
    visited = {os.path.realpath(parent) for parent in folder.absolute().parents}  # a link to one would be a loop
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        shown = sorted(name for name in folders if not is_hidden(name))
        skipped[HIDDEN] += len(folders) - len(shown)
        folders[:] = shown
        images, others = _sort_out(place, names)
        files += [Path(place, name) for name in images]
        skipped += others
    return sorted(files, key=lambda file: (str(file.parent), file.name)), skipped


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error


def _sort_out(folder: str | Path, names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the names of a folder's image files, and the numbers of the other files by kind."""
    images, others = [], Counter()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if is_hidden(name):
            others[HIDDEN] += 1
        elif suffix in image_suffixes():
            images.append(name)
        elif os.path.exists(os.path.join(folder, name)):
            others[suffix or "without a suffix"] += 1
        else:
            others["broken links"] += 1
    return images, others


def warn_skipped_files(folder: Path, skipped: Counter[str], num_beside: int = 0) -> None:
    """Print one warning that counts the files of a folder that are not used.

    skipped: numbers of files that are not images, by kind; num_beside: number of images next to the class folders
    """
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(skipped.items()) if number)
    parts = [f"skipped files that are not images: {kinds}"] if kinds else []
    if num_beside:
        images = "1 image" if num_beside == 1 else f"{num_beside} images"
        parts.append(f"skipped {images} next to the class folders. To use them, move each into its class folder")
    if parts:
        warn(f"{folder}: {'; '.join(parts)}")


# Class folders -----------------------------------------------------------------------------------


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder with the files of `find_image_files`.

    skipped: numbers of files and folders that are not images or classes, by kind; beside: names of the images beside
    the class folders. Raises UserError if there is no class folder, or one without images.
    """

    def __init__(self, root: str | Path, transform=None, loader=load_image):
        super().__init__(root, transform=transform, loader=loader)
        warn_skipped_files(root, self.skipped, len(self.beside))

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class names, which are folder names in their normal form, and their indices."""
        entries = list(os.scandir(directory))
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        classes = [name for name in folders if not is_hidden(name)]
        self.beside, self.skipped = _sort_out(directory, (entry.name for entry in entries if not entry.is_dir()))
        self.skipped[HIDDEN] += len(folders) - len(classes)
        if not classes:
            raise UserError(
                f"--data-path: Couldn't find any class folder in {directory}, but {len(self.beside)} images. "
                f"Put each image into a folder named after its class: {directory}/CLASS/IMAGE"
            )
        self.folders = by_normal_name(classes, str(directory))
        return list(self.folders), {name: number for number, name in enumerate(self.folders)}

    def make_dataset(self, directory, class_to_idx, *_, **__) -> list[tuple[str, int]]:
        """Return the path and class index of each image."""
        samples = []
        for name, number in class_to_idx.items():
            files, skipped = find_image_files(Path(directory, self.folders[name]))
            if not files:
                raise UserError(
                    f"--data-path: Found no image of the class {name} in {directory}. "
                    "Add images to this folder, or remove it from training and validation data"
                )
            samples += [(str(file), number) for file in files]
            self.skipped += skipped
        return samples


def image_folder(folder: Path, train: bool, transform) -> ClassFolders:
    """Build a dataset from FOLDER/train/CLASS/IMAGE or FOLDER/val/CLASS/IMAGE.

    Raises UserError if a folder is missing or empty.
    """
    part = folder / ("train" if train else "val")
    if not part.is_dir():
        raise UserError(
            f"--data-path {folder}: {part} is missing; expected {folder}/train/CLASS/IMAGE and {folder}/val/CLASS/IMAGE"
        )
    return ClassFolders(part, transform)


SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # as in timm


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split as timm finds it: named like the split or its synonyms, else the root.

    Raises UserError if the root has folders of other splits only.
    """
    wanted = split.partition("[")[0]
    synonyms = next((names for names in SPLIT_NAMES if wanted in names), ())
    present = [name for name in (wanted, *synonyms) if (root / name).is_dir()]
    others = [name for names in SPLIT_NAMES for name in names if (root / name).is_dir()]
    if others and not present:
        raise UserError(f"--data-path {root}: no folder for the split {split!r}; found {', '.join(others)}")
    return root / present[0] if present else root


class ImageNetFolders(ImageNet, ClassFolders):
    """torchvision's ImageNet, which unpacks the original archives, with the files of `ClassFolders`.

    Its classes are WordNet IDs, as those of `image_folder`.
    """

    def __init__(self, root: str, split: str, transform):
        super().__init__(root, "val" if split in SPLIT_NAMES[1] else split, transform=transform)
        self.classes = self.wnids


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
        label_of = {number: normal_name(str(entry[category])) for number, entry in categories.items()}
        train_path, path = folder / f"train{year}.json", folder / f"{'train' if train else 'val'}{year}.json"
        training = _read_json(train_path)
        records = training if train else _read_json(path)
        _check_annotations(train_path, training["annotations"], "category_id", categories)
        classes = list(dict.fromkeys(label_of[a["category_id"]] for a in training["annotations"]))
        index_of = {name: index for index, name in enumerate(classes)}
        files = {image["id"]: folder / image["file_name"] for image in records["images"]}
        annotations = records["annotations"]
        _check_annotations(path, annotations, "image_id", files)
        _check_annotations(path, annotations, "category_id", [n for n, name in label_of.items() if name in index_of])
        num_unlabeled = len(files.keys() - {a["image_id"] for a in annotations})
        if num_unlabeled:
            warn(f"{path}: skipped {num_unlabeled} of {len(files)} images, which have no annotation")
        return classes, [(files[a["image_id"]], index_of[label_of[a["category_id"]]]) for a in annotations]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        return self.transform(load_image(path)), target


def _check_annotations(path: Path, annotations: list[dict], key: str, known: Iterable) -> None:
    """Raise UserError if an annotation refers to an unknown image, or to a category without training images."""
    known = set(known)
    unknown = [annotation[key] for annotation in annotations if annotation[key] not in known]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(annotations)} annotations have an unknown {key}, first {unknown[0]!r}. "
            "The files may belong to different versions of iNaturalist"
        )


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; expected train2018.json, val2018.json (or 2019) and categories.json"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
