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
import cuda_check
import export_onnx
import models_act
import visualize
from experiments.baselines_report import ABLATIONS, METHODS
from training.arguments import make_parser

README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*/*.md")),
]
RECIPES = sorted((ROOT / "recipes").glob("*.args"))
CLUTTERED, FASHION_MNIST = ROOT / "experiments" / "cluttered", ROOT / "experiments" / "fashion_mnist"
MAKERS = {"main_act.py": make_parser, "visualize.py": visualize.make_parser}
MAKERS |= {"benchmark.py": benchmark.make_parser, "cuda_check.py": cuda_check.make_parser}
MAKERS |= {"export_onnx.py": export_onnx.make_parser}
FLAGS = {script: set(make()._option_string_actions) for script, make in MAKERS.items()}
LAUNCHERS_FLAGS = {"--nproc-per-node", "--max-restarts"}  # torchrun's, where a page speaks of them
OF_A_RUN = ("data_path", "output_dir", "pretrained_path", "resume")  # what a recipe need not say

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

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


def prose(page: Path) -> str:
    """Without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def code_lines(page: Path) -> list[str]:
    """The lines of its code blocks, those that end with a backslash joined with the next."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines()


def arguments_of(line: str, script: str) -> list[str]:
    """What a command line gives to one of our scripts; nothing where it does not run it."""
    words = shlex.split(line, comments=True) if script in line else []
    return words[words.index(script) + 1 :] if script in words else []


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def table_rows(page: Path) -> list[list[str]]:
    """The cells of every row of its tables."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def settings(words: list[str]) -> dict:
    """What a recipe or a command sets, without what belongs to one run of it; SystemExit for what is no flag."""
    return {name: value for name, value in vars(make_parser().parse_args(words)).items() if name not in OF_A_RUN}


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@each_page
def test_links_and_pictures_are_there(page):
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
    """Those of commands, and those that are spoken of."""
    for script, known in FLAGS.items():
        assert {flag for line in code_lines(page) for flag in flags_in(arguments_of(line, script))} <= known, script
    spans = re.findall(r"`([^`]+)`", prose(page))
    assert {flag for span in spans for flag in flags_in(span.split())} <= LAUNCHERS_FLAGS.union(*FLAGS.values())


QUOTED = {  # pages with figures, and where these come from
    README: CLUTTERED / "results" / "baselines.md",
    CLUTTERED / "README.md": CLUTTERED / "results" / "baselines.md",
    FASHION_MNIST / "README.md": FASHION_MNIST / "results" / "baselines" / "baselines.md",
}


@pytest.mark.parametrize(("page", "results"), QUOTED.items(), ids=["README", "cluttered", "fashion_mnist"])
def test_the_measured_figures_are_those_of_the_results(page, results):
    measured = [row for row in table_rows(page) if row[0] in {*METHODS.values(), *ABLATIONS.values()}]
    found = [row[:6] for row in table_rows(results)]
    assert len(measured) >= 7
    assert [row for row in measured if row not in found] == []


@pytest.mark.parametrize("command", ORIGINAL_COMMANDS.values(), ids=ORIGINAL_COMMANDS)
def test_the_originals_commands_stand_in_the_readme(command):
    assert command in [line.partition(" # ")[0].rstrip() for line in code_lines(README)]


@pytest.mark.parametrize("name", timm.list_models("avit*"))
def test_the_table_of_models(name):
    """Parameters and static multiply-adds at the default size, and the source of the weights."""
    model = timm.create_model(name, device="meta")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    macs = models_act.macs_per_image(model, torch.full((1, tokens), model.num_blocks)).item()
    parameters = sum(p.numel() for p in model.parameters())
    source = f"`{models_act.SOURCES[name]}`" if models_act.SOURCES.get(name) else "nothing"
    rows = [row for row in table_rows(ROOT / "docs" / "models.md") if row[0] == f"`{name}`"]
    assert [row[-3:] for row in rows] == [[f"{parameters / 1e6:.1f} M", f"{macs / 1e9:.2f} G", source]]


def command_of(recipe: str) -> str:
    """The command line that a recipe stands for: the original's, or the one that was measured."""
    if recipe.startswith("imagenet_"):
        return ORIGINAL_COMMANDS[recipe.removeprefix("imagenet_")]
    return json.loads((FASHION_MNIST / "results" / "adaptive_0.json").read_text())["command"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_are_understood_and_say_what_their_commands_say(recipe):
    """One flag with its values on a line, under a head that says what it gives."""
    head, *lines = recipe.read_text().splitlines()
    assert head.startswith("# ")
    assert all(line == "" or line.startswith(("# ", "--")) for line in lines)
    assert all(len(flags_in(line.split())) == 1 for line in lines if line.startswith("--"))
    own = settings([f"@{recipe}"])
    if recipe.stem.startswith("digits_"):
        assert f"@recipes/{recipe.name}" in (ROOT / "Makefile").read_text()
    else:
        assert own == settings(arguments_of(command_of(recipe.stem), "main_act.py"))
