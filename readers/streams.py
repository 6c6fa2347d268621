"""What timm reads: `wds/`, `tfds/` and `torch/`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import utils
from readers.folders import load_image
from utils import UserError, main_process_first

READERS = {"torch": "torchvision", "wds": "webdataset", "tfds": "tensorflow_datasets"}  # and the package of each


def check_reader(name: str) -> None:
    """UserError where a name like `wds/...` has no reader, or its package is missing."""
    prefix = name.partition("/")[0].lower()
    if prefix in ("hfds", "hfids"):
        raise UserError(f"{name}: not available: the package it needs, datasets, has the name of our datasets.py")
    if prefix not in READERS:
        raise UserError(f"{name}: no reader of that name; known are {', '.join(f'{known}/' for known in READERS)}")
    if importlib.util.find_spec(READERS[prefix]) is None:
        raise UserError(f"{name} needs the package {READERS[prefix]}: pip install {READERS[prefix]}")


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
                utils.seed_everything(*place, number, utils.SEEDS_OF_IMAGES)
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
    return names or placeholder_names(num_classes)


def placeholder_names(num_classes: int) -> list[str]:
    """Names of classes that have none."""
    return [f"class {number}" for number in range(num_classes)]
