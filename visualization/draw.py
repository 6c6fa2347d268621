"""Drawing of datasets (visualize.py --summary) and of image files (visualize.py IMAGE...)."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import utils
from datasets import (
    Preprocessing,
    UnreadableImage,
    evaluation_transform,
    find_image_files,
    load_image,
    positions,
    warn_skipped_files,
)
from losses import DistributionPriorLoss
from utils import UserError, log, warn
from visualization import heatmaps, html_pages
from visualization.heatmaps import Style, macs_text, write_image
from visualization.image_record import ImageRecord
from visualization.records import DatasetStatistics, Selection, gather_to_main, record_batch

MAX_STEM_BYTES = 200  # a file name may have 255 bytes, endings included


@dataclass(frozen=True)
class RenderJob:
    """A drawing task: the model, which images to draw, in what style, and the output folder.

    model: an adaptive model; amp: see `utils.autocast`; folder: for the output; names: class names
    criterion, per_class: which images of each class are shown, see `Selection`; html: whether to write a gallery
    """

    model: nn.Module
    amp: str
    folder: Path
    names: Sequence[str]
    style: Style
    criterion: str = "std"
    per_class: int = 1
    html: bool = False

    def write_gallery(self, records: list[ImageRecord], title: str = "Token depths") -> None:
        """Write the gallery if `html` is set."""
        if self.html:
            html_pages.write_gallery(self.folder, title, records, self.names, self.style)


# A dataset ----------------------------------------------------------------------------------------


def draw_summary(job: RenderJob, loader: Iterable, title: str, facts: list[tuple[str, str]]) -> int:
    """Draw charts of a dataset as PNG files and on summary.html. Collective: every process must call it.

    loader: a `demo_loader`; facts: names and values shown on the page in addition to the measured ones
    Returns the number of images. Raises UserError if no image can be read.
    """
    from visualization import charts  # slow to import

    examples, gallery, batches = Selection(), Selection(job.criterion, job.per_class), []
    for loaded in utils.with_progress(loader, "Summary", dict):
        batch = record_batch(job.model, loaded, job.amp)
        batches.append(batch.without_pixels())
        examples.add(batch.records)
        gallery.add(batch.records if job.html else [])
    batches = [batch for own in utils.all_gather_objects(batches) for batch in own]
    if not batches:
        raise UserError("no image could be read")
    statistics = DatasetStatistics.from_batches(batches, job.model.cls_token is not None)
    example_of = {record.target: record for _, record in gather_to_main(examples.local_selection())}
    shown = [record for _, record in gather_to_main(gallery.local_selection())]
    if utils.is_main():
        prior = DistributionPriorLoss(statistics.num_blocks).target.numpy()
        drawn = charts.summary_charts(statistics, prior, job.names, example_of, job.style)
        written = [
            (chart.title, chart.explanation, write_image(job.folder / f"{name}.png", chart.figure))
            for name, chart in drawn.items()
        ]
        job.write_gallery(shown, f"{title}: token depths")
        facts = [*facts, *_facts(statistics)]
        path = html_pages.write_summary(job.folder, f"{title}: summary", facts, written, job.html)
        log(f"wrote the summary of {len(statistics.target)} images to {path}")
    utils.all_gather_objects(None)  # wait: a process that exits with status 1 first would end the others
    return len(statistics.target)


def _facts(statistics: DatasetStatistics) -> list[tuple[str, str]]:
    macs, static_macs, class_token = statistics.macs.mean(), statistics.static_macs, statistics.class_token_depth
    return [
        ("images", f"{len(statistics.target):,}"),
        ("top-1 accuracy", f"{statistics.is_correct.mean():.2%}"),
        ("patch depth", f"{statistics.depth.mean():.2f} of {statistics.num_blocks}"),
        *([] if class_token is None else [("class token depth", f"{class_token.mean():.2f}")]),
        ("MACs per image", f"{macs_text(macs)} of {macs_text(static_macs)}"),
        ("MACs saved", f"{1 - macs / static_macs:.1%}"),
    ]


# Image files --------------------------------------------------------------------------------------


def find_images(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Find the image files of paths, directories (at any depth) and globs, each once.

    Returns the files and one message for each pattern without an image.
    """
    files, problems = [], []
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            problems.append(f"{pattern}: no such file or directory, and no file matches this pattern")
        for path in map(Path, paths):
            inside = [path]
            if path.is_dir():
                inside, skipped = find_image_files(path)
                warn_skipped_files(path, skipped)
            if not inside:
                problems.append(f"{path}: this directory contains no image")
            files += inside
    return list(dict.fromkeys(files)), problems


def draw_files(job: RenderJob, files: Sequence[Path], classes: Sequence[str], batch_size: int, animation: str) -> int:
    """Draw a panel and an animation of each image file, and return the number of images that could be read.

    classes: classes of the model; a file in a directory named after one is labeled with it
    animation: "gif", "webp" or "none"
    Raises UserError if an input would be overwritten or no image can be read.
    """
    endings = ["_panel.png", *([f"_halting.{animation}"] if animation != "none" else [])]
    outputs = [[job.folder / f"{stem}{ending}" for ending in endings] for stem in _distinct_stems(files)]
    overwritten = {path.resolve() for path in itertools.chain(*outputs)} & {file.resolve() for file in files}
    if overwritten:
        raise UserError(f"{min(overwritten)} is an input and would be overwritten. Choose another --output-dir.")
    drawn, shown = 0, []
    for first in utils.with_progress(range(0, len(files), batch_size), "Images", dict):
        records = _record_files(job, dict(enumerate(files[first : first + batch_size], first)), classes)
        for record in records:
            panel, *movie = outputs[record.index]
            write_image(panel, heatmaps.panel(record, job.names, job.style))
            for path in movie:
                utils.write_bytes(path, heatmaps.animation(record, job.style, animation))
        drawn += len(records)
        shown += records if job.html else []
    if not drawn:
        raise UserError("no image could be read")
    job.write_gallery(shown)
    log(f"wrote {drawn} panel(s) to {job.folder}")
    return drawn


def _distinct_stems(files: Iterable[Path]) -> Iterator[str]:
    """Yield a distinct name for each file: its stem, truncated if long, numbered if already taken."""
    taken: set[str] = set()
    for file in files:
        truncated = os.fsdecode(os.fsencode(file.stem)[:MAX_STEM_BYTES])
        numbered = (f"{truncated}_{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([truncated], numbered) if stem not in taken)
        taken.add(stem)
        yield stem


def _record_files(job: RenderJob, files: dict[int, Path], classes: Sequence[str]) -> list[ImageRecord]:
    """Record the readable files and warn of the others.

    files: by position; classes: a file in a directory named after one of them is labeled with it
    """
    transform, images = evaluation_transform(job.model.patch_embed.img_size, Preprocessing.from_model(job.model)), {}
    for position, file in files.items():
        try:
            images[position] = transform(load_image(file))
        except UnreadableImage as error:
            warn(f"{error}. The file is skipped.")
    if not images:
        return []
    labels = [positions([files[position].absolute().parent.name], classes)[0] for position in images]
    targets = torch.tensor([-1 if label is None else label for label in labels])
    batch = (torch.stack(list(images.values())), targets, list(images), [str(files[position]) for position in images])
    return record_batch(job.model, batch, job.amp).records
