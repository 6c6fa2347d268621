"""Parts of the gate by direction: each patch does what it says, and nothing is left of it afterwards."""

import argparse

import pytest
import torch
from conftest import halting_model, images, with_directions

import losses
from experiments import gate_parts
from training.build import build_budget

BUDGET = argparse.Namespace(target_macs=0.5)


@torch.no_grad()
def depth_of_class_token(model):
    return model(images(2), return_halting=True)[1].depth[:, 0].tolist()


@pytest.mark.parametrize("zip_tokens", [False, True])
def test_class_token_stays(zip_tokens):
    model = halting_model(zip_tokens=zip_tokens).eval()
    model.gate_scale, model.gate_center = 0.0, -10.0  # every score is almost 1
    with gate_parts.class_token_stays():
        assert depth_of_class_token(model) == [model.num_blocks] * 2
    assert depth_of_class_token(model) == [1, 1]


def test_center_moves():
    model = halting_model()
    with gate_parts.center_moves():
        assert build_budget(BUDGET, model, 100).center_step(0.4) > 0
    assert build_budget(BUDGET, model, 100).center_step(0.4) == 0


def test_center_stays():
    model = with_directions(halting_model())
    with gate_parts.center_stays():
        assert build_budget(BUDGET, model, 100).center_step(0.4) == 0
    assert build_budget(BUDGET, model, 100).center_step(0.4) > 0


CHANNEL = ["full", "--gate", "channel"]


@pytest.mark.parametrize(
    ("part", "rest", "moved"), [("center", CHANNEL, True), ("stays,center", CHANNEL, True), ("still", ["full"], False)]
)
def test_parts_hold_for_the_program_alone(monkeypatch, part, rest, moved):
    seen = []

    def record(argv):
        gain = losses.CenterController.gain
        seen.append((argv, losses.BudgetController is losses.CenterController, gain))

    monkeypatch.setattr(gate_parts.baselines, "main", record)
    gate_parts.main([part, *rest])
    assert seen == [(rest, moved, 1.0 if moved else 0.0)]
    assert losses.BudgetController is not losses.CenterController
    assert losses.CenterController.gain == 1


@pytest.mark.parametrize(
    "argv", [["stays", "full"], ["center", "full"], ["still", *CHANNEL], ["center,still", *CHANNEL]]
)
def test_parts_that_do_not_suit_the_gate_are_refused(argv):
    with pytest.raises(SystemExit, match="need --gate channel"):
        gate_parts.main(argv)


@pytest.mark.parametrize("argv", [[""], ["speed", "full"], ["stays,", "full"]])
def test_unknown_parts_print_the_usage(argv):
    with pytest.raises(SystemExit, match="Usage: python -m"):
        gate_parts.main(argv)


def test_stays_with_cuda_exits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="stays does not work with CUDA"):
        gate_parts.main(["stays", *CHANNEL])
