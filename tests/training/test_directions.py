"""Gates by direction: the fit to a static model, the controller of the center, and their way through the commands."""

import json

import pytest
import torch
from conftest import halting_model, images, save_halting_micro
from hypothesis import given
from hypothesis import strategies as st

import main_act
import visualize
from export_onnx import main as export
from losses import CenterController
from macs import macs_per_image, static_macs
from training.budget import min_cost
from training.checkpoints import Checkpoint, load_checkpoint
from training.directions import fit_directions, fit_gate, states_and_attention, why_no_directions

CPU = torch.device("cpu")


def static_model(**options):
    model = halting_model(**options).eval()
    model.halting = False
    return model


def silent(line):
    """Print nothing."""


# Fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"reg_tokens": 2, "qk_norm": True}])
def test_recorded_attention_is_that_of_unfused_blocks(options):
    model, x = static_model(**options), images(3)
    with torch.no_grad():
        states, attention = states_and_attention(model, x)
        expected, prefix = [], model.num_prefix_tokens
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: expected.append(inputs[0]))
        final, _ = model._embed(x)
        for block in model.blocks:
            final = block(final)
    to_patches = torch.stack(expected)[:, :, :, 0, prefix:]  # [L, B, H, patches]
    to_patches = to_patches / to_patches.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attention, to_patches[4:].mean(dim=(0, 2)))
    torch.testing.assert_close(states[-1], final[:, prefix:])
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))


def test_directions_solve_the_least_squares():
    model, x = static_model(), images(70)  # more than at once
    with torch.no_grad():
        states, attention = states_and_attention(model, x)
    expected = (16 * attention).log().flatten().double()
    directions, explained = fit_directions(model, x)
    assert directions.shape == (8, 25)
    columns = [torch.cat([state, torch.ones_like(state[..., :1])], dim=2).flatten(0, 1).double() for state in states]
    best = [torch.linalg.lstsq(rows, expected).solution for rows in columns]
    spread = torch.stack([rows @ weights for rows, weights in zip(columns, best)]).var(dim=1).mean().sqrt()
    for rows, direction, share, weights in zip(columns, directions, explained, best):
        for found, tolerance in ((-spread * direction.double(), 5e-3), (weights, 0.02)):
            error = (rows @ found - expected).square().mean() / expected.var(unbiased=False)
            assert share == pytest.approx(1 - error.item(), abs=tolerance)


@pytest.mark.parametrize("cost", [0.3, 0.6])
@pytest.mark.parametrize("options", [{}, {"distilled": True}])
def test_fitted_gate_has_its_cost_and_keeps_prefix_tokens(cost, options, capsys):
    model, x = static_model(**options), images(16)
    gate = fit_gate(model, x, CPU, "none", cost)
    assert "they explain" in capsys.readouterr().out
    assert model.gate_directions is None, "the model itself is unchanged"
    gate.apply(model)
    model.halting = True
    with torch.no_grad():
        depth = model(x, return_halting=True)[1].depth
    found = (macs_per_image(model, depth).mean() / static_macs(model)).item()
    assert found == pytest.approx(gate.cost, abs=1e-6)
    assert gate.cost == pytest.approx(cost, abs=0.02)
    assert (depth[:, : model.num_prefix_tokens] == 8).all()
    assert len(depth.unique()) >= 3


def test_patches_with_more_late_attention_live_longer():
    model, x = static_model(), images(16)
    fit_gate(model, x, CPU, "none", 0.5, silent).apply(model)
    with torch.no_grad():
        attention = states_and_attention(model, x)[1].flatten()
        model.halting = True
        depth = model(x, return_halting=True)[1].depth[:, 1:].flatten()
    assert torch.corrcoef(torch.stack([attention.log(), depth]))[0, 1] > 0.5


def test_channels_with_large_means_do_not_harm_the_fit(monkeypatch):
    """Pretrained ViTs have channels whose mean is many times their deviation. Others may be constant."""
    model, x = static_model(), images(16)
    _, expected = fit_directions(model, x)
    offset = torch.zeros(24)
    offset[::3] = 300.0

    def shifted(model, images):
        states, attention = states_and_attention(model, images)
        return [
            torch.cat([state[..., :23] + offset[:23], 0 * state[..., 23:] + 7], dim=2) for state in states
        ], attention

    monkeypatch.setattr("training.directions.states_and_attention", shifted)
    directions, explained = fit_directions(model, x)
    assert directions.isfinite().all()
    assert explained == pytest.approx(expected, abs=0.1)


def test_uniform_attention_explains_nothing(monkeypatch):
    model, x = static_model(), images(4)
    monkeypatch.setattr(
        "training.directions.states_and_attention",
        lambda model, images: (states_and_attention(model, images)[0], torch.full((len(images), 16), 1 / 16)),
    )
    directions, explained = fit_directions(model, x)
    assert directions.isfinite().all()
    assert explained == pytest.approx([0.0] * 8)


def test_diverged_weights_raise():
    model = static_model()
    model.blocks[2].mlp.fc1.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the states of the static model are not finite"):
        fit_gate(model, images(4), CPU, "none", 0.6)


def test_models_without_class_token_or_fused_attention_are_named():
    assert why_no_directions(static_model()) is None
    assert "class token" in why_no_directions(static_model(class_token=False, global_pool="avg"))
    assert "class token" in why_no_directions(static_model(global_pool="avg"))
    unfused = static_model()
    unfused.blocks[1].attn.fused_attn = False
    assert "fused" in why_no_directions(unfused)


# Budget ------------------------------------------------------------------------------------------


@given(st.floats(0.2, 0.9), st.floats(-8, 8), st.floats(0.3, 4))
def test_center_controller_reaches_its_budget(budget, center, slope):
    controller = CenterController(budget, updates_per_epoch=10)
    for _ in range(600):
        cost = torch.sigmoid(torch.tensor(slope * center, dtype=torch.float64)).item()
        controller.observe(cost)
        center += controller.center_step(cost)
    assert cost == pytest.approx(budget, abs=0.05)


def test_cost_that_stays_off_the_budget_is_reported_once():
    controller = CenterController(0.3, updates_per_epoch=10)
    reports = []
    for cost in [0.3] * 5 + [0.5] * 30:
        controller.observe(cost)
        reports.append(controller.is_stuck)
    assert sum(reports) == 1


def test_lowest_cost_counts_prefix_tokens_in_all_blocks():
    model = halting_model()
    lowest = min_cost(model)
    model.set_gate_directions(torch.zeros(8, 25))
    model.gate_center = -100.0  # patches halt after the first block
    with torch.no_grad():
        depth = model(images(2), return_halting=True)[1].depth
    found = (macs_per_image(model, depth).mean() / static_macs(model)).item()
    assert min_cost(model) == pytest.approx(found)
    assert found > lowest


# Command line ------------------------------------------------------------------------------------

MODEL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--batch-size", "3"]
TRAINING = "--epochs 1 --lr 0.01 --warmup-epochs 0 --mixup 0 --cutmix 0 --model-ema-decay 0.5"


@pytest.fixture
def start(tmp_path):
    """Weights alone, without a gate."""
    path = save_halting_micro(tmp_path / "start.pth", num_classes=3)
    torch.save(load_checkpoint(str(path))["model"], path)
    return path


def run(image_folder, out, *flags):
    command = [*TRAINING.split(), "--data-path", image_folder, "--output_dir", out, *flags]
    main_act.main([*MODEL, *map(str, command)])
    return out / "checkpoint.pth"


def test_training_to_a_budget_keeps_its_directions(image_folder, tmp_path, start, capsys):
    path = run(image_folder, tmp_path / "out", "--pretrained-path", start, "--target-macs", 0.5)
    assert "gate: directions fitted to the class token's attention" in capsys.readouterr().out
    (line,) = (json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines())
    assert "train_ponder_weight" not in line
    assert line["train_gate_center"] != 0
    checkpoint = Checkpoint.load(str(path))
    directions = checkpoint.content["gate"]["gate_directions"]
    assert directions.shape == (12, 49)
    assert torch.equal(checkpoint.content["gate_ema"]["gate_directions"], directions)
    exported = Checkpoint(checkpoint.without_training_state(), "exported.pth")
    for kept, options in (
        (checkpoint, {}),
        (checkpoint, {"use_ema": True}),
        (exported, {}),
        (exported, {"budget": 0.4}),
    ):
        assert torch.equal(kept.build_model(**options).gate_directions, directions)
    picture = str(next((image_folder / "val").rglob("*.png")))
    visualize.main([picture, "--finetune", str(path), "--output-dir", str(tmp_path / "pictures")])
    export([str(path), str(tmp_path / "model.onnx")])  # compares the graph with the model


@pytest.mark.parametrize(
    ("weights", "flags"),
    [(True, "--target-macs 0.5 --gate channel"), (False, "--target-macs 0.5"), (True, "--gate auto")],
)
def test_gate_reads_a_channel_on_request_and_without_weights_or_budget(
    image_folder, tmp_path, start, capsys, weights, flags
):
    flags = f"{flags} --pretrained-path {start}" if weights else flags
    path = run(image_folder, tmp_path / "out", *flags.split())
    assert "gate search: channel " in capsys.readouterr().out
    assert "gate_directions" not in load_checkpoint(str(path))["gate"]


@pytest.mark.parametrize(
    ("directions", "reason"),
    [
        (torch.zeros(12, 48), "of shape [12, 49] (blocks, channels + 1), got [12, 48]"),
        (torch.full((12, 49), torch.nan), "got 588 numbers that are not finite"),
        ([[0.0] * 49] * 12, "got list"),
        ("0", "got str"),
    ],
)
def test_directions_that_do_not_fit_are_one_line(tmp_path, image_folder, capsys, directions, reason):
    gate = {"gate_scale": 6.0, "gate_center": 1.0, "gate_directions": directions}
    path = save_halting_micro(tmp_path / "c.pth", num_classes=3, gate=gate)
    flags = ["--data-path", image_folder, "--eval", "--finetune", path, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        main_act.main([*MODEL, *map(str, flags)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main_act.py: error: {path}: gate_directions must be")
    assert line.endswith(reason)
