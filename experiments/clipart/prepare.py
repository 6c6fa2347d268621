"""Prepare Open Clip Art as two image folders for `--data-set IMNET`.

Usage: python -m experiments.clipart.prepare SOURCE OUT

SOURCE is the folder of category folders in Debian's package openclipart-png, /usr/share/openclipart/png. OUT/search has
the folders `train` and `val`, whose held-out pictures are for choosing settings. OUT/final has the same `train`, as a
link, and the test pictures as `val`; they are used once. Classes are the top-level categories. Every picture becomes a
PNG of 256 x 256 in RGB, whose inner 224 x 224 pixels the longer side fills. All the rest and transparent parts are
white. Evaluation at 224 x 224 keeps these inner pixels, so that it cuts nothing off.

Left out are:

- pictures that are unreadable, blank, or larger than 89 million pixels
- pictures that links file under a second category, since they have two right answers
- the folder `unsorted`, and categories with fewer than 50 pictures

Near-copies form a group: the pictures of a series, pictures whose names differ in numbers and colors only, and pictures
that look alike except for color. At most 20 pictures of a group and 900 of a category are kept. A group goes to one
part as a whole, one of more than 4 pictures to `train`. Training pictures that still resemble a picture of another part
are left out. Hashes of the names decide, so the result is the same each time.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.stages import table
from training.arguments import Parser
from training.command import one_line_errors
from utils import UserError

SIDE, MARGIN = 256, 16  # pixels
MIN_PICTURES, MAX_PICTURES = 50, 900  # of a category
MAX_GROUP, MAX_HELD_OUT_GROUP = 20, 4  # pictures of a group, in `train` and in the other parts
SHARES = {"val": 1 / 8, "test": 1 / 4}  # of a category; the rest is for training
NO_CATEGORY = "unsorted"
SERIES = [  # folders of near-identical pictures, the largest with 1,378 stars
    "recreation/games/cards",
    "shapes/jigsaw",
    "shapes/stars",
    "signs_and_symbols/flags/semaphore",
    "signs_and_symbols/led",
]
WHITE = 250  # gray levels from here on are background
COLORS = "black|blue|brown|gray|green|grey|orange|pink|purple|red|white|yellow"
GRID, MAX_DIFFERENCE = 16, 24  # two pictures are near-copies if at most 24 of 2 * 16 * 16 bits differ
MIN_DISTANCE = 64  # bits between training and other pictures; as a limit for groups it would chain all flags together


class Picture(NamedTuple):
    """A prepared picture. path: relative to the source, with "/"; png: the file; bits: [512] bool, see `outline`."""

    path: str
    png: bytes
    bits: np.ndarray

    @property
    def category(self) -> str:
        return self.path.partition("/")[0]

    @property
    def file_name(self) -> str:
        """Return the name of the file to write, unique within the category."""
        inner = self.path.partition("/")[2].removesuffix(".png")
        return f"{re.sub('[^A-Za-z0-9.-]+', '_', inner)}-{_digest(self.path)[:8]}.png"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


# Read --------------------------------------------------------------------------------------------


def read(source: Path) -> tuple[list[Picture], Counter[str]]:
    """Prepare all pictures, in the order of their paths, and count those left out by reason.

    Raises UserError if the source has no PNG in a category folder.
    """
    files = sorted(source.glob("*/**/*.png"))
    if not files:
        raise UserError(f"{source}: no category folder with PNG files; expected the folder png of openclipart-png")
    ambiguous = _filed_twice(files, source)
    pictures, left_out = [], Counter()
    for file in files:
        path = file.relative_to(source).as_posix()
        if file.is_symlink() or path.startswith(f"{NO_CATEGORY}/"):
            continue
        if path in ambiguous:
            left_out["in several categories"] += 1
            continue
        try:
            image = load(file)
        except Exception:  # Pillow's decoders raise errors of any type
            left_out["unreadable or too large"] += 1
            continue
        bits = outline(image)
        if bits is None:
            left_out["blank"] += 1
            continue
        pictures.append(Picture(path, encode(image), bits))
    return pictures, left_out


def _filed_twice(files: Iterable[Path], source: Path) -> set[str]:
    """Return the paths of the pictures that links file under a second category."""
    root, paths = source.resolve(), set()
    for link in filter(Path.is_symlink, files):
        path, category = link.resolve(), link.relative_to(source).parts[0]
        if path.is_relative_to(root) and category not in (path.relative_to(root).parts[0], NO_CATEGORY):
            paths.add(path.relative_to(root).as_posix())
    return paths


def load(file: Path) -> Image.Image:
    """Load a picture as `square` returns it. An animation gives its first frame.

    Raises an error of any type if the file cannot be read or has more pixels than Pillow holds safe.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            return square(image.convert("RGBA"))


def square(image: Image.Image) -> Image.Image:
    """Scale an RGBA image to a white square in RGB, which its longer side fills except for the margins."""
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image)
    width, height = (max(1, round(side * (SIDE - 2 * MARGIN) / max(image.size))) for side in image.size)
    scaled = opaque.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(scaled, ((SIDE - width) // 2, (SIDE - height) // 2))
    return canvas


def encode(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


# Group -------------------------------------------------------------------------------------------


def outline(image: Image.Image) -> np.ndarray | None:
    """Return a perceptual hash that recoloring and scaling hardly change, [512] bool; None for a blank picture.

    The content's bounding box is reduced to 17 x 17 gray levels. The bits are 1 where the gray level rises to the right
    and downward (difference hash).
    """
    gray = image.convert("L")
    box = gray.point([255 * (level < WHITE) for level in range(256)]).getbbox()
    if box is None:
        return None
    small = gray.crop(box).resize((GRID + 1, GRID + 1), Image.Resampling.BOX)
    levels = np.asarray(small).astype(int)
    right, down = np.diff(levels, axis=1)[:GRID] > 0, np.diff(levels, axis=0)[:, :GRID] > 0
    return np.concatenate([right.ravel(), down.ravel()])


def stem(path: str) -> str:
    """Return what the names of near-copies share: the series, else the file name without numbers and colors.

    The result may be "".
    """
    series = next((folder for folder in SERIES if path.startswith(f"{folder}/")), None)
    name = re.sub(rf"\d+[a-z]?(?![a-z])|(?<![a-z])({COLORS})(?![a-z])", "", PurePath(path).stem.lower())
    return series or re.sub("[^a-z]+", "_", name).strip("_")


def num_differing(first: list[Picture], second: list[Picture]) -> np.ndarray:
    """Return the number of bits in which the outlines of pictures differ: [M, N] float32."""
    signs = [np.array([picture.bits for picture in pictures], np.float32) * 2 - 1 for pictures in (first, second)]
    signs = [each.reshape(-1, 2 * GRID**2) for each in signs]  # also if there are no pictures
    return (2 * GRID**2 - signs[0] @ signs[1].T) / 2


def group(pictures: list[Picture]) -> list[list[Picture]]:
    """Return the groups of near-copies, each in the order of the pictures.

    Two pictures with the same `stem` or similar outlines are in the same group. Groups may span categories.
    """
    parent = list(range(len(pictures)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first_of_stem, differing = {}, num_differing(pictures, pictures)
    for number, picture in enumerate(pictures):
        similar = np.flatnonzero(differing[number, : number + 1] <= MAX_DIFFERENCE).tolist()
        if name := stem(picture.path):
            similar.append(first_of_stem.setdefault(name, number))
        for other in similar:
            parent[root(other)] = root(number)
    groups = defaultdict(list)
    for number, picture in enumerate(pictures):
        groups[root(number)].append(picture)
    return list(groups.values())


# Choose and write --------------------------------------------------------------------------------


def choose(groups: list[list[Picture]]) -> dict[str, list[Picture]]:
    """Return the pictures of `train`, `val` and `test`.

    Pictures beyond the size of a group or category are left out, and training pictures that resemble another part.

    Raises UserError if no category has enough pictures, or if one has none in a part.
    """
    by_hash = [picture for members in groups for picture in sorted(members, key=_rank)[:MAX_GROUP]]
    by_category = defaultdict(list)
    for picture in sorted(by_hash, key=_rank):
        by_category[picture.category].append(picture)
    classes = {name: own[:MAX_PICTURES] for name, own in by_category.items() if len(own) >= MIN_PICTURES}
    if not classes:
        raise UserError(f"no category has {MIN_PICTURES} pictures that are not near-copies")
    kept = {picture.path for own in classes.values() for picture in own}
    parts = _split([[picture for picture in members if picture.path in kept] for members in groups])
    nearest = num_differing(parts["train"], parts["val"] + parts["test"]).min(axis=1, initial=np.inf)
    parts["train"] = [picture for picture, distance in zip(parts["train"], nearest) if distance >= MIN_DISTANCE]
    for part, pictures in parts.items():
        if lacking := classes.keys() - {picture.category for picture in pictures}:
            raise UserError(f"no picture of {', '.join(sorted(lacking))} for {part}: too many are near-copies")
    return parts


def _rank(picture: Picture) -> str:
    return _digest(picture.path)


def _split(groups: list[list[Picture]]) -> dict[str, list[Picture]]:
    """Return the pictures of `train`, `val` and `test`.

    In the order of their hashes, small groups fill `val` and `test` up to their share of each category. Large groups
    are in `train`, because alike pictures would add little to a measurement.
    """
    parts = {"train": [], "val": [], "test": []}
    sizes = Counter(picture.category for members in groups for picture in members)
    filled = Counter()
    for members in sorted(filter(None, groups), key=lambda members: _rank(members[0])):
        own = Counter(picture.category for picture in members)
        fitting = (
            part
            for part, share in SHARES.items()
            if len(members) <= MAX_HELD_OUT_GROUP
            and all(filled[part, name] + count <= share * sizes[name] for name, count in own.items())
        )
        part = next(fitting, "train")
        parts[part] += members
        filled.update({(part, name): count for name, count in own.items()})
    return parts


def write(parts: dict[str, list[Picture]], out: Path) -> None:
    """Write the folders. OUT is renamed when it is complete."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part, folder in {"train": "search/train", "val": "search/val", "test": "final/val"}.items():
        for picture in parts[part]:
            file = partial / folder / picture.category / picture.file_name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture.png)
    (partial / "final" / "train").symlink_to("../search/train")
    partial.rename(out)


def report(parts: dict[str, list[Picture]], left_out: Counter[str]) -> str:
    """Return a table of the numbers of pictures, and two lines: size of the files, and numbers of those left out."""
    counts = {part: Counter(picture.category for picture in pictures) for part, pictures in parts.items()}
    rows = [[name, *(str(counts[part][name]) for part in parts)] for name in sorted(counts["train"])]
    rows.append(["all", *(str(len(pictures)) for pictures in parts.values())])
    size = sum(len(picture.png) for pictures in parts.values() for picture in pictures)
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items())) or "none"
    return f"{table(['category', *parts], rows)}\n\nsize: {size / 2**20:.1f} MiB\nleft out: {reasons}"


def prepare(source: Path, out: Path) -> None:
    """Prepare the pictures and print the table. Raises UserError for a wrong source or an existing OUT."""
    if out.exists():
        raise UserError(f"{out} exists; remove it to prepare the pictures again")
    pictures, left_out = read(source)
    groups = group(pictures)
    parts = choose(groups)
    left_out["near-copies, in small categories or beyond a category's size"] = len(pictures) - sum(
        map(len, parts.values())
    )
    write(parts, out)
    print(report(parts, left_out))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="prepare.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of category folders with PNG files")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    args = parser.parse_args(argv)
    with one_line_errors(parser, args):
        prepare(args.source, args.out)


if __name__ == "__main__":
    main()
