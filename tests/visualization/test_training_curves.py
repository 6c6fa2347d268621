import json

import numpy as np
import pytest
from test_charts import assert_drawn_well, texts

from utils import UserError
from visualization.charts import PALETTE
from visualization.training_curves import Run, accuracy_against_macs, curves, read_runs, series


def write_log(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def epochs(count=5, gmacs=0.01, static=0.02, acc1=90.0, **more) -> list[dict]:
    fixed = {"test_gmacs": gmacs, "test_gmacs_static": static, "train_lr": 0.1, "test_depth_mean": 5.0, **more}
    return [{"epoch": e, "test_acc1": acc1 - count + 1 + e, "test_loss": 1 / (e + 1), **fixed} for e in range(count)]


def test_broken_log_lines_are_skipped_with_a_warning(tmp_path, capsys):
    broken = ['{"epoch": 1, "test_', "[1]", '{"test_acc1": 3}', '{"epoch": NaN}', "\0\0"]
    folder = write_log(tmp_path / "run", {"epoch": 0}, *broken, "", {"epoch": 2})
    assert read_runs([folder]) == [Run("run", [{"epoch": 0}, {"epoch": 2}], folder)]
    warnings = capsys.readouterr().err.splitlines()
    assert all(f"{folder / 'log.txt'}, line {n} is not a log entry" in text for n, text in enumerate(warnings, start=2))


@pytest.mark.parametrize("lines", [None, [""], ["nonsense"]], ids=["missing", "empty", "broken"])
def test_directory_without_epochs_raises(tmp_path, lines):
    folder = tmp_path if lines is None else write_log(tmp_path / "run", *lines)
    with pytest.raises(UserError, match=r"Pass the --output-dir of a training run of main_act\.py") as error:
        read_runs([folder])
    assert str(error.value).startswith(f"{folder / 'log.txt'}")


def test_runs_with_equal_names_are_named_by_paths(tmp_path):
    places = ["x/a/run", "x/b/run", "x/b/run/run", "other"]
    folders = [write_log(tmp_path / place, {"epoch": number}) for number, place in enumerate(places)]
    runs = read_runs([*folders, folders[0]])
    assert [(run.name, run.lines[0]["epoch"]) for run in runs] == [(name, n) for n, name in enumerate(places)]
    assert [run.name for run in read_runs(folders[1:3])] == ["run", "run/run"]


def test_series_is_finite_sorted_and_keeps_last_entry_of_an_epoch():
    lines = [{"epoch": 1, "x": 5, "y": 1}, {"epoch": 0, "x": 1.5, "y": 2}, {"epoch": 1, "x": 7, "y": 3}]
    odd = [float("nan"), float("inf"), None, "3", [1.0], 10**400]
    lines += [{"epoch": 2 + n, "x": value, "y": 0} for n, value in enumerate(odd)]
    run = Run("run", [*lines, {"epoch": 20, "y": 1}])
    assert series(run, "x", "y").tolist() == [[0, 1.5, 2], [1, 7, 3]]
    assert series(run, "nothing").shape == (0, 2)


def test_curves_draw_metrics_of_two_runs():
    extra = {"test_ema_acc1": 99.0, "train_loss": 3.0, "train_ponder_loss_token": 0.1, "train_distr_prior_loss": 0.2}
    band = {"train_depth_min": 2.0, "train_depth_max": 7.5}
    figure = curves([Run("static", epochs(gmacs=0.02)), Run("$ours$", epochs(7, **extra, **band))])
    accuracy, _, _, depth, macs, _ = figure.axes
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn[0] == [[86, 87, 88, 89, 90], [84, 85, 86, 87, 88, 89, 90], [99.0] * 7]
    assert [line.get_linestyle() for line in accuracy.lines] == ["-", "-", ":"]
    assert [line.get_color() for line in accuracy.lines] == [PALETTE[0], PALETTE[1], PALETTE[1]]
    assert drawn[1][2] == [3.0] * 7
    assert drawn[2:4] == [[[0.1] * 7, [0.2] * 7], [[5.0] * 5, [5.0] * 7]]
    assert set(depth.collections[0].get_paths()[0].vertices[:, 1]) == {2.0, 7.5}
    assert macs.get_title("left") == "MACs (M)"
    assert np.array(drawn[4][2:]) == pytest.approx(np.outer([10, 20], np.ones(7)))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["static", "$ours$"]
    assert_drawn_well(figure)


def test_curves_of_one_epoch_with_missing_metrics():
    figure = curves([Run("_one_", [{"epoch": 3, "test_acc1": 50.0, "test_gmacs": 1.25}])])
    assert figure.axes[0].lines[0].get_marker() == "o"
    assert figure.axes[4].get_title("left") == "MACs (G)"
    assert figure.axes[4].lines[0].get_ydata().tolist() == [1.25]
    assert texts(figure).count("no data") == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_one_"]
    assert_drawn_well(figure)


def test_accuracy_against_macs_marks_last_epochs():
    runs = [Run("ours", epochs(acc1=89.0)), Run("static", epochs(gmacs=0.02)), Run("empty", [{"epoch": 0}])]
    figure = accuracy_against_macs(runs)
    (axes,) = figure.axes
    ends = {line.get_marker(): line.get_data() for line in axes.lines if line.get_markersize() == 8}
    assert ends == {"s": ([20], [90]), "o": ([10], [89])}
    paths = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
    assert paths == [[85, 86, 87, 88, 89], [86, 87, 88, 89, 90]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["static: 90.0%", "ours: 89.0%"]
    assert "(M)" in axes.get_xlabel()
    assert_drawn_well(figure)
    assert "no data" in texts(accuracy_against_macs(runs[2:]))


@pytest.mark.parametrize("draw", [curves, accuracy_against_macs])
@pytest.mark.parametrize(("count", "name"), [(2, "a very long name, $日本_\x07$ " * 3), (30, "r")])
def test_runs_have_distinct_colors_and_legend_covers_nothing(draw, count, name):
    figure = draw([Run(name, epochs(acc1=90 + 0.01 * n)) for n in range(count)])
    assert_drawn_well(figure)
    legend = figure.legends[0]
    assert len({tuple(line.get_color()) for line in legend.get_lines()}) == count
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)
