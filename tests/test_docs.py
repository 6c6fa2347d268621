"""Check README, docs and recipes against the code, each other, the results they quote, and the rules of style."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT

import benchmark
import cuda_check
import export_onnx
import models_act
import visualize
from experiments.baselines_report import GATE_ABLATIONS, METHODS, RECIPE_ABLATIONS
from training.arguments import make_parser

README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CLUTTERED, FASHION_MNIST, CLIPART = (ROOT / "experiments" / name for name in ("cluttered", "fashion_mnist", "clipart"))
VARIED = CLUTTERED / "varied"
PAGES = [README, CONTRIBUTING, *DOCS, *sorted((ROOT / "experiments").glob("*/*.md")), VARIED / "README.md"]
RECIPES = sorted((ROOT / "recipes").glob("*.args"))
MAKERS = {"main_act.py": make_parser, "visualize.py": visualize.make_parser}
MAKERS |= {"benchmark.py": benchmark.make_parser, "cuda_check.py": cuda_check.make_parser}
MAKERS |= {"export_onnx.py": export_onnx.make_parser}
FLAGS = {script: set(make()._option_string_actions) for script, make in MAKERS.items()}
LAUNCHER_FLAGS = {"--nproc-per-node", "--max-restarts"}  # flags of torchrun that a page mentions
RUN_FLAGS = ("data_path", "output_dir", "pretrained_path", "resume")  # flags that differ between runs of one recipe

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# The commands of the original README, which users have in their scripts.
ORIGINAL_COMMANDS = {
    "tiny": "python -m torch.distributed.launch --nproc_per_node=4 --use_env main_act.py --model avit_tiny_patch16_224 "
    "--data-path <imagenet> --output_dir ./results/<name> --pretrained --batch-size 128 --lr 0.0005 --tensorboard "
    "--epochs 100 --gate_scale 10.0 --gate_center 30 --warmup-epochs 5 --ponder_token_scale 0.0005 "
    "--distr_prior_alpha 0.001",
    "small": "python -m torch.distributed.launch --nproc_per_node=4 --use_env main_act.py --model "
    "avit_small_patch16_224 --data-path <imagenet> --output_dir ./results/<name> --pretrained --batch-size 96 "
    "--lr 0.0003 --tensorboard --epochs 100 --gate_scale 10.0 --gate_center 75 --warmup-epochs 5 "
    "--ponder_token_scale 0.0005 --distr_prior_alpha 0.001",
    "demo": "python -m torch.distributed.launch --nproc_per_node=1 --use_env main_act.py --model avit_tiny_patch16_224 "
    "--data-path <imagenet> --finetune a-vit-weights/visualization-tiny.pth --demo",
}


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def code_lines(page: Path) -> list[str]:
    """Return the lines of the code blocks of a page. A line that ends with a backslash is joined with the next."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines()


def arguments_of(line: str, script: str) -> list[str]:
    """Return the arguments that a command line passes to a script, or none if it does not run the script."""
    words = shlex.split(line, comments=True) if script in line else []
    return words[words.index(script) + 1 :] if script in words else []


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def table_rows(page: Path) -> list[list[str]]:
    """Return the cells of every table row of a page."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def settings(words: list[str]) -> dict:
    """Parse the flags of a recipe or a command, without RUN_FLAGS. Raises SystemExit if a flag is unknown."""
    return {name: value for name, value in vars(make_parser().parse_args(words)).items() if name not in RUN_FLAGS}


def test_readme_has_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


@each_page
def test_links_and_images_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", prose(target), flags=re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub's are
        assert not anchor or anchor in anchors, link


@each_page
def test_flags_exist(page):
    """Check the flags in commands and those in the text."""
    for script, known in FLAGS.items():
        assert {flag for line in code_lines(page) for flag in flags_in(arguments_of(line, script))} <= known, script
    spans = re.findall(r"`([^`]+)`", prose(page))
    assert {flag for span in spans for flag in flags_in(span.split())} <= LAUNCHER_FLAGS.union(*FLAGS.values())


QUOTED = {  # pages with result tables, and the files that the rows come from
    README: CLUTTERED / "results" / "baselines.md",
    CLUTTERED / "README.md": CLUTTERED / "results" / "baselines.md",
    VARIED / "README.md": VARIED / "baselines.md",
    CLIPART / "README.md": CLIPART / "results" / "baselines.md",
    FASHION_MNIST / "README.md": FASHION_MNIST / "results" / "baselines" / "baselines.md",
}


@pytest.mark.parametrize(("page", "results"), QUOTED.items(), ids=lambda path: str(path.relative_to(ROOT)))
def test_quoted_rows_are_in_the_results(page, results):
    names = {*METHODS.values(), *RECIPE_ABLATIONS.values(), *GATE_ABLATIONS.values()}
    measured = [row for row in table_rows(page) if row[0] in names]
    found = table_rows(results)
    assert len(measured) >= 7
    assert [row for row in measured if not any(row == other[: len(row)] for other in found)] == []


@pytest.mark.parametrize("command", ORIGINAL_COMMANDS.values(), ids=ORIGINAL_COMMANDS)
def test_readme_contains_the_original_commands(command):
    assert command in [line.partition(" # ")[0].rstrip() for line in code_lines(README)]


@pytest.mark.parametrize("name", timm.list_models("avit*"))
def test_model_table_matches_the_models(name):
    """Check parameters, static MACs at the default image size, and the source of the weights."""
    model = timm.create_model(name, device="meta")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    macs = models_act.macs_per_image(model, torch.full((1, tokens), model.num_blocks)).item()
    parameters = sum(p.numel() for p in model.parameters())
    source = f"`{models_act.SOURCES[name]}`" if models_act.SOURCES.get(name) else "nothing"
    rows = [row for row in table_rows(ROOT / "docs" / "models.md") if row[0] == f"`{name}`"]
    assert [row[-3:] for row in rows] == [[f"{parameters / 1e6:.1f} M", f"{macs / 1e9:.2f} G", source]]


def command_of(recipe: str) -> str:
    """Return the command line that a recipe stands for: the original's, or the measured one."""
    if recipe.startswith("imagenet_"):
        return ORIGINAL_COMMANDS[recipe.removeprefix("imagenet_")]
    return json.loads((FASHION_MNIST / "results" / "adaptive_0.json").read_text())["command"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_equals_its_command(recipe):
    """A recipe starts with a comment that describes it, and has one flag with its values per line."""
    head, *lines = recipe.read_text().splitlines()
    assert head.startswith("# ")
    assert all(line == "" or line.startswith(("# ", "--")) for line in lines)
    assert all(len(flags_in(line.split())) == 1 for line in lines if line.startswith("--"))
    own = settings([f"@{recipe}"])
    if recipe.stem.startswith("digits_"):
        assert f"@recipes/{recipe.name}" in (ROOT / "Makefile").read_text()
    else:
        assert own == settings(arguments_of(command_of(recipe.stem), "main_act.py"))


# Prose -------------------------------------------------------------------------------------------

MAX_WORDS, MAX_WORDS_P90 = 40, 27  # words in a sentence: the maximum, and the 90th percentile
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "vs.", "Jose M.")
LONG_FORM = re.compile(r"multiply-(?:accumulate|add)s?\b")  # of MACs
BRITISH = (
    r"analys(?:e|ed|ing)|artefacts?|behaviours?|cancelled|centr(?:e|ed|es|ing)|colour\w*|defence|"
    r"favour\w*|grey\w*|initialis\w*|judgement|labell\w*|licence\w*|modell(?:ed|ing)|neighbour\w*|normalis\w*|"
    r"optimis(?:e|ed|er|es|ing)|organis\w*|penalis\w*|programmes?|quantis\w*|recognis\w*|regularis\w*|serialis\w*|"
    r"spelt|learnt|summaris\w*|synchronis\w*|tokenis\w*|travell\w*|tyres?|utilis\w*|visualis\w*"
)


def paragraphs(text: str) -> list[str]:
    """Split a page into paragraphs and list items, without code, tables, headings and images.

    A span of code becomes one word, a link its text.
    """
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^(?:\||#+ ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"``?[^`]+``?", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^ *(?:[*-]|\d+\.) ", "\n", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text: str) -> list[str]:
    """Split the prose of a page into sentences."""
    found = []
    for paragraph in paragraphs(text):
        for abbreviation in ABBREVIATIONS:
            paragraph = paragraph.replace(abbreviation, abbreviation.replace(".", "\0"))
        found += re.split(r"(?<=[.!?])[*_)\"]*\s+(?=[*_(\"]*[A-Z0-9]|code)", paragraph)
    return [sentence.replace("\0", ".") for sentence in found]


def count_words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def test_prose_is_split_into_sentences():
    text = """# A heading that is no sentence

One sentence with `code of many words. Not a second`, e.g. this. A second one, of
two lines: [a link](page.md#anchor).

* An item. *Emphasis ends it.* `code` begins the next.
1. A numbered item

| a table | is not prose. It is not. |
```bash
nor is code. It is not.
```
"""
    assert sentences(text) == [
        "One sentence with code, e.g. this.",
        "A second one, of two lines: a link.",
        "An item.",
        "*Emphasis ends it.",
        "code begins the next.",
        "A numbered item",
    ]
    assert count_words("A - 2 x `code`, twice.") == 5


@each_page
def test_sentences_are_short(page):
    too_long = [sentence for sentence in sentences(page.read_text()) if count_words(sentence) > MAX_WORDS]
    assert too_long == []


def test_90_percent_of_sentences_are_shorter():
    lengths = sorted(count_words(sentence) for page in PAGES for sentence in sentences(page.read_text()))
    assert lengths[len(lengths) * 9 // 10] <= MAX_WORDS_P90


@each_page
def test_spelling_is_american(page):
    words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose(page))
    assert re.findall(rf"\b(?:{BRITISH})\b", words, flags=re.IGNORECASE) == []


@each_page
def test_macs_are_defined_once(page):
    """A page that uses MACs names the long form exactly once, next to the short one. Code blocks are exempt."""
    text = prose(page)
    defining = [paragraph for paragraph in paragraphs(page.read_text()) if LONG_FORM.search(paragraph)]
    assert all("MACs" in paragraph for paragraph in defining)
    assert len(LONG_FORM.findall(text)) == len(defining) == ("MACs" in text)


# Code of the pages -------------------------------------------------------------------------------


def python_blocks() -> dict[str, str]:
    """Return the Python blocks of README, CONTRIBUTING and docs, by page and position.

    The pages mark fragments that do not run as `py`. Two more blocks are tested elsewhere: docs/deployment.md in
    test_deployment_docs.py, and the segmentation of docs/models.md in test_any_vit.py.
    """
    pages = [page for page in (README, CONTRIBUTING, *DOCS) if page.name != "deployment.md"]
    found = {}
    for page in pages:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        found |= {f"{page.stem}-{number}": block for number, block in enumerate(blocks) if "Segmenter" not in block}
    return found


@pytest.mark.parametrize("code", python_blocks().values(), ids=python_blocks())
def test_python_of_the_pages_runs(code, monkeypatch):
    """Random weights stand in for pretrained ones, so that nothing is downloaded."""
    create = timm.create_model

    def create_random(*args, pretrained: bool = False, **kwargs):
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_random)
    monkeypatch.chdir(ROOT)
    exec(code, {})


def test_estimate_for_imagenet_is_what_its_code_prints(monkeypatch, capsys):
    page = ROOT / "docs" / "performance.md"
    (code,) = (code for code in python_blocks().values() if "1_281_167" in code)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 8
    assert printed in page.read_text()


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_readme_names_the_main_commands(command):
    assert command in README.read_text()


def test_differences_of_the_results_page_are_in_the_results():
    measured, _, published = (ROOT / "docs" / "results.md").read_text().partition("## Published checkpoints")
    results = "".join(page.read_text() for page in set(QUOTED.values()))
    pages = "".join((folder / "README.md").read_text() for folder in (CLUTTERED, VARIED, FASHION_MNIST, CLIPART))
    pages += (FASHION_MNIST / "recipe.md").read_text()
    differences = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", measured)
    assert len(differences) >= 36
    assert [difference for difference in differences if difference not in results + pages] == []
    assert "±" not in published
