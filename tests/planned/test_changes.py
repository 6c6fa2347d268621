"""What a replay would miss or could not bear: such calls run in the dynamic mode, or another pass is captured."""

import threading

import pytest
import torch
from conftest import images
from graphed_models import CLOSE, graphed, masked, warm, warm_training
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from zipping.planned import capture, runner
from zipping.planned.dispatch import RUNNERS, graph_report

pytestmark = [
    pytest.mark.usefixtures("graphs_on_cpu"),
    pytest.mark.filterwarnings("error:CUDA graphs are disabled"),
]


def _replace_method(model):
    model.forward_head = lambda x: x[:, 0, :7]


def _replace_buffer(model):
    model.patch_embed.norm.running_mean = torch.full((16,), 0.5)


def _change_patch_size(model):
    model.set_input_size(patch_size=2)


def _unfuse_attention(model):
    for block in model.blocks:
        block.attn.fused_attn = False


@pytest.mark.parametrize("modify", [_replace_method, _replace_buffer, _change_patch_size])
@torch.no_grad()
def test_replaced_part_is_noticed(modify):
    model = graphed().eval()
    model.patch_embed.norm = nn.BatchNorm1d(16).eval()
    warm(model)
    if modify is _change_patch_size:
        model.patch_embed.norm = nn.Identity()
    modify(model)
    for seed in range(4):
        assert_close(model(images(4, seed=seed)), masked(model)(images(4, seed=seed)), **CLOSE)
    assert graph_report(model).replayed > 1


@pytest.mark.filterwarnings("ignore:zipping is disabled")
@torch.no_grad()
def test_blocks_that_cannot_be_zipped_are_not_captured():
    model = warm(graphed().eval())
    _unfuse_attention(model)
    for seed in range(3):
        assert_close(model(images(4, seed=seed)), masked(model)(images(4, seed=seed)), **CLOSE)
    assert graph_report(model).replayed == 1


@torch.no_grad()
def test_layers_in_training_mode_stay_random_in_evaluation():
    """Dropout as an estimate of uncertainty."""
    model = graphed(proj_drop_rate=0.5).eval()
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))
    for _ in range(4):
        assert not torch.equal(model(images(4)), model(images(4)))
    assert graph_report(model).replayed == 0


def test_gradient_of_the_gate_offset():
    model = warm_training(graphed())
    results = []
    for each in (model, masked(model)):
        offset = torch.zeros(4, requires_grad=True)
        _, halting = each(images(4), return_halting=True, gate_offset=offset)
        results.append(torch.autograd.grad(halting.ponder_cost.sum(), offset))
    assert_close(*results, **CLOSE)


def test_training_without_trained_parameters_leaves_graphs_to_evaluation():
    model = graphed().requires_grad_(False)
    for seed in range(4):
        model.train()(images(4, seed=seed), return_halting=True)
    with torch.no_grad():
        warm(model.eval())
    assert graph_report(model).replayed == 1


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.8 has one API of TF32")
@torch.no_grad()
def test_new_and_old_api_of_tf32():
    model = graphed().eval()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        assert graph_report(warm(model)).replayed == 1
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@torch.no_grad()
def test_operations_can_be_counted():
    model = warm(graphed().eval())
    with FlopCounterMode(display=False):
        model(images(4))
    assert graph_report(model).replayed == 1


def test_parameters_of_a_transform():
    model = warm_training(graphed())

    def loss(parameters, model):
        return torch.func.functional_call(model, parameters, (images(4), True))[0].square().sum()

    grads = [torch.func.grad(loss)(dict(each.named_parameters()), each) for each in (model, masked(model))]
    assert graph_report(model).replayed == 1
    assert_close(*grads, **CLOSE)


@torch.no_grad()
def test_calls_of_several_threads_do_not_mix(monkeypatch):
    model = warm(graphed().eval())
    expected = masked(model)(images(4, seed=5))
    other = threading.Thread(target=torch.no_grad()(model), args=(images(4, seed=6),))

    def interrupted(graph, original=capture.InferenceGraph.counts):
        if threading.current_thread() is not other:
            other.start()
            other.join(timeout=0.3)
        return original(graph)

    monkeypatch.setattr(capture.InferenceGraph, "counts", interrupted)
    found = model(images(4, seed=5))
    other.join()
    assert_close(found, expected, **CLOSE)


def test_first_capture_in_evaluation_keeps_those_of_training():
    model = warm_training(graphed())
    with torch.no_grad():
        warm(model.eval())
    assert len(RUNNERS[model]._graphs) == 2


@torch.no_grad()
def test_more_kinds_of_calls_than_captures_do_not_capture_in_turn(monkeypatch):
    monkeypatch.setattr(runner, "MAX_CAPTURES", 2)
    model = graphed().eval()
    for number in range(18):
        x = images((1, 3, 8)[number % 3], seed=number)
        assert_close(model(x), masked(model)(x), **CLOSE)
    assert graph_report(model).captures == 3
    assert graph_report(model).replayed == 9


def test_pool_goes_with_its_last_graph(monkeypatch):
    """The allocator refuses a capture into a pool whose graphs are all gone."""
    pools, original = [], capture.new_pool
    monkeypatch.setattr(capture, "new_pool", lambda: pools.append(original()) or pools[-1])
    model = warm_training(graphed())
    RUNNERS[model]._graphs.clear()
    warm_training(model)
    assert len(pools) == 2
