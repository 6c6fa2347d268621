"""Matching of a dataset's classes with the rows of a head."""

import unicodedata
from functools import cache

import pytest
import torch
from conftest import halting_model
from hypothesis import given
from hypothesis import strategies as st

from datasets import placeholder_names
from training.checkpoints import Checkpoint
from training.classes import default_names, match_head
from utils import UserError

NUMBERS = [str(number) for number in range(12)]
AS_TEXT = sorted(NUMBERS)  # 0, 1, 10, 11, 2, ...: the order of folders
NAMES = [f"name {chr(97 + row)}" for row in range(12)]
WNIDS = list(default_names(1000))


def match(classes, recorded, num_rows=None, **options):
    return match_head("c.pth", classes, recorded, num_rows or len(recorded), **options)


# Property: the row of a class is the one that was trained for it -----------------------------------

names = st.lists(st.text(st.characters(codec="utf-8"), max_size=6).filter(str.strip), min_size=1, max_size=8)


@given(st.data())
def test_rows_do_not_depend_on_order_and_spelling_of_names(data):
    recorded = data.draw(
        names.filter(lambda names: len({unicodedata.normalize("NFC", n).strip() for n in names}) == len(names))
    )
    spellings = [
        [unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), f" {name}\n"] for name in recorded
    ]
    checkpoint = Checkpoint(
        {
            "model": {"head.bias": torch.arange(len(recorded))},
            "classes": [data.draw(st.sampled_from(s)) for s in spellings],
        },
        "c.pth",
    )
    rows = data.draw(st.lists(st.integers(0, len(recorded) - 1), unique=True, min_size=1))
    classes = [data.draw(st.sampled_from(spellings[row])) for row in rows]
    head = checkpoint.head_for(classes, keep_others=True)
    assert head.select(checkpoint.state_dict())["head.bias"][: len(rows)].tolist() == rows
    assert sorted(head.rows) == list(range(len(recorded)))


def number_names(numbers, padding, is_placeholder):
    return [f"class {number}" if is_placeholder else str(number).zfill(padding) for number in numbers]


@given(
    st.permutations(range(12)),
    st.permutations(range(12)),
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
)
def test_rows_do_not_depend_on_order_and_padding_of_numbers(order, own, count, padding, other, placeholder, own_is):
    recorded = number_names(range(12) if placeholder else order, padding, placeholder)
    classes = number_names(own[:count], other, own_is)
    head = match(classes, recorded, keep_others=True)
    expected = [recorded.index(number_names([number], padding, placeholder)[0]) for number in own[:count]]
    assert head.rows[:count] == expected


@cache
def model_and_predictions():
    model, x = halting_model(), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, x, [f"name {row}" for row in model(x).argmax(dim=1)]


@given(st.permutations(range(7)), st.integers(1, 7))
def test_accuracy_of_a_model_does_not_depend_on_the_order_of_classes(order, count):
    model, x, expected = model_and_predictions()
    content = {"model": model.state_dict(), "classes": [f"name {row}" for row in range(7)]}
    head = Checkpoint(content, "c.pth").head_for([f"name {row}" for row in order[:count]], keep_others=True)
    with torch.no_grad():
        logits = torch.func.functional_call(model, head.select(content["model"]), x)
    assert [head.names[row] for row in logits.argmax(dim=1)] == expected


# Numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [None, placeholder_names(12), NAMES])
@pytest.mark.parametrize("options", [{}, {"keep_others": True}, {"replace_head": True}])
def test_numbered_folders_are_rows_with_a_warning(recorded, options, capsys):
    head = match(AS_TEXT, recorded, 12, **options)
    assert [NUMBERS[row] for row in head.rows] == AS_TEXT
    assert head.names == AS_TEXT
    assert "matched by number, not in the order of their names" in capsys.readouterr().err


def test_imagenet_v2_is_matched_by_number(capsys):
    folders = sorted(str(number) for number in range(1000))
    for recorded in (None, WNIDS):
        assert match(folders, recorded, 1000, keep_others=True).rows == [int(name) for name in folders]
        assert capsys.readouterr().err.count("by number") == 1


def test_numbers_from_one_are_matched_in_their_order(capsys):
    folders = sorted(str(number) for number in range(1, 13))
    assert match(folders, None, 12).rows == [int(name) - 1 for name in folders]
    assert "by number" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [None, [str(row) for row in range(9)], placeholder_names(9)])
@pytest.mark.parametrize("classes", [[str(row) for row in range(9)], [f"{row:03}" for row in range(9)]])
def test_numbers_in_the_order_of_the_rows_print_nothing(recorded, classes, capsys):
    assert match(classes, recorded, 9, keep_others=True).rows == list(range(9))
    assert capsys.readouterr() == ("", "")


def test_some_numbers_need_a_numbered_head_or_an_evaluation(capsys):
    for recorded, replace_head in ((None, False), (None, True), (NAMES, False), (NAMES, True)):
        head = match(["0", "3"], recorded, 12, replace_head=replace_head)
        assert head.rows is None
        assert head.is_new == (replace_head and recorded is NAMES)
    for recorded in (None, NAMES):
        assert match(["0", "3"], recorded, 12, keep_others=True).rows[:2] == [0, 3]
        assert "by number" in capsys.readouterr().err
    assert match(["0", "3"], placeholder_names(12), 12, replace_head=True).rows == [0, 3]
    assert match(["3", "12"], None, 12, keep_others=True).rows is None  # beyond the rows


# A part of the classes -------------------------------------------------------------------------------


def test_evaluation_keeps_the_rows_of_other_classes(capsys):
    head = match(["c", "a"], ["a", "b", "c", "d"], keep_others=True)
    assert (head.names, head.rows) == (["c", "a", "b", "d"], [2, 0, 1, 3])
    assert head.in_order_of_network() == ["a", "b", "c", "d"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "the dataset has 2 of the network's 4 classes; predictions are among all 4" in warnings[0]
    assert match(["c", "a"], ["a", "b", "c", "d"]).rows == [2, 0]


def test_weights_without_names_of_1000_classes_are_imagenets_in_evaluation(capsys):
    head = match(["n01443537", "n01440764"], None, 1000, keep_others=True)
    assert head.rows[:3] == [1, 0, 2]
    assert head.names[2] == WNIDS[2]
    assert match(["n01443537"], None, 1000, replace_head=True).rows is None


# Other relations -------------------------------------------------------------------------------------


def test_unknown_classes_raise_or_give_a_new_head():
    with pytest.raises(UserError, match=r"c\.pth cannot predict x: the dataset has a, x; the checkpoint has a, b"):
        match(["a", "x"], ["a", "b"], keep_others=True)
    assert match(["a", "x"], ["a", "b"], replace_head=True).is_new
    assert match(["x", "y", "z"], ["a", "b"], replace_head=True).is_new
    assert match(["x", "y", "z"], ["a", "b"]) == (["x", "y", "z"], None, False)  # `load_weights` raises UserError


@pytest.mark.parametrize(
    ("classes", "recorded"),
    [
        (["b", "a"], ["a", "b"]),
        (["a"], ["a", "b"]),
        (["a", "x"], ["a", "b"]),
        (["x", "y"], ["a", "b"]),
        (AS_TEXT, None),
    ],
)
def test_resuming_needs_the_same_classes_in_the_same_order(classes, recorded):
    with pytest.raises(UserError, match="--resume requires the same classes in the same order"):
        match(classes, recorded, len(recorded or classes), same_order=True)
    assert match(classes, classes, same_order=True).rows == list(range(len(classes)))


def test_classes_that_a_dataset_names_twice_are_matched_by_position():
    assert match(["crane", "crane"], ["a", "b"]) == (["crane", "crane"], None, False)


# Rows without names --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [["tench", *WNIDS[1:]], [f"animal {number}" for number in range(1000)]])
def test_thousand_classes_that_are_not_imagenets_warn(classes, capsys):
    assert match(sorted(classes), None, 1000).rows is None
    assert "warning: c.pth: classes are matched by position: the dataset has" in capsys.readouterr().err


def test_numbered_rows_and_named_classes_warn(capsys):
    assert match(NAMES, placeholder_names(12)).rows is None
    assert "the checkpoint has class 0, class 1, class 2 and 9 more" in capsys.readouterr().err


def test_rows_without_names_print_one_line(capsys):
    match(NAMES, None, 12)
    output = capsys.readouterr()
    assert (output.out.count("\n"), output.err) == (1, "")
    assert "c.pth records no class names; classes are matched by position: name a, name b" in output.out


@pytest.mark.parametrize("recorded", [None, placeholder_names(1000)])
def test_imagenet_without_names_prints_nothing(recorded, capsys):
    assert match(WNIDS, recorded, 1000).names == WNIDS
    assert capsys.readouterr() == ("", "")
