"""Image files: reading one, finding all in a folder, and data sets of class folders or of iNaturalist's layout."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from utils import RankError, UserError, warn

# Images ------------------------------------------------------------------------------------------

MAX_ASPECT_RATIO = 20  # a longer side than so many times the shorter one is cut to it, around the centre


class UnreadableImage(RankError):
    """A file that is no image, a broken one, or one of too many pixels."""


def load_image(path: str | Path) -> Image.Image:
    """An image file in RGB, upright. UnreadableImage, naming it, for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be read as an image: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata say, where they can be read: they do not decide whether the image can."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's readers of metadata raise what they like
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and more than 8 bit become RGB; of an animation, the first picture."""
    if image.mode[:1] in "IF":  # which Pillow would clip to 8 bit
        image = _to_8_bit(image)
    image = image.convert("RGB")
    shortest = min(image.size)
    width, height = (min(side, MAX_ASPECT_RATIO * shortest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


WHITES = (1, 255, 2**16 - 1, 2**32 - 1)  # of pixels in floating point, and of 8, 16 and 32 bit


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Of 16 or 32 bit, or floating point, whose range is the narrowest of the usual ones that holds it."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    ranges = WHITES[2:] if "16" in image.mode else WHITES[1:] if image.mode.startswith("I") else WHITES
    white = next((white for white in ranges if pixels.max() <= white), WHITES[-1])
    return Image.fromarray((pixels * (255.999 / white)).clip(0, 255).astype(np.uint8))


# Folders -----------------------------------------------------------------------------------------


def image_folder(folder: Path, train: bool, transform) -> ImageFolder:
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


class ClassFolders(ImageFolder):
    """torchvision's, with the images that `find_image_files` finds in each class's folder.

    skipped: what is no class or no image, by kind, and how often.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = [name for name in folders if not is_hidden(name)]
        self.skipped = Counter({HIDDEN: len(folders) - len(classes)})
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, *_, **__) -> list[tuple[str, int]]:
        samples = []
        for name, number in class_to_idx.items():
            files, skipped = find_image_files(Path(directory, name))
            if not files:
                raise FileNotFoundError(f"Found no image of the class {name} in {directory}.")
            samples += [(str(file), number) for file in files]
            self.skipped += skipped
        return samples


HIDDEN = "hidden"  # a kind of what is left out
SERVICE_NAMES = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SERVICE_NAMES |= {"Thumbs.db", "desktop.ini"}
UNREAD_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow only recognises them, or runs a program


def is_hidden(name: str) -> bool:
    """Of a file or folder that systems and programs keep beside the data."""
    return name.startswith(".") or name in SERVICE_NAMES


@cache
def image_suffixes() -> frozenset[str]:
    """Of the files that Pillow reads, with their dot, in lower case."""
    formats = Image.registered_extensions()
    return frozenset(ending for ending, kind in formats.items() if kind in Image.OPEN and kind not in UNREAD_FORMATS)


def find_image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Images in a folder at any depth, by folder and name, each real folder once; what is left out, by kind."""
    files, skipped, seen = [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
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
    """Says once what in a folder was taken for no image."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(skipped.items()) if number)
    if kinds:
        warn(f"{folder}: left out as no images: {kinds}")


# iNaturalist --------------------------------------------------------------------------------------


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 in its original layout: {train,val}YEAR.json, categories.json, images.

    category: which entry of categories.json names the class (name, genus, family, ...). Classes are
    numbered in the order in which the training annotations first name them.
    """

    def __init__(self, year: int, folder: Path, train: bool, transform, category: str = "name"):
        try:
            self.classes, self.samples = self._read(year, folder, train, category)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--data-path {folder}: its JSON files are not iNaturalist's: no {error}") from error
        self.transform, self.root = transform, folder

    @staticmethod
    def _read(year: int, folder: Path, train: bool, category: str) -> tuple[list[str], list[tuple[Path, int]]]:
        categories = {entry["id"]: entry for entry in _read_json(folder / "categories.json")}
        known = set.intersection(*(set(entry) for entry in categories.values())) - {"id"}
        if category not in known:
            raise UserError(f"--inat-category {category}: {folder / 'categories.json'} has {', '.join(sorted(known))}")
        training = _read_json(folder / f"train{year}.json")
        records = training if train else _read_json(folder / f"val{year}.json")
        classes = list(dict.fromkeys(categories[a["category_id"]][category] for a in training["annotations"]))
        number = {name: index for index, name in enumerate(classes)}
        files = {image["id"]: folder / image["file_name"] for image in records["images"]}
        labelled = [(files[a["image_id"]], categories[a["category_id"]][category]) for a in records["annotations"]]
        return classes, [(file, number[name]) for file, name in labelled]

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
