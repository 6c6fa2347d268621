import json

import pytest
import torch
from conftest import halting_model, save_halting_micro

import benchmark


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(benchmark, "MIN_IMAGES", 2)
    monkeypatch.setattr(benchmark, "MIN_SECONDS", 0.0)


@pytest.mark.parametrize("train", [False, True])
def test_rows_compare_with_the_static_network(tmp_path, train, capsys):
    flags = ["--model", "avit_micro_patch4_32", "--batch-size", "2", "3", "--mean-depth", "4", "7", "--runs", "1"]
    flags += ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")] + ["--train"] * train
    benchmark.main(flags)
    rows = json.loads((tmp_path / "b.json").read_text())
    forms = ["static (timm)", "masked", "zipped"] + ["zipped, early exit"] * (not train)
    assert [row["form"] for row in rows] == forms * 4
    for row in rows:
        assert row["images_per_s_range"][0] <= row["images_per_s"] <= row["images_per_s_range"][1]
        assert row["speed_up_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
        assert (row["memory_mib"] is not None) == train
    by_form = {row["form"]: row for row in rows[: len(forms)]}
    assert by_form["zipped"]["gmacs"] < by_form["static (timm)"]["gmacs"]
    if train:
        assert by_form["zipped"]["memory_mib"] < by_form["static (timm)"]["memory_mib"]
    else:
        assert by_form["zipped, early exit"]["gmacs"] <= by_form["zipped"]["gmacs"]
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert "of ideal" in capsys.readouterr().out


def test_depths_of_real_images(image_folder, tmp_path):
    flags = ["--model", "avit_micro_patch4_32", "--finetune", str(save_halting_micro(tmp_path / "c.pth", 3))]
    flags += ["--data-path", str(image_folder), "--batch-size", "4", "--runs", "1"]
    benchmark.main([*flags, "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())[0]["mean_depth"] < 12


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_the_static_twin_is_timms_network_with_the_same_weights(distilled):
    model = halting_model(distilled=distilled).eval()
    twin = benchmark.static_twin(model).eval()
    assert type(twin).__module__.startswith("timm.")
    model.halting = False
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(twin(x), model(x))


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--finetune", "missing.pth"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "benchmark.py: error: missing.pth: no such file\n"
