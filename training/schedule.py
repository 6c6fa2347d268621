"""The learning-rate schedule: one of timm's, with its state in checkpoints."""

from __future__ import annotations

import argparse
import math

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from utils import UserError

# The entries of a plateau schedule's state that flags do not set
PLATEAU_PROGRESS = {
    **{"best": float, "num_bad_epochs": int, "cooldown_counter": int, "last_epoch": int},
    "_last_lr": lambda rates: list(map(float, rates)),
}


class Schedule:
    """A timm schedule, stepped after every update; plateau after every epoch, because it follows the accuracy."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def step_update(self, updates: int) -> None:
        """Set the learning rate; updates: number done so far, over all epochs."""
        self.scheduler.step_update(updates)

    def step_epoch(self, epochs: int, acc1: float) -> None:
        """Step a plateau schedule; epochs: number done so far; acc1: top-1 of the last epoch, in percent."""
        if self.scheduler.t_in_epochs:
            self.scheduler.step(epochs, acc1)

    def state_dict(self) -> dict:
        """Return the schedule's entry of a checkpoint; all but plateau follow from the number of updates."""
        plateau = getattr(self.scheduler, "lr_scheduler", None)  # timm's state_dict omits it
        if plateau is None:
            return {"plateau": None}
        return {"plateau": plateau.state_dict() | {"restore_lr": self.scheduler.restore_lr}}

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore the progress of a plateau schedule and its learning rate, relative to that of the flags.

        Raises KeyError, ValueError or the like if an entry does not fit.
        """
        plateau, saved = getattr(self.scheduler, "lr_scheduler", None), checkpoint["plateau"]
        if plateau is None or saved is None:
            return
        plateau.load_state_dict({name: kind(saved[name]) for name, kind in PLATEAU_PROGRESS.items()})
        before, groups = checkpoint["optimizer"]["param_groups"][0], self.scheduler.optimizer.param_groups
        without_noise = saved.get("restore_lr")  # None if the rate has no noise, and missing in older checkpoints
        self.scheduler.restore_lr = None if without_noise is None else [0.0] * len(groups)
        for number, group in enumerate(groups):
            scale = group["initial_lr"] / float(before["initial_lr"])
            group["lr"] = float(before["lr"]) * scale
            if not 0 <= group["lr"] < math.inf:
                raise ValueError(f"the learning rate must be finite, got {group['lr']}")
            if without_noise is not None:
                self.scheduler.restore_lr[number] = float(without_noise[0]) * scale


def build_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Schedule:
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            cooldown_epochs=args.cooldown_epochs,
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs,
            noise=args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
            step_on_epochs=args.sched == "plateau",
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched {args.sched}: {error}") from error
    if schedule is None:
        raise UserError("--sched none is not supported; use --sched constant")
    return Schedule(schedule)
