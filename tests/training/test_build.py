import argparse

import pytest
import timm
import torch
from conftest import save_halting_micro
from PIL import Image

from datasets import evaluation_transform
from training.arguments import parse_args
from training.build import StartingPoint, training_set
from training.checkpoints import load_checkpoint
from utils import UserError


def test_no_aug_takes_training_images_as_in_evaluation(image_folder):
    flags = ["--data-path", str(image_folder), "--input-size", "24", "--reprob", "1", "--aa", "rand-m9"]
    plain, varied = (training_set(parse_args([*flags, *more])) for more in (["--no-aug"], []))
    pixels = evaluation_transform((24, 24))(Image.open(plain.samples[3][0]))
    assert all(torch.equal(plain[3][0], pixels) for _ in range(5))
    assert len({varied[3][0].sum().item() for _ in range(5)}) > 1
    assert len(plain) == len(varied) == 15


def start_from(path) -> StartingPoint:
    return StartingPoint("finetune", str(path), load_checkpoint(str(path)))


def test_what_our_checkpoints_record(tmp_path):
    args = {"model": "avit_micro_patch4_32", "input_size": [16, 40]}
    start = start_from(save_halting_micro(tmp_path / "c.pth", 3, args=args, classes=["a", "b", "c"]))
    assert start.model_name() == "avit_micro_patch4_32"
    assert start.image_size() == (16, 40)
    assert start.classes() == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"args": argparse.Namespace(model="deit_tiny")},
        {"args": {"model": ["avit_micro_patch4_32"], "input_size": "32"}, "classes": "abc"},
        {"args": 7, "classes": ["a", "b"]},
        {"args": {"model": "resnet50", "input_size": [1, 2, 3]}, "classes": ["a", "b", 3]},
        {"args": {"input_size": [10**6]}, "classes": ["a", "b", "a"]},
    ],
)
def test_what_cannot_be_trusted_is_found_out(tmp_path, entries):
    start = start_from(save_halting_micro(tmp_path / "c.pth", 3, **entries))
    assert start.model_name() == "avit_micro_patch4_32"
    assert start.image_size() is None
    assert list(start.classes()) == ["class 0", "class 1", "class 2"]


def test_the_published_checkpoints_model_and_classes(tmp_path):
    model = timm.create_model("avit_tiny_patch16_224")
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="avit_tiny")}, tmp_path / "t-10-30.pth")
    start = start_from(tmp_path / "t-10-30.pth")
    assert start.model_name() == "avit_tiny_patch16_224"
    assert start.classes()["n01443537"].startswith("goldfish")
    assert len(start.classes()) == 1000


def test_weights_of_no_model_of_ours(tmp_path):
    torch.save({"model": timm.create_model("resnet10t").state_dict()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="fits none of our models"):
        start_from(tmp_path / "c.pth").model_name()


@pytest.mark.parametrize(
    "head", [None, torch.zeros(()), torch.zeros(3), torch.zeros(0, 48), torch.zeros(1).expand(3 * 10**7, 48)]
)
def test_weights_without_a_head(tmp_path, head):
    path = save_halting_micro(tmp_path / "c.pth", 3)
    checkpoint = torch.load(path)
    del checkpoint["model"]["head.weight"]
    checkpoint["model"] |= {} if head is None else {"head.weight": head}
    with pytest.raises(UserError, match="have no head"):
        StartingPoint("finetune", str(path), checkpoint).classes()


@pytest.mark.parametrize(("entries", "is_static"), [({}, False), ({"gate": None}, True)])
def test_static_checkpoints_of_ours(tmp_path, entries, is_static):
    assert start_from(save_halting_micro(tmp_path / "c.pth", 3, **entries)).is_static() == is_static
