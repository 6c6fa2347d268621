import csv
import io
import json

import pytest
import torch
from conftest import halting_model, images
from torch.utils.data import TensorDataset

from datasets import placeholder_names
from models_act import AdaptiveTokens
from training.evaluation import COLUMNS, evaluate_dataset, report, save, zipping_speeds
from training.loaders import evaluation_loader
from utils import UserError
from zipping.planned.plans import Planner

CPU = torch.device("cpu")


def test_predictions_have_a_row_per_image_in_order():
    model = halting_model()
    data = TensorDataset(images(7), torch.arange(7))
    loader = evaluation_loader(data, 3, num_workers=0, pin_memory=False)
    result, predictions = evaluate_dataset(model, loader, CPU, "none")
    rows = list(csv.DictReader(io.StringIO(predictions.decode())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["index"] for row in rows] == [str(i) for i in range(7)]
    with torch.no_grad():
        logits, halting = model(data.tensors[0], return_halting=True)
    assert [int(row["prediction"]) for row in rows] == logits.argmax(dim=1).tolist()
    assert 100 * sum(row["target"] == row["prediction"] for row in rows) / 7 == pytest.approx(result["acc1"])
    depths = torch.tensor([float(row["depth"]) for row in rows])
    torch.testing.assert_close(depths, halting.depth.mean(dim=1), atol=1e-4, rtol=0)
    assert len(depths.unique()) > 2


def test_predictions_have_class_names():
    names = [f"name {number}" for number in range(7)]
    loader = evaluation_loader(TensorDataset(images(4), torch.arange(4)), 3, num_workers=0, pin_memory=False)
    for classes, expected in ((names, names), (None, placeholder_names(7))):
        _, predictions = evaluate_dataset(halting_model(), loader, CPU, "none", classes)
        for row in csv.DictReader(io.StringIO(predictions.decode())):
            assert row["target_name"] == expected[int(row["target"])]
            assert row["prediction_name"] == expected[int(row["prediction"])]


def test_a_part_of_the_classes_has_both_accuracies(capsys):
    model, data = halting_model(), TensorDataset(images(40), torch.arange(40) % 2)
    data.classes = ["a", "b"]
    loader = evaluation_loader(data, 7, num_workers=0, pin_memory=False)
    result, _ = evaluate_dataset(model, loader, CPU, "none")
    with torch.no_grad():
        logits, targets = model(data.tensors[0]), data.tensors[1]
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(dim=1) == targets).double().mean().item())
    among_two = 100 * (logits[:, :2].argmax(dim=1) == targets).double().mean().item()
    assert result["dataset_acc1"] == pytest.approx(among_two)
    assert among_two > result["acc1"]
    assert (result["classes"], result["dataset_classes"]) == (7, 2)
    report(result, halting=True)
    assert f"top-1 among the dataset's 2 classes  {among_two:.2f}%" in capsys.readouterr().out
    data.classes = list("abcdefg")
    assert "dataset_acc1" not in evaluate_dataset(model, loader, CPU, "none")[0]


def test_missing_image_in_an_evaluation_raises():
    loader = evaluation_loader(TensorDataset(images(7), torch.arange(7)), 3, num_workers=0, pin_memory=False)
    loader.num_images = 8
    with pytest.raises(UserError, match="only 7 of 8 validation images"):
        evaluate_dataset(halting_model(), loader, CPU, "none")


def test_more_images_than_declared_raise():
    loader = evaluation_loader(TensorDataset(images(7), torch.arange(7)), 3, num_workers=0, pin_memory=False)
    loader.num_images = 6
    with pytest.raises(UserError, match="declares 6 validation images, but 7 were read"):
        evaluate_dataset(halting_model(), loader, CPU, "none")


def test_zipping_speeds_measures_both_modes_and_keeps_the_model():
    model = halting_model(zip_tokens=False).train()
    speeds = zipping_speeds(model, images(), CPU, "none", rounds=1)
    assert speeds.keys() == {"images_per_s_zipped", "images_per_s_masked"}
    assert min(speeds.values()) > 0
    assert model.training
    assert not model.zip_tokens


@pytest.mark.parametrize(("cuda_graphs", "warm_up"), [(False, 0), (True, Planner.start)])
def test_zipping_speeds_are_measured_after_the_first_plan(cuda_graphs, warm_up, monkeypatch):
    calls, forward = [], AdaptiveTokens.forward
    monkeypatch.setattr(AdaptiveTokens, "forward", lambda model, x: calls.append(model.zip_tokens) or forward(model, x))
    zipping_speeds(halting_model(cuda_graphs=cuda_graphs), images(), CPU, "none", rounds=1)
    assert calls == [True] * warm_up + [True, False] * 2


def test_save_writes_two_files(tmp_path):
    save({"acc1": 50.0}, b"index\n", tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text()) == {"acc1": 50.0}
    assert (tmp_path / "predictions.csv").read_bytes() == b"index\n"
    save({}, b"", None)
