import copy
import io

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from training.optimizer_state import OptimizerState

# Optimizers of packages that may be missing, and one that needs second derivatives, which training does not compute
ABSENT = ("fused", "apex", "bnb", "adahessian")
QUICK = ("sgd", "adamw", "lamb", "adafactor", "lion", "madgrad", "adan", "nadam", "lookahead_adamw")
SLOW = [name for name in list_optimizers() if name not in QUICK and not name.startswith(ABSENT)]


def make_optimizer(name="adamw", weight_decay=0.05, weights=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    if weights is not None:
        model.load_state_dict(weights)
    return model, create_optimizer_v2(model, name, 0.01, weight_decay, **options)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model, optimizer):
    """Return the weights, and the optimizer's entry after it was written and read."""
    file = io.BytesIO()
    torch.save(OptimizerState(optimizer, model).state_dict(), file)
    return copy.deepcopy(model.state_dict()), torch.load(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_optimizer_continues_exactly(name):
    whole, optimizer = make_optimizer(name)
    train(whole, optimizer, 7)
    weights, state = saved(whole, optimizer)
    train(whole, optimizer, 6, first=7)
    resumed, optimizer = make_optimizer(name, weights=weights)
    OptimizerState(optimizer, resumed).load_state_dict(state)
    train(resumed, optimizer, 6, first=7)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("before", "now"), [(0.05, 0.0), (0.0, 0.05)])
def test_state_follows_the_parameters_into_other_groups(before, now):
    """Without weight decay, timm makes one group in the model's order."""
    model, optimizer = make_optimizer(weight_decay=before)
    train(model, optimizer, 3)
    weights, state = saved(model, optimizer)
    resumed, other = make_optimizer(weight_decay=now, weights=weights)
    OptimizerState(other, resumed).load_state_dict(state)
    assert {group["weight_decay"] for group in other.param_groups} == {0.0, now}
    for a, b in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(optimizer.state[a]["exp_avg"], other.state[b]["exp_avg"])
    older = {"optimizer": {**state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]}}
    with pytest.raises(ValueError, match="the optimizer had other parameter groups, as of another --weight-decay"):
        OptimizerState(other, resumed).load_state_dict(older)


def test_settings_follow_the_flags():
    model, optimizer = make_optimizer()
    train(model, optimizer, 1)
    weights, state = saved(model, optimizer)
    resumed, other = make_optimizer(weights=weights, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2)
    OptimizerState(other, resumed).load_state_dict(state)
    group = other.param_groups[1]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.5, 0.6), 1e-3, 0.2, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[0].update(exp_avg=torch.full((5,), torch.nan)), r"exp_avg of 0\.bias is not finite"),
        (lambda state: state[0].update(exp_avg=torch.ones(3)), r"exp_avg of 0\.bias has shape \(3,\), but .* \(5,\)"),
        (lambda state: state[0].update(exp_avg=torch.ones(())), "the optimizer AdamW cannot continue"),
        (lambda state: state[0].update(exp_avg=torch.ones(5).to_sparse()), r"exp_avg of 0\.bias has shape"),
        (lambda state: state[0].pop("exp_avg_sq"), "the optimizer AdamW cannot continue"),
        (lambda state: state[0].update(step="x"), "could not convert string"),
        (lambda state: state[0].update(exp_avg_sq=torch.full((5,), -1.0)), "makes weights that are not finite"),
        (lambda state: state.update({9: state[0]}), "has 1 parameters that the model lacks"),
    ],
)
def test_state_that_does_not_fit_raises_and_keeps_the_weights(change, message):
    model, optimizer = make_optimizer()
    train(model, optimizer, 1)
    weights, state = saved(model, optimizer)
    change(state["optimizer"]["state"])
    resumed, other = make_optimizer(weights=weights)
    with pytest.raises(ValueError, match=message):
        OptimizerState(other, resumed).load_state_dict(state)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.state_dict().items())


def test_state_of_another_model_raises():
    model, optimizer = make_optimizer()
    _, state = saved(model, optimizer)
    other = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"the optimizer's state has no parameter 3\.weight"):
        OptimizerState(torch.optim.AdamW(other.parameters()), other).load_state_dict(state)
