"""A-ViT from the command line: train, evaluate, or draw token depths.

    torchrun --nproc_per_node=4 main_act.py --data-path IMAGENET --output_dir OUT --pretrained
    python main_act.py --data-path IMAGENET --eval --finetune a-vit-weights/tiny-10-30.pth
    python main_act.py --data-path IMAGENET --demo --finetune a-vit-weights/visualization-tiny.pth

`--help` lists the flags. Bad input ends with one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import torch

import utils
import visualize
from datasets import class_names, spread_sample
from engine_act import check_complete, evaluate, report, zipping_speeds
from training import arguments
from training.build import (
    StartingPoint,
    amp_dtype_name,
    build_model,
    build_schedule,
    build_trainer,
    loader_options,
    run_cli,
    training_set,
    validation_set,
)
from training.evaluation import Predictions
from training.loaders import demo_loader, evaluation_loader, training_loader
from training.loop import TrainingRun, updates_per_epoch
from training.signals import Interrupted
from utils import UserError, log, warn


def main(argv: list[str] | None = None) -> None:
    run_cli(arguments.make_parser(), arguments.parse_args(argv), run)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit status."""
    for flag in ("act_mode", "warmup_epoch"):
        if getattr(args, flag) is not None:
            log(f"note: --{flag} is accepted and ignored")
    utils.seed_everything(args.seed)
    if args.eval or args.demo:
        return look_at_validation_set(args, device)
    with contextlib.suppress(Interrupted):  # saved, and told, already
        train(args, device)
    return 0


def look_at_validation_set(args: argparse.Namespace, device: torch.device) -> int:
    """--eval and --demo; returns the exit status."""
    images = validation_set(args)
    start = StartingPoint.of(args)
    if start.checkpoint is None and not args.pretrained:
        warn("no weights given (--finetune, --resume or --pretrained): the network is random")
    model = build_model(args, len(images.classes), start).to(device)
    output_dir = utils.prepare_output_dir(args.output_dir)
    if args.demo:
        return visualize.demo(
            model,
            demo_loader(images, args.batch_size, **loader_options(args)),
            device,
            amp_dtype_name(args),
            Path(args.demo_dir) if args.demo_dir else (output_dir or Path()) / arguments.DEMO_FOLDER,
            class_names(images.classes, args.data_path, args.class_index),
            criterion=args.demo_by,
            per_class=args.demo_images,
            html=args.html,
        )
    loader = evaluation_loader(images, args.batch_size, **loader_options(args))
    predictions = Predictions(loader)
    result = evaluate(model, loader, device, amp_dtype_name(args), on_batch=predictions.note)
    check_complete(result, loader)
    if model.halting and utils.is_main():
        sample, _ = spread_sample(images, min(args.batch_size, loader.num_images or args.batch_size))
        result |= zipping_speeds(model, sample, device, amp_dtype_name(args))
    report(result)
    if output_dir is None:
        return 0
    files = {"predictions.csv": predictions.csv(), "eval.json": (json.dumps(result, indent=2) + "\n").encode()}
    for name, content in files.items():
        if utils.is_main():
            utils.write_bytes(output_dir / name, content)
    return 0


def train(args: argparse.Namespace, device: torch.device) -> None:
    images, test_images = training_set(args), validation_set(args)
    if images.classes != test_images.classes:
        differing = sorted(set(images.classes) ^ set(test_images.classes))[:3] or ["their order"]
        raise UserError(f"--data-path {args.data_path}: training and validation differ in {', '.join(differing)}")
    num_classes = len(images.classes)
    start = StartingPoint.of(args)
    model = build_model(args, num_classes, start).to(device)
    trainer = build_trainer(args, model, num_classes, device)
    loader = training_loader(
        images,
        args.batch_size,
        seed=args.seed,
        repeated_aug=args.repeated_aug,
        max_bad_images=args.max_bad_images,
        **loader_options(args),
    )
    training_run = TrainingRun(
        trainer,
        build_schedule(args, trainer.optimizer, updates_per_epoch(loader, args.accum_steps)),
        loader,
        evaluation_loader(test_images, args.batch_size, **loader_options(args)),
        epochs=args.epochs,
        output_dir=args.output_dir,
        tensorboard=args.tensorboard,
        classes=images.classes,
        flags=dict(vars(args)),
        checkpoint_steps=args.checkpoint_steps,
        keep=args.keep,
    )
    if start.flag == "resume":
        training_run.restore(start.checkpoint, start.location)
    if args.start_epoch is not None:
        training_run.start_at(args.start_epoch)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    epoch = f"{len(loader)} batches of {args.batch_size} per epoch and process"
    log(f"{args.model}: {size}, {num_classes} classes, {epoch}, {utils.world_size()} process(es)")
    training_run.train()


if __name__ == "__main__":
    main()
