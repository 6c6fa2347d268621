"""Data sets and the transforms before the network."""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from streams import Stream, read_by_timm
from utils import LocalError, UserError, main_process_first

MAX_UNCROPPED_SIDE = 32  # up to this many pixels, images are resized whole instead of cropped from a larger one
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
    elif max(size) <= MAX_UNCROPPED_SIDE:
        crop = transforms.RandomCrop(size, padding=4)
        crop_and_flip = transforms.Compose([transforms.Resize(size), crop, transforms.RandomHorizontalFlip()])
    return transforms.Compose([transforms.Lambda(_to_rgb), crop_and_flip, augment, to_tensor])


def evaluation_transform(size: tuple[int, int]):
    """PIL image -> [3, H, W] float, normalised with ImageNet's mean and std."""
    if max(size) <= MAX_UNCROPPED_SIDE:
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


# Images ------------------------------------------------------------------------------------------

MAX_ASPECT_RATIO = 20  # a longer side than so many times the shorter one is cut to it, around the centre


class UnreadableImage(LocalError):
    """A file that is no image, or a broken or monstrous one."""


def load_image(path: str | Path) -> Image.Image:
    """An image file in RGB, upright. UnreadableImage, naming it, for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be read as an image: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16 bit become RGB; of an animation, the first picture."""
    if image.mode.startswith("I"):  # 16 bit, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    shortest = min(image.size)
    width, height = (min(side, MAX_ASPECT_RATIO * shortest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
        return self.transform(load_image(path)), target


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
        return ImageFolder(part, transform=transform, loader=load_image, is_valid_file=has_image_name)
    except FileNotFoundError as error:
        raise UserError(f"--data-path {folder}: {str(error).splitlines()[0].rstrip('.')}; {expected}") from error


IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif")


def has_image_name(path: str | Path) -> bool:
    return str(path).lower().endswith(IMAGE_SUFFIXES)


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
        return read_by_timm(name, data_path, train, transform, load_image, split, num_classes, batch_size, seed)
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
    names = {} if path is None else _read_class_index(path)
    return [names.get(own, names.get(str(number), own)) for number, own in enumerate(classes)]


def _read_class_index(path: Path) -> dict[str, str]:
    """Names by the class's own name (its folder's), or by its number."""
    try:
        content = json.loads(path.read_text())
        entries = enumerate(content) if isinstance(content, list) else content.items()
        pairs = [(key, value) if isinstance(value, str) else value[:2] for key, value in entries]
        return {str(key): " ".join(name.split()) for key, name in pairs}
    except OSError as error:
        raise UserError(f"--class-index {path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: no class index; expected {{"0": ["n01440764", "tench"], ...}}') from error


def image_name(images: Dataset, index: int) -> str:
    """Its file, where the data set knows files, else its number."""
    samples = getattr(images, "samples", None)
    return str(samples[index][0]) if samples else f"image {index}"


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
