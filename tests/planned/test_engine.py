"""Training and evaluation of a model with `cuda_graphs`, on the stand-in for CUDA graphs."""

import pytest
import torch
from conftest import halting_model, images
from graphed_models import SIZE
from torch.utils.data import DataLoader, TensorDataset

import losses
from engine_act import EpochState, Trainer, evaluate, train_one_epoch

CPU = torch.device("cpu")


def trained_and_evaluated(**options):
    """Train on 4 batches and evaluate on them; return the metrics of both."""
    model = halting_model(**SIZE, **options)
    batches = DataLoader(TensorDataset(images(16), torch.arange(16) % 3), batch_size=4)
    criterion = losses.AdaptiveLoss(losses.classification_loss(False, 0.0), model.num_blocks, 0.01, 0.01)
    trainer = Trainer(model, criterion, torch.optim.SGD(model.parameters(), lr=0.01), CPU)
    return train_one_epoch(trainer, batches, EpochState(0)), evaluate(model, batches, CPU)


def test_graph_hits_are_reported_and_the_other_metrics_stay(graphs_on_cpu):
    """The first two batches of each kind run without a plan, the other two are replayed."""
    for dynamic, graphed in zip(trained_and_evaluated(), trained_and_evaluated(cuda_graphs=True)):
        assert graphed.pop("graph_hits") == pytest.approx(0.5)
        assert graphed.keys() == dynamic.keys()
        for name in ("loss", "depth_mean", "gmacs", "layer_scores"):
            assert graphed[name] == pytest.approx(dynamic[name], rel=1e-4)
