import random
import sys

import numpy as np
import pytest
import torch

import utils


def test_averages_are_weighted_and_resume_from_their_state():
    averages, resumed = utils.MetricAverages(), utils.MetricAverages()
    averages.add(3, loss=torch.tensor(1.0), share=torch.tensor([0.0, 1.0]))
    resumed.load_state_dict(averages.state_dict())
    for each in (averages, resumed):
        each.add(1, loss=torch.tensor(5.0), share=torch.tensor([1.0, 1.0]))
        assert each.local() == {"loss": 2.0}
        assert each.reduced() == (4, {"loss": 2.0, "share": [0.25, 1.0]})


def test_averages_without_values_raise():
    with pytest.raises(utils.UserError, match="no image could be read"):
        utils.MetricAverages().reduced()


def test_seeds_depend_on_every_number_of_the_key():
    def draws(*key):
        utils.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws(1, 2, 3) == draws(1, 2, 3)
    seen = [value for key in ((1,), (1, 2), (2, 1), (1, 2, 3), (1, 2, 4)) for value in draws(*key)]
    assert len(set(seen)) == len(seen)


def test_progress_without_a_terminal_prints_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    batches = [1, 2, 3, 4, 5]
    assert list(utils.with_progress(batches, "Epoch 0", lambda: {"loss": "0.5"}, every=2)) == batches
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"Epoch 0 [{n}/5]", "loss 0.5"] for n in (2, 4, 5)]


def test_progress_on_a_terminal_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(utils.with_progress([1, 2], "Epoch 0", lambda: {"loss": "0.5"}, every=1))
    captured = capsys.readouterr()
    assert "Epoch 0" in captured.err
    assert captured.out == ""


def test_calls_are_timed_in_turn_after_a_warm_up(monkeypatch):
    """The slow first calls do not count. Each call is then repeated until the slower takes 0.15 s."""
    clock, calls = [0.0], []
    monkeypatch.setattr(utils, "synchronized_time", lambda device: clock[0])

    def call(name, seconds):
        clock[0] += seconds if name in calls else 100.0
        calls.append(name)

    calls_by_name = {"a": lambda: call("a", 0.1), "b": lambda: call("b", 0.02)}
    seconds = utils.time_interleaved(calls_by_name, torch.device("cpu"), rounds=3, min_seconds=0.15)
    assert np.allclose([seconds["a"], seconds["b"]], [[0.1] * 3, [0.02] * 3])
    assert calls == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 3
