"""Calls of timm's Eva with `cuda_graphs`, on the stand-in for CUDA graphs."""

import pytest
import torch
from conftest import images
from equivalence import assert_same
from eva_models import ROTARY, halting_eva
from graphed_models import CLOSE, masked, warm
from torch.testing import assert_close

from zipping.planned.dispatch import graph_report

pytestmark = [
    pytest.mark.usefixtures("graphs_on_cpu"),
    pytest.mark.filterwarnings("error:CUDA graphs are disabled"),
]
KINDS = {
    "per block": {"rope_type": "mixed", "attn_type": "rope", "init_values": 0.5},
    "registers": {"rope_type": "dinov3", "num_reg_tokens": 2, "swiglu_mlp": True},
}


def graphed_eva(**options):
    model = halting_eva(ROTARY | {"global_pool": "token"} | options, images(4))
    model.cuda_graphs = True
    return model


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_logits_equal_masked_mode_after_weights_change(options):
    model = warm(graphed_eva(**options))
    for parameter in model.parameters():
        parameter.mul_(1.01)
    for seed in range(2):
        assert_close(model(images(4, seed=seed)), masked(model)(images(4, seed=seed)), **CLOSE)
    assert graph_report(model).replayed == 3


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_gradients_equal_masked_mode(options):
    model = graphed_eva(**options, drop_path_rate=0.2).train()
    warm(model, return_halting=True)
    assert_same(masked(model), model, images(4), tolerance=CLOSE)
    assert graph_report(model).replayed == 2


@pytest.mark.parametrize(
    ("options", "training"), [({"dynamic_img_size": True}, False), ({"rope_shift_coords": 0.5}, True)], ids=str
)
def test_rotations_made_on_the_host_are_not_captured(options, training):
    model = graphed_eva(**options).train(training)
    with torch.set_grad_enabled(training):
        for seed in range(4):
            model(images(4, seed=seed), return_halting=True)
    assert graph_report(model).batches == 0
