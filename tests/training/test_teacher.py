"""The teacher of soft and hard distillation: the network that its weights were trained as."""

import pytest
import timm
import torch
from conftest import save_halting_micro

from training.arguments import parse_args
from training.build import resolve_settings
from training.classes import Head
from training.models import create_model
from training.teacher import build_teacher
from utils import UserError

STUDENT = "avit_tiny_distilled_patch16_224"


def teacher_of(name, path, size=32):
    flags = ["--distillation-type", "soft", "--teacher-model", name, "--teacher-path", str(path)]
    args = parse_args(["--model", STUDENT, "--input-size", str(size), *flags])
    settings = resolve_settings(args, None)
    return build_teacher(args, settings, create_model(STUDENT, settings.img_size, num_classes=3), Head(["a", "b", "c"]))


@pytest.mark.parametrize("gate", [{"gate_scale": 4.0, "gate_center": 16.0, "halt_eps": 0.01}, None])
def test_adaptive_teacher_halts_as_it_was_trained(tmp_path, gate):
    save_halting_micro(tmp_path / "teacher.pth", num_classes=3)
    content = torch.load(tmp_path / "teacher.pth", weights_only=True)
    torch.save(content | {"gate": gate}, tmp_path / "teacher.pth")
    classifier = teacher_of("avit_micro_patch4_32", tmp_path / "teacher.pth").classifier
    assert classifier.halting == (gate is not None)
    assert gate is None or (classifier.gate_scale, classifier.gate_center) == (4.0, 16.0)


def test_teacher_of_another_activation_raises(tmp_path):
    recorded, given = "vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_clip_224"
    shapes = timm.create_model(recorded, num_classes=3, img_size=32, device="meta").state_dict()
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in shapes.items()}
    torch.save({"model": weights, "args": {"model": recorded}}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=f"trained as {recorded}.* --teacher-model {given} .*QuickGELU"):
        teacher_of(given, tmp_path / "teacher.pth")
    assert teacher_of(recorded, tmp_path / "teacher.pth") is not None
