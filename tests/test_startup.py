"""Commands print --help and errors in flags without importing torch; tools/startup.py measures the time."""

import subprocess
import sys

import pytest
import startup
from conftest import ROOT
from processes import Script

WITHOUT_TORCH = [command for command, (compared_with, _) in startup.COMMANDS.items() if compared_with == "torch"]
SLOW_TO_IMPORT = ("sklearn", "matplotlib", "jinja2", "tensorboard", "webdataset", "torch.utils.tensorboard")


def imports_of(command) -> set[str]:
    """Return the names of all modules that a command imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, check=False)
    lines = done.stderr.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("command", WITHOUT_TORCH, ids=" ".join)
def test_help_and_invalid_flags_do_not_import_torch(command):
    names = imports_of(command)
    assert "argparse" in names
    assert not {"torch", "timm"} & names


def test_evaluation_does_not_import_unused_packages(image_folder, tmp_path):
    flags = "main_act.py --model avit_micro_patch4_32 --input-size 32 --num_workers 0 --eval --device cpu --data-path"
    code = "import runpy, sys; sys.argv[:2] = []; runpy.run_path(sys.argv[0], run_name='__main__'); print(*sys.modules)"
    process = Script("-c", code, *flags.split(), image_folder, log=tmp_path / "log")
    assert process.wait() == 0, process.errors()
    names = set(process.output().splitlines()[-1].split())
    assert "training.evaluation" in names
    assert not set(SLOW_TO_IMPORT) & names


@pytest.mark.slow
def test_startup_time_is_below_the_limits():
    """The tolerance allows for other load on the machine."""
    command = [sys.executable, "tests/tools/startup.py", "--rounds", "2", "--tolerance", "1.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
