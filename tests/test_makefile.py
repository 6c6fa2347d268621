"""The targets of the Makefile."""

import subprocess

import pytest
from conftest import ROOT


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("former", "target"), [("evidence", "experiments"), ("pictures", "example-images")])
def test_former_target_name_runs_same_commands(former, target):
    commands = make("--dry-run", "--no-print-directory", target)
    assert "python" in commands
    assert make("--dry-run", "--no-print-directory", former) == commands


def test_help_lists_targets_without_former_names():
    names = [line.split()[0] for line in make("help").splitlines()]
    assert {"quickstart", "experiments", "example-images", "test", "test-slow", "lint"} <= set(names)
    assert not {"evidence", "pictures"} & set(names)
