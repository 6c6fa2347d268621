"""timm's model tests, from its source distribution, on every kind of registered model."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
from conftest import ROOT

# The smallest of each kind; the other registered models differ from them in width and image size only.
MODELS = [
    "avit_micro_patch4_32",
    "avit_tiny_patch16_224",
    "avit_tiny_distilled_patch16_224",
    "avit3_small_patch16_224",
    "avit_rotated",  # of timm's Eva, see timm_suite_plugin
    "avit_rotated_per_block",
]
TIMM_TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
)


@pytest.fixture(scope="module")
def timm_tests(tmp_path_factory) -> Path:
    """Return the tests folder of the installed version; skip if no package index can be reached."""
    folder = tmp_path_factory.mktemp("timm")
    version = f"timm=={timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", version]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip("timm's source distribution cannot be downloaded")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


@pytest.mark.slow
@pytest.mark.parametrize("zip_tokens", [False, True], ids=["masked", "zipped"])
def test_timm_model_tests_pass(zip_tokens, timm_tests):
    environment = os.environ | {
        "MODELS": json.dumps(MODELS),
        "ZIP_TOKENS": json.dumps(zip_tokens),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "tools")]),
    }
    options = ["-q", "-p", "timm_suite_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *(f"test_models.py::{name}" for name in TIMM_TESTS), *options]
    done = subprocess.run(command, cwd=timm_tests, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(TIMM_TESTS) * len(MODELS)} passed" in done.stdout
    assert "skipped" not in done.stdout
