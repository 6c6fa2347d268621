"""Train, evaluate or visualize A-ViT models from the command line.

    torchrun --nproc_per_node=4 main_act.py --data-path IMAGENET --output-dir OUT --pretrained
    python main_act.py --data-path IMAGENET --eval --finetune a-vit-weights/tiny-10-30.pth
    python main_act.py --data-path IMAGENET --demo --finetune a-vit-weights/visualization-tiny.pth

`--help` lists the flags, and @FILE reads flags from a file. Invalid input exits with status 2 and one line on stderr.
Modules that need torch are imported inside functions, so that --help and invalid flags are answered immediately.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from training import arguments, flag_effects

if TYPE_CHECKING:
    import torch
    from torch import nn


def main(argv: list[str] | None = None) -> None:
    args = arguments.parse_args(argv)

    from training.command import run_cli

    run_cli(arguments.make_parser(), args, run)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Run the command that the flags select. Returns the exit status."""
    import utils
    from training.models import check_model_name

    flag_effects.report(args, flag_effects.MAIN_ACT)
    if args.model:
        check_model_name(args.model)
    utils.amp_dtype_name(args.amp, device)
    utils.seed_everything(args.seed)
    if args.eval:
        return evaluate(args, device)
    if args.demo:
        return demo(args, device)
    with utils.lock_output_dir(utils.prepare_output_dir(args.output_dir)):
        return train(args, device)


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Train a model, or continue a run. Returns the exit status."""
    from training import build, loop, run_warnings
    from training.checkpoints import Checkpoint
    from training.schedule import build_schedule
    from training.signals import Interrupted
    from training.teacher import build_teacher

    # settings of the network
    start = Checkpoint.from_args(args)
    settings = build.resolve_settings(args, start)

    # data
    train_images, test_images = build.training_and_validation_set(args, settings)
    classes = train_images.classes

    # model and teacher
    head = build.choose_head(args, classes, start)
    model = build.build_model(args, settings, head, start).to(device)
    teacher = build_teacher(args, settings, model, head)
    if build.should_search_gate(args, start):
        build.set_gate(args, model, start, build.gate_batches(args, settings, train_images, device), device)
    static_start = build.static_start(args, model, head, start)

    # losses, optimizer, schedule
    trainer = build.build_trainer(args, model, classes, device, teacher)
    train_loader, test_loader = build.training_and_validation_loader(args, train_images, test_images, device)
    updates = loop.updates_per_epoch(train_loader, args.accum_steps)
    schedule = build_schedule(args, trainer.optimizer, updates)
    trainer.budget = build.build_budget(args, model, updates)
    run_warnings.warn_about_settings(args, trainer, train_loader, updates * args.epochs)

    # loop
    output_dir = Path(args.output_dir) if args.output_dir else None
    calibration = build.calibration_batches(args, test_images, device)
    options = loop.RunOptions(args.epochs, output_dir, args.tensorboard, args.checkpoint_steps, args.keep, vars(args))
    training_run = loop.TrainingRun(trainer, schedule, train_loader, test_loader, options, calibration, static_start)
    if start is not None and start.flag == "resume":
        training_run.load_state_dict(start)
    if args.start_epoch is not None:
        training_run.start_at(args.start_epoch)
    _log_size(args, model, len(classes), train_loader.batches_per_epoch)
    with contextlib.suppress(Interrupted):  # the run has already saved its state and printed why it stopped
        training_run.train()
    return 0


def _log_size(args: argparse.Namespace, model: nn.Module, num_classes: int, num_batches: int) -> None:
    import utils

    height, width = model.patch_embed.img_size
    utils.log(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {num_classes} classes, "
        f"images of {height} x {width}; "
        f"{num_batches} batches of {args.batch_size} images per epoch and process; "
        f"number of processes: {utils.world_size()}"
    )


def evaluate(args: argparse.Namespace, device: torch.device) -> int:
    """Evaluate a model on the validation set. Returns the exit status."""
    import utils
    from training import build, evaluation
    from training.checkpoints import Checkpoint
    from training.loaders import evaluation_loader

    # settings of the network
    start = Checkpoint.from_args(args)
    settings = build.resolve_settings(args, start)

    # data
    images = build.validation_set(args, settings)
    loader = evaluation_loader(images, args.batch_size, **build.loader_options(args, device))

    # model
    head = build.choose_head(args, images.classes, start)
    model = build.build_model(args, settings, head, start).to(device)

    # evaluation
    output_dir = utils.prepare_output_dir(args.output_dir)
    amp = utils.amp_dtype_name(args.amp, device)
    result, predictions = evaluation.evaluate_dataset(model, loader, device, amp, head.names)
    evaluation.report(result, model.halting)
    evaluation.save(result, predictions, output_dir)
    return 0


def demo(args: argparse.Namespace, device: torch.device) -> int:
    """Draw the token depths of validation images. Returns the exit status: 1 if an image cannot be read."""
    import utils
    from datasets import class_names
    from training import build
    from training.checkpoints import Checkpoint
    from training.loaders import demo_loader
    from visualization.demo import draw_demo
    from visualization.draw import RenderJob
    from visualization.heatmaps import PAPERS_COLORMAP, Style

    # settings of the network
    start = Checkpoint.from_args(args)
    settings = build.resolve_settings(args, start)

    # data
    images = build.validation_set(args, settings)
    loader = demo_loader(images, args.batch_size, **build.loader_options(args, device))

    # model
    head = build.choose_head(args, images.classes, start)
    model = build.build_model(args, settings, head, start).to(device)

    # images
    numbered = (images.classes, head.in_order_of_network())
    names = class_names(head.names, args.data_path, args.class_index, numbered)
    output_dir = utils.prepare_output_dir(args.output_dir) or Path()
    folder = Path(args.demo_dir) if args.demo_dir else output_dir / arguments.DEMO_FOLDER
    amp, style = utils.amp_dtype_name(args.amp, device), Style(model.num_blocks, PAPERS_COLORMAP)
    return draw_demo(RenderJob(model, amp, folder, names, style, args.demo_by, args.demo_images, args.html), loader)


if __name__ == "__main__":
    main()
