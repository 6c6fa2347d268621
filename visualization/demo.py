"""Drawing of a few images of each class of a dataset, for main_act.py --demo."""

from __future__ import annotations

from collections.abc import Iterable

import utils
from utils import log, warn
from visualization import charts, heatmaps
from visualization.draw import RenderJob
from visualization.heatmaps import write_image
from visualization.records import Selection, gather_to_main, record_batch


def draw_demo(job: RenderJob, loader: Iterable) -> int:
    """Draw the selected images of every class. Collective: every process must call it.

    loader: a `demo_loader`, in any order
    Returns the exit status: 1 if some images could not be read, else 0. Raises UserError if the output directory
    cannot be written.
    """
    folder = utils.prepare_output_dir(job.folder, "--demo-dir")
    selection = Selection(job.criterion, job.per_class)
    for batch in utils.with_progress(loader, "Demo", dict):
        selection.add(record_batch(job.model, batch, job.amp).records)
    chosen = selection.local_selection()
    for number, record in utils.with_progress(chosen, "Drawing", dict):
        stem = f"class{record.target}" + (f"_{number}" if number > 1 else "")
        for kind, picture in heatmaps.demo_views(record, job.names, job.style).items():
            write_image(folder / f"{stem}_{kind}.jpg", picture)
    shown = gather_to_main([(number, record) for number, record in chosen if job.html or number == 1])
    if shown:
        first = [record for number, record in shown if number == 1]
        write_image(folder / "teaser.png", charts.teaser(first, job.style))
        job.write_gallery([record for _, record in shown])
    drawn, unreadable = (sum(utils.all_gather_objects(count)) for count in (len(chosen), len(loader.bad_images)))
    if not drawn:
        warn(f"no image meets --demo-by {job.criterion}: nothing is drawn")
    log(f"wrote the token depths of {drawn} images to {folder}")
    return int(unreadable > 0)
