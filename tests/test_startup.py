"""Commands answer at once: see tools/startup.py, which measures it."""

import subprocess
import sys

import pytest
import startup
from conftest import ROOT

AT_ONCE = [command for command, (compared_with, _) in startup.COMMANDS.items() if compared_with == "torch"]
SLOW_TO_IMPORT = ("sklearn", "matplotlib", "jinja2", "tensorboard", "webdataset", "torch.utils.tensorboard")


def imports_of(command) -> set[str]:
    """Names of all modules that a command imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, check=False)
    lines = done.stderr.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("command", AT_ONCE, ids=" ".join)
def test_help_and_mistakes_do_not_wait_for_torch(command):
    names = imports_of(command)
    assert "argparse" in names
    assert not {"torch", "timm"} & names


def test_an_evaluation_imports_what_it_uses(image_folder):
    flags = "main_act.py --model avit_micro_patch4_32 --input-size 32 --num_workers 0 --eval --device cpu --data-path"
    names = imports_of([*flags.split(), str(image_folder)])
    assert "timm" in names
    assert not set(SLOW_TO_IMPORT) & names


@pytest.mark.slow
def test_cpu_time_before_the_work():
    """With room for the noise of a machine that does other things too."""
    command = [sys.executable, "tests/tools/startup.py", "--runs", "2", "--tolerance", "1.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
