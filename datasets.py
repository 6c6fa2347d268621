"""Datasets by name, and the transforms of their images.

This module is the interface to `readers/`, which holds the implementations.
"""

from __future__ import annotations

import hashlib
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
from readers.class_names import class_names, class_numbers, normal_name, placeholder_names, positions
from readers.downloads import downloaded, fashion_mnist
from readers.folders import (
    INaturalist,
    find_image_files,
    image_folder,
    image_suffixes,
    warn_skipped_files,
)
from readers.images import UnreadableImage, load_image, to_rgb
from readers.streams import Stream, check_reader, read_by_timm
from readers.synthetic import ClutteredFashionMNIST, Digits, VariedClutteredFashionMNIST
from utils import UserError

__all__ = [
    "IMAGENET",
    "Preprocessing",
    "Stream",
    "UnreadableImage",
    "build_dataset",
    "check_name",
    "class_names",
    "class_numbers",
    "dataset_digest",
    "evaluation_transform",
    "find_image_files",
    "image_name",
    "image_suffixes",
    "load_image",
    "normal_name",
    "placeholder_names",
    "positions",
    "spread_sample",
    "training_transform",
    "warn_skipped_files",
]

MAX_UNCROPPED_SIDE = 32  # pixels; up to this input size, evaluation does not crop, and training crops after padding


# What a checkpoint may record: the programs of docs/deployment.md do the same with it.
CROP_MODES, INTERPOLATIONS = ("center", "squash"), ("bilinear", "bicubic", "lanczos")
MIN_CROP_PCT, MIN_STD, MAX_PIXEL = 0.1, 1e-3, 255


class Preprocessing(NamedTuple):
    """The preprocessing of a model's images in evaluation, with the fields of timm's pretrained_cfg.

    mean, std: [3] each, for normalization; interpolation: for resizing; crop_pct: share of the shorter side that is
    kept in evaluation; crop_mode: center, or squash, which ignores the aspect ratio.
    """

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 224 / 256
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: dict) -> Preprocessing:
        """Build it from a pretrained_cfg, with timm's defaults for missing entries."""
        resolved = resolve_data_config(pretrained_cfg=config)
        return cls(*(resolved[name] for name in cls._fields))

    @classmethod
    def from_model(cls, model: nn.Module) -> Preprocessing:
        """Return the preprocessing of a model that was created by name, else that of ImageNet."""
        config = getattr(model, "pretrained_cfg", None)
        return cls.from_config(config) if config else cls()

    @classmethod
    def from_record(cls, record: object) -> Preprocessing | None:
        """Return the preprocessing in a record read from a file, or None if it is missing or not usable."""
        if not isinstance(record, dict):
            return None
        mean, std, interpolation, crop_pct, crop_mode = map(record.get, cls._fields)
        is_usable = (
            _are_numbers(mean, -MAX_PIXEL, MAX_PIXEL)
            and _are_numbers(std, MIN_STD, MAX_PIXEL)
            and _are_numbers([crop_pct], MIN_CROP_PCT, 1, count=1)
            and interpolation in INTERPOLATIONS
            and crop_mode in CROP_MODES
        )
        return cls(tuple(mean), tuple(std), interpolation, crop_pct, crop_mode) if is_usable else None

    def record(self) -> dict:
        """Return it as plain values, for a checkpoint or for JSON."""
        return self._asdict() | {"mean": list(self.mean), "std": list(self.std)}

    def for_run(self, size: tuple[int, int], data_set: str | None = None) -> Preprocessing:
        """Return the preprocessing for images of this size: small ones, and those of PLACED, are not cropped."""
        if data_set in PLACED or max(size) <= MAX_UNCROPPED_SIDE:
            return self._replace(interpolation="bilinear", crop_pct=1.0, crop_mode="squash")
        return self

    def difference(self, other: Preprocessing) -> str:
        """Return the fields that differ, for messages: "crop_pct 1.0 instead of 0.875"."""
        fields = zip(self._fields, self, other)
        return ", ".join(f"{name} {own} instead of {others}" for name, own, others in fields if own != others)

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert normalized images to pixels.

        images: [..., 3, H, W] float -> uint8 of the same shape
        """
        mean, std = torch.tensor([self.mean, self.std], device=images.device)[:, :, None, None]
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _are_numbers(values: object, low: float, high: float, count: int = 3) -> bool:
    """Return whether a value read from a file is a list of so many numbers from `low` to `high`."""
    is_list = isinstance(values, list | tuple) and len(values) == count
    return is_list and all(type(value) in (int, float) and low <= value <= high for value in values)


IMAGENET = Preprocessing()
PLACED = {"DIGITS", "CLUTTERED", "CLUTTERED_VARIED"}  # these datasets place their objects themselves


# Transforms --------------------------------------------------------------------------------------


def training_transform(
    size: tuple[int, int], augmentation: dict, placed: bool = False, preprocessing: Preprocessing = IMAGENET
):
    """Return a transform from a PIL image to [3, H, W] float.

    augmentation: keyword arguments of timm.data.create_transform, such as auto_augment, color_jitter and re_prob;
    placed: whether the dataset places its objects itself, so that images are neither cropped nor flipped.
    """
    options = {"mean": preprocessing.mean, "std": preprocessing.std, **augmentation}
    crop_and_flip, augment, to_tensor = create_transform(size, is_training=True, separate=True, **options)
    if placed:
        crop_and_flip = transforms.Resize(size)
    elif max(size) <= MAX_UNCROPPED_SIDE:
        crop = transforms.RandomCrop(size, padding=4)
        crop_and_flip = transforms.Compose([transforms.Resize(size), crop, transforms.RandomHorizontalFlip()])
    return transforms.Compose([transforms.Lambda(to_rgb), crop_and_flip, augment, to_tensor])


def evaluation_transform(size: tuple[int, int], preprocessing: Preprocessing | None = None):
    """Return a transform from a PIL image to [3, H, W] float, the same for every command.

    preprocessing: of a loaded model, see `Preprocessing.from_model`; None: ImageNet's for this size
    """
    preprocessing = preprocessing or IMAGENET.for_run(size)
    return transforms.Compose([transforms.Lambda(to_rgb), create_transform(size, **preprocessing._asdict())])


# Datasets ----------------------------------------------------------------------------------------

DATA_SETS = {
    "IMNET": image_folder,
    "CIFAR": partial(downloaded, CIFAR100),
    "CIFAR10": partial(downloaded, CIFAR10),
    "INAT": partial(INaturalist, 2018),
    "INAT19": partial(INaturalist, 2019),
    "FMNIST": fashion_mnist,
    "CLUTTERED": ClutteredFashionMNIST,
    "CLUTTERED_VARIED": VariedClutteredFashionMNIST,
    "DIGITS": Digits,
}
NEEDS_NO_FOLDER = {"DIGITS"}


def check_name(name: str) -> None:
    """Raise UserError if the dataset is unknown, or the package that reads it is missing."""
    if "/" in name:
        return check_reader(name)
    if name not in DATA_SETS:
        hint = utils.did_you_mean(name, DATA_SETS) or f"; expected one of {', '.join(DATA_SETS)}"
        raise UserError(f"--data-set: unknown dataset {name!r}{hint}")


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
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """Build a dataset of ([3, H, W] float, class index) with an attribute `classes`, the class names.

    name: a key of DATA_SETS, or a name of timm.data.create_dataset with its prefix (see readers/streams.py);
    augmentation: see `training_transform`; None preprocesses training images as in evaluation;
    split, num_classes, batch_size, seed: for timm's readers; the default split is "train" or "validation";
    preprocessing: of the run; None: ImageNet's for this dataset and size.
    Raises UserError if the folder is missing, empty or has another layout.
    """
    check_name(name)
    preprocessing = preprocessing or IMAGENET.for_run(size, name)
    transform = _transform(name, train, size, augmentation, preprocessing)
    if "/" not in name and (split is not None or num_classes is not None):
        raise UserError(
            f"--train-split, --val-split and --num-classes need a dataset that timm reads (e.g. wds/), got {name}"
        )
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


def _transform(name: str, train: bool, size: tuple[int, int], augmentation: dict | None, preprocessing: Preprocessing):
    """Return the transform for a part of a dataset, or raise UserError if --aa is invalid."""
    if not train or augmentation is None:
        return evaluation_transform(size, preprocessing)
    try:
        return training_transform(size, augmentation, name in PLACED, preprocessing)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--aa {augmentation.get('auto_augment')}: not a policy that timm supports: {error}") from error


def image_name(images: Dataset, index: int) -> str:
    """Return the path of an image within the dataset's folder, or its number if the dataset has no files."""
    samples = getattr(images, "samples", None)
    return Path(os.path.relpath(samples[index][0], images.root)).as_posix() if samples else f"image {index}"


def dataset_digest(images: Dataset) -> str:
    """Return a digest of the names and labels of a dataset's images, as far as it lists them.

    A folder that moved keeps its digest. Pixels do not count.
    """
    reader = getattr(getattr(images, "dataset", images), "reader", images)  # of a timm dataset, or of a stream's
    if isinstance(images, Stream):
        names = images.shards
    elif (samples := getattr(reader, "samples", None)) and isinstance(samples[0][0], str | Path):
        start = len(str(reader.root))
        names = [f"{str(path)[start:].lstrip(os.sep)}\t{label}" for path, label in samples]
    else:
        targets = getattr(images, "targets", ())
        names = map(str, targets.tolist() if isinstance(targets, torch.Tensor) else targets)
    return hashlib.sha256("\n".join(names).encode(errors="backslashreplace")).hexdigest()


def spread_sample(images: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return evenly spaced images of a dataset (the first ones of a stream), and their class indices.

    [B, 3, H, W] float and [B] int64, with B <= count. Raises UserError if there are none.
    """
    if isinstance(images, Stream):
        samples = images.first_images(count)
    else:
        samples = [images[index * len(images) // count] for index in range(count if len(images) else 0)]
    if not samples:
        raise UserError("no image can be read")
    return tuple(default_collate(samples))
