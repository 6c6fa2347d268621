"""The chart of MACs against content: what counts as content, the groups, and the command."""

import numpy as np
import pytest
import timm
from conftest import make_fashion, make_record, with_directions
from PIL import Image

from experiments import adaptivity
from training.checkpoints import save_checkpoint


def test_content_is_the_share_of_patches_with_different_colors():
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:4, 4:] = 255  # blank patches of another color
    pixels[5, 1, 2] = 100  # one pixel in one channel
    pixels[6:, 10:] = 5  # hardly different
    record = make_record(pixels=pixels, depth=((1, 2, 3), (4, 5, 6)))
    assert adaptivity.content(record) == pytest.approx(1 / 6)


def test_groups_are_sorted_by_content_and_of_equal_size():
    records = []
    for number in range(16):
        pixels = np.zeros((16, 16, 3), np.uint8)
        patch = np.zeros((16, 1), bool)
        patch[: (7 * number) % 16] = True
        for place in np.flatnonzero(patch):
            pixels[4 * (place // 4), 4 * (place % 4)] = 255
        records.append(make_record(number, pixels=pixels, depth=np.ones((4, 4)), macs=float(number % 2)))
    groups = adaptivity.groups(records)
    assert [len(group) for group in groups] == [2] * adaptivity.GROUPS
    assert np.concatenate(groups)[:, 0].tolist() == pytest.approx([number / 16 for number in range(16)])


def test_command_draws_and_prints(tmp_path, capsys):
    model = with_directions(timm.create_model("avit_micro_patch4_32", img_size=28, gate_scale=4.0, gate_center=0.0))
    gate = {"gate_scale": 4.0, "gate_center": 0.0, "halt_eps": 0.01, "gate_directions": model.gate_directions}
    args = {"model": "avit_micro_patch4_32", "input_size": [28], "data_set": "FMNIST"}
    save_checkpoint({"model": model.state_dict(), "gate": gate, "args": args}, tmp_path / "c.pth")
    make_fashion(tmp_path / "data")
    out = tmp_path / "out.png"
    flags = ["--data-set", "FMNIST", "--data-path", str(tmp_path / "data"), "--images", "20"]
    adaptivity.main([str(tmp_path / "c.pth"), str(out), *flags])
    assert Image.open(out).size[0] > 800
    printed = capsys.readouterr().out
    assert "MACs of 20 images relative to the static model: mean 0." in printed
    assert printed.count("\n| 1.00 to 1.00 |") == adaptivity.GROUPS
