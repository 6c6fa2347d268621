import csv
import io

import pytest
import torch
from conftest import halting_model, images
from torch.utils.data import TensorDataset

from engine_act import evaluate
from training.evaluation import COLUMNS, Predictions
from training.loaders import evaluation_loader


def test_a_row_for_each_image_in_order():
    model = halting_model()
    data = TensorDataset(images(7), torch.arange(7))
    loader = evaluation_loader(data, 3, num_workers=0, pin_memory=False)
    predictions = Predictions(loader)
    result = evaluate(model, loader, torch.device("cpu"), on_batch=predictions.note)
    rows = list(csv.DictReader(io.StringIO(predictions.csv().decode())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["index"] for row in rows] == [str(i) for i in range(7)]
    with torch.no_grad():
        logits, halting = model(data.tensors[0], return_halting=True)
    assert [int(row["prediction"]) for row in rows] == logits.argmax(dim=1).tolist()
    assert 100 * sum(row["target"] == row["prediction"] for row in rows) / 7 == pytest.approx(result["acc1"])
    depths = torch.tensor([float(row["depth"]) for row in rows])
    torch.testing.assert_close(depths, halting.depth.mean(dim=1), atol=1e-4, rtol=0)
    assert len(depths.unique()) > 2
