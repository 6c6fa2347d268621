"""Evaluation of a dataset: the printed table, eval.json, and predictions.csv for compare.py."""

from __future__ import annotations

import copy
import csv
import io
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from timm.utils import accuracy
from torch import Tensor, nn

import engine_act
import utils
from datasets import placeholder_names, spread_sample
from models_act import Halting
from training.loaders import Batch, ImageLoader
from utils import UserError
from visualization.image_record import ImageRecord
from visualization.records import records_of_batch
from zipping.planned.plans import Planner

COLUMNS = ("index", "image", "target", "prediction", "confidence", "depth", "target_name", "prediction_name")


def evaluate_dataset(
    model: nn.Module, loader: ImageLoader, device: torch.device, amp: str, classes: Sequence[str] | None = None
) -> tuple[dict, bytes]:
    """Evaluate a model. Returns means by name, see `engine_act.evaluate`, and a CSV row per image.

    classes: names of all classes that the model predicts, the dataset's first; None stands for "class N".
    The means also have `classes`, their number, and `dataset_classes`, the number of the dataset's. If these differ,
    `dataset_acc1` is the top-1 accuracy among the dataset's classes alone.
    For a halting model, the main process also measures the speed of the logits alone, zipped and masked.
    Every process must call it. Raises UserError if an image is missing.
    """
    rows, among_own = [], utils.MetricAverages()
    classes = placeholder_names(model.num_classes) if classes is None else classes
    num_own = len(getattr(loader.images, "classes", classes))

    def on_batch(batch: Batch, logits: Tensor, halting: Halting) -> None:
        rows.extend(_row(record, classes) for record in records_of_batch(model, batch, logits, halting))
        (acc1,) = accuracy(logits[:, :num_own].cpu(), batch.targets.cpu())
        among_own.add(len(logits), dataset_acc1=acc1)

    result = engine_act.evaluate(model, loader, device, amp, on_batch=on_batch)
    result |= {"classes": len(classes), "dataset_classes": num_own}
    if num_own < len(classes):
        result |= among_own.reduced()[1]
    check_complete(result, loader)
    if model.halting and utils.is_main():
        count = min(loader.batch_size, loader.num_images or loader.batch_size)
        result |= zipping_speeds(model, spread_sample(loader.images, count)[0], device, amp)
    return result, _as_csv(rows)


def _row(record: ImageRecord, classes: Sequence[str]) -> tuple:
    """Return the values of COLUMNS; depth is the mean over all tokens."""
    names = (classes[record.target], classes[record.prediction])
    confidence, depth = f"{record.confidence:.4f}", f"{record.token_depth:.4f}"
    return (record.index, record.name, record.target, record.prediction, confidence, depth, *names)


def _as_csv(rows: list[tuple]) -> bytes:
    """Return the rows of all processes in the order of the dataset."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    writer.writerows(sorted(row for local in utils.all_gather_objects(rows) for row in local))
    return file.getvalue().encode(errors="replace")


def check_complete(result: dict, loader: ImageLoader) -> None:
    """Raise UserError if a complete evaluation has read another number of images than the dataset declares."""
    if result["images"] < loader.num_images:
        raise UserError(
            f"only {result['images']} of {loader.num_images} validation images could be read; check --data-path"
        )
    if 0 < loader.num_images < result["images"]:
        raise UserError(
            f"the dataset declares {loader.num_images} validation images, but {result['images']} were read; correct "
            "_info.json, or the number in --val-split"
        )


@torch.inference_mode()
def zipping_speeds(
    model: nn.Module, images: Tensor, device: torch.device, amp: str, rounds: int = 5
) -> dict[str, float]:
    """Measure images/s of the logits alone, zipped and masked: medians of interleaved rounds; images: [B, 3, H, W]."""
    images = images.to(device)

    def call(variant: nn.Module) -> None:
        with utils.autocast(device, amp):
            variant(images)

    calls = {}
    for name, zip_tokens in {"images_per_s_zipped": True, "images_per_s_masked": False}.items():
        variant = copy.deepcopy(model).eval()
        variant.zip_tokens = zip_tokens
        calls[name] = partial(call, variant)
    for _ in range(Planner.start if model.cuda_graphs else 0):  # batches before the first plan
        calls["images_per_s_zipped"]()
    seconds = utils.time_interleaved(calls, device, rounds)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def save(result: dict, predictions: bytes, output_dir: Path | None) -> None:
    """Write eval.json and predictions.csv if there is a folder. Raises UserError if they cannot be written."""
    if output_dir is None or not utils.is_main():
        return
    utils.write_bytes(output_dir / "predictions.csv", predictions, durable=True)
    utils.write_bytes(output_dir / "eval.json", (json.dumps(result, indent=2) + "\n").encode(), durable=True)


def report(result: dict, halting: bool) -> None:
    """Print the metrics as a table; halting: also print the metrics of a halting model."""
    rows = [("top-1", f"{result['acc1']:.2f}%")]
    if "dataset_acc1" in result:
        among = f"top-1 among the dataset's {result['dataset_classes']} classes"
        rows.append((among, f"{result['dataset_acc1']:.2f}%"))
    if "ema_acc1" in result:
        rows.append(("top-1 of the EMA weights", f"{result['ema_acc1']:.2f}%"))
    rows += [("top-5", f"{result['acc5']:.2f}%"), ("loss", f"{result['loss']:.4f}")]
    rows += _halting_rows(result) if halting else [("MACs per image", f"{result['gmacs']:.3f}G")]
    rows.append(("images/s", f"{result['images_per_s']:.1f}"))
    if "images_per_s_zipped" in result:
        zipped, masked = result["images_per_s_zipped"], result["images_per_s_masked"]
        rows.append(("images/s, forward pass only", f"{zipped:.1f} zipped, {masked:.1f} masked"))
    if "graph_hits" in result:
        rows.append(("replayed from CUDA graphs", f"{result['graph_hits']:.1%} of the images"))
    utils.log(utils.table(rows))
    utils.log(f"Accuracy of the network on the {result['images']} test images: {result['acc1']:.1f}%")


def _halting_rows(result: dict) -> list[tuple[str, str]]:
    depths = f"patches {result['patch_depth_mean']:.2f}"
    if "class_token_depth" in result:
        depths += f", class token {result['class_token_depth']:.2f}"
    macs, static_macs = result["gmacs"], result["gmacs_static"]
    return [
        ("mean depth", f"{result['depth_mean']:.2f} ({depths})"),
        ("live tokens per block", " ".join(f"{share:.2f}" for share in result["live_share"])),
        ("MACs per image", f"{macs:.3f}G ({macs / static_macs:.1%} of the static model's {static_macs:.3f}G)"),
    ]
