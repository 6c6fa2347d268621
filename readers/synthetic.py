"""Datasets that place small images on larger canvases: DIGITS and CLUTTERED."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from readers.downloads import fashion_mnist


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 28 x 28 on a black canvas of 32 x 32, as RGB.

    The split is fixed and stratified, with 80% for training. The place of a digit is random in training and depends
    on its index in validation.
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


class ClutteredFashionMNIST(Dataset):
    """A Fashion-MNIST article of 28 x 28 at a random place on a black canvas of 56 x 56, with clutter, in grayscale.

    The construction follows cluttered translated MNIST (Mnih et al., Recurrent Models of Visual Attention, NeurIPS
    2014): most of an image is useless, and the useful part differs between images. The clutter is 8 random crops of
    8 x 8 from random articles. Where pieces overlap, the brighter pixel is kept. In training each access composes a
    new image from NumPy's global random state. In validation the image depends on its index only.
    """

    CANVAS, CROPS, CROP_SIZE = 56, 8, 8

    def __init__(self, folder: Path, train: bool, transform):
        articles = fashion_mnist(folder, train, None)
        self.pixels, self.targets, self.classes = articles.data.numpy(), articles.targets, articles.classes
        self.train, self.transform = train, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        random = np.random if self.train else np.random.RandomState(index)
        canvas = np.zeros((self.CANVAS, self.CANVAS), np.uint8)
        for _ in range(self.CROPS):
            source = self.pixels[random.randint(len(self))]
            top, left = random.randint(source.shape[0] - self.CROP_SIZE + 1, size=2)
            self._paste(canvas, source[top : top + self.CROP_SIZE, left : left + self.CROP_SIZE], random)
        self._paste(canvas, self.pixels[index], random)
        return self.transform(Image.fromarray(canvas)), int(self.targets[index])

    def _paste(self, canvas: np.ndarray, piece: np.ndarray, random) -> None:
        """Paste a piece at a random place that lies fully on the canvas.

        canvas, piece: [H, W] uint8
        """
        side = len(piece)
        top, left = random.randint(self.CANVAS - side + 1, size=2)
        target = canvas[top : top + side, left : left + side]
        np.maximum(target, piece, out=target)
