"""Datasets that place small images on larger canvases: DIGITS, CLUTTERED and CLUTTERED_VARIED."""

from __future__ import annotations

import math
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
        image, _ = self.compose(index)
        return self.transform(Image.fromarray(image)), int(self.targets[index])

    def compose(self, index: int) -> tuple[np.ndarray, dict[str, int]]:
        """Return an image, [56, 56] uint8, and its content by name: the article's side in pixels, number of crops."""
        random = np.random if self.train else np.random.RandomState(index)
        return self._compose(self.pixels[index], random)

    def _compose(self, article: np.ndarray, random) -> tuple[np.ndarray, dict[str, int]]:
        canvas = np.zeros((self.CANVAS, self.CANVAS), np.uint8)
        for _ in range(self.CROPS):
            self._paste(canvas, self._crop(self.CROP_SIZE, random), random)
        self._paste(canvas, article, random)
        return canvas, {"side": len(article), "crops": self.CROPS}

    def _crop(self, size: int, random) -> np.ndarray:
        """Return a random crop of a random article, [size, size] uint8."""
        source = self.pixels[random.randint(len(self))]
        top, left = random.randint(source.shape[0] - size + 1, size=2)
        return source[top : top + size, left : left + size]

    def _paste(self, canvas: np.ndarray, piece: np.ndarray, random) -> tuple[int, int]:
        """Paste a piece at a random place that lies fully on the canvas.

        canvas, piece: [H, W] uint8. Returns the place: top, left.
        """
        side = len(piece)
        top, left = random.randint(self.CANVAS - side + 1, size=2)
        _keep_brighter(canvas, piece, top, left)
        return top, left


class VariedClutteredFashionMNIST(ClutteredFashionMNIST):
    """`ClutteredFashionMNIST` with content that varies between images.

    The number of crops is from 0 to 16. The article is scaled by a factor from 0.5 to 1.75, uniform in its logarithm,
    so that its side is from 14 to 49 pixels. In three images of ten, two crops of 16 x 16 overlap the article's square.
    """

    MAX_CROPS, MIN_SCALE, MAX_SCALE = 16, 0.5, 1.75
    OVERLAID_SHARE, OVERLAYS, OVERLAY_SIZE, MIN_OVERLAP = 0.3, 2, 16, 8

    def _compose(self, article: np.ndarray, random) -> tuple[np.ndarray, dict[str, int]]:
        canvas = np.zeros((self.CANVAS, self.CANVAS), np.uint8)
        crops = random.randint(self.MAX_CROPS + 1)
        for _ in range(crops):
            self._paste(canvas, self._crop(self.CROP_SIZE, random), random)
        side = round(len(article) * math.exp(random.uniform(math.log(self.MIN_SCALE), math.log(self.MAX_SCALE))))
        scaled = np.asarray(Image.fromarray(article).resize((side, side), Image.Resampling.BILINEAR))
        top, left = self._paste(canvas, scaled, random)
        overlays = self.OVERLAYS if random.uniform() < self.OVERLAID_SHARE else 0
        for _ in range(overlays):
            self._overlay(canvas, top, left, side, random)
        return canvas, {"side": side, "crops": crops, "overlays": overlays}

    def _overlay(self, canvas: np.ndarray, top: int, left: int, side: int, random) -> None:
        """Paste a crop so that it overlaps the article's square by `MIN_OVERLAP` pixels or more, as far as it fits."""
        size, overlap = self.OVERLAY_SIZE, self.MIN_OVERLAP
        offsets = random.randint(overlap - size, side - overlap + 1, size=2)
        y, x = np.clip(np.array([top, left]) + offsets, 0, self.CANVAS - size)
        _keep_brighter(canvas, self._crop(size, random), y, x)


def _keep_brighter(canvas: np.ndarray, piece: np.ndarray, top: int, left: int) -> None:
    """Paste a piece into the canvas, both [H, W] uint8. Where they overlap, the brighter pixel is kept."""
    target = canvas[top : top + len(piece), left : left + len(piece)]
    np.maximum(target, piece, out=target)
