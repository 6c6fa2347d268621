"""TensorBoard logs of a training run: a point per epoch and metric, and token-depth images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from datasets import spread_sample
from engine_act import Trainer
from training.loaders import ImageLoader
from visualization.heatmaps import Style, sheet
from visualization.records import record_batch

ORIGINAL_NAMES = {"depth_mean": "cnt_token_mean", "depth_max": "cnt_token_max", "depth_min": "cnt_token_min"}
PER_BLOCK = ("live_share", "layer_scores")
SHOWN_IMAGES = 8
SHOWN_SIZE = 128  # pixels


class TensorBoardLogger:
    """A writer of TensorBoard logs.

    first_epoch: hide the points of earlier writers from this epoch on; None keeps them.
    loader: of the validation images; the same evenly spaced ones are shown in every epoch and run.
    """

    def __init__(self, folder: Path, first_epoch: int | None, loader: ImageLoader, class_names: list[str]):
        self.class_names = class_names
        count = min(SHOWN_IMAGES, loader.num_images or SHOWN_IMAGES)
        self.shown, self.targets = spread_sample(loader.images, count)
        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def record(self, epoch: int, training: dict, test: dict, trainer: Trainer) -> None:
        """Write the points of an epoch; training, test: means by name, of `train_one_epoch` and `evaluate`."""
        for name, value in _scalars(training, test).items():
            self.writer.add_scalar(name, value, epoch)
        if trainer.model_without_ddp.halting:
            self._show_depths(epoch, test["live_share"], trainer)
        self.writer.flush()

    def _show_depths(self, epoch: int, live_share: list[float], trainer: Trainer) -> None:
        """Write depth maps and the histogram of depths; live_share: fraction of live tokens by block.

        The tokens that halt in a block are the difference of its fraction and the next block's.
        """
        names = [f"image {number}" for number in range(len(self.shown))]
        batch = (self.shown, self.targets, range(len(names)), names)
        records = record_batch(trainer.model_without_ddp, batch, trainer.amp).records
        style = Style(len(live_share), size=SHOWN_SIZE)
        image = sheet(records, self.class_names, style)
        self.writer.add_image("test/token_depth", np.asarray(image), epoch, dataformats="HWC")
        blocks = np.arange(1, len(live_share) + 1)
        counts = -np.diff(live_share, append=0)
        self.writer.add_histogram_raw(
            "test/depth",
            min=1,
            max=len(blocks),
            num=1,
            sum=counts @ blocks,
            sum_squares=counts @ blocks**2,
            bucket_limits=[*(blocks + 0.5)],
            bucket_counts=[*counts],
            global_step=epoch,
        )

    def close(self) -> None:
        self.writer.close()


def _scalars(training: dict, test: dict) -> dict[str, float]:
    """Return TensorBoard values by tag: the original's tags where it has some, else the metric's name."""
    scalars = {ORIGINAL_NAMES.get(name, name): value for name, value in training.items() if name not in PER_BLOCK}
    for series in PER_BLOCK:
        scalars |= {f"{series}/block_{i:02d}": value for i, value in enumerate(training.get(series, ()), start=1)}
    if "depth_mean" in training:
        scalars["expected_depth_ratio"] = training["depth_mean"] / len(training["live_share"])
    scalars = {f"train/{name}": value for name, value in scalars.items()}
    scalars |= {"test/acc_top1": test["acc1"], "test/acc_top5": test["acc5"]}
    others = ("loss", "depth_mean", "class_token_depth", "gmacs", "ema_acc1", "graph_hits")
    return scalars | {f"test/{name}": test[name] for name in others if name in test}
