"""Data sets and the transforms before the network."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder
from torchvision.datasets.folder import default_loader

import utils
from utils import UserError, main_process_first

SMALL = 32  # up to this many pixels, images are resized whole instead of cropped from a larger one
EVALUATION_CROP = 224 / 256  # of the shorter side, whatever the model's crop_pct says


# Transforms --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image, beside cropping; the values are timm's."""

    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: str = "bicubic"
    erase_probability: float = 0.25
    erase_mode: str = "pixel"
    erase_count: int = 1


def training_transform(size: tuple[int, int], augmentation: Augmentation, placed: bool = False):
    """PIL image -> [3, H, W] float. `placed`: the data set places its object itself: no crop, no flip."""
    crop_and_flip, augment, to_tensor = create_transform(
        size,
        is_training=True,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        re_prob=augmentation.erase_probability,
        re_mode=augmentation.erase_mode,
        re_count=augmentation.erase_count,
        separate=True,
    )
    if placed:
        crop_and_flip = transforms.Resize(size)
    elif max(size) <= SMALL:
        crop = transforms.RandomCrop(size, padding=4)
        crop_and_flip = transforms.Compose([transforms.Resize(size), crop, transforms.RandomHorizontalFlip()])
    return transforms.Compose([transforms.Lambda(_to_rgb), crop_and_flip, augment, to_tensor])


def evaluation_transform(size: tuple[int, int]):
    """PIL image -> [3, H, W] float, normalised with ImageNet's mean and std."""
    if max(size) <= SMALL:
        normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        steps = [transforms.Resize(size), transforms.ToTensor(), normalize]
    else:
        steps = [create_transform(size, interpolation="bicubic", crop_pct=EVALUATION_CROP)]
    return transforms.Compose([transforms.Lambda(_to_rgb), *steps])


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """[..., 3, H, W] float as the transforms made them -> uint8."""
    statistics = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=images.device)
    mean, std = statistics[:, :, None, None]
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


# Data sets ---------------------------------------------------------------------------------------


class Digits(Dataset):
    """scikit-learn's 1,797 scanned handwritten digits, 28 x 28 on a black canvas of 32 x 32, RGB.

    A fixed stratified split, 80 % for training. A digit stands at a random place in training, at
    one given by its index in validation.
    """

    CANVAS, SIZE = 32, 28

    def __init__(self, folder: None, train: bool, transform):
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        pixels, labels = (split[0], split[2]) if train else (split[1], split[3])
        self.pixels = (pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
        self.targets = labels.tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.train, self.transform = train, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        places = self.CANVAS - self.SIZE + 1
        place = torch.randint(places**2, ()).item() if self.train else index * 7 % places**2
        digit = Image.fromarray(self.pixels[index]).resize((self.SIZE, self.SIZE), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (self.CANVAS, self.CANVAS))
        canvas.paste(digit.convert("RGB"), divmod(place, places))
        return self.transform(canvas), self.targets[index]


class FashionMNISTFiles(Dataset):
    """Fashion-MNIST from a folder that directly holds its four `*-ubyte.gz` files."""

    def __init__(self, folder: Path, train: bool, transform):
        prefix = "train" if train else "t10k"
        self.images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", ndim=3)
        self.targets = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", ndim=1).tolist()
        self.classes = FashionMNIST.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of bytes (yann.lecun.com/exdb/mnist): big-endian magic, sizes, values."""
    try:
        data = gzip.decompress(path.read_bytes())
        magic, *shape = np.frombuffer(data, ">i4", count=1 + ndim).tolist()
        if magic != 0x800 + ndim:
            raise ValueError("wrong magic number")
        return np.frombuffer(data, np.uint8, offset=4 * (1 + ndim)).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a Fashion-MNIST file: {error}") from error


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
        self.transform = transform

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
        return self.transform(default_loader(path)), target


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; expected train2018.json, val2018.json (or 2019) and categories.json"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _image_folder(folder: Path, train: bool, transform) -> ImageFolder:
    expected = f"expected {folder}/train/CLASS/IMAGE and {folder}/val/CLASS/IMAGE"
    part = folder / ("train" if train else "val")
    if not part.is_dir():
        raise UserError(f"--data-path {folder}: {part} is missing; {expected}")
    try:
        return ImageFolder(part, transform=transform)
    except FileNotFoundError as error:
        raise UserError(f"--data-path {folder}: {str(error).splitlines()[0].rstrip('.')}; {expected}") from error


def _fashion_mnist(folder: Path, train: bool, transform) -> Dataset:
    if (folder / "t10k-images-idx3-ubyte.gz").exists():
        return FashionMNISTFiles(folder, train, transform)
    return _downloaded(FashionMNIST, folder, train, transform)


def _downloaded(kind: type, folder: Path, train: bool, transform) -> Dataset:
    try:
        with main_process_first():
            return kind(str(folder), train=train, transform=transform, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data-path {folder}: holds no {kind.__name__}, and it cannot be downloaded: {error}"
        ) from error


# Data sets that timm reads ------------------------------------------------------------------------

READERS = {"torch": "torchvision", "wds": "webdataset", "tfds": "tensorflow_datasets"}  # and the package of each


class Stream(IterableDataset):
    """What timm reads in order: WebDataset (`wds/`) and TensorFlow Datasets (`tfds/`).

    In training timm's reader shuffles the shards and deals them to the loaders of all processes. In
    validation every process reads everything and keeps each world-size-th image, so that every
    image counts once, for any number of shards and processes.
    """

    def __init__(self, dataset: IterableDataset, classes: list[str], train: bool, transform):
        self.dataset, self.classes, self.train, self.transform = dataset, classes, train, transform
        self.first, self.step = (0, 1) if train else (utils.rank(), utils.world_size())
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1

    def prepare_workers(self, wanted: int) -> int:
        """How many loader processes to use: at most `wanted`, so that shards divide evenly if they can.

        UserError if there are fewer shards than processes to train.
        """
        shards = len(self.dataset.reader.split_info.filenames) if hasattr(self.dataset.reader, "split_info") else None
        workers = wanted
        if self.train and shards is not None:
            here = shards // utils.world_size()
            if here == 0:
                raise UserError(f"{shards} training shards are too few for {utils.world_size()} processes")
            workers = max((n for n in range(1, wanted + 1) if shards % (n * utils.world_size()) == 0), default=0)
            workers = workers or min(wanted, here)
            if shards % (max(workers, 1) * utils.world_size()):
                utils.warn(
                    f"{shards} training shards do not divide evenly: an epoch repeats some images, misses others"
                )
        self.dataset.set_loader_cfg(workers)
        return workers

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Images in this process (in validation an upper bound)."""
        return math.ceil(len(self.dataset) / self.step)

    def __iter__(self) -> Iterator:
        for image, target in islice(self.dataset, self.first, None, self.step):
            if not 0 <= target < len(self.classes):
                raise UserError(f"an image is labelled {target}, but there are {len(self.classes)} classes")
            yield self.transform(image), target


def check_reader(name: str) -> None:
    """UserError where a name like `wds/...` has no reader, or its package is missing."""
    prefix = name.partition("/")[0].lower()
    if prefix in ("hfds", "hfids"):
        raise UserError(f"{name}: not available: the package it needs, datasets, has the name of our datasets.py")
    if prefix not in READERS:
        raise UserError(f"{name}: no reader of that name; known are {', '.join(f'{known}/' for known in READERS)}")
    if importlib.util.find_spec(READERS[prefix]) is None:
        raise UserError(f"{name} needs the package {READERS[prefix]}: pip install {READERS[prefix]}")


def _read_by_timm(
    name: str, root: str, train: bool, transform, split: str, num_classes: int | None, batch_size: int, seed: int
) -> Dataset:
    """A data set by its name in `timm.data.create_dataset`."""
    check_reader(name)
    options = {"split": split, "is_training": train, "batch_size": batch_size, "seed": seed}
    try:
        with main_process_first():
            dataset = create_dataset(name, root, download=not name.startswith("wds"), **options)
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError, TypeError) as error:
        raise UserError(f"--data-set {name}, --data-path {root}, split {split}: {error}") from error
    _check_shards(dataset, root)
    classes = _class_names(dataset, name, num_classes)
    if isinstance(dataset, IterableDataset):
        return Stream(dataset, classes, train, transform)
    dataset.classes, dataset.transform = classes, transform
    return dataset


def _check_shards(dataset: Dataset, root: str) -> None:
    """webdataset would pass over a missing file in silence."""
    split = getattr(getattr(dataset, "reader", None), "split_info", None)
    if split is None or not Path(root).is_dir():
        return
    missing = [file for file in split.filenames if not (Path(root) / file).is_file()]
    if missing:
        raise UserError(f"{root}: {len(missing)} of {len(split.filenames)} shards are missing, first {missing[0]}")


def _class_names(dataset: Dataset, name: str, num_classes: int | None) -> list[str]:
    index_of = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    names = getattr(dataset, "classes", None) or sorted(index_of, key=index_of.get)
    if not names and num_classes is None:
        raise UserError(f"--data-set {name} does not say how many classes it has: give --num-classes")
    return list(names) or [str(number) for number in range(num_classes)]


# By name ------------------------------------------------------------------------------------------

DATA_SETS = {
    "IMNET": _image_folder,
    "CIFAR": partial(_downloaded, CIFAR100),
    "CIFAR10": partial(_downloaded, CIFAR10),
    "INAT": partial(INaturalist, 2018),
    "INAT19": partial(INaturalist, 2019),
    "FMNIST": _fashion_mnist,
    "DIGITS": Digits,
}
PLACED = {"DIGITS"}  # these place their object in the image themselves
WITH_LIBRARY = {"DIGITS"}  # these need no folder


def build_dataset(
    name: str,
    data_path: str | None,
    train: bool,
    size: tuple[int, int],
    augmentation: Augmentation | None = None,
    *,
    inat_category: str = "name",
    split: str | None = None,
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Dataset:
    """A data set of ([3, H, W] float, class index) with its class names under `.classes`.

    name: one of DATA_SETS, or one that timm.data.create_dataset knows, with its prefix;
    augmentation: how training images are varied; None takes them as in evaluation;
    split, num_classes, batch_size, seed: for timm's readers; the split is "train" or "validation"
    by default.
    UserError for a missing or empty folder, or another layout.
    """
    transform = evaluation_transform(size)
    if train and augmentation is not None:
        try:
            transform = training_transform(size, augmentation, placed=name in PLACED)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--aa {augmentation.auto_augment}: not a policy of timm's: {error}") from error
    if name in WITH_LIBRARY:
        return DATA_SETS[name](None, train, transform)
    if not data_path:
        raise UserError(f"--data-set {name} needs --data-path")
    folder = Path(data_path)
    if not folder.is_dir() and "://" not in data_path:
        raise UserError(f"--data-path {data_path}: no such folder")
    if "/" in name:
        split = split or ("train" if train else "validation")
        return _read_by_timm(name, data_path, train, transform, split, num_classes, batch_size, seed)
    options = {"category": inat_category} if name.startswith("INAT") else {}
    return DATA_SETS[name](folder, train, transform, **options)


def spread_sample(images: Dataset, count: int) -> torch.Tensor:
    """`count` images from all over a data set (the first ones of a stream): [count, 3, H, W] float."""
    if isinstance(images, Stream):
        chosen = islice(images, count)
    else:
        chosen = (images[index * len(images) // count] for index in range(count))
    return torch.stack([image for image, _ in chosen])
