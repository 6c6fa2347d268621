import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_charts import assert_drawn_well, texts

from utils import UserError
from visualization import training_curves
from visualization.charts import PALETTE
from visualization.training_curves import Run, accuracy_against_macs, curves, read_run, read_runs, series


def write_log(folder: Path, *lines) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.txt").write_text("\n".join(texts) + "\n")
    return folder


def epochs(count=5, gmacs=0.01, static=0.02, acc1=90.0, **more) -> list[dict]:
    fixed = {"test_gmacs": gmacs, "test_gmacs_static": static, "train_lr": 0.1, "test_depth_mean": 5.0, **more}
    return [{"epoch": e, "test_acc1": acc1 - count + 1 + e, "test_loss": 1 / (e + 1), **fixed} for e in range(count)]


def test_a_log_with_broken_lines(tmp_path, capsys):
    broken = ['{"epoch": 1, "test_', "[1]", '{"test_acc1": 3}', '{"epoch": NaN}', '{"epoch": true}', "[" * 10**5]
    folder = write_log(tmp_path / "run", {"epoch": 0}, *broken, "", {"epoch": 2})
    with (folder / "log.txt").open("ab") as file:
        file.write(b"\0\0\xff\n")
    run = read_run(folder)
    assert run == Run("run", [{"epoch": 0}, {"epoch": 2}])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(broken) + 1
    assert all(f"{folder / 'log.txt'}, line {n}:" in text for n, text in zip([*range(2, 8), 10], warnings))


@pytest.mark.parametrize("kind", ["missing", "empty", "broken", "a folder"])
def test_no_log(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "a folder":
        (folder / "log.txt").mkdir(parents=True)
    elif kind != "missing":
        write_log(folder, "" if kind == "empty" else "nonsense")
    with pytest.raises(UserError, match=r"expected an --output_dir of main_act\.py, with log\.txt") as error:
        read_run(folder)
    assert str(folder / "log.txt") in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path, monkeypatch):
    places = ["x/a/run", "x/b/run", "y/b/run", "other"]
    folders = [write_log(tmp_path / place, {"epoch": number}) for number, place in enumerate(places)]
    runs = read_runs([*folders, folders[0]])
    assert [run.name for run in runs] == ["a/run", "x/b/run", "y/b/run", "other"]
    assert [run.lines[0]["epoch"] for run in runs] == [0, 1, 2, 3]
    monkeypatch.chdir(folders[0])
    assert read_runs([Path()])[0].name == "run"


def test_a_series_has_finite_numbers_in_order_and_the_last_of_an_epoch():
    lines = [{"epoch": 1, "x": 5, "y": 1}, {"epoch": 0, "x": 1.5, "y": 2}, {"epoch": 1, "x": 7, "y": 3}]
    odd = [float("nan"), float("inf"), None, "3", True, [1.0], 10**400]
    lines += [{"epoch": 2 + n, "x": value, "y": 0} for n, value in enumerate(odd)]
    run = Run("run", [*lines, {"epoch": 20, "y": 1}])
    assert series(run, "x", "y").tolist() == [[0, 1.5, 2], [1, 7, 3]]
    assert series(run, "nothing").shape == (0, 2)


def test_curves_of_two_runs():
    extra = {"test_ema_acc1": 99.0, "train_loss": 3.0, "train_ponder_loss_token": 0.1, "train_distr_prior_loss": 0.2}
    band = {"train_depth_min": 2.0, "train_depth_max": 7.5}
    runs = [Run("static", epochs(gmacs=0.02)), Run("$ours$", epochs(7, **extra, **band))]
    figure = curves(runs)
    accuracy, loss, ponder, depth, macs, rate = figure.axes
    assert [axes.get_title("left") for axes in figure.axes][4] == "multiply-adds (M)"
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn[0] == [[86, 87, 88, 89, 90], [84, 85, 86, 87, 88, 89, 90], [99.0] * 7]
    assert [line.get_linestyle() for line in accuracy.lines] == ["-", "-", ":"]
    assert drawn[1][2] == [3.0] * 7
    assert drawn[2] == [[0.1] * 7, [0.2] * 7]
    assert drawn[3] == [[5.0] * 5, [5.0] * 7]
    (shade,) = depth.collections
    assert set(shade.get_paths()[0].vertices[:, 1]) == {2.0, 7.5}
    assert macs.lines[2].get_ydata() == pytest.approx([10] * 7)
    assert macs.lines[3].get_ydata() == pytest.approx([20] * 7)
    assert drawn[5] == [[0.1] * 5, [0.1] * 7]
    for axes in figure.axes:
        assert {line.get_color() for line in axes.lines} <= set(PALETTE[:2])
    assert len({line.get_color() for line in loss.lines}) == 2
    assert len({line.get_color() for line in ponder.lines}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["static", "$ours$"]
    assert rate.get_xlim() == accuracy.get_xlim()
    assert_drawn_well(figure)
    legend = figure.legends[0].get_window_extent()
    assert all(legend.y1 <= axes.get_tightbbox().y0 for axes in figure.axes)  # it covers nothing


def test_curves_with_little_to_show():
    figure = curves([Run("_one_", [{"epoch": 3, "test_acc1": 50.0}])])
    (point,) = figure.axes[0].lines
    assert point.get_marker() == "o"
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [3]
    assert texts(figure).count("no data") == 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_one_"]
    assert_drawn_well(figure)


def test_large_networks_are_counted_in_g():
    figure = curves([Run("deit", epochs(gmacs=0.8, static=1.25))])
    assert figure.axes[4].get_title("left") == "multiply-adds (G)"
    assert figure.axes[4].lines[0].get_ydata() == pytest.approx([0.8] * 5)


def test_many_runs_have_colours_of_their_own():
    many = training_curves._run_colors(30)
    assert len({tuple(color) for color in many}) == 30
    assert len(set(training_curves._run_colors(8))) == 8


def test_accuracy_against_multiply_adds():
    runs = [Run("static", epochs(gmacs=0.02)), Run("ours", epochs(acc1=89.0)), Run("empty", [{"epoch": 0}])]
    figure = accuracy_against_macs(runs)
    (axes,) = figure.axes
    ends = {line.get_marker(): line.get_data() for line in axes.lines if line.get_markersize() == 8}
    assert ends["s"] == (pytest.approx([20]), [90])
    assert ends["o"] == (pytest.approx([10]), [89])
    (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_ydata()) == [90, 90]
    way = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
    assert way == [[86, 87, 88, 89, 90], [85, 86, 87, 88, 89]]
    assert [text.get_text() for text in axes.texts] == ["static", "ours"]
    assert "(M)" in axes.get_xlabel()
    assert_drawn_well(figure)


NEAR = {
    "in a row": [(f"run ${n}$ of several", 0.01 + 1e-5 * n, 90 + 0.01 * n) for n in range(6)],
    "plate beside plate": [
        *(("control_0", 0.01958, 91.4), ("adaptive_0", 0.008626, 90.9), ("control_1", 0.01958, 91.34)),
        *(("adaptive_1", 0.008336, 90.7), ("control_2", 0.01958, 91.58), ("adaptive_2", 0.008967, 90.84)),
    ],
}


@pytest.mark.parametrize("points", NEAR.values(), ids=NEAR.keys())
def test_labels_of_near_points_do_not_overlap(points):
    figure = accuracy_against_macs([Run(name, epochs(6, gmacs=gmacs, acc1=acc1)) for name, gmacs, acc1 in points])
    FigureCanvasAgg(figure).draw()
    plates = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(plates) == len(points)
    assert not any(a.overlaps(b) for n, a in enumerate(plates) for b in plates[:n])


def test_no_run_has_multiply_adds():
    figure = accuracy_against_macs([Run("old", [{"epoch": 0, "test_acc1": 3.0}])])
    assert "no data" in texts(figure)
    assert_drawn_well(figure)
