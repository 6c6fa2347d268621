"""Recorded graphs: a recorder of torch gets a graph for any images, or an error."""

import pytest
import torch
from conftest import assert_halting, halting_model, images
from equivalence import flops, masked_and_zipped
from functorch.compile import aot_module, nop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from models_act import Halting


class Outputs(torch.nn.Module):
    """A model with the outputs of its calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits, halting = self.model(x, return_halting=True)
        maps = self.model.forward_intermediates(x, [1, 3], intermediates_only=True)
        return logits, *halting, *maps


RECORDERS = {
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, before dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
    "make_fx, fake": lambda model, x: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "make_fx, symbolic": lambda model, x: make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
    "make_fx, functionalized": lambda model, x: make_fx(torch.func.functionalize(model))(x),
    "AOTAutograd": lambda model, x: aot_module(model, nop),
    "torch.jit.trace": torch.jit.trace,
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
@torch.no_grad()
def test_recorded_graph_is_right_for_other_images(record, training):
    """Halting in a graph must be that of its inputs, not that of the images it was recorded with."""
    model = Outputs(halting_model(3.0, 1.2, depth=5).train(training))
    other = images(seed=5)
    expected = model(other)
    assert_halting(Halting(*expected[1:4]), num_blocks=5)
    assert_close(record(model, images())(other), expected, rtol=1e-4, atol=1e-4)


def test_counters_of_ops_see_the_zipped_mode():
    """A dispatch mode that counts is no recorder."""
    masked, zipped = masked_and_zipped(halting_model().eval())
    with torch.no_grad():
        assert flops(lambda: zipped(images())) < flops(lambda: masked(images()))


def test_fake_tensors_have_output_shapes():
    model = halting_model()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, halting = model(mode.from_tensor(images()), return_halting=True)
    assert (logits.shape, halting.depth.shape) == ((6, 7), (6, 17))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"halting": False}], ids=["adaptive", "static"])
def test_traced_model_runs_on_another_number_of_images(options):
    model = Outputs(halting_model(**options).eval())
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
        assert_close(traced(images(batch=9, seed=5)), model(images(batch=9, seed=5)))


@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_intermediates"])
def test_torch_fx_of_a_larger_module_raises(call):
    class Caller(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = halting_model()

        def forward(self, x):
            return getattr(self.model, call)(x)

    with pytest.raises(NotImplementedError, match=r"torch\.fx is not supported: .* Use torch\.compile"):
        torch.fx.symbolic_trace(Caller())
