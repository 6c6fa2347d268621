"""The parser of every command: negative numbers, unknown flags, and which flags were given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_flag_effects import COMMANDS

from training import arguments
from training.arguments import parse_args

NUMERIC = {
    (command, action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1)
    for command, (make, _) in COMMANDS.items()
    for action in make()._actions
    if getattr(action.type, "__name__", "") in ("int", "float", "fraction or number of MACs")
}


@given(st.floats())
def test_every_spelling_of_a_number_is_read_as_a_value(number):
    for text in (repr(number), f"{number:e}", f"{number:.3E}", f"{number:g}"):
        parser = arguments.Parser()
        parser.add_argument("--number", type=float)
        assert repr(parser.parse_args(["--number", text]).number) == repr(float(text))


@pytest.mark.parametrize("text", ["-1e0", "-2.5E+1", "-1.", "-.5e1"])
def test_gate_accepts_negative_numbers_with_exponents(text):
    args = parse_args(["--gate_center", text, "--gate-scale", text])
    assert (args.gate_center, args.gate_scale) == (float(text), float(text))


@pytest.mark.parametrize(("command", "flag", "count"), sorted(NUMERIC))
@pytest.mark.parametrize("text", ["-inf", "-1e-1000x", "-nan"])
def test_impossible_number_of_any_flag_exits_with_a_line_that_quotes_it(command, flag, count, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command][0]().parse_args([flag, *[text] * count])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert flag in message
    assert text in message


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epoch", "--epochs"),
        ("--batchsize", "--batch-size"),
        ("--learning-rate", None),
        ("--pretrain=1", "--pretrained"),
    ],
)
def test_unknown_flag_exits_with_the_similar_one(flag, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args([flag, "3"])
    assert stopped.value.code == 2
    hint = f" (did you mean {meant}?)" if meant else ""
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {flag} 3{hint}\n")


def test_given_flags_are_those_of_the_command_line_and_of_files(tmp_path):
    (tmp_path / "a.args").write_text("--lr 0.1  # a comment with --epochs\n--no_model_ema\n")
    args = parse_args([f"@{tmp_path / 'a.args'}", "--batch_size=64", "--output-dir", "opt"])
    names = {"lr": "--lr", "model_ema": "--no-model-ema", "batch_size": "--batch-size", "output_dir": "--output-dir"}
    assert args.given == names
    assert parse_args([]).given == {}
