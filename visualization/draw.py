"""What a network does with images, as files: with a whole data set, and with files from anywhere; see also demo.py."""

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
    warn_skipped_files,
)
from losses import DistributionPriorLoss
from utils import UserError, log, warn
from visualization import heatmaps, html_pages
from visualization.heatmaps import Style, macs_text, write_picture
from visualization.image_record import ImageRecord
from visualization.records import DatasetStatistics, Selection, gather_to_main, record_batch

MAX_STEM_BYTES = 200  # of 255 that a file's name may have


@dataclass(frozen=True)
class RenderJob:
    """Whose work is drawn, how, and where to.

    amp: see `utils.autocast`; names: of the classes;
    criterion, per_class: which images of each class are shown, see `Selection`; html: in a gallery too.
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
        """Where one is asked for."""
        if self.html:
            html_pages.write_gallery(self.folder, title, records, self.names, self.style)


# A whole data set ---------------------------------------------------------------------------------


def draw_summary(drawing: RenderJob, loader: Iterable, title: str, facts: list[tuple[str, str]]) -> int:
    """Charts of a data set as PNG files, and summary.html of them; all processes take part. Returns how many images.

    loader: a `demo_loader`; facts: names and values, to be told beside what is measured.
    UserError where no image can be read.
    """
    from visualization import charts  # slow to import

    examples, gallery, batches = Selection(), Selection(drawing.criterion, drawing.per_class), []
    for loaded in utils.with_progress(loader, "Summary", dict):
        batch = record_batch(drawing.model, loaded, drawing.amp)
        batches.append(batch.without_pixels())
        examples.add(batch.records)
        gallery.add(batch.records if drawing.html else [])
    batches = [batch for own in utils.all_gather_objects(batches) for batch in own]
    if not batches:
        raise UserError("not one image could be read")
    statistics = DatasetStatistics.of(batches, drawing.model.has_class_token)
    example_of = {record.target: record for _, record in gather_to_main(examples.own_chosen())}
    shown = [record for _, record in gather_to_main(gallery.own_chosen())]
    if utils.is_main():
        prior = DistributionPriorLoss(statistics.num_blocks).target.numpy()
        found = charts.summary_charts(statistics, prior, drawing.names, example_of, drawing.style)
        drawn = [
            (chart.title, chart.explanation, write_picture(drawing.folder / f"{name}.png", chart.figure))
            for name, chart in found.items()
        ]
        drawing.write_gallery(shown, f"{title}: token depths")
        facts = [*facts, *_facts(statistics)]
        path = html_pages.write_summary(drawing.folder, f"{title}: summary", facts, drawn, drawing.html)
        log(f"summary of {len(statistics.target)} images in {path}")
    utils.all_gather_objects(None)  # whoever ends first with a status that is not 0 would end the others
    return len(statistics.target)


def _facts(statistics: DatasetStatistics) -> list[tuple[str, str]]:
    macs, static_macs, class_token = statistics.macs.mean(), statistics.static_macs, statistics.class_token_depth
    return [
        ("images", f"{len(statistics.target):,}"),
        ("top-1", f"{statistics.is_right.mean():.2%}"),
        ("patch depth", f"{statistics.depth.mean():.2f} of {statistics.num_blocks}"),
        *([] if class_token is None else [("class token depth", f"{class_token.mean():.2f}")]),
        ("multiply-adds", f"{macs_text(macs)} of {macs_text(static_macs)}"),
        ("saved", f"{1 - macs / static_macs:.1%}"),
    ]


# Image files from anywhere ------------------------------------------------------------------------


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
                inside, skipped = find_image_files(path)
                warn_skipped_files(path, skipped)
            if not inside:
                problems.append(f"{path}: no image in this folder")
            files += inside
    return list(dict.fromkeys(files)), problems


def draw_files(
    drawing: RenderJob, files: Sequence[Path], classes: Sequence[str], batch_size: int, animation: str
) -> int:
    """A panel of each image, and an animation ("gif", "webp" or "none"); returns how many could be read.

    classes: the model's, which a folder may be named after. UserError where a file would be overwritten, or no
    image can be read.
    """
    endings = ["_panel.png", *([f"_halting.{animation}"] if animation != "none" else [])]
    outputs = [[drawing.folder / f"{stem}{ending}" for ending in endings] for stem in _distinct_stems(files)]
    overwritten = {path.resolve() for path in itertools.chain(*outputs)} & {file.resolve() for file in files}
    if overwritten:
        raise UserError(f"{min(overwritten)} would be overwritten: choose another --output-dir")
    drawn, shown = 0, []
    for first in utils.with_progress(range(0, len(files), batch_size), "Images", dict):
        records = _record_files(drawing, dict(enumerate(files[first : first + batch_size], first)), classes)
        for record in records:
            panel, *movie = outputs[record.index]
            write_picture(panel, heatmaps.panel(record, drawing.names, drawing.style))
            for path in movie:
                utils.write_bytes(path, heatmaps.animation(record, drawing.style, animation))
        drawn += len(records)
        shown += records if drawing.html else []
    if not drawn:
        raise UserError("not one image could be read")
    drawing.write_gallery(shown)
    log(f"{drawn} images drawn in {drawing.folder}")
    return drawn


def _distinct_stems(files: Iterable[Path]) -> Iterator[str]:
    """The names of files without their endings, cut where they are long, numbered where they would be the same."""
    taken: set[str] = set()
    for file in files:
        own = os.fsdecode(os.fsencode(file.stem)[:MAX_STEM_BYTES])
        numbered = (f"{own}_{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([own], numbered) if stem not in taken)
        taken.add(stem)
        yield stem


def _record_files(drawing: RenderJob, files: dict[int, Path], classes: Sequence[str]) -> list[ImageRecord]:
    """The files, by their places, that can be read; the others are named. A folder with a class's name is a label."""
    preprocessing, images = Preprocessing.from_model(drawing.model), {}
    transform = evaluation_transform(drawing.model.patch_embed.img_size, preprocessing=preprocessing)
    for place, file in files.items():
        try:
            images[place] = transform(load_image(file))
        except UnreadableImage as error:
            warn(f"{error}; it is passed over")
    if not images:
        return []
    numbers = {name: number for number, name in enumerate(classes)}
    targets = torch.tensor([numbers.get(files[place].parent.name, -1) for place in images])
    batch = (torch.stack(list(images.values())), targets, list(images), [str(files[place]) for place in images])
    return record_batch(drawing.model, batch, drawing.amp).records
