"""Show how the compute of an image follows its content: a chart with images at both ends, and a table.

Usage: python -m experiments.adaptivity CHECKPOINT OUT.png --data-set NAME --data-path DIR [--images N]

CHECKPOINT is an A-ViT. The content of an image is the fraction of its patches that are not blank: their pixels are not
all of one color. The compute of an image is its MACs as a fraction of the static model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets import build_dataset, spread_sample
from experiments.stages import table
from training.arguments import Parser
from training.checkpoints import Checkpoint
from training.command import one_line_errors
from visualization.charts import GRAY, MAIN, MARK, SMALL_TEXT, new_figure, style_axes
from visualization.heatmaps import PAPERS_COLORMAP, Style, colors, write_image
from visualization.image_record import ImageRecord
from visualization.records import record_batch

BATCH, GROUPS, SHOWN = 128, 8, 4  # images at once; groups of equal size by content; pictures at each end
BLANK = 8  # largest difference of gray levels in a blank patch


def content(record: ImageRecord) -> float:
    """Return the fraction of the patches that are not blank."""
    rows, columns = record.depth.shape
    height, width = record.pixels.shape[:2]
    patches = record.pixels.reshape(rows, height // rows, columns, width // columns, 3).astype(int)
    spread = patches.max(axis=(1, 3)) - patches.min(axis=(1, 3))  # [rows, columns, 3]
    return float((spread.max(axis=-1) > BLANK).mean())


def compute(record: ImageRecord) -> float:
    """Return the MACs as a fraction of the static model's."""
    return record.macs / record.static_macs


def measure(checkpoint: Checkpoint, data_set: str, data_path: str, count: int) -> list[ImageRecord]:
    """Run the model on images that are spread over the test images, on the CPU."""
    model = checkpoint.build_model().eval()
    images = build_dataset(data_set, data_path, False, model.patch_embed.img_size)
    batch, targets = spread_sample(images, min(count, len(images)))
    records = []
    for first in range(0, len(batch), BATCH):
        part, own = batch[first : first + BATCH], targets[first : first + BATCH]
        names = [str(first + number) for number in range(len(part))]
        records += record_batch(model, (part, own, range(first, first + len(part)), names), "none").records
    return records


def groups(records: Sequence[ImageRecord]) -> list[np.ndarray]:
    """Return groups of equal size by content, each with rows of content, compute and correctness: [n, 3]."""
    rows = np.array([(content(one), compute(one), one.prediction == one.target) for one in records], dtype=float)
    return np.array_split(rows[np.argsort(rows[:, 0], kind="stable")], GROUPS)


def summary(records: Sequence[ImageRecord]) -> str:
    """Return two lines on all images, and a table of the groups."""
    computes, contents = (np.array([value(one) for one in records]) for value in (compute, content))
    low, high = np.quantile(computes, [0.1, 0.9])
    rows = [
        [f"{g[:, 0].min():.2f} to {g[:, 0].max():.2f}", f"{g[:, 1].mean():.3f}", f"{100 * g[:, 2].mean():.1f}"]
        for g in groups(records)
    ]
    lines = [
        f"MACs of {len(computes)} images relative to the static model: mean {computes.mean():.3f}, standard deviation "
        f"{computes.std():.3f}, a tenth below "
        f"{low:.3f}, a tenth above {high:.3f}"
    ]
    if min(computes.std(), contents.std()) > 0:
        lines.append(f"correlation of MACs and content: {np.corrcoef(computes, contents)[0, 1]:.2f}")
    return "\n".join([*lines, "", table(("content", "mean MACs", "top-1 (%)"), rows)])


def chart(records: Sequence[ImageRecord], num_blocks: int) -> Figure:
    """Draw MACs against content, between the images with the fewest and the most MACs and their depth maps."""
    figure = new_figure(5.4, width=9.0)
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1, 2.3, 1])
    axes = style_axes(middle.subplots(), "content (% of patches that are not blank)", "MACs (% of the static model's)")
    percent = 100 * np.array([(content(one), compute(one)) for one in records])
    axes.scatter(*percent.T, s=6, color=MAIN, alpha=0.35, linewidths=0)
    means = 100 * np.array([group.mean(axis=0) for group in groups(records)])
    axes.plot(means[:, 0], means[:, 1], "o-", color=MARK, markersize=5, label="mean of an eighth of the images")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.15 * percent[:, 1].max())  # space for the legend
    axes.legend(frameon=False, fontsize=SMALL_TEXT, loc="upper left")
    ranked = sorted(records, key=compute)
    style = Style(num_blocks, PAPERS_COLORMAP)
    for part, title, ends in ((left, "fewest MACs", ranked[:SHOWN]), (right, "most MACs", ranked[: -SHOWN - 1 : -1])):
        part.suptitle(title, fontsize=10, color=GRAY)
        for row, one in zip(part.subplots(SHOWN, 2), ends):
            for place, pixels in zip(row, (one.pixels, colors(one.depth, style))):
                place.imshow(pixels, interpolation="nearest")
                place.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"{100 * compute(one):.0f}%", fontsize=SMALL_TEXT)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="adaptivity.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint of an A-ViT")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--data-set", required=True, help="dataset name, for example CLUTTERED_VARIED")
    parser.add_argument("--data-path", required=True, help="dataset folder, whose test images are used")
    parser.add_argument("--images", type=int, default=2000, help="largest number of images (default: %(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors(parser, args), torch.inference_mode():
        checkpoint = Checkpoint.load(args.checkpoint)
        records = measure(checkpoint, args.data_set, args.data_path, args.images)
        write_image(args.out, chart(records, num_blocks=int(max(one.prefix_depth.max() for one in records))))
        print(summary(records))


if __name__ == "__main__":
    main()
