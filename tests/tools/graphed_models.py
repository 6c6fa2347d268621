"""Small models of the tests of the planned mode, whose passes are captured after two batches."""

import copy

from conftest import halting_model, images

from zipping.planned.dispatch import graph_report

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
LOOSE = {"start": 2, "spreads": 9.0, "grid": 4}  # options of a planner whose plans hold
TIGHT = {"start": 2, "spreads": 0.0, "grid": 1}  # of one whose plans often overflow
SIZE = {"depth": 4, "mean": 2.3, "spread": 0.9}
KINDS = {
    "class token": {},
    "distilled": {"distilled": True},
    "DeiT III": {"no_embed_class": True, "init_values": 0.5},
    "registers": {"reg_tokens": 2},
    "stochastic depth": {"drop_path_rate": 0.2},
    "normed queries and keys": {"qk_norm": True},
    "every token halts in block 1": {"mean": -5.0},
    "no token halts": {"mean": 30.0, "spread": 0.5},
}


def graphed(**kwargs):
    """Return a model with `cuda_graphs`."""
    return halting_model(**{**SIZE, **kwargs}, cuda_graphs=True)


def masked(model):
    """Return a masked copy of a model."""
    twin = copy.deepcopy(model)
    twin.zip_tokens = False
    return twin


def warm(model, batch=4, **kwargs):
    """Call the model until its pass is captured."""
    for seed in range(3):
        model(images(batch, seed=seed), **kwargs)
    assert graph_report(model).captures > 0
    return model


def warm_training(model):
    """Train until the pass is captured."""
    return warm(model.train(), return_halting=True)
