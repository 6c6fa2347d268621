"""Budget tables: weights between the static start and the trained ones, measured and from the command line."""

import json

import onnx
import pytest
import torch
from conftest import ROOT, halting_model, images, make_image_folder, not_plain, save_halting_micro
from hypothesis import given
from hypothesis import strategies as st

import benchmark
import export_onnx
import main_act
import visualize
from macs import macs_per_image, static_macs
from training import budget_table
from training.budget import budget_curve
from training.budget_table import (
    BudgetPoint,
    BudgetSettings,
    BudgetTable,
    fits_weights,
    half_precision,
    measure_table,
    mixed_weights,
)
from training.checkpoints import Checkpoint, load_checkpoint
from training.gate_settings import safe_budget_curve

CPU = torch.device("cpu")
ROW = [0.3, 1.0, 2.5, 0.9]
FULL_ROW = [0.4, 0.5, 3.0, 0.9, 0.7, -0.02, 0.01]
TABLE = BudgetTable(
    (
        BudgetPoint(0.3, 1.0, 2.0, 0.8, 0.70, 0.0, 0.0),
        BudgetPoint(0.5, 0.5, 4.0, 0.9, 0.72, 0.02, 0.01),
        BudgetPoint(1.0, 0.0, 14.0, 1.0, 0.68, -0.02, 0.004),
    )
)
OLD_TABLE = BudgetTable(tuple(BudgetPoint(*point[:4]) for point in TABLE.points))  # of versions without accuracies


# Tables and weights ------------------------------------------------------------------------------


def test_table_interpolates_settings_but_not_what_was_measured():
    assert TABLE.at(0.35) == BudgetSettings(0.35, pytest.approx(0.875), pytest.approx(2.5), TABLE.points[0])
    assert TABLE.at(0.45).nearest == TABLE.points[1]
    assert TABLE.at(1.0) == BudgetSettings(1.0, 0.0, 14.0, TABLE.points[-1])
    assert [TABLE.at(budget).is_static for budget in (0.99, 1.0)] == [False, True]
    assert (TABLE.min_cost, TABLE.max_cost) == (0.3, 1.0)
    assert OLD_TABLE.at(0.35)[:3] == TABLE.at(0.35)[:3]
    assert OLD_TABLE.at(0.4).nearest.accuracy is None


@pytest.mark.parametrize("table", [TABLE, OLD_TABLE], ids=["accuracies", "none"])
def test_table_record_round_trip_is_equal(table):
    assert BudgetTable.from_record(table.record()) == table


def test_point_is_less_accurate_if_its_printed_change_is_negative():
    assert [point.is_less_accurate for point in TABLE.points] == [False, False, True]
    assert not any(point.is_less_accurate for point in OLD_TABLE.points)
    assert BudgetPoint(1.0, 0.0, 14.0, 1.0, 0.68, -0.0006, 0.011).is_less_accurate
    assert not BudgetPoint(1.0, 0.0, 14.0, 1.0, 0.68, -0.0004, 0.011).is_less_accurate  # printed as +0.0


@pytest.mark.parametrize(
    "record",
    [
        *(None, 3, [], [ROW], [ROW, ROW], [[0.5, *ROW[1:]], ROW], [ROW, [0.4, 0.5, 1.0]], [ROW, "abcd"]),
        *([ROW, [cost, 0.5, 3.0, 0.9]] for cost in (float("nan"), 1.1, "0.4")),
        *([ROW, [0.4, mixing, 3.0, 0.9]] for mixing in (-0.1, 3.0, 1)),
        *([ROW, [0.4, 0.5, center, 0.9]] for center in (float("inf"), -1e300, 1e6, None)),
        *([ROW, [0.4, 0.5, 3.0, agreement]] for agreement in (-0.1, 1.1, None)),
        *(
            [[0.3, *FULL_ROW[1:]], [*FULL_ROW[:4], *rest]]
            for rest in ([0.7, -1.1, 0.1], [-0.7, 0.0, 0.1], [0.7, 0, 0.1])
        ),
        [ROW, FULL_ROW],
        [[i / 3000, *ROW[1:]] for i in range(2000)],
    ],
)
def test_invalid_table_record_returns_none(record):
    assert BudgetTable.from_record(record) is None


@given(st.floats(0, 1.5), st.integers(0, 9))
def test_mixed_weights_lie_on_the_line_through_start_and_trained(mixing, seed):
    generator = torch.Generator().manual_seed(seed)
    start, trained = (
        {"a": torch.randn(3, generator=generator), "n": torch.tensor(number)} for number in (seed, seed + 1)
    )
    mixed = mixed_weights(half_precision(start), trained, mixing)
    expected = (1 - mixing) * start["a"] + mixing * trained["a"]
    torch.testing.assert_close(mixed["a"], expected, atol=0.01, rtol=0.01)
    assert mixed["n"] == seed + 1
    assert mixed_weights(start, trained, 1.0) is trained


def test_start_must_have_the_names_and_shapes_of_the_weights():
    weights = {"a": torch.ones(3), "n": torch.tensor(2)}
    assert fits_weights(half_precision(weights), weights)
    for broken in (None, [], {}, {"a": torch.ones(3)}):
        assert not fits_weights(broken, weights)
    tensors = [torch.ones(2), torch.tensor([1, torch.nan, 1]), torch.ones(3, dtype=torch.int64), *not_plain((3,))]
    for value in ([1, 2, 3], *tensors):
        assert not fits_weights(weights | {"a": value}, weights)
    assert fits_weights(weights | {"a": torch.ones(3).to(torch.float8_e4m3fn)}, weights)


def test_weights_beyond_half_precision_keep_theirs():
    weights = {"big": torch.tensor([1e6, 1e-3]), "small": torch.tensor([1e-3]), "n": torch.tensor(2)}
    kept = half_precision(weights)
    assert [value.dtype for value in kept.values()] == [torch.float32, torch.float16, torch.int64]
    assert torch.equal(kept["big"], weights["big"])
    assert kept["big"] is not weights["big"]
    assert fits_weights(kept, weights)


# Measurement -------------------------------------------------------------------------------------


@pytest.fixture
def agreeing(monkeypatch):
    """The networks of these tests are random, so that they may agree about few images."""
    monkeypatch.setattr(budget_table, "MIN_AGREEMENT", 0.0)


def test_measured_table_describes_the_mixed_models(agreeing):
    torch.manual_seed(0)
    model = halting_model().eval()
    batches = [(images(16), torch.arange(16) % 7), (images(5, seed=2), torch.arange(5))]
    start = half_precision({name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()})
    curve = budget_curve(model, batches, CPU, "none")
    model.gate_center = curve.center(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = measure_table(model, start, curve, batches, CPU, "none")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is unchanged"
    mixings = [point.mixing for point in table.points]
    assert mixings == sorted(mixings, reverse=True)
    assert table.points[-1][:4] == (1.0, 0.0, table.points[-1].center, 1.0)
    assert BudgetTable.from_record(table.record()) == table
    trained = min(table.points, key=lambda point: abs(point.cost - 0.5))
    assert (trained.mixing, trained.center) == (1.0, model.gate_center)
    static = halting_model(halting=False).eval()
    static.load_state_dict(start)
    x, targets = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        own = model(x).argmax(1)
        for point in table.points:
            model.load_state_dict(mixed_weights(start, before, point.mixing))
            model.gate_center = point.center
            if (point.cost, point.mixing) == (1, 0):
                logits, cost = static(x), 1.0
            else:
                logits, halting = model(x, return_halting=True)
                cost = macs_per_image(model, halting.depth).mean().item() / static_macs(model)
            agreement = (logits.argmax(1) == static(x).argmax(1)).double().mean().item()
            correct = (logits.argmax(1) == targets).double()
            change = correct - (own == targets).double()
            error = change.std(correction=0).item() / len(x) ** 0.5
            expected = point.mixing, point.center, agreement, correct.mean().item(), change.mean().item(), error
            assert point == pytest.approx((cost, *expected), abs=1e-3)


def test_divergence_is_from_the_mean_of_both_predictions():
    """So mixings are right whether the training has made the model better or worse than its start."""
    torch.manual_seed(0)
    model, x = halting_model().eval(), images(9)
    start = {name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}
    static = halting_model(halting=False).eval()
    static.load_state_dict(start)
    mixable = budget_table._MixableModel(model, start, CPU, "none")
    (found,) = mixable.measure([(x, torch.zeros(9, dtype=torch.long))], 1.0, [model.gate_center])
    with torch.no_grad():
        own, starts = (network(x).double().softmax(1) for network in (model, static))
    mean = (own + starts) / 2
    assert found.divergence == pytest.approx((mean * (mean / own).log()).sum(1).mean().item(), rel=1e-3)
    assert found.change == found.change_error == 0


def test_start_of_another_task_gives_no_table():
    model, batches = halting_model().eval(), [(images(16), torch.zeros(16, dtype=torch.long))]
    start = half_precision(model.state_dict())
    start["head.bias"][0] += 100
    with torch.no_grad():
        model.head.bias[1] += 100
    curve = budget_curve(model, batches, CPU, "none")
    assert measure_table(model, start, curve, batches, CPU, "none") is None


@given(st.data())
def test_any_choice_of_mixings_falls_through_1_at_the_trained_budget(data):
    curve = budget_table.BudgetCurve(((0.0, 0.1), (1.0, 1.0)))
    divergences = st.tuples(st.floats(0, 9), st.floats(0, 9))
    candidates = (1.0, *budget_table.MIXINGS_BELOW, *budget_table.MIXINGS_ABOVE)
    curves = {mixing: (curve, list(data.draw(divergences))) for mixing in candidates}
    budgets = sorted(data.draw(st.sets(st.floats(0.1, 1.0), min_size=1, max_size=8)))
    trained = data.draw(st.sampled_from(budgets))
    chosen = budget_table._choose_mixings(curves, budgets, trained)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[budgets.index(trained)] == 1


def test_mixings_never_rise_with_the_budget():
    curve = budget_table.BudgetCurve(((0.0, 0.1), (1.0, 1.0)))
    curves = {1.0: (curve, [1.0, 1.0]), 1.5: (curve, [0.0, 2.0]), 1.25: (curve, [2.0, 0.0])}
    curves |= {0.75: (curve, [3.0, 3.0]), 0.5: (curve, [0.0, 0.9]), 0.25: (curve, [5.0, 0.0]), 0.0: (curve, [9.0, 0.1])}
    chosen = budget_table._choose_mixings(curves, [0.1, 0.2, 0.3, 0.4, 0.6, 0.95], 0.3)
    assert chosen == [1.5, 1.5, 1.0, 0.5, 0.5, 0.25]
    curves[0.125] = curve, [0.0, 0.0]
    assert budget_table._choose_mixings(curves, [0.1, 0.2, 0.3, 0.4], 0.3) == [1.5, 1.5, 1.0, 0.125]


def test_docs_list_the_mixings():
    above, below = sorted([*budget_table.MIXINGS_ABOVE, 1.0]), sorted([*budget_table.MIXINGS_BELOW, 1.0])
    *above, last_above = map("{:g}".format, above)
    *below, last_below = map("{:g}".format, below)
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"one of {', '.join(above)} and {last_above}. Below it, it is {', '.join(below)} or {last_below}." in text


@pytest.mark.parametrize("name", ["cluttered/avit_micro_cluttered.pth", "clipart/avit_mini_clipart.pth"])
def test_bundled_model_accepts_all_budgets(name):
    table = Checkpoint.load(str(ROOT / "experiments" / name)).budget_table()
    assert (table.min_cost < 0.2, table.max_cost) == (True, 1.0)
    assert table.at(0.3).mixing == pytest.approx(1, abs=0.01)
    assert table.at(0.5).nearest.accuracy == pytest.approx(table.at(0.3).nearest.accuracy, abs=0.03)


# Command line ------------------------------------------------------------------------------------

MODEL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--batch-size", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that was trained to half of the MACs from weights without a gate, next to its dataset."""
    folder = tmp_path_factory.mktemp("trained")
    data, start = make_image_folder(folder / "data"), save_halting_micro(folder / "start.pth", num_classes=3)
    torch.save(load_checkpoint(str(start))["model"], start)
    flags = f"--data-path {data} --pretrained-path {start} --output_dir {folder} --epochs 1 --target-macs 0.5 --lr 0.01"
    flags += " --warmup-epochs 0 --mixup 0 --cutmix 0 --model-ema-decay 0.5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_table, "MIN_AGREEMENT", 0.0)
        main_act.main([*MODEL, *flags.split()])
    return folder / "checkpoint.pth"


def evaluate(data, checkpoint, out, *flags):
    command = ["--data-path", data, "--eval", "--finetune", checkpoint, "--output_dir", out, *flags]
    main_act.main([*MODEL, *map(str, command)])
    return json.loads((out / "eval.json").read_text()), (out / "predictions.csv").read_text()


def test_training_from_static_weights_allows_every_budget(tmp_path, trained, capsys):
    data, checkpoint = trained.parent / "data", Checkpoint.load(str(trained))
    assert {"model", "model_ema"} == checkpoint.content["budget_tables"].keys()
    table = checkpoint.budget_table()
    assert table.max_cost == 1
    for budget in (0.4, 0.8):
        result, _ = evaluate(data, trained, tmp_path / str(budget), "--budget", budget)
        assert result["gmacs"] / result["gmacs_static"] == pytest.approx(budget, abs=0.1)
    expected = checkpoint.build_model(classes=["a", "b", "c"], budget=0.8).state_dict()
    mixed = mixed_weights(checkpoint.content["start"], checkpoint.state_dict(), table.at(0.8).mixing)
    assert all(torch.equal(expected[name], value) for name, value in mixed.items())
    static = ["1.000", "0.00", f"{table.points[-1].center:.4g}", "100.0%"]
    assert str(table).splitlines()[-1].split()[:4] == static
    capsys.readouterr()
    full, predictions = evaluate(data, trained, tmp_path / "full", "--budget", 1)
    assert "budget 1: the static model that training started from" in capsys.readouterr().out
    start = tmp_path / "static.pth"
    torch.save({name: value.float() for name, value in checkpoint.content["start"].items()}, start)
    _, expected = evaluate(data, start, tmp_path / "static", "--no-halting")
    assert predictions == expected
    assert full["gmacs"] == full["gmacs_static"]


def test_other_commands_mix_weights_too(tmp_path, trained, capsys):
    image = str(next((trained.parent / "data" / "val").rglob("*.png")))
    for name, budget in (("some", "0.8"), ("full", "1")):
        flags = ["--finetune", str(trained), "--budget", budget, "--output-dir", str(tmp_path / name)]
        visualize.main([image, *flags])
        export_onnx.main([str(trained), str(tmp_path / f"{name}.onnx"), "--budget", budget])
        keys = {entry.key for entry in onnx.load(tmp_path / f"{name}.onnx").metadata_props}
        assert "budget_curve" not in keys, "it is of the unmixed weights"
    data = ["--data-path", str(trained.parent / "data"), "--finetune", str(trained), "--rounds", "1"]
    benchmark.main([*data, "--batch-size", "2", "--budget", "0.8"])
    output = capsys.readouterr().out
    assert output.count("for a budget of 0.8; weights: ") == 3
    assert output.count("budget 1: the static model that training started from") == 2


def test_exported_checkpoint_keeps_start_and_table(trained):
    checkpoint = Checkpoint.load(str(trained))
    content = checkpoint.without_training_state()
    kept = Checkpoint(content, "kept.pth")
    assert kept.budget_table() == checkpoint.budget_table()
    assert all(value.dtype == torch.float16 for value in content["start"].values())
    del content["start"]
    assert kept.budget_table() is None


def test_full_budget_without_a_start_keeps_the_trained_weights_and_warns(tmp_path, capsys):
    """The static model is known by its weights only: the trained ones are no such model."""
    curve = {"model": [[20.0, 0.1], [30.0, 0.5], [60.0, 1.0]]}
    path = save_halting_micro(tmp_path / "known.pth", num_classes=3, budget_curves=curve)
    model = Checkpoint.load(str(path)).build_model("avit_micro_patch4_32", budget=1.0)
    output = capsys.readouterr()
    assert model.halting
    assert model.gate_center == 60
    assert "the static model that training started from" not in output.out
    assert "has no starting weights" in output.err


def test_warning_compares_with_the_gate_of_the_averaged_weights(tmp_path, capsys):
    curve = [[20.0, 0.1], [30.0, 0.5], [60.0, 1.0]]
    entries = {"budget_curves": {"model": curve, "model_ema": curve}, "gate_ema": {"gate_center": 60.0}}
    path = save_halting_micro(tmp_path / "known.pth", num_classes=3, **entries)
    content = load_checkpoint(str(path))
    checkpoint = Checkpoint(content | {"model_ema": content["model"]}, str(path))
    checkpoint.build_model("avit_micro_patch4_32", budget=0.8, use_ema=True)
    assert "has no starting weights" not in capsys.readouterr().err
    checkpoint.build_model("avit_micro_patch4_32", budget=0.8)
    assert "was trained for a budget of 0.50" in capsys.readouterr().err
    for damaged in ("x", torch.zeros(2)):
        checkpoint.content["gate_ema"] = damaged
        assert checkpoint.build_model("avit_micro_patch4_32", use_ema=True).gate_center == 30


def with_table(tmp_path, rows, curve=([20.0, 0.2], [30.0, 0.3], [60.0, 1.0]), **entries):
    """Return a checkpoint whose gate has the center 30."""
    entries |= {"budget_tables": {"model": rows}, "budget_curves": {"model": list(curve)}}
    path = save_halting_micro(tmp_path / "known.pth", num_classes=3, **entries)
    content = load_checkpoint(str(path))
    return Checkpoint(content | {"start": content["model"]}, str(path))


@pytest.mark.parametrize("trained", [0.298, 0.3, 0.302])
@pytest.mark.parametrize(
    ("budget", "warns"),
    [(0.25, False), (0.3, False), (0.31, False), (0.42, False), (0.5, True), (0.9, True), (1.0, True)],
)
def test_larger_budget_that_was_less_accurate_warns(tmp_path, capsys, trained, budget, warns):
    rows = [[0.2, 1.5, 20.0, 0.7, 0.6, -0.1, 0.01], [trained, 1.0, 30.0, 0.8, 0.7, 0.0, 0.0]]
    # A change of -0.01 ± 0.01 at 0.5, of -0.05 ± 0.02 at 1.
    rows += [[0.33, 1.0, 32.0, 0.8, 0.69, -0.01, 0.001], [0.4, 0.5, 40.0, 0.9, 0.71, 0.01, 0.01]]
    rows += [[0.5, 0.5, 40.0, 0.9, 0.7, -0.01, 0.01], [1.0, 0.0, 60.0, 1.0, 0.65, -0.05, 0.02]]
    checkpoint = with_table(tmp_path, rows)
    checkpoint.build_model("avit_micro_patch4_32", budget=budget)
    output = capsys.readouterr()
    assert (
        output.err.count(f"trained for a budget of {trained:.2f} and was more accurate there on the calibration")
        == warns
    )
    assert budget < 1 or "Top-1 at budget 1 is -5.0 ± 2.0 points (one standard error) relative to 0.30" in output.err
    assert ("so it may be chance" in output.err) == (budget == 0.5)
    assert budget < 1 or "images, at budget 1, top-1 is 65.0%, -5.0 ± 2.0 points relative" in output.out
    assert budget != 0.9 or "at budget 1, 100.0% of the predictions" in output.out


def test_damaged_table_or_start_warns_at_every_budget(tmp_path, capsys):
    rows = [[0.3, 1.0, 30.0, 0.8], [1.0, 0.0, 60.0, 1.0]]
    checkpoint = with_table(tmp_path, rows)
    without_start = Checkpoint(checkpoint.content | {"start": {}}, "c.pth")
    for damaged in (without_start, with_table(tmp_path, [[0.3, 9.0, 30.0, 0.8], rows[1]])):
        damaged.build_model("avit_micro_patch4_32", budget=0.25)
        assert "are damaged, so the gate alone changes" in capsys.readouterr().err
    checkpoint.build_model("avit_micro_patch4_32", budget=0.3)
    assert "damaged" not in capsys.readouterr().err


def test_another_image_size_than_that_of_the_calibration_warns(tmp_path, capsys):
    checkpoint = with_table(tmp_path, [[0.3, 1.0, 30.0, 0.8], [1.0, 0.0, 60.0, 1.0]])
    checkpoint = Checkpoint(checkpoint.content | {"args": {"input_size": 32}}, "c.pth")
    for size, budget, warns in ((32, 0.4, False), (64, 0.4, True), (64, 1.0, False), (64, None, False)):
        model = checkpoint.build_model("avit_micro_patch4_32", budget=budget, img_size=(size, size))
        errors = capsys.readouterr().err
        assert ("was calibrated at 32 x 32; at 64 x 64 it uses another fraction" in errors) == warns
        has_curve = "budget_curve" in export_onnx.metadata(checkpoint, model, use_ema=False, budget=None)
        assert has_curve == (size == 32 and model.halting)


def test_old_table_without_accuracies_warns_far_above_the_trained_budget(tmp_path, capsys):
    checkpoint = with_table(tmp_path, [[0.3, 1.0, 30.0, 0.8], [1.0, 0.0, 60.0, 1.0]])
    for budget, warns in ((0.34, False), (0.8, True)):
        checkpoint.build_model("avit_micro_patch4_32", budget=budget)
        assert ("and records no accuracies, so this budget may" in capsys.readouterr().err) == warns
    assert str(checkpoint.budget_table()).count("\n") == 2


def test_curve_for_other_programs_ends_near_the_trained_budget(tmp_path):
    rows, curve = [[0.3, 1.0, 30.0, 0.8], [1.0, 0.0, 60.0, 1.0]], ([20.0, 0.2], [30.0, 0.3], [60.0, 0.9])
    checkpoint = with_table(tmp_path, rows, curve)
    assert safe_budget_curve(checkpoint, False).record() == [*curve[:2], [pytest.approx(32.5), pytest.approx(0.35)]]
    for change in ({"args": {"gate_jitter": 4.0}}, {"gate": {"gate_scale": 10.0}}):
        unbounded = Checkpoint(checkpoint.content | change, "c.pth")
        assert safe_budget_curve(unbounded, False).record() == list(curve)
    flat = with_table(tmp_path, rows, ([20.0, 0.3], [60.0, 0.3]))
    assert safe_budget_curve(flat, False).record() == [[20.0, 0.3], [60.0, 0.3]]


@pytest.mark.parametrize(
    ("budget", "args", "warns"),
    [(0.55, {}, False), (0.8, {}, True), (0.8, {"gate_jitter": 4.0}, False), (0.3, {}, False)],
)
def test_budget_far_above_the_trained_one_warns_without_a_start(tmp_path, capsys, budget, args, warns):
    curve = {"model": [[20.0, 0.1], [30.0, 0.5], [60.0, 1.0]]}  # the gate's center is 30
    path = save_halting_micro(tmp_path / "known.pth", num_classes=3, budget_curves=curve)
    content = load_checkpoint(str(path))
    checkpoint = Checkpoint(content | {"args": {**dict(content.get("args") or {}), **args}}, str(path))
    checkpoint.build_model("avit_micro_patch4_32", budget=budget)
    errors = capsys.readouterr().err
    assert ("was trained for a budget of 0.50 and has no starting weights" in errors) == warns
    assert errors.count("warning: --budget") == warns
