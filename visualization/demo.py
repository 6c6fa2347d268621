"""--demo of main_act.py: what a network does with a few images of each class of a data set."""

from __future__ import annotations

from collections.abc import Iterable

import utils
from utils import log, warn
from visualization import charts, heatmaps
from visualization.draw import RenderJob
from visualization.heatmaps import write_picture
from visualization.records import Selection, gather_to_main, record_batch


def draw_demo(drawing: RenderJob, loader: Iterable) -> int:
    """Draws some images of every class; all processes take part.

    loader: a `demo_loader`. Of an equal measure the first in the data set counts, in any order of the data.
    Returns 1 where images cannot be read, else 0. UserError where the folder cannot be written.
    """
    folder = utils.prepare_output_dir(drawing.folder, "--demo-dir")
    selection = Selection(drawing.criterion, drawing.per_class)
    for batch in utils.with_progress(loader, "Demo", dict):
        selection.add(record_batch(drawing.model, batch, drawing.amp).records)
    chosen = selection.own_chosen()
    for number, record in utils.with_progress(chosen, "RenderJob", dict):
        stem = f"class{record.target}" + (f"_{number}" if number > 1 else "")
        for kind, picture in heatmaps.demo_pictures(record, drawing.names, drawing.style).items():
            write_picture(folder / f"{stem}_{kind}.jpg", picture)
    shown = gather_to_main([(number, record) for number, record in chosen if drawing.html or number == 1])
    if shown:
        first = [record for number, record in shown if number == 1]
        write_picture(folder / "teaser.png", charts.teaser(first, drawing.style))
        drawing.write_gallery([record for _, record in shown])
    drawn, unreadable = (sum(utils.all_gather_objects(count)) for count in (len(chosen), len(loader.bad_images)))
    if not drawn:
        warn(f"no image to show by --demo-by {drawing.criterion}")
    log(f"token depths of {drawn} images drawn in {folder}")
    return int(unreadable > 0)
