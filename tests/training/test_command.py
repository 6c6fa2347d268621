"""Every command ends with one line and an exit status, whatever happens."""

import argparse
import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_image_folder, save_halting_micro
from processes import Script, script_in_processes, start_group
from test_layout import MODULES

import benchmark
import compare
import cuda_check
import export_onnx
import main_act
import visualize
from training.command import ending_of, one_line_errors, run_cli
from training.parser import Parser
from utils import RankError, UserError

SMALL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--no-model-ema"]
MANY = 2**62  # bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    checkpoint = save_halting_micro(root / "c.pth", num_classes=2)
    return make_image_folder(root / "data", classes=2, train=4, val=4), checkpoint


def stopped(call, capsys) -> tuple[int, str]:
    """Return exit status and stderr of a command that ends with SystemExit."""
    with pytest.raises(SystemExit) as stop:
        call()
    return stop.value.code, capsys.readouterr().err


def frame(error: BaseException, **flags):
    def run(args, device):
        raise error

    args = argparse.Namespace(device="cpu", **flags)
    return lambda: run_cli(Parser(prog="x.py"), args, run, alone=True)


ERRORS = {
    "user": (UserError("--x: bad"), 2, "--x: bad"),
    "rank": (RankError("--x: bad"), 2, "--x: bad"),
    "not finite": (FloatingPointError("not finite"), 1, "not finite"),
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    "unwritable": (PermissionError(errno.EACCES, "Permission denied", "/f"), 2, "/f: Permission denied"),
    "memory": (MemoryError(), 1, "out of memory: close other programs"),
    "fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "out of memory: close other programs"),
    "CUDA": (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 1, "out of GPU memory: close other programs"),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
        1,
        "out of GPU memory: close other programs",
    ),
    "killed": (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), 1, "a data-loader worker was"),
    "shm": (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), 1, "a data-loader worker was"),
}


@pytest.mark.parametrize(("error", "status", "line"), ERRORS.values(), ids=ERRORS)
def test_error_ends_with_one_line(capsys, error, status, line):
    code, errors = stopped(frame(error), capsys)
    assert (code, errors.count("\n")) == (status, 1)
    assert errors.startswith(f"x.py: error: {line}")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(MANY, dtype=torch.uint8), lambda: np.empty(MANY, np.uint8)])
def test_failed_allocation_is_recognized(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as failed:
        allocate()
    assert "out of memory" in ending_of(failed.value, argparse.Namespace()).message


def test_error_of_the_program_keeps_its_traceback():
    for error in (
        RuntimeError("a bug"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
        KeyError(1),
    ):
        with pytest.raises(type(error)):
            frame(error)()


def memory_line(argv, parse, **changes):
    args = parse(argv)
    vars(args).update(changes)
    return ending_of(MemoryError(), args).message


def test_lack_of_memory_names_the_flags_of_the_command():
    train = memory_line(["--batch-size", "200", "--accum-steps", "2"], main_act.arguments.parse_args, num_workers=3)
    assert train == (
        "out of memory: reduce --batch-size, which is 200 (half of it with --accum-steps 4 keeps the global batch), "
        "pass --grad-checkpointing, reduce --num-workers, which is 3, reduce --input-size or use a smaller model"
    )
    evaluation = memory_line(["--eval", "--batch-size", "8", "--num_workers", "0"], main_act.arguments.parse_args)
    assert evaluation == "out of memory: reduce --batch-size, which is 8, reduce --input-size or use a smaller model"
    measured = memory_line(["--batch-size", "1", "64"], benchmark.make_parser().parse_args)
    assert "reduce --batch-size, which is 64" in measured
    assert "accum" not in measured
    assert "--batch-size" not in memory_line(["c.pth", "o.onnx"], export_onnx.make_parser().parse_args)


def test_single_process_reads_no_settings(monkeypatch):
    """The checksum of a checkpoint takes seconds, and there is nothing to compare it with."""

    def fail(args):
        raise AssertionError

    monkeypatch.setattr("training.rendezvous.settings_of", fail)
    devices = []
    args = argparse.Namespace(device="cpu", dist_url="env://", world_size=None)
    run_cli(Parser(prog="x.py"), args, lambda args, device: devices.append(device.type))
    assert devices == ["cpu"]


@pytest.fixture
def own_handlers():
    """Install the default handlers: a shell starts background jobs with SIGINT ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_with_one_line(capsys, number):
    before = signal.getsignal(number)

    def run(args, device):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a launcher repeats it

    code, errors = stopped(lambda: run_cli(Parser(prog="x.py"), argparse.Namespace(device="cpu"), run, True), capsys)
    assert (code, errors) == (128 + number, "x.py: interrupted\n")
    assert signal.getsignal(number) == before


def test_handlers_of_a_calling_program_stay(monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with one_line_errors(Parser(prog="x.py"), argparse.Namespace()):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it for its background jobs
import time
from training.loaders import ImageLoader
batches = ImageLoader.__iter__
def slow(self):
    for batch in batches(self):
        print("reading", flush=True)
        yield batch
        time.sleep(60)
ImageLoader.__iter__ = slow
"""


@pytest.mark.parametrize(("mode", "name"), [("--eval", "SIGINT"), ("--demo", "SIGTERM")])
def test_signal_ends_commands_and_their_workers(tmp_path, data, mode, name):
    """The signal goes to all processes and their data-loader workers, as from a terminal. One process prints."""
    folder, checkpoint = data
    out = tmp_path / "out"
    argv = [*SMALL, "--num_workers", 1, "--data-path", folder, "--finetune", checkpoint, "--output_dir", out]
    group = start_group(2, [*argv, mode], tmp_path, prepare=SLOW)
    for process in group:
        process.wait_until(lambda p=process: "reading" in p.output())
    for process in group:
        os.killpg(process.pid, getattr(signal, name))
    status = 128 + getattr(signal, name)
    assert [process.wait() for process in group] == [status, status]
    assert [process.errors() for process in group] == ["main_act.py: interrupted\n", ""]
    for process in group:  # no worker is left in the session
        assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout == b""
    assert not list(out.rglob("*.partial"))


NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_that_is_missing"}


@pytest.mark.slow
def test_pictures_are_drawn_from_a_notebook(tmp_path, data):
    folder, checkpoint = data
    drawn, training = tmp_path / "drawn", ["--epochs", 1, "--tensorboard", "--output_dir", tmp_path / "out"]
    commands = {
        "visualize.py": [folder / "val", "--finetune", checkpoint, "--animation", "none", "--output-dir", drawn],
        "main_act.py": [*SMALL, "--num_workers", 0, "--data-path", folder, *training],
        "benchmark.py": [*SMALL[:2], "--rounds", 1, "--batch-size", 1, "--plot", tmp_path / "p.pdf"],
    }
    for script, argv in commands.items():
        process = Script(script, *argv, log=tmp_path / script, environment=NOTEBOOK)
        assert process.wait() == 0, process.errors()
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(drawn.glob("*.png"))) == 8


def test_report_of_experiments_is_drawn_from_a_notebook():
    command = [sys.executable, "-m", "experiments.baselines_report", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | NOTEBOOK, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_modules_leaves_the_backend_alone():
    assert [path for path in MODULES if "MPLBACKEND" in (ROOT / path).read_text()] == ["training/parser.py"]
    code = "import os, training.parser; assert os.environ['MPLBACKEND'] == 'svg'"
    environment = os.environ | {"MPLBACKEND": "svg"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0


LOST = """
import os, utils
import torch.distributed as dist
gather = utils.all_gather_objects
def lost(value):
    if dist.is_initialized() and dist.get_rank() == 1 and os.path.exists({!r}):
        os._exit(9)
    return gather(value)
utils.all_gather_objects = lost
"""


def test_lost_process_gives_one_line(tmp_path, data):
    folder, checkpoint = data
    (tmp_path / "now").touch()
    argv = [*SMALL, "--num_workers", 0, "--data-path", folder, "--finetune", checkpoint, "--eval"]
    statuses, _, errors = script_in_processes(2, argv, tmp_path / "log", prepare=LOST.format(str(tmp_path / "now")))
    assert statuses == [1, 9]
    assert errors.count("\n") == 1
    assert "process 0 lost another process of the run. See the error of that process." in errors


@pytest.mark.parametrize(
    "command", [main_act, visualize, benchmark, export_onnx, cuda_check, compare], ids=lambda m: m.__name__
)
def test_every_command_has_the_frame(monkeypatch, capsys, command, tmp_path):
    """A lack of memory anywhere in the command's work is one line."""

    def fail(*_):
        raise MemoryError

    argv = {
        visualize: ["--curves", tmp_path],
        export_onnx: [tmp_path, tmp_path / "o.onnx"],
        compare: [tmp_path],
        cuda_check: ["--device", "cpu"],
    }.get(command, ["--device", "cpu"])
    monkeypatch.setattr(command, {export_onnx: "export", compare: "print_table"}.get(command, "run"), fail)
    code, errors = stopped(lambda: command.main([*map(str, argv)]), capsys)
    assert code == 1
    assert errors.startswith(f"{command.__name__}.py: error: out of memory: ")
