"""Decoding of image files."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from readers.metadata import copies_without_metadata, png_chunks
from utils import RankError, warn

MAX_ASPECT_RATIO = 20  # longer images are cropped to this ratio, around their center
WHITE_LEVELS = (1, 255, 2**16 - 1, 2**32 - 1)  # white in floating point and with 8, 16 and 32 bits


class UnreadableImage(RankError):
    """A file that is not an image, is broken, or has too many pixels."""


def load_image(file: str | Path | BytesIO, name: str | None = None) -> Image.Image:
    """Load an image file as RGB, rotated upright, or raise an UnreadableImage that names the file.

    Transparency is dropped: each pixel keeps its color. Metadata that Pillow refuses are ignored.
    name: the name for messages, by default the path
    """
    name = name or str(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(file, BytesIO) and not stat.S_ISREG(os.stat(file).st_mode):
                raise OSError("it is not a regular file")  # a pipe could block
            return _decode_despite_metadata(file, name)
    except Exception as error:  # Pillow's decoders raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{name}: cannot be read as an image: {reason}") from error


def _decode_despite_metadata(file: str | Path | BytesIO, name: str) -> Image.Image:
    try:
        return _decode(file, name)
    except Exception:
        for copy in copies_without_metadata(_content(file)):
            with contextlib.suppress(Exception):
                return _decode(BytesIO(copy), name)
        raise


def _content(file: str | Path | BytesIO) -> bytes:
    return file.getvalue() if isinstance(file, BytesIO) else Path(file).read_bytes()


def _decode(file: str | Path | BytesIO, name: str) -> Image.Image:
    with Image.open(file) as image:
        is_reduced = any("RGB" in image.mode and ";16" in str(tile.args) for tile in image.tile)
        image.load()
        white = None
        with contextlib.suppress(Exception):  # metadata may hold anything
            white = _declared_white(image, file)
        with contextlib.suppress(Exception):  # Pillow's metadata readers raise errors of any type
            ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image, white, name)
    if is_reduced:  # Pillow kept the upper 8 of 16 bits
        _warn_if_dark(name, max(high for _, high in image.getextrema()) * 256 + 255, WHITE_LEVELS[2])
    return image


def to_rgb(image: Image.Image, white: int | None = None, name: str = "an image") -> Image.Image:
    """Convert an image of any mode and bit depth to RGB, and crop extreme aspect ratios.

    An animation gives its first frame.
    white: the level of white if the file declares it, for more than 8 bits; name: for a warning
    """
    if image.mode[:1] in "IF":
        image = _to_8_bit(image, white, name)  # Pillow would clip larger values
    image = image.convert("RGB")
    shortest = min(image.size)
    width, height = (min(side, MAX_ASPECT_RATIO * shortest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# More than 8 bits --------------------------------------------------------------------------------


def _to_8_bit(image: Image.Image, white: int | None, name: str) -> Image.Image:
    """Scale an image of 16 or 32 bit or floating point to 8 bit.

    White is the declared level, unless a pixel exceeds it, else the lowest allowed level that no pixel exceeds.
    """
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    brightest = pixels.max()
    if white is None or brightest > white:
        levels = WHITE_LEVELS
        if "16" in image.mode:
            levels = WHITE_LEVELS[2:]
        elif image.mode.startswith("I"):
            levels = WHITE_LEVELS[1:]
        white = next((level for level in levels if brightest <= level), WHITE_LEVELS[-1])
        _warn_if_dark(name, int(brightest), white)
    return Image.fromarray((pixels * (255.999 / white)).clip(0, 255).astype(np.uint8))


BITS_PER_SAMPLE, MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 258, 281, 341  # tags of TIFF


def _declared_white(image: Image.Image, file: str | Path | BytesIO) -> int | None:
    """Return the level of white that a PNG or TIFF file declares for more than 8 bits, None if it declares none."""
    levels = []
    if image.format == "PNG" and image.mode.startswith("I"):
        bits = next((chunk[8] for kind, chunk in png_chunks(_content(file)) if kind == b"sBIT"), 16)
        low_bits = np.asarray(image) & (2 ** (16 - bits) - 1)
        levels = [2**bits - 1] if low_bits.any() else []  # otherwise the values are scaled to 16 bits, as PNG requires
    elif image.format == "TIFF" and image.mode[:1] in "IF":
        declared = [image.tag_v2.get(tag, ()) for tag in (S_MAX_SAMPLE_VALUE, MAX_SAMPLE_VALUE)]
        levels = [int(value) for values in declared for value in np.atleast_1d(values)]
        levels += [2**bits - 1 for bits in image.tag_v2.get(BITS_PER_SAMPLE, ()) if bits < 16]
    return next((level for level in levels if level >= 255 and (level + 1) & level == 0), None)


_has_warned = multiprocessing.RawValue("b")  # shared with data-loader workers, which are forked


def _warn_if_dark(name: str, brightest: int, white: int) -> None:
    """Print one warning per run if the values of an image use so few bits that it is read as a dark image."""
    used, bits = brightest.bit_length(), white.bit_length()
    if bits <= 8 or not 0 < used <= bits - 2 or _has_warned.value:
        return
    _has_warned.value = True
    warn(
        f"{name}: the pixel values use {used} of {bits} bits, so it is read as a dark image. If it is not dark, scale "
        f"the values to {bits} bits, or declare their range (PNG: sBIT, TIFF: SMaxSampleValue). "
        "Further files of this kind are not named",
        everywhere=True,
    )
