"""Image files from anywhere: what a network does with each, as a panel and an animation."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import utils
from datasets import IMAGE_SUFFIXES, UnreadableImage, evaluation_transform, has_image_name, load_image
from utils import UserError, log, warn
from visualization import heatmaps
from visualization.files import write_gallery, write_png
from visualization.heatmaps import Style
from visualization.records import ImageRecord, record_batch

MAX_STEM_BYTES = 200  # of 255 that a file's name may have


def draw_images(
    model: nn.Module,
    files: Sequence[Path],
    classes: Sequence[str],
    names: Sequence[str],
    device: torch.device,
    amp: str,
    folder: Path,
    style: Style,
    *,
    batch_size: int,
    animation: str,
    html: bool,
) -> int:
    """A panel and an animation for each image, see `drawn_files`; returns how many could be read.

    classes: the model's, which a folder may be named after; names: to show. UserError where a file would be
    overwritten, or no image can be read.
    """
    outputs = [drawn_files(folder / stem, animation) for stem in distinct_stems(files)]
    overwritten = {path.resolve() for paths in outputs for path in paths} & {file.resolve() for file in files}
    if overwritten:
        raise UserError(f"{min(overwritten)} would be overwritten: choose another --output-dir")
    drawn, shown = 0, []
    for first in utils.with_progress(range(0, len(files), batch_size), "Images", dict):
        batch = range(first, min(first + batch_size, len(files)))
        records = _record_files(files, batch, model, classes, device, amp)
        for record in records:
            panel, *movie = outputs[record.index]
            write_png(panel, heatmaps.panel(record, names, style))
            for path in movie:
                utils.write_bytes(path, heatmaps.animation(heatmaps.frames(record, style), animation))
        drawn += len(records)
        shown += records if html else []
    if not drawn:
        raise UserError("not one image could be read")
    if html:
        write_gallery(folder, "Token depths", shown, names, style)
    log(f"{drawn} images drawn in {folder}")
    return drawn


def drawn_files(stem: Path, animation: str) -> list[Path]:
    """Where the panel goes, and the animation if there is to be one: "gif", "webp" or "none"."""
    ends = ["panel.png"] + ([f"halting.{animation}"] if animation != "none" else [])
    return [stem.with_name(f"{stem.name}_{end}") for end in ends]


def find_images(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Image files named, in folders (at any depth), or matched by globs, each once; and what was not found."""
    files, problems = [], []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            problems.append(f"{pattern}: no such file or folder, and no file matches it")
        for path in map(Path, found):
            inside = [path]
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if has_image_name(p) and p.is_file())
            if not inside:
                problems.append(f"{path}: no image in this folder; looked for {' '.join(IMAGE_SUFFIXES)}")
            files += inside
    return list(dict.fromkeys(files)), problems


def distinct_stems(files: Iterable[Path]) -> Iterator[str]:
    """The names of files without their endings, cut where they are long, numbered where they would be the same."""
    taken: set[str] = set()
    for file in files:
        own = os.fsdecode(os.fsencode(file.stem)[:MAX_STEM_BYTES])
        numbered = (f"{own}_{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([own], numbered) if stem not in taken)
        taken.add(stem)
        yield stem


def _record_files(
    files: Sequence[Path],
    places: Sequence[int],
    model: nn.Module,
    classes: Sequence[str],
    device: torch.device,
    amp: str,
) -> list[ImageRecord]:
    """The files at these places that can be read; the others are named. A folder with a class's name is a label."""
    transform, images = evaluation_transform(model.patch_embed.img_size), {}
    for place in places:
        try:
            images[place] = transform(load_image(files[place]))
        except UnreadableImage as error:
            warn(f"{error}; it is passed over")
    if not images:
        return []
    numbers = {name: number for number, name in enumerate(classes)}
    targets = torch.tensor([numbers.get(files[place].parent.name, -1) for place in images])
    batch = (torch.stack(list(images.values())), targets, list(images), [str(files[place]) for place in images])
    return record_batch(model, batch, device, amp).records
