import os
import random
import sys

import numpy as np
import pytest
import torch

import utils


def test_averages_weigh_batches_by_their_size():
    averages = utils.MetricAverages()
    averages.add(3, loss=torch.tensor(1.0), share=torch.tensor([0.0, 1.0]))
    averages.add(1, loss=torch.tensor(5.0), share=torch.tensor([1.0, 1.0]))
    assert averages.local() == {"loss": 2.0}
    assert averages.reduced() == (4, {"loss": 2.0, "share": [0.25, 1.0]})


def test_averages_of_nothing():
    with pytest.raises(utils.UserError, match="not one image"):
        utils.MetricAverages().reduced()


def test_averages_go_on_from_their_state():
    whole, first, second = utils.MetricAverages(), utils.MetricAverages(), utils.MetricAverages()
    for weight, value in ((3, 0.1), (4, 0.2)):
        whole.add(weight, loss=torch.tensor(value), share=torch.tensor([value, 1.0]))
    first.add(3, loss=torch.tensor(0.1), share=torch.tensor([0.1, 1.0]))
    second.load_state_dict(first.state_dict())
    second.add(4, loss=torch.tensor(0.2), share=torch.tensor([0.2, 1.0]))
    assert second.reduced() == whole.reduced()


def test_seeds_depend_on_every_number():
    def draws(*key):
        utils.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws(1, 2, 3) == draws(1, 2, 3)
    seen = [value for key in ((1,), (1, 2), (2, 1), (1, 2, 3), (1, 2, 4)) for value in draws(*key)]
    assert len(set(seen)) == len(seen)


def test_slurm_speaks_torchruns_language(monkeypatch):
    for name in (*utils.LAUNCHER, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    slurm["SLURM_LAUNCH_NODE_IPADDR"] = "192.0.2.7"
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    utils._adopt_slurm()
    assert [os.environ[name] for name in utils.LAUNCHER] == ["3", "8", "1"]
    assert os.environ["MASTER_ADDR"] == "192.0.2.7"


def test_a_task_outside_srun_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # sbatch's own shell
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    utils._adopt_slurm()
    assert "RANK" not in os.environ


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(utils.UserError, match="--device"), utils.process_group(device):
        pass


def test_seeds_reach_every_generator():
    import random

    import numpy as np

    def draw():
        utils.seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    batches = [1, 2, 3, 4, 5]
    assert list(utils.with_progress(batches, "Epoch 0", lambda: {"loss": "0.5"}, every=2)) == batches
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"Epoch 0 [{n}/5]", "loss 0.5"] for n in (2, 4, 5)]


def test_progress_shows_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(utils.with_progress([1, 2], "Epoch 0", lambda: {"loss": "0.5"}, every=1))
    captured = capsys.readouterr()
    assert "Epoch 0" in captured.err
    assert captured.out == ""


def test_nearest_names():
    assert "avit_tiny" in utils.nearest("avit_tinny", ["avit_tiny", "resnet"])
    assert utils.nearest("zzz", ["avit_tiny"]) == ""


def test_one_process_gathers_itself():
    assert utils.all_gather_objects({"a": 1}) == [{"a": 1}]
    assert utils.world_size() == 1
