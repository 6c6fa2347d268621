"""Data sets and the transforms before the network."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    create_dataset,
    create_transform,
    resolve_data_config,
)
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder

import utils
from utils import RankError, UserError, main_process_first, warn

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
    def of(cls, config: dict) -> Preprocessing:
        """config: a pretrained_cfg; what it does not say is timm's default."""
        found = resolve_data_config(pretrained_cfg=config)
        return cls(*(found[name] for name in cls._fields))

    @classmethod
    def of_model(cls, model: nn.Module) -> Preprocessing:
        """ImageNet's where the model was not made by name."""
        config = getattr(model, "pretrained_cfg", None)
        return cls.of(config) if config else cls()

    def of_whole_images(self) -> Preprocessing:
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
    return transforms.Compose([transforms.Lambda(_to_rgb), crop_and_flip, augment, to_tensor])


def is_shown_whole(size: tuple[int, int], placed: bool) -> bool:
    """Whether evaluation sees images to their borders; placed: as in `training_transform`."""
    return placed or max(size) <= MAX_UNCROPPED_SIDE


def evaluation_transform(size: tuple[int, int], placed: bool = False, preprocessing: Preprocessing = IMAGENET):
    """PIL image -> [3, H, W] float; placed: as in `training_transform`."""
    if is_shown_whole(size, placed):
        normalize = transforms.Normalize(preprocessing.mean, preprocessing.std)
        steps = [transforms.Resize(size), transforms.ToTensor(), normalize]
    else:
        steps = [create_transform(size, **preprocessing._asdict())]
    return transforms.Compose([transforms.Lambda(_to_rgb), *steps])


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
                return _to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be read as an image: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata say, where they can be read: they do not decide whether the image can."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's readers of metadata raise what they like
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
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


# Data sets ---------------------------------------------------------------------------------------


class Digits(Dataset):
    """scikit-learn's 1,797 scanned handwritten digits, 28 x 28 on a black canvas of 32 x 32, RGB.

    A fixed stratified split, 80 % for training. A digit stands at a random place in training, at
    one given by its index in validation.
    """

    CANVAS, SIZE = 32, 28

    def __init__(self, folder: None, train: bool, transform):
        from sklearn.datasets import load_digits  # slow to import
        from sklearn.model_selection import train_test_split

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


def _image_folder(folder: Path, train: bool, transform) -> ImageFolder:
    expected = f"expected {folder}/train/CLASS/IMAGE and {folder}/val/CLASS/IMAGE"
    part = folder / ("train" if train else "val")
    if not part.is_dir():
        raise UserError(f"--data-path {folder}: {part} is missing; {expected}")
    try:
        images = ClassFolders(part, transform=transform, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(f"--data-path {folder}: {str(error).splitlines()[0].rstrip('.')}; {expected}") from error
    warn_left_out(part, images.left_out)
    return images


class ClassFolders(ImageFolder):
    """torchvision's, with the images that `find_image_files` finds in each class's folder.

    left_out: what is no class or no image, by kind, and how often.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = [name for name in folders if not is_hidden(name)]
        self.left_out = Counter({HIDDEN: len(folders) - len(classes)})
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, *_, **__) -> list[tuple[str, int]]:
        samples = []
        for name, number in class_to_idx.items():
            files, left_out = find_image_files(Path(directory, name))
            if not files:
                raise FileNotFoundError(f"Found no image of the class {name} in {directory}.")
            samples += [(str(file), number) for file in files]
            self.left_out += left_out
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
    files, left_out, seen = [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        left_out[HIDDEN] += sum(map(is_hidden, [*folders, *names]))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if not is_hidden(name) and suffix in image_suffixes():
                files.append(Path(place, name))
            elif not is_hidden(name):
                left_out[suffix or "without a suffix"] += 1
    return sorted(files, key=lambda file: (str(file.parent), file.name)), left_out


def warn_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Says once what in a folder was taken for no image."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(left_out.items()) if number)
    if kinds:
        warn(f"{folder}: left out as no images: {kinds}")


class FashionMNISTFiles(FashionMNIST):
    """torchvision's, of a folder that itself holds the *-ubyte.gz files, as they are."""

    def _check_exists(self) -> bool:
        return True

    def _load_data(self) -> tuple[torch.Tensor, torch.Tensor]:
        part = Path(self.root) / ("train" if self.train else "t10k")
        return _read_idx(f"{part}-images-idx3-ubyte.gz", ndim=3), _read_idx(f"{part}-labels-idx1-ubyte.gz", ndim=1)


def _read_idx(path: str, ndim: int) -> torch.Tensor:
    """An IDX file of bytes (yann.lecun.com/exdb/mnist): big-endian magic, sizes, values."""
    try:
        data = gzip.decompress(Path(path).read_bytes())
        magic, *shape = np.frombuffer(data, ">i4", count=1 + ndim).tolist()
        if magic != 0x800 + ndim:
            raise ValueError("wrong magic number")
        return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8, offset=4 * (1 + ndim)).reshape(shape))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a Fashion-MNIST file: {error}") from error


def _fashion_mnist(folder: Path, train: bool, transform) -> FashionMNIST:
    if (folder / "t10k-images-idx3-ubyte.gz").exists():
        return FashionMNISTFiles(str(folder), train, transform)
    return _downloaded(FashionMNIST, folder, train, transform)


class ClutteredFashionMNIST(Dataset):
    """A Fashion-MNIST article at a random place of a larger black canvas, among cuttings of others, RGB.

    What cluttered translated MNIST is to MNIST (Mnih et al., Recurrent Models of Visual Attention, NeurIPS 2014):
    most of the image is of no use, and which part is depends on the image. An article of 28 x 28 on 56 x 56, with 8
    cuttings of 8 x 8, each of any article, from anywhere in it; where they overlap, the brighter pixel counts. In
    training every look at an image draws it anew, from NumPy's global state; in validation it follows from its index.
    """

    CANVAS, CUTTINGS, CUTTING = 56, 8, 8

    def __init__(self, folder: Path, train: bool, transform):
        articles = _fashion_mnist(folder, train, None)
        self.pixels, self.targets, self.classes = articles.data.numpy(), articles.targets, articles.classes
        self.train, self.transform = train, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        random = np.random if self.train else np.random.RandomState(index)
        canvas = np.zeros((self.CANVAS, self.CANVAS), np.uint8)
        for _ in range(self.CUTTINGS):
            source = self.pixels[random.randint(len(self))]
            top, left = random.randint(source.shape[0] - self.CUTTING + 1, size=2)
            self._paste(canvas, source[top : top + self.CUTTING, left : left + self.CUTTING], random)
        self._paste(canvas, self.pixels[index], random)
        return self.transform(Image.fromarray(canvas)), int(self.targets[index])

    def _paste(self, canvas: np.ndarray, piece: np.ndarray, random) -> None:
        """At a random place, whole; canvas, piece: [H, W] uint8."""
        side = len(piece)
        top, left = random.randint(self.CANVAS - side + 1, size=2)
        target = canvas[top : top + side, left : left + side]
        np.maximum(target, piece, out=target)


def _downloaded(kind: type, folder: Path, train: bool, transform) -> Dataset:
    try:
        with main_process_first():
            return kind(str(folder), train=train, transform=transform, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data-path {folder}: holds no {kind.__name__}, and it cannot be downloaded: {error}"
        ) from error


# What timm reads -----------------------------------------------------------------------------------

READERS = {"torch": "torchvision", "wds": "webdataset", "tfds": "tensorflow_datasets"}  # and the package of each


class Stream(IterableDataset):
    """What timm reads in order: WebDataset (`wds/`) and TensorFlow Datasets (`tfds/`).

    In training timm's reader shuffles the shards and deals them to the loaders of all processes. In
    validation every image counts once, for any number of shards and processes: shards are dealt to
    the processes; where there are none, each process reads everything and keeps its share.
    """

    def __init__(self, dataset: IterableDataset, classes: list[str], train: bool, transform, seed: int = 0):
        self.dataset, self.classes, self.train, self.transform = dataset, classes, train, transform
        self.seed, self.epoch = seed, 0
        self.first, self.step = 0, 1
        if not train:
            self._take_share()

    def _take_share(self) -> None:
        reader = self.dataset.reader
        reader.dist_rank, reader.dist_num_replicas = 0, 1  # it would fill shares up to equal lengths
        if _has_shards(self.dataset):
            reader.split_info.filenames = reader.split_info.filenames[utils.rank() :: utils.world_size()]
        else:
            self.first, self.step = utils.rank(), utils.world_size()

    @property
    def num_images(self) -> int:
        """Over all processes, as the data set says; 0 where it does not."""
        return self.dataset.reader.num_samples

    def prepare_workers(self, wanted: int) -> int:
        """How many loader processes to use: at most `wanted`, so that shards divide evenly if they can.

        UserError if there are fewer shards than processes to train.
        """
        workers = wanted = min(utils.all_gather_objects(wanted))  # machines may differ
        if self.train and _has_shards(self.dataset):
            workers = _fitting_workers(len(self.dataset.reader.split_info.filenames), wanted)
        self.dataset.set_loader_cfg(workers)
        return workers

    def set_epoch(self, epoch: int) -> None:
        """Of the next iteration, which follows from it alone."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)
        self.dataset.reader.ds = None  # the reader's shuffling starts anew ...
        self.dataset.reader.worker_seed = self.seed + epoch  # ... from here, or from the loader process's seed

    def first_images(self, count: int) -> list[tuple]:
        """Read in this process, at most `count`; loader processes that start later open their own shards."""
        found = list(islice(self, count))
        self.dataset.reader.ds = None
        return found

    def __len__(self) -> int:
        """Images in this process (in validation roughly)."""
        return len(self.dataset) if self.train else math.ceil(self.num_images / utils.world_size())

    def __iter__(self) -> Iterator:
        if _has_shards(self.dataset) and not self.dataset.reader.split_info.filenames:
            return  # fewer shards than processes
        worker = get_worker_info()
        place = (self.seed, utils.rank(), self.epoch, 0 if worker is None else worker.id)
        for number, (image, target) in enumerate(islice(self.dataset, self.first, None, self.step)):
            if self.train:
                utils.seed_everything(*place, number, utils.RANDOM_OF_IMAGES)
            yield self.transform(image), target


def _fitting_workers(shards: int, wanted: int) -> int:
    here = shards // utils.world_size()
    if here == 0:
        raise UserError(f"{shards} training shards are too few for {utils.world_size()} processes")
    even = [n for n in range(1, wanted + 1) if shards % (n * utils.world_size()) == 0]
    workers = max(even) if even else min(wanted, here)
    if workers < wanted:
        utils.log(f"{workers} loader processes instead of {wanted}, to suit {shards} training shards")
    if shards % (max(workers, 1) * utils.world_size()):
        utils.warn(f"{shards} training shards do not divide evenly: an epoch repeats or misses some images")
    return workers


def _read_by_timm(
    name: str,
    root: str,
    train: bool,
    transform,
    split: str,
    num_classes: int | None,
    batch_size: int,
    seed: int,
) -> Dataset:
    """A data set by its name in `timm.data.create_dataset`. UserError for whatever cannot be read."""
    options = {"split": split, "is_training": train, "batch_size": batch_size, "seed": seed, "download": True}
    if name.lower().startswith("torch/"):
        options["transform"] = transform
    if name.lower() == "torch/image_folder":
        options["loader"] = load_image
    try:
        with main_process_first():
            dataset = create_dataset(name, root, **options)
    except ImportError as error:
        raise UserError(f"--data-set {name} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # the readers raise what they like
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--data-set {name}, --data-path {root}, split {split}: {reason}") from error
    if _has_shards(dataset):
        _check_shards(dataset.reader.split_info.filenames, Path(root))
    classes = _declared_classes(dataset, name, num_classes)
    if isinstance(dataset, IterableDataset):
        return Stream(dataset, classes, train, transform, seed)
    dataset.classes = classes
    return dataset


def _has_shards(dataset: Dataset) -> bool:
    return type(getattr(dataset, "reader", None)).__name__ == "ReaderWds"


def _check_shards(files: list[str], root: Path) -> None:
    """webdataset would pass over a missing file in silence."""
    missing = [file for file in files if not (root / file).is_file()] if root.is_dir() else []
    if missing:
        raise UserError(f"{root}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}")


def _declared_classes(dataset: Dataset, name: str, num_classes: int | None) -> list[str]:
    index_of = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    names = list(getattr(dataset, "classes", None) or sorted(index_of, key=index_of.get))
    if not names and num_classes is None:
        raise UserError(f"--data-set {name} does not say how many classes it has: give --num-classes")
    if names and num_classes not in (None, len(names)):
        raise UserError(f"--num-classes {num_classes}: {name} has {len(names)} classes")
    return names or placeholders(num_classes)


def placeholders(num_classes: int) -> list[str]:
    """Names of classes that have none."""
    return [f"class {number}" for number in range(num_classes)]


# By name ------------------------------------------------------------------------------------------

DATA_SETS = {
    "IMNET": _image_folder,
    "CIFAR": partial(_downloaded, CIFAR100),
    "CIFAR10": partial(_downloaded, CIFAR10),
    "INAT": partial(INaturalist, 2018),
    "INAT19": partial(INaturalist, 2019),
    "FMNIST": _fashion_mnist,
    "CLUTTERED": ClutteredFashionMNIST,
    "DIGITS": Digits,
}
PLACED = {"DIGITS", "CLUTTERED"}  # these themselves place what their images show
WITH_LIBRARY = {"DIGITS"}  # these need no folder


def check_name(name: str) -> None:
    """UserError for an unknown data set, or where the package that reads it is missing."""
    if "/" in name:
        return _check_reader(name)
    if name not in DATA_SETS:
        hint = utils.did_you_mean(name, DATA_SETS) or f"; known are {', '.join(DATA_SETS)}"
        raise UserError(f"--data-set: unknown data set {name!r}{hint}")


def _check_reader(name: str) -> None:
    """UserError where a name like `wds/...` has no reader, or its package is missing."""
    prefix = name.partition("/")[0].lower()
    if prefix in ("hfds", "hfids"):
        raise UserError(f"{name}: not available: the package it needs, datasets, has the name of our datasets.py")
    if prefix not in READERS:
        raise UserError(f"{name}: no reader of that name; known are {', '.join(f'{known}/' for known in READERS)}")
    if importlib.util.find_spec(READERS[prefix]) is None:
        raise UserError(f"{name} needs the package {READERS[prefix]}: pip install {READERS[prefix]}")


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
    if name in WITH_LIBRARY:
        return DATA_SETS[name](None, train, transform)
    if not data_path:
        raise UserError(f"--data-set {name} needs --data-path")
    folder = Path(data_path)
    if not folder.is_dir() and not (name.startswith("wds/") and "://" in data_path):
        raise UserError(f"--data-path {data_path}: no such folder")
    if "/" in name:
        split = split or ("train" if train else "validation")
        return _read_by_timm(name, data_path, train, transform, split, num_classes, batch_size, seed)
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
        raise UserError("not one image can be read")
    return tuple(default_collate(chosen))
