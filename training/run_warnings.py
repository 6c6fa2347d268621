"""Warnings before training: settings whose numbers do not fit each other or the dataset."""

from __future__ import annotations

import argparse

import utils
from engine_act import MAX_START_SHARE, Trainer
from training.flag_effects import DECAYS_TO_MIN_LR
from training.loaders import ImageLoader
from utils import warn

MIN_UPDATES = 10  # an average over fewer optimizer steps is not worth a decay of its own


def warn_about_settings(args: argparse.Namespace, trainer: Trainer, loader: ImageLoader, updates: int) -> None:
    """Print a warning about each setting that does not do what its number says.

    trainer: its optimizer has a schedule;
    updates: number of optimizer steps of the whole run
    """
    lr = max(group["initial_lr"] for group in trainer.optimizer.param_groups)  # `lr` is that of warm-up by now
    warn_about_rates(args, lr)
    warn_about_batches(args, lr, loader)
    if trainer.ema is not None:
        warn_about_average(args.model_ema_decay, updates)
    model = trainer.model_without_ddp
    if model.halting and model.gate_directions is not None and trainer.budget is None:
        warn(
            "the gate of the checkpoint reads directions, which get no gradient, so that --ponder-token-scale and "
            "--distr-prior-alpha change nothing. Pass --target-macs to train to a budget, or --gate channel"
        )


def warn_about_rates(args: argparse.Namespace, lr: float) -> None:
    """Warn about learning-rate flags that contradict each other; lr: the scaled learning rate."""
    scaled = f"the learning rate {lr:g} (--lr scaled to this batch size)"
    if args.sched in DECAYS_TO_MIN_LR and args.min_lr > lr:
        warn(
            f"--min-lr {args.min_lr:g} is above {scaled}; the rate rises during training. "
            "Pass --min-lr 0 or a larger --lr"
        )
    if args.warmup_epochs >= args.epochs > 0:
        warn(
            f"--warmup-epochs {args.warmup_epochs:g} is not below --epochs {args.epochs}; "
            f"training ends before it reaches {scaled}. Pass fewer --warmup-epochs"
        )
    elif args.warmup_epochs and args.warmup_lr > lr:
        warn(
            f"--warmup-lr {args.warmup_lr:g} is above {scaled}; the rate falls during warm-up. Pass a lower --warmup-lr"
        )
    if args.sched == "step" and args.decay_epochs >= args.epochs:
        warn(
            f"--decay-epochs {args.decay_epochs:g} is not below --epochs {args.epochs}, so --sched step never lowers "
            "the learning rate. Pass fewer --decay-epochs"
        )


def warn_about_batches(args: argparse.Namespace, lr: float, loader: ImageLoader) -> None:
    """Warn if no optimizer step of an epoch sees as many images as the learning rate is scaled to."""
    batch = loader.batch_size if loader.drop_last else len(loader.sampler)  # the only batch may be incomplete
    batches = min(args.accum_steps, loader.batches_per_epoch)
    if batch == loader.batch_size and batches == args.accum_steps:
        return
    processes = utils.world_size()
    fix = f"--accum-steps {batches}" if batch == loader.batch_size else f"--batch-size {batch}"
    fix += " and --accum-steps 1" if batch < loader.batch_size and args.accum_steps > 1 else ""
    warn(
        f"the learning rate {lr:g} is scaled to {args.batch_size * args.accum_steps * processes} images per optimizer "
        f"step (--batch-size {args.batch_size} x --accum-steps {args.accum_steps} x processes {processes}), but the "
        f"dataset is so small that a step has at most {batch * batches * processes}. Pass {fix}"
    )


def warn_about_average(decay: float, updates: int) -> None:
    """Warn if the moving average stays close to the weights that training starts from.

    updates: number of optimizer steps of the whole run
    """
    share = decay**updates
    if share <= MAX_START_SHARE:
        return
    fix = "--no-model-ema"
    if updates >= MIN_UPDATES:
        fix = f"--model-ema-decay {1 - float(f'{5 / updates:.1g}'):g} or {fix}"  # then exp(-5) of the start remains
    warn(
        f"the averaged weights (EMA) stay close to the start of training: with --model-ema-decay {decay:g} and "
        f"{updates} optimizer steps, {share:.0%} of the average is the starting weights. Pass {fix}"
    )
