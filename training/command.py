"""The frame of every command: errors, a lack of memory and Ctrl-C end with one line and an exit status.

This module does not import torch, which takes seconds. Ctrl-C during that time ends with one line too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from training.parser import Parser
from training.signals import raising_signals

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = (  # parts of the messages of torch, CUDA and the operating system, in lower case
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "alloc_failed",
    "bad_alloc",
)
CONNECTION_LOST = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")


class Ending(NamedTuple):
    """Exit status and line of a command that fails; everywhere: each process prints it, not one per machine."""

    status: int
    message: str
    everywhere: bool = False


def run_cli(
    parser: Parser,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, torch.device], int],
    alone: bool = False,
) -> None:
    """Run a command in its process group, or alone; `run` returns the exit status.

    Raises SystemExit with that status if it is not 0, and see `one_line_errors`.
    """
    with one_line_errors(parser, args):
        from training.launch import process_group, single_process
        from training.rendezvous import settings_of

        group = (args.device,) if alone else (args.device, args.dist_url, args.world_size, partial(settings_of, args))
        with (single_process if alone else process_group)(*group) as device:
            args.device = args.device or device.type
            status = run(args, device)
        if status:
            raise SystemExit(status)


@contextmanager
def one_line_errors(parser: Parser, args: argparse.Namespace) -> Iterator[None]:
    """Turn errors that are not bugs into one line on stderr and SystemExit.

    The status is 2 for invalid input and files that cannot be used, 130 for SIGINT (Ctrl-C), 143 for SIGTERM, and 1
    for other failures: values that are not finite, a lack of memory, a process or a data-loader worker that is lost.
    """
    with raising_signals():
        try:
            yield
            return
        except Exception as error:
            ending = ending_of(error, args)
            if ending is None:
                raise
        except KeyboardInterrupt as error:
            ending = Ending(128 + getattr(error, "number", 2), "")
        # Outside the handlers the error is released, and with it the data-loader workers that its frames refer to.
        if ending.message:
            parser.error(ending.message, ending.status, ending.everywhere)
        parser.end("interrupted", ending.status)


def ending_of(error: Exception, args: argparse.Namespace) -> Ending | None:
    """Return how a command ends after an error, or None if the error is a bug, whose traceback is needed."""
    import utils

    text, ending = str(error).lower(), None
    if isinstance(error, utils.UserError):
        ending = Ending(2, str(error), isinstance(error, utils.RankError))
    elif isinstance(error, FloatingPointError):
        ending = Ending(1, str(error))
    elif isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        ending = Ending(1, memory_message(args, "cuda" in text), True)
    elif "dataloader worker (pid" in text:
        cause = "out of shared memory (/dev/shm)" if "bus error" in text else "probably out of memory"
        ending = Ending(1, f"a data-loader worker was killed, {cause}; reduce --num-workers", True)
    elif utils.world_size() > 1 and any(part in text for part in CONNECTION_LOST):
        message = f"process {utils.rank()} lost another process of the run. See the error of that process."
        ending = Ending(1, message, True)
    elif isinstance(error, OSError):
        reason = error.strerror or str(error)
        ending = Ending(2, f"{error.filename}: {reason}" if error.filename else reason, True)
    return ending


def memory_message(args: argparse.Namespace, on_gpu: bool) -> str:
    """Return an error message for a lack of memory that names the flags to change, with their values."""
    values = vars(args)
    batch_size = values.get("batch_size")
    batch_size = max(batch_size) if isinstance(batch_size, list) else batch_size
    is_training = "epochs" in values and not (values.get("eval") or values.get("demo"))
    fixes = []
    if batch_size and batch_size > 1:
        fixes.append(f"reduce --batch-size, which is {batch_size}")
        if is_training:
            accum_steps = 2 * values["accum_steps"]
            fixes[0] += f" (half of it with --accum-steps {accum_steps} keeps the global batch)"
    if is_training and not values["grad_checkpointing"]:
        fixes.append("pass --grad-checkpointing")
    if values.get("num_workers") and not on_gpu:
        fixes.append(f"reduce --num-workers, which is {values['num_workers']}")
    if "input_size" in values:
        fixes.append("reduce --input-size")
    fixes.append("use a smaller model" if fixes else "close other programs")
    return f"out of {'GPU ' if on_gpu else ''}memory: {', '.join(fixes[:-1])}{' or ' if fixes[1:] else ''}{fixes[-1]}"
