"""Measure images/s of several models in turn.

Usage: python -m experiments.throughput FLAGS NAME=KIND=CHECKPOINT...

KIND is one of baselines.py. A checkpoint without a gate runs as a static model. Only logits are computed. The result,
images/s by name and the CPU, is written as JSON and printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch

import utils
from datasets import build_dataset, spread_sample
from experiments.baselines import register
from experiments.stages import processors
from training.checkpoints import Checkpoint


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="throughput.py", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=KIND=CHECKPOINT", help="models to measure")
    parser.add_argument("--data-set", required=True, help="dataset name, for example FMNIST")
    parser.add_argument("--data-path", required=True, help="dataset folder")
    parser.add_argument("--input-size", type=int, required=True, help="image size in pixels")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    args = parser.parse_args(argv)
    images = build_dataset(args.data_set, args.data_path, False, (args.input_size, args.input_size))
    batch, _ = spread_sample(images, args.batch_size)
    calls = {}
    for argument in args.models:
        name, kind, path = argument.split("=")
        checkpoint = Checkpoint.load(path)
        model = checkpoint.build_model(register(kind), halting=not checkpoint.is_static).eval()
        calls[name] = partial(model, batch)
    seconds = utils.time_interleaved(calls, torch.device("cpu"), args.rounds)
    images_per_s = {name: len(batch) / statistics.median(times) for name, times in seconds.items()}
    result = {"machine": processors(), "images_per_s": images_per_s}
    utils.write_bytes(args.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
