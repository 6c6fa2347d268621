import pytest
import torch
from conftest import save_halting_micro
from PIL import Image

from datasets import evaluation_transform
from training.arguments import parse_args
from training.build import (
    build_model,
    build_optimizer,
    build_trainer,
    choose_head,
    resolve_settings,
    set_gate,
    training_and_validation_set,
)
from training.checkpoints import Checkpoint
from training.classes import Head
from training.directions import DirectionGate
from training.teacher import build_self_teacher

MICRO = ["--model", "avit_micro_patch4_32"]


def training_set(args):
    return training_and_validation_set(args, resolve_settings(args, None))[0]


def test_no_aug_preprocesses_training_images_as_in_evaluation(image_folder):
    flags = ["--data-path", str(image_folder), *MICRO, "--input-size", "24", "--reprob", "1", "--aa", "rand-m9"]
    plain, varied = (training_set(parse_args([*flags, *more])) for more in (["--no-aug"], []))
    pixels = evaluation_transform((24, 24))(Image.open(plain.samples[3][0]))
    assert all(torch.equal(plain[3][0], pixels) for _ in range(5))
    assert len({varied[3][0].sum().item() for _ in range(5)}) > 1
    assert len(plain) == len(varied) == 15


def test_learning_rate_scales_with_the_global_batch():
    args = parse_args(["--batch-size", "128", "--accum-steps", "2", "--lr", "0.001"])
    assert build_optimizer(args, torch.nn.Linear(2, 2)).param_groups[0]["lr"] == pytest.approx(0.001 * 128 * 2 / 512)


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("from_file", [True, False])
def test_flags_set_the_mode_of_the_model_and_of_its_average(is_on, from_file, checkpoint):
    flags = ["--cuda-graphs", "--compile"] if is_on else ["--no-zip-tokens", "--no-early-exit"]
    args, _, model = built(*flags, *(["--finetune", checkpoint] if from_file else []))
    trainer = build_trainer(args, model, CLASSES, torch.device("cpu"), teacher=None)
    for network in (model, trainer.ema.module):
        assert (network.cuda_graphs, network.compile_blocks) == (is_on, is_on)
        assert (network.zip_tokens, network.early_exit) == (is_on, is_on)


def test_cuda_graphs_of_a_model_that_pools_patches_warn(capfd):
    built("--cuda-graphs", "--model", "vit_wee_patch16_reg1_gap_256", "--input-size", "32")
    assert (
        "--cuda-graphs has no effect: the head of vit_wee_patch16_reg1_gap_256 reads the patches"
        in capfd.readouterr().err
    )
    built("--cuda-graphs", "--model", "vit_small_patch16_lingbot", "--input-size", "32")
    message = "the rotary position embedding of vit_small_patch16_lingbot is made in every pass"
    assert message in capfd.readouterr().err
    built("--cuda-graphs")
    assert "--cuda-graphs" not in capfd.readouterr().err


# Printed gate ------------------------------------------------------------------------------------

CLASSES = ["a", "b", "c"]
CURVE = {"model": [[0.0, 0.3], [60.0, 0.9]]}


@pytest.fixture
def checkpoint(tmp_path):
    return str(save_halting_micro(tmp_path / "tiny-10-30.pth", num_classes=3, classes=CLASSES, budget_curves=CURVE))


def built(*flags):
    args = parse_args([*MICRO, "--input-size", "32", *flags])
    start = Checkpoint.from_args(args)
    settings = resolve_settings(args, start)
    return args, settings, build_model(args, settings, choose_head(args, CLASSES, start), start)


def test_all_processes_get_the_gate_of_the_main_one(monkeypatch):
    """Their images differ, so that each would find another gate."""
    args, _, model = built("--target-macs", "0.5")
    args.pretrained = True  # as if the weights were
    others = DirectionGate(torch.full((12, 49), 0.5), 2.0, 3.0, 0.5, (0.9,))
    monkeypatch.setattr(
        "training.build.fit_gate", lambda *_, **__: DirectionGate(torch.zeros(12, 49), 6.0, 1.0, 0.5, (1.0,))
    )
    monkeypatch.setattr("utils.all_gather_objects", lambda own: [others, own])
    set_gate(args, model, None, [(torch.zeros(2, 3, 32, 32), None)], torch.device("cpu"))
    assert torch.equal(model.gate_directions, others.directions)
    assert (model.gate_scale, model.gate_center) == (2.0, 3.0)


def test_directions_that_explain_little_are_warned_about(monkeypatch, capsys):
    args, _, model = built("--target-macs", "0.5")
    args.pretrained = True
    gate = DirectionGate(torch.zeros(12, 49), 6.0, 1.0, 0.5, (0.05, 0.09))
    monkeypatch.setattr("training.build.fit_gate", lambda *_, **__: gate)
    set_gate(args, model, None, [(torch.zeros(2, 3, 32, 32), None)], torch.device("cpu"))
    assert "can hardly be predicted" in capsys.readouterr().err


def test_static_model_prints_no_gate(checkpoint, capsys):
    built("--no-halting")
    built("--no-halting", "--pretrained-path", checkpoint)
    built("--no-halting", "--eval", "--finetune", checkpoint)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("flags", [["--gate", "auto"], ["--target-macs", "0.5"]])
def test_gate_search_prints_no_gate_that_it_replaces(flags, checkpoint, capsys):
    built(*flags)
    assert "gate" not in capsys.readouterr().out
    built(*flags, "--pretrained-path", checkpoint)
    kept = ("gate_scale", "gate_center") if flags[0] == "--target-macs" else ()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(kept)


def test_self_teacher_prints_no_gate(checkpoint, capsys):
    args, settings, model = built("--distillation-type", "self", "--finetune", checkpoint)
    capsys.readouterr()
    build_self_teacher(args, settings, model, Head(CLASSES))
    args.teacher_path = checkpoint
    build_self_teacher(args, settings, model, Head(CLASSES))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_halting_model_prints_its_gate_and_conflicts(checkpoint, capsys):
    built("--finetune", checkpoint, "--gate_center", "20")
    captured = capsys.readouterr()
    scale, center = captured.out.splitlines()
    assert scale.startswith("gate_scale ")
    assert center == "gate_center 20, from the command line"
    assert "gate_center is 20 in the command line but 30 in the file name; using 20" in captured.err


def test_budget_prints_one_center(checkpoint, capsys):
    built("--eval", "--finetune", checkpoint, "--budget", "0.6")
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == ["gate_center 30, for a budget of 0.6"]
    assert "gate_center" not in captured.err
