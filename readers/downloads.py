"""Data sets that torchvision downloads: CIFAR-10, CIFAR-100 and Fashion-MNIST."""

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
    try:
        with main_process_first():
            return kind(str(folder), train=train, transform=transform, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data-path {folder}: holds no {kind.__name__}, and it cannot be downloaded: {error}"
        ) from error


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


def fashion_mnist(folder: Path, train: bool, transform) -> FashionMNIST:
    if (folder / "t10k-images-idx3-ubyte.gz").exists():
        return FashionMNISTFiles(str(folder), train, transform)
    return downloaded(FashionMNIST, folder, train, transform)
