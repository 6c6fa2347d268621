"""Data sets and the transforms before the network."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

import utils
from readers.downloads import downloaded, fashion_mnist
from readers.folders import (
    INaturalist,
    UnreadableImage,
    find_image_files,
    image_folder,
    image_suffixes,
    load_image,
    to_rgb,
    warn_skipped_files,
)
from readers.streams import Stream, check_reader, placeholder_names, read_by_timm
from readers.synthetic import ClutteredFashionMNIST, Digits
from utils import UserError, warn

__all__ = [
    "IMAGENET",
    "PLACED",
    "Preprocessing",
    "Stream",
    "UnreadableImage",
    "build_dataset",
    "check_name",
    "class_names",
    "evaluation_transform",
    "find_image_files",
    "image_name",
    "image_suffixes",
    "is_uncropped",
    "load_image",
    "placeholder_names",
    "spread_sample",
    "training_transform",
    "warn_skipped_files",
]

MAX_UNCROPPED_SIDE = 32  # up to this many pixels, images are resized whole instead of cropped from a larger one


class Preprocessing(NamedTuple):
    """How an image is made for a network, in the words of timm's pretrained_cfg.

    mean, std: [3] each, of its normalisation; interpolation: of resizing; crop_pct: the share of the shorter side that
    evaluation sees; crop_mode: center, squash or border.
    """

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 224 / 256
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: dict) -> Preprocessing:
        """config: a pretrained_cfg; what it does not say is timm's default."""
        found = resolve_data_config(pretrained_cfg=config)
        return cls(*(found[name] for name in cls._fields))

    @classmethod
    def from_model(cls, model: nn.Module) -> Preprocessing:
        """ImageNet's where the model was not made by name."""
        config = getattr(model, "pretrained_cfg", None)
        return cls.from_config(config) if config else cls()

    def uncropped(self) -> Preprocessing:
        """As `evaluation_transform` makes small and placed images: resized, not cropped."""
        return self._replace(interpolation="bilinear", crop_pct=1.0, crop_mode="squash")

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """[..., 3, H, W] float as the transforms made them -> uint8."""
        mean, std = torch.tensor([self.mean, self.std], device=images.device)[:, :, None, None]
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


IMAGENET = Preprocessing()


# Transforms --------------------------------------------------------------------------------------


def training_transform(
    size: tuple[int, int], augmentation: dict, placed: bool = False, preprocessing: Preprocessing = IMAGENET
):
    """PIL image -> [3, H, W] float.

    augmentation: keywords of timm.data.create_transform: auto_augment, color_jitter, re_prob and so on;
    placed: the data set itself places what its images show: no crop, no flip.
    """
    options = {"mean": preprocessing.mean, "std": preprocessing.std, **augmentation}
    crop_and_flip, augment, to_tensor = create_transform(size, is_training=True, separate=True, **options)
    if placed:
        crop_and_flip = transforms.Resize(size)
    elif max(size) <= MAX_UNCROPPED_SIDE:
        crop = transforms.RandomCrop(size, padding=4)
        crop_and_flip = transforms.Compose([transforms.Resize(size), crop, transforms.RandomHorizontalFlip()])
    return transforms.Compose([transforms.Lambda(to_rgb), crop_and_flip, augment, to_tensor])


def is_uncropped(size: tuple[int, int], placed: bool) -> bool:
    """Whether evaluation sees images to their borders; placed: as in `training_transform`."""
    return placed or max(size) <= MAX_UNCROPPED_SIDE


def evaluation_transform(size: tuple[int, int], placed: bool = False, preprocessing: Preprocessing = IMAGENET):
    """PIL image -> [3, H, W] float; placed: as in `training_transform`."""
    if is_uncropped(size, placed):
        normalize = transforms.Normalize(preprocessing.mean, preprocessing.std)
        steps = [transforms.Resize(size), transforms.ToTensor(), normalize]
    else:
        steps = [create_transform(size, **preprocessing._asdict())]
    return transforms.Compose([transforms.Lambda(to_rgb), *steps])


# By name ------------------------------------------------------------------------------------------

DATA_SETS = {
    "IMNET": image_folder,
    "CIFAR": partial(downloaded, CIFAR100),
    "CIFAR10": partial(downloaded, CIFAR10),
    "INAT": partial(INaturalist, 2018),
    "INAT19": partial(INaturalist, 2019),
    "FMNIST": fashion_mnist,
    "CLUTTERED": ClutteredFashionMNIST,
    "DIGITS": Digits,
}
PLACED = {"DIGITS", "CLUTTERED"}  # these themselves place what their images show
NEEDS_NO_FOLDER = {"DIGITS"}  # these need no folder


def check_name(name: str) -> None:
    """UserError for an unknown data set, or where the package that reads it is missing."""
    if "/" in name:
        return check_reader(name)
    if name not in DATA_SETS:
        hint = utils.did_you_mean(name, DATA_SETS) or f"; known are {', '.join(DATA_SETS)}"
        raise UserError(f"--data-set: unknown data set {name!r}{hint}")


def build_dataset(
    name: str,
    data_path: str | None,
    train: bool,
    size: tuple[int, int],
    augmentation: dict | None = None,
    *,
    inat_category: str = "name",
    split: str | None = None,
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    preprocessing: Preprocessing = IMAGENET,
) -> Dataset:
    """A data set of ([3, H, W] float, class index) with its class names under `.classes`.

    name: one of DATA_SETS, or one that timm.data.create_dataset knows, with its prefix (see READERS);
    augmentation: how training images are varied, see `training_transform`; None takes them as in evaluation;
    split, num_classes, batch_size, seed: for timm's readers; the split is "train" or "validation"
    by default.
    UserError for a missing or empty folder, or another layout.
    """
    check_name(name)
    placed = name in PLACED
    transform = evaluation_transform(size, placed, preprocessing)
    if train and augmentation is not None:
        try:
            transform = training_transform(size, augmentation, placed, preprocessing)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--aa {augmentation.get('auto_augment')}: not a policy of timm's: {error}") from error
    if "/" not in name and (split is not None or num_classes is not None):
        raise UserError(f"--train-split, --val-split and --num-classes are for timm's data sets, {name} is none")
    if name in NEEDS_NO_FOLDER:
        return DATA_SETS[name](None, train, transform)
    if not data_path:
        raise UserError(f"--data-set {name} needs --data-path")
    folder = Path(data_path)
    if not folder.is_dir() and not (name.startswith("wds/") and "://" in data_path):
        raise UserError(f"--data-path {data_path}: no such folder")
    if "/" in name:
        split = split or ("train" if train else "validation")
        return read_by_timm(name, data_path, train, transform, split, num_classes, batch_size, seed)
    options = {"category": inat_category} if name.startswith("INAT") else {}
    return DATA_SETS[name](folder, train, transform, **options)


CLASS_INDEX_FILES = "*class_index.json"


def class_names(classes: list[str], data_path: str | None, index_file: str | None) -> list[str]:
    """The names to show of a data set's classes: from a class-index file where there is one, else its own.

    index_file: its path; None looks for one in the data set's folder. JSON: {"0": "tench", ...},
    {"0": ["n01440764", "tench"], ...}, {"n01440764": "tench", ...} or ["tench", ...]. UserError for
    another form.
    """
    found = sorted(Path(data_path).glob(CLASS_INDEX_FILES)) if data_path and index_file is None else []
    path = Path(index_file) if index_file is not None else next(iter(found), None)
    try:
        names = {} if path is None else _read_class_index(path)
    except UserError as error:
        if index_file is not None:
            raise
        warn(f"{error}: not used")  # nobody asked for it
        names = {}
    return [names.get(own, names.get(str(number), own)) for number, own in enumerate(classes)]


def _read_class_index(path: Path) -> dict[str, str]:
    """Names by the class's own name (its folder's), or by its number."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        entries = enumerate(content) if isinstance(content, list) else content.items()
        pairs = [(key, value) if isinstance(value, str) else value[:2] for key, value in entries]
        return {str(key): " ".join(name.split()) for key, name in pairs}
    except OSError as error:
        raise UserError(f"--class-index {path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: no class index; expected {{"0": ["n01440764", "tench"], ...}}') from error


def image_name(images: Dataset, index: int) -> str:
    """Its file within the data set's folder, where it knows files, else its number."""
    samples = getattr(images, "samples", None)
    return Path(os.path.relpath(samples[index][0], images.root)).as_posix() if samples else f"image {index}"


def spread_sample(images: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images from all over a data set (the first ones of a stream), and their class indices.

    [B, 3, H, W] float and [B] int64, B at most `count`. UserError if there are none.
    """
    if isinstance(images, Stream):
        chosen = images.first_images(count)
    else:
        chosen = [images[index * len(images) // count] for index in range(count if len(images) else 0)]
    if not chosen:
        raise UserError("no image can be read")
    return tuple(default_collate(chosen))
