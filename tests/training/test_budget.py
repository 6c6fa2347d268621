"""MACs budgets: the budget curve, the gate search, and both from the command line."""

import json

import pytest
import torch
from conftest import halting_model, images, make_shards, save_halting_micro
from hypothesis import given
from hypothesis import strategies as st
from kill_and_resume import same
from processes import script_in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import kl_div

import benchmark
import main_act
import utils
import visualize
from macs import macs_per_image, static_macs
from training import budget_table
from training.arguments import parse_args
from training.budget import (
    BudgetCurve,
    budget_curve,
    measure_costs,
    measure_curve,
    min_cost,
    resolve_budget,
)
from training.build import calibration_batches, gate_batches, resolve_settings, training_and_validation_set
from training.checkpoints import Checkpoint, load_checkpoint
from training.gate import choose_gate
from training.parser import MAX_GATE
from utils import UserError

CPU = torch.device("cpu")


# Budget curve --------------------------------------------------------------------------------------


@given(
    st.floats(0.3, 20),
    st.floats(-30, 30),
    st.floats(0.05, 0.3),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5),
)
def test_measured_curve_matches_any_slope_and_center(width, middle, lowest, budgets):
    def cost(center):
        return lowest + (1 - lowest) * torch.sigmoid(torch.tensor((center - middle) / width)).item()

    curve = measure_curve(lambda centers: [*map(cost, centers)], 0.0, lowest, 0.9)
    assert list(curve.points) == sorted(curve.points)
    for budget in budgets:
        if curve.min_cost <= budget <= 0.9:
            assert cost(curve.center(budget)) == pytest.approx(budget, abs=0.02)
    assert curve.min_cost < lowest + 0.07
    assert curve.max_cost > 0.9


def test_step_curve_ends_the_search():
    """The curve of a model in which all tokens of all images halt in the same block."""
    asked = []

    def costs_of(centers):
        asked.extend(centers)
        return [float(center > 0.3) for center in centers]

    curve = measure_curve(costs_of, 0.0, 0.0, 0.9)
    assert (curve.min_cost, curve.max_cost) == (0, 1)
    assert len(asked) < 30


def test_flat_curve_ends_where_gates_do():
    curve = measure_curve(lambda centers: [0.5 for _ in centers], 3.0, 0.1, 0.9)
    centers = [center for center, _ in curve.points]
    assert -MAX_GATE < centers[0] < -MAX_GATE / 10
    assert MAX_GATE / 10 < centers[-1] < MAX_GATE
    assert BudgetCurve.from_record(curve.record()) == curve


def test_model_at_a_curve_center_has_that_cost():
    model, batches = halting_model().eval(), [(images(16),), (images(5, seed=2),)]
    curve = budget_curve(model, batches, CPU, "none")
    center = curve.center(0.5)
    assert model.gate_center == 12  # unchanged
    model.gate_center = center
    with torch.no_grad():
        depth = torch.cat([model(x, return_halting=True)[1].depth for (x,) in batches])
    (cost,), (error,) = measure_costs(model, batches, CPU, "none", [center])
    assert cost == pytest.approx(0.5, abs=0.02)
    costs = macs_per_image(model, depth).double() / static_macs(model)
    assert (cost, error) == pytest.approx((costs.mean().item(), costs.std(correction=0).item() / len(depth) ** 0.5))
    assert depth.mean().item() / 8 == pytest.approx(0.5, abs=0.05)
    assert min_cost(model) == pytest.approx(curve.min_cost, abs=0.05)


INVALID_RECORDS = {
    "none": None,
    "number": 3,
    "empty": [],
    "one point": [[1.0, 0.5]],
    "centers not ascending": [[1.0, 0.5], [0.0, 0.6]],
    "cost is NaN": [[0.0, 0.5], [1.0, float("nan")]],
    "cost above 1": [[0.0, 0.5], [1.0, 2.0]],
    "center is infinite": [[0.0, 0.5], [float("inf"), 1.0]],
    "center is too large": [[-1e300, 0.5], [1.0, 1.0]],
    "costs not ascending": [[0.0, 0.5], [1.0, 0.9], [2.0, 0.2]],
    "center is an integer": [[0.0, 0.5], [1, 1.0]],
    "point is text": [[0.0, 0.5], "ab"],
    "too many points": [[0.0, 0.1]] * 2000,
}


@pytest.mark.parametrize("record", INVALID_RECORDS.values(), ids=INVALID_RECORDS.keys())
def test_invalid_curve_record_returns_none(record):
    assert BudgetCurve.from_record(record) is None


def test_curve_record_round_trip_is_equal():
    curve = BudgetCurve(((-1.0, 0.2), (0.5, 0.4), (3.0, 1.0)))
    assert BudgetCurve.from_record(curve.record()) == curve
    assert curve.center(0.7) == pytest.approx(1.75)


# Gate search -------------------------------------------------------------------------------------


def divergence_and_cost(model, x, static_logits):
    with torch.no_grad():
        logits, halting = model(x, return_halting=True)
    divergence = kl_div(logits.log_softmax(1), static_logits.log_softmax(1), reduction="batchmean", log_target=True)
    return divergence.item(), macs_per_image(model, halting.depth).mean().item() / static_macs(model)


@pytest.mark.parametrize("cost", [0.4, 0.7])
def test_chosen_gate_has_its_reported_cost_and_divergence(cost, capsys):
    model, x = halting_model().eval(), images(16)
    model.halting = False
    with torch.no_grad():
        static = model(x)
    model.halting = True
    choice = choose_gate(model, x, CPU, "none", cost)
    worst = float(capsys.readouterr().out.split("worst of 48 gates: ")[1].rstrip(")\n"))
    assert choice.divergence < worst / 2
    choice.apply(model)
    found = divergence_and_cost(model, x, static)
    assert found == pytest.approx((choice.divergence, choice.cost), rel=1e-3)
    assert choice.cost == pytest.approx(cost, abs=0.05)


def test_gate_of_a_headless_model_is_that_of_an_identity_head():
    """The features that stand in for logits have swapped channels, which is no change of the predictions."""
    headless, x = halting_model(num_classes=0).eval(), images(8)
    with_head = halting_model(num_classes=24).eval()
    with_head.load_state_dict(headless.state_dict(), strict=False)
    with torch.no_grad():
        with_head.head.weight.copy_(torch.eye(24))
        with_head.head.bias.zero_()
    choices = [choose_gate(model, x, CPU, "none", 0.6, report=lambda line: None) for model in (headless, with_head)]
    assert choices[0].channel == choices[1].channel > 0
    assert choices[0].divergence == pytest.approx(choices[1].divergence, rel=1e-3)


def test_gate_search_with_diverged_weights_raises():
    model = halting_model().eval()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits of the static model are not finite"):
        choose_gate(model, images(4), CPU, "none", 0.6)


def test_gates_are_measured_without_cuda_graphs(monkeypatch):
    """A plan of one gate does not fit another: batches would run again, and captures would fill the memory."""
    model, called, forward = halting_model().eval(), [], type(halting_model()).forward
    model.cuda_graphs = True
    monkeypatch.setattr(
        type(model), "forward", lambda self, *args, **kw: called.append(self.cuda_graphs) or forward(self, *args, **kw)
    )
    measure_costs(model, [(images(2),)], CPU, "none", [5.0, 20.0])
    assert called == [False, False]
    choose_gate(model, images(2), CPU, "none", 0.6, report=lambda line: None)
    assert not any(called)
    assert model.cuda_graphs, "the option of the model itself is unchanged"


# Command line ------------------------------------------------------------------------------------

MODEL = "--model avit_micro_patch4_32 --input-size 32 --num_workers 0"
TRAINING = "--batch-size 3 --epochs 2 --target-macs 0.5 --gate-jitter 0.5 --distillation-type self --mixup 0 --cutmix 0"
FLAGS = [*MODEL.split(), *TRAINING.split()]


def run(data, out, start, *flags):
    main_act.main([*FLAGS, *map(str, ("--data-path", data, "--output_dir", out, "--pretrained-path", start, *flags))])
    return load_checkpoint(str(out / "checkpoint.pth"))


@pytest.fixture
def start(tmp_path):
    return save_halting_micro(tmp_path / "start.pth", num_classes=3)


def evaluated_cost(data, checkpoint, out, *flags):
    command = ["--data-path", data, "--eval", "--finetune", checkpoint, "--output_dir", out, "--batch-size", 3, *flags]
    main_act.main([*MODEL.split(), *map(str, command)])
    result = json.loads((out / "eval.json").read_text())
    return result["gmacs"] / result["gmacs_static"]


def test_training_to_a_budget_allows_other_budgets(image_folder, tmp_path, start, capsys):
    checkpoint = run(image_folder, tmp_path / "out", start, "--tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    for line in lines:
        assert 0 < line["train_budget_cost"] <= 1
        assert line["train_budget_goal"] >= 0.5
        assert abs(line["train_ponder_weight"]) <= 0.02
    shown = EventAccumulator(str(tmp_path / "out")).Reload().Tags()["scalars"]
    assert {"train/budget_cost", "train/budget_goal", "train/ponder_weight"} <= set(shown)
    assert set(checkpoint["budget_curves"]) == {"model", "model_ema"}
    output = capsys.readouterr().out
    assert "calibration of model: gate_center " in output
    assert "the teacher's forward pass takes 40% of a training step's MACs" in output
    path = tmp_path / "out" / "checkpoint.pth"
    curve = Checkpoint.load(str(path)).budget_curve()
    assert checkpoint["gate"]["gate_center"] == pytest.approx(curve.center(0.5))
    costs = [evaluated_cost(image_folder, path, tmp_path / str(b), "--budget", b) for b in (0.3, 0.6)]
    assert costs == pytest.approx([0.3, 0.6], abs=0.1)  # measured on 9 images, the curve on 15 others
    assert evaluated_cost(image_folder, path, tmp_path / "own") == pytest.approx(0.5, abs=0.1)
    assert evaluated_cost(image_folder, path, tmp_path / "ema", "--use-ema") == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["auto", "channel", "fixed"])
def test_resumed_run_with_a_budget_is_identical(image_folder, tmp_path, start, monkeypatch, gate):
    torch.save(load_checkpoint(str(start))["model"], start)  # weights alone, so that a budget table is measured
    monkeypatch.setattr(budget_table, "MIN_AGREEMENT", 0.0)
    flags = ["--epochs", 1, "--gate", gate]
    if gate == "fixed":  # a given center of a gate by direction
        start = tmp_path / "directed.pth"
        content = run(image_folder, tmp_path / "first", tmp_path / "start.pth", "--epochs", 1)
        torch.save(content | {"args": {**content["args"], "target_macs": None}}, start)
        flags += ["--gate-center", 2.0]
    expected = run(image_folder, tmp_path / "whole", start, *flags)
    calls = iter(range(1, 1000))

    def asked(self):
        self.signal = "SIGTERM" if next(calls) >= 3 else None
        return self.signal is not None

    with monkeypatch.context() as patch:
        patch.setattr("training.signals.StopRequest.asked", asked)
        interrupted = run(image_folder, tmp_path / "again", start, *flags)
    assert interrupted["budget_controller"][1] is not None
    assert "budget_curves" not in interrupted
    actual = run(image_folder, tmp_path / "again", start, *flags, "--resume", "auto")
    for part in (
        "model",
        "model_ema",
        "optimizer",
        "budget_controller",
        "budget_curves",
        "budget_tables",
        "start",
        "gate",
        "gate_ema",
    ):
        assert same(actual.get(part), expected.get(part)), part
    assert "budget_curves" in expected


def test_processes_share_one_gate_and_one_cost(image_folder, tmp_path, start):
    weights = load_checkpoint(str(start))["model"]
    torch.save(weights, start)  # weights alone, without a gate
    flags = [*FLAGS, "--data-path", image_folder, "--pretrained-path", start, "--output_dir", tmp_path / "out"]
    flags += ["--epochs", "1", "--no-model-ema"]
    statuses, _, errors = script_in_processes(2, [*map(str, flags)], tmp_path / "log")
    assert statuses == [0, 0], errors
    found = load_checkpoint(str(tmp_path / "out" / "checkpoint.pth"))
    assert Checkpoint.load(str(tmp_path / "out" / "checkpoint.pth")).budget_curve() is not None
    assert found["gate"]["gate_scale"] != 10


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        main_act.main([*map(str, flags)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("main_act.py: error: ")
    return message


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--target-macs", "0"], "a fraction above 0 and at most 1, or a number of MACs"),
        (["--target-macs", "2"], "a fraction above 0 and at most 1, or a number of MACs"),
        (["--target-macs=-1G"], "a fraction above 0 and at most 1, or a number of MACs"),
        (["--target-macs", "much"], "invalid fraction or number of MACs value"),
        (["--target-macs", "0.5", "--no-halting"], "--target-macs cannot be combined with"),
        (["--target-macs", "0.5", "--eval"], "--target-macs cannot be combined with"),
        (["--budget", "0.5"], "--budget requires --eval or --demo"),
        (["--eval", "--budget", "1.5"], "above 0 and at most 1"),
        (["--eval", "--budget", "0.5", "--gate-center", "3"], "cannot be combined"),
        (["--eval", "--budget", "0.5", "--no-halting"], "cannot be combined"),
        (["--gate-center", "1e39"], "must be between -1e+06 and 1e+06"),
        (["--gate-jitter", "inf"], "must be at least 0 and below 1e+06"),
        (["--gate", "auto", "--gate-scale", "3"], "--gate auto cannot be combined with --gate-scale"),
    ],
)
def test_budget_flags_that_cannot_be_combined_exit_with_2(capsys, flags, reason):
    assert reason in refused(capsys, *flags)


def test_budget_out_of_reach_exits_with_2(capsys, image_folder, tmp_path, start):
    common = [*MODEL.split(), "--data-path", image_folder]
    for target in ("0.05", "1M", "2G"):
        assert "out of reach" in refused(capsys, *common, "--pretrained-path", start, "--target-macs", target)
    model = halting_model()
    lowest = (min_cost(model, by_direction=False) + min_cost(model, by_direction=True)) / 2
    assert resolve_budget(model, lowest, by_direction=False) == lowest
    with pytest.raises(UserError, match="out of reach"):
        resolve_budget(model, lowest, by_direction=True)
    message = refused(capsys, *common, "--eval", "--finetune", start, "--budget", 0.4)
    assert "has no budget curve, so --budget cannot be used" in message
    curve = {"model": [[0.0, 0.3004], [5.0, 0.9]]}
    known = save_halting_micro(tmp_path / "known.pth", num_classes=3, budget_curves=curve)
    for budget in (0.3, 0.95):
        message = refused(capsys, *common, "--eval", "--finetune", known, "--budget", budget)
        assert "supports budgets from 0.301 to 0.9" in message
    assert "--budget requires a checkpoint" in refused(capsys, *common, "--eval", "--budget", 0.2)


def test_other_commands_accept_budgets(capsys, image_folder, tmp_path):
    curve = {"model": [[0.0, 0.3], [60.0, 0.9]]}
    known = save_halting_micro(tmp_path / "known.pth", num_classes=3, budget_curves=curve)
    image = next((image_folder / "val").rglob("*.png"))
    visualize.main([str(image), "--finetune", str(known), "--budget", "0.4", "--output-dir", str(tmp_path / "out")])
    assert "gate_center 10, for a budget of 0.4" in capsys.readouterr().out
    flags = ["--data-path", str(image_folder), "--finetune", str(known), "--rounds", "1", "--batch-size", "2"]
    benchmark.main([*flags, "--model", "avit_micro_patch4_32", "--budget", "0.5"])
    assert "gate_center 20, for a budget of 0.5" in capsys.readouterr().out
    for command, refused_flags in (
        (visualize, [str(image), "--finetune", str(known), "--budget", "0.1", "--output-dir", str(tmp_path / "out")]),
        (benchmark, ["--budget", "0.5"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(refused_flags)
        assert stopped.value.code == 2
        assert "--budget" in capsys.readouterr().err.splitlines()[-1]


def test_self_distillation_without_weights_exits_with_2(capsys, image_folder):
    message = refused(capsys, *MODEL.split(), "--data-path", image_folder, "--distillation-type", "self")
    assert "--distillation-type self requires starting weights" in message


def test_number_of_macs_resolves_to_fraction():
    model = halting_model()
    assert parse_args(["--target-macs", "2.9G"]).target_macs == 2.9e9
    assert resolve_budget(model, static_macs(model) / 2) == pytest.approx(0.5)
    with pytest.raises(UserError, match="out of reach"):
        resolve_budget(model, 2 * static_macs(model))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_pass_of_the_calibration_reads_the_same_images(tmp_path, workers):
    flags = f"--data-set wds/ --num-classes 16 --num_workers {workers} --batch-size 3 --input-size 32 --data-path"
    args = parse_args([*flags.split(), str(make_shards(tmp_path / "wds"))])
    settings = resolve_settings(args, None)
    training, validation = training_and_validation_set(args, settings)
    searched = gate_batches(args, settings, training, CPU)
    calibrated = calibration_batches(args, validation, CPU)
    for batches, count in ((searched, 6), (calibrated, 5)):
        first, second = ([batch.images for batch in batches] for _ in range(2))
        assert len(first) == count
        assert all(torch.equal(images, again) for images, again in zip(first, second, strict=True))


@pytest.mark.parametrize("processes", [1, 4])
def test_each_process_searches_a_gate_on_all_images(monkeypatch, processes):
    monkeypatch.setattr(utils, "world_size", lambda: processes)
    args = parse_args(["--data-set", "DIGITS", "--input-size", "32", "--num_workers", "0", "--batch-size", "60"])
    settings = resolve_settings(args, None)
    training, _ = training_and_validation_set(args, settings)
    assert sum(len(images) for images, *_ in gate_batches(args, settings, training, CPU)) == 5 * 60


@pytest.mark.parametrize(("length", "count"), [(5, 5), (1000, 1000), (1001, 501), (50_000, 1000)])
def test_calibration_images_are_spread_over_the_validation_set(length, count):
    """Validation sets are sorted by class, so the first images would all be of a few classes."""
    args = parse_args(["--num_workers", "0", "--batch-size", "16"])
    dataset = list(zip(torch.arange(length)[:, None].float(), torch.zeros(length, dtype=torch.long)))
    found = torch.cat([images for images, *_ in calibration_batches(args, dataset, CPU)]).flatten()
    assert len(found) == count
    assert length < 10 or found[:256].max() > 0.9 * length, "the first images are of all classes too"
    found = found.sort().values
    assert set(found.diff().tolist()) == {float(-(-length // 1000))}
    assert found[-1] >= length - length / count - 1


@pytest.mark.slow
def test_calibration_of_a_stream_is_repeatable(tmp_path):
    data = make_shards(tmp_path / "wds")
    start = save_halting_micro(tmp_path / "start.pth", num_classes=16)
    flags = ["--data-set", "wds/", "--num-classes", "16", "--num_workers", 1, "--gate", "auto", "--epochs", 1]
    first, again = (run(data, tmp_path / name, start, *flags) for name in ("first", "again"))
    assert again["budget_curves"] == first["budget_curves"]
    assert same(again["gate"], first["gate"])
