"""Allowed names at the top level, and the direction of imports."""

import ast
import subprocess

import pytest
from conftest import ROOT

CORE = {"models_act", "macs", "losses", "datasets", "samplers", "utils", "engine_act"}
CORE_PACKAGES = {"zipping", "readers"}
COMMANDS = {"main_act", "visualize", "benchmark", "compare", "cuda_check", "export_onnx"}
MAY_IMPORT = {  # the other parts, experiments and tests, may import anything, and nothing imports them
    "core": {"core"},
    "visualization": {"core", "visualization"},
    "training": {"core", "visualization", "training"},
    "deployment": {"core", "deployment"},
    "benchmarks": {"core", "training", "deployment", "benchmarks"},
    "commands": {"core", "visualization", "training", "deployment", "benchmarks"},
}
FOLDERS = CORE_PACKAGES | {
    "training",
    "visualization",
    "deployment",
    "benchmarks",
    "experiments",
    "recipes",
    "docs",
    "tests",
    "example_images",
    ".ci",
}
FILES = {f"{name}.py" for name in CORE | COMMANDS} | {"README.md", "LICENSE", "Makefile", "pyproject.toml"}
FILES |= {
    "CONTRIBUTING.md",
    "CITATION.cff",
    ".gitignore",
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-export.txt",
}
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
MODULES = [path for path in TRACKED if path.endswith(".py") and not path.startswith(("tests/", "experiments/"))]


def part_of(module: str) -> str | None:
    """Return the part a module belongs to, by its full name; None for a module from outside this repository."""
    top = module.partition(".")[0]
    parts = {"core": CORE | CORE_PACKAGES, "commands": COMMANDS, "others": {"experiments", "tests"}}
    parts |= {name: {name} for name in ("training", "visualization", "deployment", "benchmarks")}
    return next((name for name, modules in parts.items() if top in modules), None)


def imported(path: str) -> set[str]:
    """Return the full names of the modules that a file imports."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.skipif(not TRACKED, reason="not a git repository")
def test_top_level_has_only_known_names():
    assert {path.partition("/")[0] for path in TRACKED} == FOLDERS | FILES


@pytest.mark.parametrize("path", MODULES)
def test_imports_follow_the_direction_of_parts(path):
    own = part_of(path.removesuffix(".py").replace("/", "."))
    found = {name: part_of(name) for name in imported(path)}
    assert {name: part for name, part in found.items() if part and part not in MAY_IMPORT[own]} == {}


def own_imports(path: str) -> set[str]:
    """Return the top-level names of this repository that a file imports."""
    return {name.partition(".")[0] for name in imported(path) if part_of(name)}


def test_models_need_only_zipping_and_macs():
    assert own_imports("models_act.py") == {"zipping", "macs"}


def test_zipping_and_macs_import_nothing_else():
    files = ["macs.py", *(path for path in MODULES if path.startswith("zipping/"))]
    assert set().union(*map(own_imports, files)) == {"zipping"}


def test_only_the_kernels_import_triton():
    assert [path for path in MODULES if "triton" in imported(path)] == ["zipping/kernels.py"]
