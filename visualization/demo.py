"""--demo of main_act.py: the depths of a few images of each class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

import utils
from utils import log, warn
from visualization import charts, heatmaps
from visualization.files import write_gallery, write_jpeg, write_png
from visualization.heatmaps import Style
from visualization.records import Selection, gather_to_main, record_dataset


def demo(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    amp: str,
    folder: Path,
    names: Sequence[str],
    *,
    criterion: str = "std",
    per_class: int = 1,
    html: bool = False,
) -> int:
    """Draws `per_class` images of every class, by one of criteria.CRITERIA; all processes take part.

    loader: a `demo_loader`; names: of the classes. Of an equal measure the first in the data set counts, in any
    order of the data. Returns 1 where images cannot be read, else 0. UserError where the folder cannot be written.
    """
    utils.prepare_output_dir(folder, "--demo-dir")
    selection = Selection(criterion, per_class)
    for batch in record_dataset(model, loader, device, amp, "Demo"):
        for record in batch.records:
            selection.add(record)
    chosen = selection.own_chosen()
    style = Style(model.num_blocks, heatmaps.PAPERS_COLORMAP)
    for number, record in utils.with_progress(chosen, "Drawing", dict):
        stem = f"class{record.target}" + (f"_{number}" if number > 1 else "")
        for kind, picture in heatmaps.demo_pictures(record, names, style).items():
            write_jpeg(folder / f"{stem}_{kind}.jpg", picture)
    shared = chosen if html else [entry for entry in chosen if entry[0] == 1]
    shown = gather_to_main(shared)
    if shown:
        first = [record for number, record in shown if number == 1]
        write_png(folder / "teaser.png", charts.teaser(first, style))
        if html:
            write_gallery(folder, "Token depths", [record for _, record in shown], names, style)
    drawn, unreadable = (sum(utils.all_gather_objects(count)) for count in (len(chosen), len(loader.bad_images)))
    if not drawn:
        warn(f"no image to show by --demo-by {criterion}")
    log(f"token depths of {drawn} images drawn in {folder}")
    return int(unreadable > 0)
