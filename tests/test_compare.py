import json

import numpy as np
import pytest

import compare


def write_evaluation(folder, acc1, correct):
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({"acc1": acc1, "depth_mean": 6.0, "gmacs": 0.0123}))
    rows = [f"{index},image {index},1,{int(prediction)}" for index, prediction in enumerate(correct)]
    (folder / "predictions.csv").write_text("\n".join(["index,image,target,prediction", *rows]))


def test_table_has_paired_difference(tmp_path, capsys):
    write_evaluation(tmp_path / "static", 75.0, [1, 1, 1, 0])
    write_evaluation(tmp_path / "adaptive", 50.0, [1, 0, 1, 0])
    compare.main([str(tmp_path / "static"), str(tmp_path / "adaptive")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["static", "75.00", "%", "6.00", "12.3", "M"]
    assert lines[2].split() == ["adaptive", "50.00", "%", "6.00", "12.3", "M", "-25.00", "±", "25.00"]


@pytest.mark.parametrize(
    "broken", ["no folder", "no table", "another table", "no result", "more images", "other images"]
)
def test_missing_or_different_evaluation_exits(tmp_path, capsys, broken):
    write_evaluation(tmp_path / "static", 75.0, [1, 1, 1, 0])
    if broken != "no folder":
        write_evaluation(tmp_path / "adaptive", 50.0, [1, 0, 1, 0])
    table = tmp_path / "adaptive" / "predictions.csv"
    if broken == "no table":
        table.unlink()
    elif broken == "another table":
        table.write_text("a,b\n1,2\n")
    elif broken == "no result":
        (tmp_path / "adaptive" / "eval.json").write_text('{"acc1": 50.0}')
    elif broken == "more images":
        table.write_text(table.read_text() + "\n4,image 4,1,1")
    elif broken == "other images":
        table.write_text(table.read_text().replace("image 2", "image 9"))
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path / "static"), str(tmp_path / "adaptive")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"compare.py: error: cannot compare {tmp_path / 'adaptive'}: ")


def test_standard_error_is_paired_by_image():
    rng = np.random.default_rng(0)
    first = rng.random(2000) < 0.9
    second = np.where(rng.random(2000) < 0.02, ~first, first)
    difference, error = compare.paired_difference(first.astype(float), second.astype(float))
    assert difference == pytest.approx(100 * (second.mean() - first.mean()))
    assert error == pytest.approx(100 * np.std(second.astype(float) - first, ddof=1) / 2000**0.5)
    unpaired = 100 * np.sqrt((first.var() + second.var()) / 2000)
    assert error < unpaired / 2
