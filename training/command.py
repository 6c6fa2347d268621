"""Runs a command in its process group, and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from training.launch import process_group, single_process
from training.rendezvous import settings_of
from utils import RankError, UserError


def run_cli(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, torch.device], int],
    alone: bool = False,
) -> None:
    """Run a command in its process group, or alone; `run` returns the exit status.

    Raises SystemExit with that status if it is not 0, and with 2 for invalid input. The status is 1 if losses,
    gradients or logits are not finite, or if a data-loader worker is killed.
    """
    try:
        group = (args.device,) if alone else (args.device, args.dist_url, args.world_size, settings_of(args))
        with (single_process if alone else process_group)(*group) as device:
            args.device = args.device or device.type
            status = run(args, device)
        if status:
            raise SystemExit(status)
        return
    except UserError as error:
        status, message, everywhere = 2, str(error), isinstance(error, RankError)
    except FloatingPointError as error:
        status, message, everywhere = 1, str(error), False
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        status, everywhere = 1, True
        message = "a data-loader worker was killed, probably out of memory; reduce --num-workers"
    # Outside the handlers the error is released, and with it the data-loader workers that its frames refer to.
    parser.error(message, status, everywhere)
