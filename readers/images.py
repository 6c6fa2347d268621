"""Decoding of image files."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import RankError

MAX_ASPECT_RATIO = 20  # longer images are cropped to this ratio, around their center
WHITE_LEVELS = (1, 255, 2**16 - 1, 2**32 - 1)  # white in floating point and with 8, 16 and 32 bits


class UnreadableImage(RankError):
    """A file that is not an image, is broken, or has too many pixels."""


def load_image(path: str | Path) -> Image.Image:
    """Load an image file as RGB, rotated upright, or raise an UnreadableImage that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be read as an image: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its metadata require, unless they are broken."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's metadata readers raise errors of any type
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode and bit depth to RGB, and crop extreme aspect ratios.

    An animation gives its first frame.
    """
    if image.mode[:1] in "IF":
        image = _to_8_bit(image)  # Pillow would clip larger values
    image = image.convert("RGB")
    shortest = min(image.size)
    width, height = (min(side, MAX_ASPECT_RATIO * shortest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale an image of 16 or 32 bit or floating point to 8 bit.

    White is the lowest allowed level that no pixel exceeds.
    """
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    levels = WHITE_LEVELS
    if "16" in image.mode:
        levels = WHITE_LEVELS[2:]
    elif image.mode.startswith("I"):
        levels = WHITE_LEVELS[1:]
    white = next((level for level in levels if pixels.max() <= level), WHITE_LEVELS[-1])
    return Image.fromarray((pixels * (255.999 / white)).clip(0, 255).astype(np.uint8))
