"""Comparison of masked and zipped mode of a model."""

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_FLOAT64 = {"rtol": 1e-7, "atol": 1e-7}  # of models in float64, whose halting scores are float32


def masked_and_zipped(model):
    """Return a masked copy of the model, and the model itself, zipped."""
    masked, zipped = copy.deepcopy(model), model
    masked.zip_tokens, zipped.zip_tokens = False, True
    return masked, zipped


def assert_same(masked, zipped, x, seed=0, gradients=True, tolerance=CLOSE):
    """Assert that outputs, gradients and the final state of the random generator agree; return the halting.

    Models in float64 can be compared more strictly: in float32, gradients may be off by more than 1e-5.
    """
    results = []
    for model in (masked, zipped):
        torch.manual_seed(seed)
        logits, halting = model(x.to(next(model.parameters()).dtype), return_halting=True)
        outputs = [*logits] if isinstance(logits, tuple) else [logits]
        outputs += [halting.ponder_cost, halting.layer_scores]
        model.zero_grad()
        if gradients:
            weights = torch.Generator().manual_seed(7)
            sum((o * torch.randn(o.shape, generator=weights)).sum() for o in outputs).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((outputs, halting, grads, torch.get_rng_state()))
    (outputs, halting, grads, state), (other_outputs, other_halting, other_grads, other_state) = results
    assert torch.equal(halting.depth, other_halting.depth)
    assert torch.equal(state, other_state)
    for a, b in zip(outputs, other_outputs):
        assert_close(b.to(a.dtype), a, **tolerance)
    for name, grad in grads.items() if gradients else ():
        assert other_grads[name] is not None, name
        scale = max(1.0, grad.abs().max().item())  # gradients of sums over many tokens: relative to the largest
        assert_close(
            other_grads[name].to(grad.dtype) / scale, grad / scale, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
    return halting


def flops(use):
    """Return the FLOPs that torch counts in a call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        use()
    return counter.get_total_flops()
