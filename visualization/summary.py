"""Charts of a whole data set: how deep its tokens go, where it is easy and where hard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

import utils
from losses import DistributionPriorLoss
from utils import UserError, log
from visualization import charts, heatmaps, html_pages
from visualization.files import GALLERY, write_gallery, write_png
from visualization.heatmaps import Style
from visualization.records import DatasetStatistics, Selection, gather_to_main, record_dataset

SUMMARY = "summary.html"


def draw_summary(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    amp: str,
    folder: Path,
    names: Sequence[str],
    style: Style,
    *,
    title: str,
    facts: list[tuple[str, str]],
    criterion: str = "std",
    per_class: int = 1,
    html: bool = False,
) -> int:
    """Charts of a data set as PNG files, and summary.html of them; all processes take part. Returns how many images.

    loader: a `demo_loader`; names: of the classes; facts: names and values, to be told beside what is measured;
    criterion, per_class: of the images in the gallery that `html` asks for. UserError where no image can be read.
    """
    examples, gallery, parts = Selection(), Selection(criterion, per_class), []
    for batch in record_dataset(model, loader, device, amp, "Summary"):
        parts.append(DatasetStatistics.of_batch(batch))
        for record in batch.records:
            examples.add(record)
            if html:
                gallery.add(record)
    parts = [part for own in utils.all_gather_objects(parts) for part in own]
    if not parts:
        raise UserError("not one image could be read")
    statistics = DatasetStatistics.of(parts)
    example_of = {record.target: record for _, record in gather_to_main(examples.own_chosen())}
    shown = [record for _, record in gather_to_main(gallery.own_chosen())]
    if utils.is_main():
        prior = DistributionPriorLoss(style.num_blocks).target.numpy()
        drawn = [
            (chart.title, chart.explanation, write_png(folder / f"{name}.png", chart.figure))
            for name, chart in charts.summary_charts(statistics, prior, names, example_of, style).items()
        ]
        if html:
            write_gallery(folder, f"{title}: token depths", shown, names, style)
        facts = [*facts, *_facts(statistics)]
        html_pages.write_summary(folder / SUMMARY, f"{title}: summary", facts, drawn, GALLERY if html else None)
        log(f"summary of {len(statistics.target)} images in {folder / SUMMARY}")
    utils.all_gather_objects(None)  # whoever ends first with a status that is not 0 would end the others
    return len(statistics.target)


def _facts(statistics: DatasetStatistics) -> list[tuple[str, str]]:
    macs, static_macs = statistics.macs.mean(), statistics.static_macs
    return [
        ("images", f"{len(statistics.target):,}"),
        ("top-1", f"{statistics.is_right.mean():.2%}"),
        ("patch depth", f"{statistics.depth.mean():.2f} of {statistics.num_blocks}"),
        ("class token depth", f"{statistics.class_token_depth.mean():.2f}"),
        ("multiply-adds", f"{heatmaps.macs_text(macs)} of {heatmaps.macs_text(static_macs)}"),
        ("saved", f"{1 - macs / static_macs:.1%}"),
    ]
