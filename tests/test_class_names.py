"""Class names: their normal form, numbers in them, and class-index files."""

import json
import unicodedata

import pytest
from conftest import make_image_folder
from hypothesis import given
from hypothesis import strategies as st

from datasets import build_dataset, class_names, class_numbers, normal_name, positions
from utils import UserError

SIZE = (32, 32)
NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


# Comparison --------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8")).filter(str.strip))
def test_normal_form_is_the_same_for_all_spellings(name):
    spellings = [name, f" {name}\t", unicodedata.normalize("NFD", name), unicodedata.normalize("NFC", name)]
    assert len({normal_name(spelling) for spelling in spellings}) == 1
    assert normal_name(normal_name(name)) == normal_name(name)


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["0", "10", "2"], [0, 10, 2]),
        (["000", "010", "002"], [0, 10, 2]),
        (["class 0", "class 10"], [0, 10]),
        (["1", "01"], None),
        (["1", "cat"], None),
        (["-1", "2"], None),
        (["1.5", "2"], None),
        (["\u00b2", "\u0664"], None),
        (["9" * 5000], None),
    ],
)
def test_class_numbers_are_decimal_numbers(names, numbers):
    assert class_numbers(names) == numbers


def test_positions_compare_numbers_only_if_all_names_are_numbers():
    assert positions(["2", "010"], ["class 0", "class 2", "class 10"]) == [1, 2]
    assert positions(["2", "010"], ["02", "010", "cat"]) == [None, 1]
    assert positions([NFD, "dog"], ["cat", NFC]) == [1, None]


def test_folders_in_two_spellings_are_the_same_class(tmp_path):
    for part, name in {"train": NFD, "val": f"{NFC} "}.items():
        root = make_image_folder(tmp_path / part, classes=2, train=2, val=2)
        (root / part / "class_0").rename(root / part / name)
    train, val = (build_dataset("IMNET", str(tmp_path / part), part == "train", SIZE) for part in ("train", "val"))
    assert train.classes == val.classes == [NFC, "class_1"]
    assert [target for _, target in train] == [target for _, target in val] == [0, 0, 1, 1]


def test_two_spellings_in_one_split_raise(image_folder):
    (image_folder / "val" / "class_0").rename(image_folder / "val" / NFC)
    (image_folder / "val" / "class_1").rename(image_folder / "val" / NFD)
    with pytest.raises(UserError, match=r"val: the classes 'cafe\\u0301' and 'caf\\xe9' have the same name"):
        build_dataset("IMNET", str(image_folder), False, SIZE)


# Class index -------------------------------------------------------------------------------------

PAIRS = '[["n01", " tench\\n"], ["n9", "x"]]'


@pytest.mark.parametrize(
    "content",
    [
        '{"0": ["n01", "tench"]}',
        '{"7": ["n01", "tench"]}',
        '{"0": "tench", "1": "n02"}',
        '{"n01": "tench"}',
        '["tench", "n02"]',
        PAIRS,
    ],
)
def test_class_index_gives_the_class_names(tmp_path, content):
    (tmp_path / "imagenet_class_index.json").write_text(content)
    assert class_names(["n01", "n02"], str(tmp_path), None) == ["tench", "n02"]
    assert class_names(["n01", "n02"], None, str(tmp_path / "imagenet_class_index.json")) == ["tench", "n02"]


def test_class_names_without_a_class_index_are_the_folder_names(tmp_path):
    assert class_names(["n01", "n02"], str(tmp_path), None) == ["n01", "n02"]
    assert class_names(["0", "1"], None, None) == ["0", "1"]


@pytest.mark.parametrize("content", ["", "7", "{", '{"0": 5}', '{"0": ["a"]}', '{"0": ["a", 5]}', "[" * 10**5, "null"])
def test_broken_class_index_raises_or_is_ignored(tmp_path, content, capsys):
    (tmp_path / "class_index.json").write_text(content)
    with pytest.raises(UserError, match="not a class index"):
        class_names(["n01"], None, str(tmp_path / "class_index.json"))
    assert class_names(["n01"], str(tmp_path), None) == ["n01"]  # found in the dataset's folder, not named by the user
    assert "The file is ignored" in capsys.readouterr().err


def test_missing_class_index_raises():
    with pytest.raises(UserError, match="cannot be read: No such file"):
        class_names(["n01"], None, "gone.json")


FISH = {str(number): f"fish {number}" for number in range(4)}
UNFIT = [
    (["cat", "dog"], FISH),  # of another number of classes
    (["0", "1"], FISH),  # folders with numbers, and an index of another dataset
    (["1", "2", "3", "4"], FISH),  # numbered from 1
    (["cat", "dog"], {"1": "x", "2": "y"}),
    (["cat", "dog"], {"n01": "x"}),
    (["cat", "dog"], {}),
]


@pytest.mark.parametrize(("classes", "index"), UNFIT)
def test_unfit_class_index_is_not_used(tmp_path, capsys, classes, index):
    path = tmp_path / "imagenet_class_index.json"
    path.write_text(json.dumps(index))
    assert class_names(classes, str(tmp_path), None) == classes
    assert capsys.readouterr().err.count("warning: ") == 1
    with pytest.raises(UserError, match="the class index does not fit"):
        class_names(classes, None, str(path))


def test_class_index_of_numbered_folders_is_used_by_number(tmp_path, capsys):
    index = {str(number): [f"n{number:02}", f"fish {number}"] for number in range(12)}
    (tmp_path / "class_index.json").write_text(json.dumps(index))
    folders = sorted(index)  # 0, 1, 10, 11, 2
    assert class_names(folders, str(tmp_path), None) == [f"fish {number}" for number in folders]
    assert class_names(["n10", "n2"], str(tmp_path), None) == ["fish 10", "n2"]
    assert "names for 1 of 2 classes" in capsys.readouterr().err


def test_numbers_of_a_class_index_may_be_those_of_the_network(tmp_path):
    """The dataset has two of the network's four classes, so the index numbers the network's."""
    (tmp_path / "class_index.json").write_text(json.dumps(FISH))
    network = ["a", "b", "c", "d"]
    names = class_names(["d", "b", "a", "c"], str(tmp_path), None, numbered=(["d", "b"], network))
    assert names == ["fish 3", "fish 1", "fish 0", "fish 2"]


def test_second_class_index_is_used_if_the_first_does_not_fit(tmp_path, capsys):
    (tmp_path / "imagenet_class_index.json").write_text(json.dumps(FISH))
    (tmp_path / "my_class_index.json").write_text(json.dumps({NFD: "coffee", "dog": "hound"}))
    assert class_names([NFC, "dog"], str(tmp_path), None) == ["coffee", "hound"]
    assert capsys.readouterr().err == ""
