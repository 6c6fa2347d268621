import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compare


def write_evaluation(folder, acc1, correct, name=None, **result):
    """Write an evaluation; without a name for the class, as earlier versions did."""
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({"acc1": acc1, "depth_mean": 6.0, "gmacs": 0.0123} | result))
    new, values = (",depth,target_name", f",6.0,{name}") if name or result else ("", "")
    rows = [f"{index},image {index},1,{int(prediction)}{values}" for index, prediction in enumerate(correct)]
    (folder / "predictions.csv").write_text("\n".join([f"index,image,target,prediction{new}", *rows]))


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


def table(folder):
    return folder / "predictions.csv"


def fails(capsys, *folders):
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(folder) for folder in folders])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("key", "value"), [("acc1", 99.0), ("images", 5), ("depth_mean", 7.0), ("acc1", float("nan")), ("images", 0)]
)
def test_files_of_two_evaluations_exit(tmp_path, capsys, key, value):
    write_evaluation(tmp_path / "a", 75.0, [1, 1, 1, 0], images=4)
    compare.main([str(tmp_path / "a")])
    result = json.loads((tmp_path / "a" / "eval.json").read_text())
    (tmp_path / "a" / "eval.json").write_text(json.dumps(result | {key: value}))
    message = (
        f"cannot compare {tmp_path / 'a'}: its two files are of different evaluations: {key} is {value:g} in eval.json"
    )
    assert message in fails(capsys, tmp_path / "a")


def test_other_class_names_exit(tmp_path, capsys):
    for name in ("cat", "dog"):
        write_evaluation(tmp_path / name, 50.0, [1, 0], name=name)
    assert "class 1 of image 0 is 'dog', but 'cat' in" in fails(capsys, tmp_path / "cat", tmp_path / "dog")
    write_evaluation(tmp_path / "old", 50.0, [1, 0])  # a table without names
    compare.main([str(tmp_path / "cat"), str(tmp_path / "old")])


@pytest.mark.parametrize(
    ("correct", "message"),
    [([], "has no images"), ([1], "the number of images is 1, and a standard error needs at least 2")],
)
def test_too_few_images_exit(tmp_path, capsys, correct, message):
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, 100.0, correct)
    assert message in fails(capsys, tmp_path / "a", tmp_path / "b")


def test_repeated_image_exits(tmp_path, capsys):
    write_evaluation(tmp_path / "a", 50.0, [1, 0])
    rows = table(tmp_path / "a").read_text().splitlines()
    table(tmp_path / "a").write_text("\n".join([*rows, rows[1]]))
    assert "has an image twice or out of order: image 0" in fails(capsys, tmp_path / "a")


def test_models_of_other_numbers_of_classes_warn(tmp_path, capsys):
    write_evaluation(tmp_path / "a", 50.0, [1, 0], classes=10)
    write_evaluation(tmp_path / "b", 50.0, [1, 0], classes=1000)
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().err == (
        "warning: the models predict among 10 or 1000 classes, so their top-1 is not comparable\n"
    )


def test_labels_are_the_shortest_distinct_endings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.labels([Path("one/eval"), Path("two/eval"), Path("three")]) == ["one/eval", "two/eval", "three"]
    assert compare.labels([Path()]) == [tmp_path.name]
    assert compare.labels([Path("a/"), Path("b/../a"), Path("b")]) == ["a", "a", "b"]
    assert compare.labels([Path("a"), Path("b/a")]) == [f"{tmp_path.name}/a", "b/a"]
    assert compare.labels([Path("/"), Path("/a"), Path("/a/a")]) == ["/", "/a", "a/a"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=5))
def test_labels_of_different_folders_differ(paths):
    folders = [Path("/", *parts) for parts in paths]
    names = compare.labels(folders)
    assert len(set(names)) == len(set(folders))
    assert all(folder.parts[-len(Path(name).parts) :] == Path(name).parts for folder, name in zip(folders, names))
