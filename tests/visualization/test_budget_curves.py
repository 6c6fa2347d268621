"""The chart of budget tables, from checkpoints to the drawing."""

import pytest
import torch
from conftest import save_halting_micro
from test_charts import assert_drawn_well, texts

import visualize
from training.checkpoints import load_checkpoint
from utils import UserError
from visualization.budget_curves import quality_against_macs
from visualization.training_curves import Run

TABLE = [[0.2, 1.5, -1.0, 0.6], [0.3, 1.0, 30.0, 0.9], [1.0, 0.0, 60.0, 1.0]]


def save_run(folder, table):
    """Write the log and the checkpoint of a run whose gate has the center 30."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text('{"epoch": 0}')
    path = save_halting_micro(folder / "checkpoint.pth", num_classes=3, budget_tables={"model": table})
    content = load_checkpoint(str(path))
    torch.save(content | {"start": content["model"]}, path)
    return folder


def test_chart_shows_each_table_and_marks_the_budget_of_the_training(tmp_path):
    folders = [save_run(tmp_path / "first", TABLE), save_run(tmp_path / "$second$", TABLE[1:])]
    budgets = visualize.read_budgets([Run(folder.name, [], folder) for folder in [*folders, tmp_path]])
    assert [each.name for each in budgets] == ["first", "$second$"]
    figure = quality_against_macs(budgets)
    (axes,) = figure.axes
    first, mark, *_ = axes.lines
    assert first.get_xdata() == pytest.approx([0.2, 0.3, 1.0])
    assert first.get_ydata() == pytest.approx([60, 90, 100])
    assert (*mark.get_xdata(), *mark.get_ydata()) == pytest.approx((0.3, 90))
    assert len(axes.lines) == 4
    assert {"first", "$second$", "budget of the training"} <= set(texts(figure))
    assert_drawn_well(figure)


def test_chart_shows_top_1_if_all_runs_have_it(tmp_path):
    measured = [[0.72, 0.0, 0.0], [0.75, 0.03, 0.01]]
    folders = [save_run(tmp_path / "new", [row + more for row, more in zip(TABLE[1:], measured)])]
    runs = [Run(folder.name, [], folder) for folder in [*folders, save_run(tmp_path / "old", TABLE)]]
    for runs_shown, expected in ((runs[:1], [72, 75]), (runs, [90, 100])):
        figure = quality_against_macs(visualize.read_budgets(runs_shown))
        assert figure.axes[0].lines[0].get_ydata() == pytest.approx(expected)
        assert_drawn_well(figure)


def test_command_draws_budgets_if_a_run_has_a_table(tmp_path):
    save_run(tmp_path / "run", TABLE)
    visualize.main(["--curves", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "accuracy_macs.png", "budgets.png"}


def test_file_that_is_no_checkpoint_raises(tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a checkpoint"):
        visualize.read_budgets([Run("run", [], tmp_path)])
