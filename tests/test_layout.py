"""Allowed names at the top level, and the direction of imports."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter

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
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 45  # a file is read in one go, a function fits on a screen
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
    kernels = {"zipping/kernels.py", "zipping/planned/kernels.py", "zipping/planned/triton_kernels.py"}
    assert {path for path in MODULES if "triton" in imported(path)} == kernels


def module_imports(path: str) -> set[str]:
    """Return the files of this repository that a file imports at module level, outside functions and type checks."""
    tree = ast.parse((ROOT / path).read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {name.replace(".", "/") for name in found}
    return {path for file in files for path in (f"{file}.py", f"{file}/__init__.py") if path in MODULES}


def test_imports_have_no_circle():
    TopologicalSorter({path: module_imports(path) - {path} for path in MODULES}).prepare()  # CycleError names a circle


@pytest.mark.parametrize("path", MODULES)
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES}
    assert (text.count("\n") <= MAX_FILE_LINES, long) == (True, {})


@pytest.mark.parametrize("package", sorted({"training", "zipping/planned"} | CORE_PACKAGES))
def test_packages_describe_each_module(package):
    described = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert {name for name in modules if not re.search(rf"`{name}(\.py)?`", described)} == set()


# Openings without a verb in the imperative and without a noun; ruff's D401 knows the other verb forms.
NO_VERB = {"Of", "What", "Whether", "Over", "Where", "From", "As", "That", "How", "Which", "When", "Who", "Why", "With"}


@pytest.mark.parametrize("path", MODULES)
def test_docstrings_open_with_a_verb_or_a_noun(path):
    nodes = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    docstrings = {node.name: ast.get_docstring(node) for node in nodes if ast.get_docstring(node)}
    assert {name: text for name, text in docstrings.items() if text.split()[0].strip(",.:") in NO_VERB} == {}


@pytest.mark.parametrize("path", MODULES)
def test_messages_spell_flags_as_help_does(path):
    tree = ast.parse((ROOT / path).read_text())
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and n.body]
    docstrings = {getattr(node.body[0], "value", None) for node in documented}
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in docstrings]
    assert [text for text in texts if isinstance(text, str) and re.search(r"--[a-z]+_[a-z]", text)] == []
