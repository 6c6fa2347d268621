"""Datasets that timm reads, with the prefixes `torch/`, `wds/` (WebDataset) and `tfds/` (TensorFlow Datasets)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from timm.data import IterableImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import utils
from readers.class_names import by_normal_name, normal_name, placeholder_names
from readers.downloads import check_labels
from readers.folders import ClassFolders, ImageNetFolders, split_folder
from utils import UserError, main_process_first

READERS = {"torch": "torchvision", "wds": "webdataset", "tfds": "tensorflow_datasets"}  # prefix -> package


def check_reader(name: str) -> None:
    """Raise UserError if a name like `wds/...` has an unknown prefix, or the package of its reader is missing."""
    prefix = name.partition("/")[0].lower()
    if prefix in ("hfds", "hfids"):
        raise UserError(
            f"--data-set {name}: not supported, because Hugging Face's package has the same name as datasets.py here"
        )
    if prefix not in READERS:
        raise UserError(f"--data-set {name}: unknown prefix; expected {', '.join(f'{known}/' for known in READERS)}")
    if importlib.util.find_spec(READERS[prefix]) is None:
        raise UserError(f"--data-set {name} needs the package {READERS[prefix]}: pip install {READERS[prefix]}")


class Stream(IterableDataset):
    """A dataset that is read in order: WebDataset (`wds/`) or TensorFlow Datasets (`tfds/`).

    In training, timm's reader shuffles the shards and splits them across the data-loader workers of all processes.
    In validation, each image counts once for any number of shards and processes. The shards are split across
    processes. Without shards, each process reads everything and keeps its part.
    """

    def __init__(self, dataset: IterableDataset, classes: list[str], train: bool, transform, seed: int = 0):
        self.dataset, self.classes, self.train, self.transform = dataset, classes, train, transform
        self.seed, self.epoch = seed, 0
        self.first, self.step = 0, 1
        if not train:
            self._split_across_processes()

    def _split_across_processes(self) -> None:
        """Restrict this process to its part of the validation images."""
        reader = self.dataset.reader
        reader.dist_rank, reader.dist_num_replicas = 0, 1  # timm's own split would repeat images to get equal lengths
        if _has_shards(self.dataset):
            reader.split_info.filenames = reader.split_info.filenames[utils.rank() :: utils.world_size()]
        else:
            self.first, self.step = utils.rank(), utils.world_size()

    @property
    def num_images(self) -> int:
        """The number of images over all processes, 0 if the dataset does not declare it."""
        return self.dataset.reader.num_samples

    @property
    def shards(self) -> list[str]:
        """The names of the shards (in validation, of this process), [] if the dataset has none."""
        return self.dataset.reader.split_info.filenames if _has_shards(self.dataset) else []

    def prepare_workers(self, wanted: int) -> int:
        """Set and return the number of data-loader workers: at most `wanted`, chosen to divide the shards evenly.

        Every process must call this. Raises UserError if there are fewer training shards than processes.
        """
        workers = wanted = min(utils.all_gather_objects(wanted))  # machines may have different numbers of cores
        if self.train and _has_shards(self.dataset):
            workers = _fitting_workers(len(self.dataset.reader.split_info.filenames), wanted)
        self.dataset.set_loader_cfg(workers)
        return workers

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which depends on the epoch only."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)
        self.dataset.reader.ds = None  # makes the reader restart its shuffling
        self.dataset.reader.worker_seed = self.seed + epoch  # replaced by the worker's seed in data-loader workers

    def first_images(self, count: int) -> list[tuple]:
        """Read up to `count` samples in this process."""
        samples = list(islice(self, count))
        self.dataset.reader.ds = None  # so that data-loader workers started later open the shards themselves
        return samples

    def __len__(self) -> int:
        """Return the number of images in this process, which is approximate in validation."""
        return len(self.dataset) if self.train else math.ceil(self.num_images / utils.world_size())

    def __iter__(self) -> Iterator:
        if _has_shards(self.dataset) and not self.dataset.reader.split_info.filenames:
            return  # there are fewer shards than processes
        worker = get_worker_info()
        key = (self.seed, utils.rank(), self.epoch, 0 if worker is None else worker.id)
        for number, (image, target) in enumerate(islice(self.dataset, self.first, None, self.step)):
            if self.train:
                utils.seed_everything(*key, number, utils.SEEDS_OF_IMAGES)
            yield self.transform(image), target


def _fitting_workers(shards: int, wanted: int) -> int:
    """Return the largest number of workers, up to `wanted`, that divides the shards evenly.

    If no number does, each worker gets at least one shard. Raises UserError if there are fewer shards than processes.
    """
    per_process = shards // utils.world_size()
    if per_process == 0:
        raise UserError(
            f"{shards} training shards are too few for {utils.world_size()} processes. Use at most {shards} processes."
        )
    even = [n for n in range(1, wanted + 1) if shards % (n * utils.world_size()) == 0]
    workers = max(even) if even else min(wanted, per_process)
    if workers < wanted:
        utils.log(f"using {workers} data-loader workers instead of {wanted}, to fit {shards} training shards")
    readers = max(workers, 1) * utils.world_size()
    if shards % readers:
        utils.warn(
            f"{shards} training shards do not divide evenly across {readers} data-loader workers. "
            f"Each epoch repeats or misses some images. Use a multiple of {readers} shards to avoid this."
        )
    return workers


def read_by_timm(
    name: str,
    root: str,
    train: bool,
    transform,
    split: str,
    num_classes: int | None,
    batch_size: int,
    seed: int,
) -> Dataset:
    """Build a dataset by its name in `timm.data.create_dataset`, or raise UserError if it cannot be read."""
    try:
        with main_process_first():
            dataset = _create(name, root, transform, split=split, is_training=train, batch_size=batch_size, seed=seed)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--data-set {name} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # the readers raise errors of any type
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--data-set {name}, --data-path {root}, split {split}: {reason}") from error
    if _has_shards(dataset):
        _check_shards(dataset.reader.split_info.filenames, Path(root))
    check_labels(dataset, f"--data-path {root}: the images", "the labels")
    classes = _declared_classes(dataset, name, num_classes)
    if isinstance(dataset, IterableDataset):
        return Stream(dataset, classes, train, transform, seed)
    dataset.classes = classes
    return dataset


def _create(name: str, root: str, transform, split: str, **options) -> Dataset:
    """Build a dataset by its name in timm; those of class folders and shards read their images as `image_folder`.

    transform: ignored for streams
    """
    prefix, _, rest = name.lower().partition("/")
    if prefix == "torch" and rest in ("image_folder", "folder"):
        return ClassFolders(split_folder(Path(root), split), transform)
    if prefix == "torch" and rest == "imagenet":
        return ImageNetFolders(root, split, transform)
    if prefix == "wds":
        from readers.shards import Shards  # imports webdataset

        return IterableImageDataset(root, Shards(root, rest, split, input_img_mode="", **options))
    if prefix == "torch":
        options["transform"] = transform
    return create_dataset(name, root, split=split, download=True, **options)


def _has_shards(dataset: Dataset) -> bool:
    """Return whether the dataset is a WebDataset."""
    return type(getattr(dataset, "reader", None)).__name__ == "Shards"


def _check_shards(files: list[str], root: Path) -> None:
    """Raise UserError if a local shard is missing, which webdataset would skip silently."""
    missing = [file for file in files if not (root / file).is_file()] if root.is_dir() else []
    if missing:
        raise UserError(f"{root}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}")


def _declared_classes(dataset: Dataset, name: str, num_classes: int | None) -> list[str]:
    """Return the class names of the dataset, or placeholders.

    Raises UserError if the number of classes is unknown or contradicts --num-classes.
    """
    index_of = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    declared = [str(own) for own in getattr(dataset, "classes", None) or sorted(index_of, key=index_of.get)]
    by_normal_name(declared, f"--data-set {name}")
    names = [normal_name(own) for own in declared]
    if not names and num_classes is None:
        raise UserError(f"--data-set {name} does not declare its number of classes; pass --num-classes")
    if names and num_classes not in (None, len(names)):
        raise UserError(f"--num-classes {num_classes}: {name} has {len(names)} classes")
    return names or placeholder_names(num_classes)
