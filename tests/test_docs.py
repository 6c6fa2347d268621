"""README, docs and recipes agree with the code, with each other and with the results that they quote."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT

import benchmark
import models_act
import visualize
from training.arguments import make_parser

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.args"))
FASHION_MNIST = ROOT / "experiments" / "fashion_mnist" / "results"
PARSERS = {
    "main_act.py": make_parser(),
    "visualize.py": visualize.make_parser(),
    "benchmark.py": benchmark.make_parser(),
}
LAUNCHERS_FLAGS = {"--nproc-per-node", "--max-restarts"}  # torchrun's, where a page speaks of them
OF_A_RUN = ("data_path", "output_dir", "pretrained_path", "resume")  # what a recipe need not say

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)

# As the original's README has them, so as they are in people's scripts.
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


# What a page holds -------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def code_lines(text: str) -> list[str]:
    """The lines of its code blocks, those that end with a backslash joined with the next."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    return re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines()


def arguments_of(line: str, script: str) -> list[str] | None:
    """What a command line gives to one of our scripts; None where it does not run it."""
    if script not in line:
        return None
    words = shlex.split(line, comments=True)
    if script not in words:
        return None
    words = words[words.index(script) + 1 :]
    return words[: words.index("||")] if "||" in words else words


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cells(page: Path) -> list[list[str]]:
    """The cells of every row of its tables."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def recipe_words(recipe: Path) -> list[str]:
    return shlex.split(recipe.read_text(), comments=True)


def recipe_values(words: list[str]) -> dict:
    """What a recipe or a command sets, without what belongs to one run of it."""
    values = vars(make_parser().parse_args(words))
    return {name: value for name, value in values.items() if name not in OF_A_RUN}


# Pages -------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@each_page
def test_links_and_pictures_are_there(page):
    text = re.sub(r"`[^`]*`", "", prose(page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_flags_of_commands_exist(page):
    lines = code_lines(page.read_text())
    for script, parser in PARSERS.items():
        for words in filter(None, (arguments_of(line, script) for line in lines)):
            assert flags_in(words) <= parser._option_string_actions.keys(), (script, words)


@each_page
def test_flags_spoken_of_exist(page):
    known = LAUNCHERS_FLAGS.union(*(parser._option_string_actions for parser in PARSERS.values()))
    spans = re.findall(r"`([^`]+)`", prose(page.read_text()))
    spoken_of = {flag for span in spans for flag in flags_in(span.split())}
    assert spoken_of <= known


def test_the_measured_figures_are_those_of_the_results():
    measured = [row[1:] for row in cells(README) if row[0].startswith("measured here")]
    results = [row[1:] for row in cells(FASHION_MNIST / "fashion_mnist.md")]
    assert len(measured) >= 2
    assert [row for row in measured if row not in results] == []


@pytest.mark.parametrize("command", ORIGINAL_COMMANDS.values(), ids=ORIGINAL_COMMANDS)
def test_the_originals_commands_stand_in_the_readme(command):
    assert [line for line in code_lines(README.read_text()) if line.partition(" # ")[0].rstrip() == command]


@pytest.mark.parametrize("name", timm.list_models("avit*"))
def test_the_table_of_models(name):
    """Parameters and static multiply-adds at the default size, and the source of the weights."""
    model = timm.create_model(name, device="meta")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    macs = models_act.macs_per_image(model, torch.full((1, tokens), model.num_blocks)).item()
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M | {macs / 1e9:.2f} G"
    source = models_act.SOURCES.get(name)
    table = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [line for line in table if line.startswith(f"| `{name}` |")]
    assert [row.endswith(f"{size} | {f'`{source}`' if source else 'nothing'} |") for row in rows] == [True], size


# Recipes -----------------------------------------------------------------------------------------


@each_recipe
def test_recipes_are_understood(recipe):
    """One flag with its values on a line, under a head that says what it gives."""
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(line == "" or line.startswith(("# ", "--")) for line in lines)
    assert all(len(flags_in(line.split())) == 1 for line in lines if line.startswith("--"))
    recipe_values(recipe_words(recipe))  # SystemExit for what the parser does not know


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_recipes_for_imagenet_are_the_originals_commands(size):
    words = arguments_of(ORIGINAL_COMMANDS[size], "main_act.py")
    assert recipe_values(recipe_words(ROOT / "recipes" / f"imagenet_{size}.args")) == recipe_values(words)


def test_the_recipe_for_fashion_mnist_is_what_was_measured():
    command = json.loads((FASHION_MNIST / "adaptive_0.json").read_text())["command"]
    words = arguments_of(command, "main_act.py")
    assert recipe_values(recipe_words(ROOT / "recipes" / "fashion_mnist.args")) == recipe_values(words)


@pytest.mark.parametrize("kind", ["static", "adaptive"])
def test_recipes_for_digits_are_the_commands_of_the_page_on_training(kind):
    lines = code_lines((ROOT / "docs" / "training.md").read_text())
    ends = f"--output_dir results/quickstart/{kind}"
    command = next(line for line in lines if line.endswith(ends) and "--epochs" in line)
    words = arguments_of(command, "main_act.py")
    assert recipe_values(recipe_words(ROOT / "recipes" / f"digits_{kind}.args")) == recipe_values(words)
