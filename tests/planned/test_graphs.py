"""Calls of a model with `cuda_graphs`, on the stand-in for CUDA graphs: every result is that of the model."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from conftest import halting_model, images, with_directions
from equivalence import assert_same
from graphed_models import CLOSE, KINDS, SIZE, TIGHT, graphed, masked, warm, warm_training
from torch import nn
from torch.testing import assert_close

from zipping.planned import capture, runner
from zipping.planned.dispatch import RUNNERS, graph_report
from zipping.planned.plans import Planner
from zipping.planned.weights import CastWeights

pytestmark = pytest.mark.usefixtures("graphs_on_cpu")
ALL_KINDS = [  # the interpreter needs seconds for each
    "class token",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("distilled", "DeiT III", "stochastic depth")),
]


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(runner, "Planner", partial(Planner, **TIGHT))


# Inference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_halting", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
@torch.inference_mode()
def test_logits_equal_masked_mode_whatever_overflows(tight, kind, return_halting):
    model = graphed(**KINDS[kind]).eval()
    twin = masked(model)
    for seed in range(8):
        x = images(3 if seed == 6 else 4, seed=seed)
        result, (expected, expected_halting) = model(x, return_halting), twin(x, return_halting=True)
        logits, halting = result if return_halting else (result, None)
        assert_close(logits, expected, **CLOSE)
        if return_halting:
            assert_close([*halting], [*expected_halting], **CLOSE)
    report = graph_report(model)
    assert report.batches == 8
    assert report.replayed == 6
    assert report.overflows > 0
    assert report.captures >= 2
    assert report.hit_rate == 0.75


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_few_images_end_after_the_stage_without_live_tokens(monkeypatch, batch):
    monkeypatch.setattr(runner, "STAGE", 1)
    model = graphed(depth=8, mean=3.5, spread=1.2).eval()
    twin, replayed = masked(model), []

    def run(self, *args, original=capture.InferenceGraph.launch):
        parts = [(lambda replay=replay: (replayed.append(1), replay()), counts) for replay, counts in self._graphs]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "_graphs", parts)
            replayed.append(-len(parts))
            original(self, *args)

    monkeypatch.setattr(capture.InferenceGraph, "launch", run)
    for seed in range(6):
        if seed == 4:
            model.gate_center = twin.gate_center = model.gate_center - 12  # tokens halt earlier
        assert_close(model(images(batch, seed=seed)), twin(images(batch, seed=seed)), **CLOSE)
        if seed == 3:
            assert sum(replayed) == 0, "every part was replayed"
    assert graph_report(model).replayed == 4
    assert sum(replayed) < 0


@torch.no_grad()
def test_images_of_an_earlier_batch_have_no_effect_on_a_smaller_one():
    model = warm(graphed().eval(), return_halting=True)
    model(torch.full((4, 3, 16, 16), torch.nan), return_halting=True)
    found, expected = (m(images(3), return_halting=True) for m in (model, masked(model)))
    assert graph_report(model).replayed == 3
    assert_close((found[0], *found[1]), (expected[0], *expected[1]), **CLOSE)


@torch.no_grad()
def test_nan_in_an_image_gives_nan_logits_for_that_image_only():
    model = warm(graphed().eval())
    x = images(4)
    x[2, 0, 0, 0] = torch.nan
    assert model(x).isnan().all(dim=1).tolist() == [False, False, True, False]


# What users change -------------------------------------------------------------------------------


def _write_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.03)  # torch does not count this as a new version


def _scale(model):
    for parameter in model.parameters():
        parameter.mul_(1.03)


CHANGES = {
    "center": lambda model: setattr(model, "gate_center", model.gate_center + 1.5),
    "scale": lambda model: setattr(model, "gate_scale", model.gate_scale * 1.1),
    "halt_eps": lambda model: setattr(model, "halt_eps", 0.2),
    "weights": _scale,
    "weights through .data": _write_data,
    "checkpoint": lambda model: model.load_state_dict(halting_model(**SIZE | {"mean": 3.5}).state_dict()),
}


@torch.no_grad()
def test_captured_pass_follows_changes():
    model = warm(graphed().eval())
    for name, change in CHANGES.items():
        change(model)
        assert_close(model(images(4)), masked(model)(images(4)), **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    report = graph_report(model)
    assert report.replayed == 1 + len(CHANGES)
    assert report.captures <= 1 + report.plans, "only plans were captured, and the full plan"


DIRECTED_CHANGES = {
    "center": CHANGES["center"],
    "scale": CHANGES["scale"],
    "directions in place": lambda model: model.gate_directions.mul_(1.05),
    "other directions": lambda model: model.set_gate_directions(model.gate_directions.flip(0)),
    "channel 0": lambda model: model.set_gate_directions(None),
    "directions again": with_directions,
}


@torch.no_grad()
def test_captured_pass_follows_changes_with_directions():
    model = warm(with_directions(graphed().eval()))
    for name, change in DIRECTED_CHANGES.items():
        change(model)
        assert_close(model(images(4)), masked(model)(images(4)), **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert graph_report(model).replayed >= 4  # a pass that is dropped is captured again in the next batch


def test_captured_training_with_directions_equals_masked_mode():
    model = warm_training(with_directions(graphed()))
    assert_same(masked(model), model, images(4), tolerance=CLOSE)
    assert graph_report(model).replayed > 1


@torch.no_grad()
def test_weights_are_cast_in_each_pass():
    model = graphed().eval()
    with torch.autocast("cpu", torch.bfloat16):
        warm(model)
        _write_data(model)
        assert_close(model(images(4)), masked(model)(images(4)), rtol=0.05, atol=0.05)
    assert graph_report(model).replayed == 2


def _add_hook(model):
    model.head.register_forward_hook(lambda *_: None)


def _replace_forward(model):
    model.norm.forward = model.norm.forward


def _replace_layer(model):
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1, nn.Identity())


def _replace_weights(model):
    model.blocks[1].norm1.weight = nn.Parameter(2 * model.blocks[1].norm1.weight)


def _set_epsilon(model):
    model.norm.eps = 0.1


MODIFICATIONS = {
    "hook": (_add_hook, False),
    "forward": (_replace_forward, False),
    "layer from torch": (_replace_layer, True),
    "parameter": (_replace_weights, True),
    "attribute": (_set_epsilon, True),
    "gate offset": (lambda model: None, True),
}


@pytest.mark.parametrize(("modify", "is_captured_again"), MODIFICATIONS.values(), ids=MODIFICATIONS)
@torch.no_grad()
def test_modified_model_is_not_replayed_as_it_was(modify, is_captured_again):
    model = warm(graphed().eval())
    modify(model)
    for seed in (3, 4):
        assert_close(model(images(4, seed=seed)), masked(model)(images(4, seed=seed)), **CLOSE)
    assert (graph_report(model).replayed > 1) == is_captured_again


@torch.no_grad()
def test_offset_of_the_gate_is_an_input():
    model = warm(graphed().eval(), return_halting=True)
    offset = torch.linspace(-2, 2, 4)
    for gate_offset in (offset, None, -offset):
        results = [m(images(4), return_halting=True, gate_offset=gate_offset) for m in (model, masked(model))]
        assert_close(*[(logits, *halting) for logits, halting in results], **CLOSE)
    assert graph_report(model).replayed == 4


def _custom_class(model):
    class Custom(type(model)):
        pass

    model.__class__ = Custom


def _set(name, value):
    return lambda model: setattr(model, name, value)


UNSUPPORTED = {
    "masked": _set("zip_tokens", False),
    "static": _set("halting", False),
    "off": _set("cuda_graphs", False),
    "pruned": lambda model: model.blocks.pop(-1),
    "float64": lambda model: model.double(),
    "class of its own": _custom_class,
}


@pytest.mark.parametrize("change", UNSUPPORTED.values(), ids=UNSUPPORTED)
@torch.no_grad()
def test_unsupported_models_use_no_graph(change):
    model = graphed().eval()
    change(model)
    for seed in range(4):
        x = images(4, seed=seed).to(model.head.weight.dtype)
        assert_close(model(x), masked(model)(x), **CLOSE)
    assert graph_report(model).batches == 0


def test_unsupported_calls_use_no_graph():
    model = graphed().eval().requires_grad_(False)
    with torch.no_grad():
        warm(model)
    replayed = graph_report(model).replayed
    model(images(4).requires_grad_()).sum().backward()
    model.train()(images(4))
    model.eval().forward_features(images(4))
    assert graph_report(model).replayed == replayed


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen capturing"), torch.OutOfMemoryError("oom")]
)
@torch.no_grad()
def test_failed_capture_warns_once_and_runs_the_dynamic_mode(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(capture, "capture", fail)
    model = graphed().eval()
    expected = [masked(model)(images(4, seed=seed)) for seed in range(5)]
    with pytest.warns(UserWarning, match="CUDA graphs are disabled because a capture failed") as warned:
        found = [model(images(4, seed=seed)) for seed in range(5)]
    assert_close(found, expected, **CLOSE)
    assert sum("CUDA graphs" in str(warning.message) for warning in warned) == 1
    assert graph_report(model).replayed == 0


def test_failed_capture_in_training_draws_no_random_numbers(monkeypatch):
    model = warm_training(graphed(drop_path_rate=0.3))
    monkeypatch.setattr(capture, "capture", lambda *args: 1 / 0)
    RUNNERS[model]._graphs.clear()
    with pytest.warns(UserWarning, match="division by zero"):
        assert_same(*masked_and(model), images(4), tolerance=CLOSE)


# Training ----------------------------------------------------------------------------------------


def masked_and(model):
    return masked(model), model


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_equals_masked_mode_whatever_overflows(tight, kind):
    """Outputs, gradients and the state of the random generator."""
    model = graphed(**KINDS[kind]).train()
    if kind == "distilled":
        model.set_distilled_training(True)
    for seed in range(7):
        assert_same(*masked_and(model), images(4, seed=seed), seed=seed, tolerance=CLOSE)
    report = graph_report(model)
    assert report.overflows > 0
    assert report.replayed + report.overflows == 5


def test_gate_jitter_in_training_equals_masked_mode():
    model, offset = warm_training(graphed()), torch.linspace(-2, 2, 4)
    results = []
    for each in masked_and(model):
        logits, halting = each(images(4), return_halting=True, gate_offset=offset)
        loss = logits.square().sum() + halting.ponder_cost.mean()
        results.append((logits, *halting, *torch.autograd.grad(loss, list(each.parameters()), allow_unused=True)))
    assert graph_report(model).replayed == 2
    assert_close(*results, **CLOSE)


def test_weights_cast_together_have_the_bits_of_autocast(monkeypatch):
    results = []
    for cast_dtype in (torch.bfloat16, None):
        monkeypatch.setattr(
            runner, "CastWeights", lambda model, _, train, dtype=cast_dtype: CastWeights(model, dtype, train)
        )
        model = graphed()
        with torch.autocast("cpu", torch.bfloat16):
            warm_training(model)
            _write_data(model)  # as some optimizers do
            logits, halting = model(images(4), return_halting=True)
        assert graph_report(model).replayed == 2
        loss = logits.float().square().mean() + halting.ponder_cost.mean()
        results.append((logits, *halting, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(map(torch.equal, *results))
    assert all(gradient.dtype == torch.float32 for gradient in results[0][4:])


def test_gradients_accumulate():
    model = warm_training(graphed())
    twin = masked(model)
    for seed in (1, 2, 3):
        for each in (model, twin):
            logits, halting = each(images(4, seed=seed), return_halting=True)
            (logits.square().sum() + halting.ponder_cost.mean()).backward()
    assert graph_report(model).replayed == 4
    assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], **CLOSE)


def test_frozen_parameters_get_no_gradient():
    model = graphed()
    for parameter in model.blocks[:2].parameters():
        parameter.requires_grad_(False)
    warm_training(model)
    twin = masked(model)
    for each in (model, twin):
        each(images(4), return_halting=True)[0].square().sum().backward()
    assert graph_report(model).replayed == 2
    assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], **CLOSE)
    assert model.blocks[0].norm1.weight.grad is None


def test_second_pass_before_the_backward_pass_does_not_overwrite_the_first():
    model = warm_training(graphed())
    grads = []
    for each in masked_and(model):
        first, second = (each(images(4, seed=seed), return_halting=True)[0] for seed in (1, 2))
        grads.append(torch.autograd.grad((first * second).sum(), list(each.parameters()), allow_unused=True))
    assert graph_report(model).replayed == 2, "only the first was replayed"
    assert_close(*grads, **CLOSE)


def test_second_backward_pass_raises():
    model = warm_training(graphed())
    logits, _ = model(images(4), return_halting=True)
    logits.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass for each forward pass"):
        logits.sum().backward()


def test_model_can_be_evaluated_between_forward_and_backward_pass():
    model = warm_training(graphed())
    logits, _ = model(images(4), return_halting=True)
    with torch.no_grad():
        warm(model.eval())
    model.train()
    logits.square().sum().backward()
    expected = masked(model)
    expected.zero_grad()
    expected(images(4), return_halting=True)[0].square().sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), expected.parameters()) if q.grad is not None]
    assert_close(*zip(*pairs), **CLOSE)


# State -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_captures_are_not_part_of_the_model():
    model = warm(graphed().eval())
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert [graph_report(each).batches for each in copies] == [0, 0]
    assert model.state_dict().keys() == halting_model(**SIZE).state_dict().keys()
    reference = weakref.ref(model)
    reference_to_runner = weakref.ref(RUNNERS[model])
    del model
    gc.collect()
    assert reference() is None
    assert reference_to_runner() is None


@torch.no_grad()
def test_number_of_captures_is_limited(monkeypatch):
    monkeypatch.setattr(runner, "MAX_CAPTURES", 2)
    model = graphed().eval()
    for batch in (1, 3, 8):
        warm(model, batch)
    assert graph_report(model).captures == 3
    assert len(RUNNERS[model]._graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_blocks_with_generated_code_equal_masked_mode(training):
    model = graphed(drop_path_rate=0.1).train(training)
    model.compile_blocks = True
    outputs, gradients = [], []
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        warm(model, return_halting=True)
        for each in (model, masked(model)):
            torch.manual_seed(0)  # for stochastic depth
            logits, halting = each(images(4), return_halting=True)
            outputs.append((logits, *halting))
            if training:
                loss = logits.float().square().sum() + halting.ponder_cost.mean()
                found = torch.autograd.grad(loss, list(each.parameters()), allow_unused=True, materialize_grads=True)
                gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert graph_report(model).replayed == 2
    same = (outputs[0][1] == outputs[1][1]).all(dim=1)  # rounding may change a depth
    assert same.sum() >= 3
    assert_close(*(logits[same] for logits, *_ in outputs), rtol=0.05, atol=0.05)
    if training:
        assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
