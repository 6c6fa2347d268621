"""Several processes of one run, for tests: forked from a process that has imported torch and timm already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "timm", "pytest", "hypothesis"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_processes(function, *args, processes: int = 2) -> None:
    """function(rank, *args) in each process of a group over gloo; AssertionError where one fails."""
    assert _statuses(_enter_group, processes, function, args) == [0] * processes


def main_in_processes(processes: int, argv: list[str], log: Path) -> tuple[list[int], str, str]:
    """main_act.py with these flags in each of them, as torchrun starts it -> exit statuses, stdout, stderr, of all.

    log: a folder for what they print. One that fails does not end the others, as torchrun would.
    """
    log.mkdir(parents=True, exist_ok=True)
    statuses = _statuses(_main, processes, argv, log)
    return statuses, *("".join((log / f"{r}.{end}").read_text() for r in range(processes)) for end in ("out", "err"))


def _statuses(target, processes: int, *args) -> list[int]:
    port = free_port()
    started = [FORKS.Process(target=target, args=(rank, processes, port, *args)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def _set_environment(rank: int, processes: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _enter_group(rank: int, processes: int, port: int, function, args) -> None:
    import torch

    _set_environment(rank, processes, port)
    torch.distributed.init_process_group("gloo")
    function(rank, *args)
    torch.distributed.destroy_process_group()


def _main(rank: int, processes: int, port: int, argv: list[str], log: Path) -> None:
    import main_act

    _set_environment(rank, processes, port)
    with contextlib.ExitStack() as streams:
        for redirect, end in ((contextlib.redirect_stdout, "out"), (contextlib.redirect_stderr, "err")):
            streams.enter_context(redirect(streams.enter_context((log / f"{rank}.{end}").open("w"))))
        main_act.main(argv)
