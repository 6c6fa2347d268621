"""The recorded results of the repository are recognized by the pipelines that produced them."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PIPELINES = {
    "cluttered": ["cluttered/run.sh"],
    "fashion_mnist_baselines": ["fashion_mnist/baselines.sh"],
    "fashion_mnist": ["fashion_mnist/run.sh", "trials"],
}
UNFINISHED = ["clipart/run.sh", "cluttered/varied.sh"]


def run_pipeline(tmp_path, script, *part):
    """Run a pipeline with a script as python, which writes its first arguments to the file calls.

    Only the program that prints the counts of a recorded model runs, as they are part of a command.
    """
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "experiments", repository / "experiments", ignore=shutil.ignore_patterns("runs"))
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$3" != counts ] || exec {sys.executable} "$@"\necho "$2 $3" >> {tmp_path}/calls\n'
    )
    python.chmod(0o755)
    command = ["bash", str(repository / "experiments" / script), str(tmp_path / "data"), *part]
    environment = {**os.environ, "PYTHON": str(python), "JOBS": "50", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_pipeline_with_all_results_recorded_runs_no_stage(tmp_path, pipeline):
    """Only the data split, the logs and the report run."""
    done = run_pipeline(tmp_path, *pipeline)
    assert done.returncode == 0, done.stderr
    assert "==" not in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls[:2]] == [["experiments.stages", "split"], ["experiments.stages", "logs"]]
    assert len(calls) == 3
    assert "report" in calls[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", UNFINISHED)
def test_unfinished_pipeline_accepts_its_recorded_results(tmp_path, script):
    """A stage that another command recorded would end the pipeline with an error."""
    done = run_pipeline(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert "pipeline finished" in done.stdout
    assert "== direction0.3_0:" not in done.stdout  # recorded
