"""A substitute for `python` in shell scripts that tests run: it forks a process that has imported torch and timm.

    with warm_python() as python:
        subprocess.run(["bash", "run.sh"], env={**os.environ, "PYTHON": str(python)})

`python` is a program that takes a script or `-m module`, and their arguments. It passes them with its environment,
working directory and streams to a server, which forks a process for them. That process joins the process group of
its caller, so that signals to the group reach it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from processes import FORKS, ROOT

CLIENT = """#!{python} -ISE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "group": os.getpgrp(), "environment": dict(os.environ)}}
    request = json.dumps(request).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    status = server.recv(1)
sys.exit(status[0] if status else 1)
"""


@contextlib.contextmanager
def warm_python() -> Iterator[Path]:
    """Yield the path of the program."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address, program = f"{folder}/socket", Path(folder) / "python"
        listener.bind(address)
        listener.listen(16)
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        server = FORKS.Process(target=_serve, args=(listener,))
        server.start()
        try:
            yield program
        finally:
            server.kill()
            server.join()


def _serve(listener: socket.socket) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the processes that answer
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(client)
            os._exit(0)
        client.close()


def _answer(client: socket.socket) -> None:
    """Run what the client asks for in a child process, and send its exit status."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        client.close()
        os._exit(_run(request, streams))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):  # the client was killed too
        client.sendall(bytes([status if status >= 0 else 128 - status]))


def _run(request: dict, streams: list[int]) -> int:
    """Run a module or a script as an interpreter would, and return the exit status."""
    with contextlib.suppress(PermissionError):  # not possible if the caller is in another session
        os.setpgid(0, request["group"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
    elsewhere = [path for path in sys.path if Path(path) != ROOT and not Path(path).is_relative_to(ROOT / "tests")]
    sys.path = [os.getcwd(), *elsewhere]
    first, *rest = request["argv"]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    return status or 0
