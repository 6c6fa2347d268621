"""Processes for tests, forked from a server that has already imported torch and timm.

A new Python process spends about 4 CPU seconds on these imports. A fork starts in milliseconds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "timm", "pytest", "hypothesis"])
PATIENCE = 300  # seconds after which a process is killed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_processes(function: Callable, *args, processes: int = 2) -> None:
    """Call function(rank, *args) in each process of a gloo group. Raises AssertionError if one of them fails."""
    port = free_port()
    started = [FORKS.Process(target=_enter_group, args=(r, processes, port, function, args)) for r in range(processes)]
    for process in started:
        process.start()
    assert [_exit_status(process) for process in started] == [0] * processes


def script_in_processes(
    processes: int, argv: list, log: Path, script: str = "main_act.py", **options
) -> tuple[list[int], str, str]:
    """Run a script in several processes; return their exit statuses, and what they print on stdout and on stderr.

    log: folder for the output. Unlike torchrun, a process that fails does not end the others.
    """
    started = start_group(processes, argv, log, script, **options)
    statuses = [process.wait() for process in started]
    return statuses, "".join(s.output() for s in started), "".join(s.errors() for s in started)


def start_group(processes: int, argv: list, log: Path, script: str = "main_act.py", **options) -> list[Script]:
    """Start a script in several processes, with the environment that torchrun would give them."""
    port = free_port()
    return [
        Script(script, *argv, log=log / str(rank), environment=_launched(rank, processes, port), **options)
        for rank in range(processes)
    ]


class Script:
    """A running script of the repository, forked instead of started, in a session of its own.

    script: file to run, or "-c" to run the code in argv[0];
    log: path whose parent folder holds the output, in files with the suffixes .out and .err;
    environment: variables to set; prepare: code to run before the script starts.
    The exit status is that of an interpreter: 120 if stdout cannot be flushed at exit.
    """

    def __init__(self, script: str, *argv, log: Path, environment: dict | None = None, prepare: str = ""):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.files = [Path(f"{log}.{end}") for end in ("out", "err")]
        for file in self.files:
            file.write_text("")
        arguments = (self.files, script, [*map(str, argv)], environment or {}, prepare)
        self.process = FORKS.Process(target=_run_script, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def output(self) -> str:
        return self.files[0].read_text()

    def errors(self) -> str:
        return self.files[1].read_text()

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for the condition to hold while the script runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.02)

    def wait(self) -> int:
        """Return the exit status."""
        return _exit_status(self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _exit_status(process: multiprocessing.Process) -> int:
    process.join(PATIENCE)
    process.kill()
    process.join()
    return process.exitcode


def _launched(rank: int, processes: int, port: int) -> dict[str, str]:
    if processes == 1:
        return {}
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in group.items()}


def _enter_group(rank: int, processes: int, port: int, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(_launched(rank, processes, port))
    torch.distributed.init_process_group("gloo")
    function(rank, *args)
    torch.distributed.destroy_process_group()


def _run_script(files: list[Path], script: str, argv: list[str], environment: dict, prepare: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.setsid()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding, "backslashreplace", write_through=True)
    os.chdir(ROOT)
    sys.argv = [script, *argv]
    exec(prepare, {})
    try:
        if script == "-c":
            exec(argv[0], {"__name__": "__main__"})
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:
            os._exit(120)
