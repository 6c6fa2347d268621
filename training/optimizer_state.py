"""The optimizer's part of a checkpoint, in which parameters have names."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils import is_plain_tensor

# Entries of a parameter group that flags set. They are never restored.
SET_BY_FLAGS = {"params", "param_names", "lr", "initial_lr", "weight_decay", "betas", "eps", "momentum"}


class OptimizerState:
    """Saves and restores the state of an optimizer.

    The state of each parameter is found by its name, so that other parameter groups, as of another weight decay, can
    use it. Settings follow the flags, and the learning rate the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module):
        """model: without wrapper; it owns the parameters."""
        self.optimizer = optimizer
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    def state_dict(self) -> dict:
        """Return the optimizer's entry of a checkpoint, with `param_names` in each group as in torch's own format."""
        state = self.optimizer.state_dict()
        groups = [
            group | {"param_names": [self.names[parameter] for parameter in own["params"]]}
            for group, own in zip(state["param_groups"], self.optimizer.param_groups)
        ]
        return {"optimizer": {"state": state["state"], "param_groups": groups}}

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore the state and the step counters.

        Raises KeyError, ValueError or the like if they do not fit, or if the optimizer cannot make a step with them.
        """
        saved, groups = checkpoint["optimizer"], self.state_dict()["optimizer"]["param_groups"]
        sources = _saved_parameters(saved["param_groups"], groups)
        # Some optimizers have entries that belong to no parameter.
        state = {key: value for key, value in saved["state"].items() if isinstance(key, str) and _is_number(value)}
        remaining = {key: value for key, value in saved["state"].items() if key not in state}
        for name, index, parameter in self._parameters(groups):
            if name not in sources:
                raise ValueError(f"the optimizer's state has no parameter {name}")
            entries = remaining.pop(sources[name][0], None)
            if entries is not None:  # a parameter without gradients has no state
                _check_entries(name, parameter, entries)
                state[index] = entries
        if remaining:
            raise ValueError(f"the optimizer's state has {len(remaining)} parameters that the model lacks")
        groups = [group | _counters(sources[group["param_names"][0]][1]) for group in groups]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._try_step()

    def _parameters(self, groups: list[dict]) -> Iterator[tuple[str, int, nn.Parameter]]:
        """Yield name, index in the optimizer's state, and parameter."""
        for group, own in zip(groups, self.optimizer.param_groups):
            yield from zip(group["param_names"], group["params"], own["params"])

    def _try_step(self) -> None:
        """Make a step without gradients and undo it. Raises ValueError if the restored state does not allow it."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        weights = [parameter.detach().clone() for parameter in parameters]
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            is_finite = all(parameter.isfinite().all() for parameter in parameters)
        except Exception as error:  # optimizers check nothing, so a foreign state may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the optimizer {type(self.optimizer).__name__} cannot continue ({reason})") from error
        finally:
            self.optimizer.zero_grad()
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights):
                    parameter.copy_(weight)
        if not is_finite:
            raise ValueError("a step with the optimizer's state makes weights that are not finite")
        self.optimizer.load_state_dict(state)


def _saved_parameters(saved: list[dict], groups: list[dict]) -> dict[str, tuple[int, dict]]:
    """Return the index in the saved state and the saved group of each parameter.

    Older checkpoints have no names, so their groups must be those of the optimizer.
    """
    if not all("param_names" in group for group in saved):
        if [list(group["params"]) for group in saved] != [group["params"] for group in groups]:
            raise ValueError("the optimizer had other parameter groups, as of another --weight-decay or --model")
        saved = [old | {"param_names": group["param_names"]} for old, group in zip(saved, groups)]
    return {
        name: (index, group)
        for group in saved
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }


def _check_entries(name: str, parameter: Tensor, entries: dict) -> None:
    """Raise ValueError if a tensor does not fit the parameter, or a value is not finite."""
    for entry, value in entries.items():
        if not isinstance(value, Tensor):
            continue
        if not (is_plain_tensor(value) and _is_subsequence(value.shape, parameter.shape)):
            expected = tuple(parameter.shape)
            raise ValueError(f"{entry} of {name} has shape {tuple(value.shape)}, but the weights have {expected}")
        if not value.isfinite().all():
            raise ValueError(f"{entry} of {name} is not finite")


def _is_subsequence(sizes: torch.Size, all_sizes: torch.Size) -> bool:
    """Return whether `sizes` is `all_sizes` without some: factored optimizers drop dimensions of their state."""
    remaining = iter(all_sizes)
    return all(size in remaining for size in sizes)  # `in` consumes the iterator up to the match, so order counts


def _counters(group: dict) -> dict:
    """Return the entries of a parameter group to restore: numbers such as step counters."""
    return {name: value for name, value in group.items() if name not in SET_BY_FLAGS and _is_number(value)}


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return is_plain_tensor(value) and value.ndim == 0
    return isinstance(value, int | float) and not isinstance(value, bool)
