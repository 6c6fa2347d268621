"""Datasets that torchvision downloads: CIFAR-10, CIFAR-100 and Fashion-MNIST."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST

from utils import UserError, main_process_first


def downloaded(kind: type, folder: Path, train: bool, transform) -> Dataset:
    """Build a torchvision dataset, and download it into the folder if necessary.

    Raises UserError if the download fails.
    """
    try:
        with main_process_first():
            return kind(str(folder), train=train, transform=transform, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data-path {folder}: {kind.__name__} is missing and cannot be downloaded: {error}"
        ) from error


class FashionMNISTFiles(FashionMNIST):
    """torchvision's FashionMNIST, read from a folder that directly contains the *-ubyte.gz files."""

    def _check_exists(self) -> bool:
        return True

    def _load_data(self) -> tuple[torch.Tensor, torch.Tensor]:
        part = Path(self.root) / ("train" if self.train else "t10k")
        return _read_idx(f"{part}-images-idx3-ubyte.gz", ndim=3), _read_idx(f"{part}-labels-idx1-ubyte.gz", ndim=1)


def _read_idx(path: str, ndim: int) -> torch.Tensor:
    """Read an IDX file of bytes (yann.lecun.com/exdb/mnist): big-endian magic number, sizes, values."""
    try:
        data = gzip.decompress(Path(path).read_bytes())
        magic, *shape = np.frombuffer(data, ">i4", count=1 + ndim).tolist()
        if magic != 0x800 + ndim:
            raise ValueError("wrong magic number")
        return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8, offset=4 * (1 + ndim)).reshape(shape))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a Fashion-MNIST file: {error}") from error


def fashion_mnist(folder: Path, train: bool, transform) -> FashionMNIST:
    """Build Fashion-MNIST from its four files in the folder, or from a download."""
    if (folder / "t10k-images-idx3-ubyte.gz").exists():
        return FashionMNISTFiles(str(folder), train, transform)
    return downloaded(FashionMNIST, folder, train, transform)
