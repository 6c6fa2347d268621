"""Datasets that torchvision downloads: CIFAR-10, CIFAR-100 and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST

from utils import UserError, main_process_first


def downloaded(kind: type, folder: Path, train: bool, transform) -> Dataset:
    """Build a torchvision dataset, and download it into the folder if necessary.

    Raises UserError if the download fails, or the files are broken or do not belong together.
    """
    try:
        with main_process_first():
            dataset = kind(str(folder), train=train, transform=transform, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data-path {folder}: {kind.__name__} is missing and cannot be downloaded: {error}"
        ) from error
    except Exception as error:  # torchvision's readers raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--data-path {folder}: the files of {kind.__name__} are broken: {reason}. Delete them for a new download"
        ) from error
    check_labels(dataset, f"--data-path {folder}: the images of {kind.__name__}", "its labels")
    return dataset


def check_labels(dataset: Dataset, images: str, labels: str) -> None:
    """Raise UserError if the labels of a dataset do not fit its images or its classes.

    images, labels: names of both for the message. Datasets without `data`, `targets` or `classes` are not checked.
    """
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if data is None or targets is None:
        return
    if len(data) != len(targets):
        raise UserError(
            f"{images} ({len(data)}) and {labels} ({len(targets)}) differ in number. "
            "They may belong to different parts or versions. Replace the wrong file"
        )
    classes = len(getattr(dataset, "classes", ()))
    found = torch.as_tensor(targets)
    if classes and found.ndim == 1 and len(found) and not 0 <= found.min() <= found.max() < classes:
        raise UserError(f"{labels} are from {found.min()} to {found.max()}, but there are {classes} classes")


class FashionMNISTFiles(FashionMNIST):
    """torchvision's FashionMNIST, read from a folder that directly contains the *-ubyte.gz files."""

    def _check_exists(self) -> bool:
        return True

    def _load_data(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _read_idx(self.images_file, ndim=3), _read_idx(self.labels_file, ndim=1)

    @property
    def images_file(self) -> str:
        return f"{self._part}-images-idx3-ubyte.gz"

    @property
    def labels_file(self) -> str:
        return f"{self._part}-labels-idx1-ubyte.gz"

    @property
    def _part(self) -> Path:
        return Path(self.root) / ("train" if self.train else "t10k")


def _read_idx(path: str, ndim: int) -> torch.Tensor:
    """Read an IDX file of bytes (yann.lecun.com/exdb/mnist): big-endian magic number, sizes, values."""
    try:
        data = gzip.decompress(Path(path).read_bytes())
        magic, *shape = np.frombuffer(data, ">u4", count=1 + ndim).tolist()
        if magic != 0x800 + ndim:
            raise ValueError(f"the magic number is {magic}, not {0x800 + ndim}")
        values = np.frombuffer(bytearray(data), np.uint8, offset=4 * (1 + ndim))
        if len(values) != math.prod(shape):
            raise ValueError(f"it declares {' x '.join(map(str, shape))} values and holds {len(values)}")
        return torch.from_numpy(values.reshape(shape))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a Fashion-MNIST file: {error}") from error


def fashion_mnist(folder: Path, train: bool, transform) -> FashionMNIST:
    """Build Fashion-MNIST from its four files in the folder, or from a download.

    Raises UserError if the files are broken or do not belong together.
    """
    if not (folder / "t10k-images-idx3-ubyte.gz").exists():
        return downloaded(FashionMNIST, folder, train, transform)
    articles = FashionMNISTFiles(str(folder), train, transform)
    check_labels(articles, f"the images of {articles.images_file}", f"the labels of {articles.labels_file}")
    return articles
