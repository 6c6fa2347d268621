"""The recorded results of the repository are recognized by the pipelines that produced them."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

PIPELINES = {
    "cluttered": ["cluttered/run.sh"],
    "fashion_mnist_baselines": ["fashion_mnist/baselines.sh"],
    "fashion_mnist": ["fashion_mnist/run.sh", "trials"],
}


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_pipeline_with_all_results_recorded_runs_no_stage(tmp_path, pipeline):
    """Only the data split, the logs and the report run: python is replaced by a script that prints its arguments."""
    script, *part = pipeline
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "experiments", repository / "experiments", ignore=shutil.ignore_patterns("runs"))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$2 $3" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    command = ["bash", str(repository / "experiments" / script), str(tmp_path / "data"), *part]
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "==" not in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls[:2]] == [["experiments.stages", "split"], ["experiments.stages", "logs"]]
    assert len(calls) == 3
    assert "report" in calls[2]
