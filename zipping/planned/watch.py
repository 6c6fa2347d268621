"""Detection of changes of a model after the capture of its passes, which call no module and no hook."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from zipping.blocks import replaced_function, why_not_zippable

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FOLLOWED = {"gate_scale", "gate_center", "halt_eps"}  # options of the model that a captured pass reads in each call
MODELESS = {nn.Linear, nn.Conv2d, nn.Identity, nn.Sequential}  # the same in training and evaluation
PLAIN_TYPES = (bool, int, float, str, type(None))


class ModelWatch:
    """Record of a model's modules, tensors and attributes, which it compares with the current ones.

    The dictionaries of the modules are collected once, because a walk through the modules takes longer than the pass of
    one image. Values of weights are not compared: captured passes read the current ones.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._hooks = [getattr(module, kind) for module in modules for kind in HOOKS]
        self._states = [module.__dict__ for module in modules]
        self._attributes = [
            (state, [name for name, value in state.items() if name not in FOLLOWED and _is_plain(value)])
            for state in self._states
        ]
        self._children = [module._modules for module in modules if module._modules]
        self._tensors = [held for m in modules for held in (m._parameters, m._buffers) if held]
        self._known = self._current()
        known_classes = all(type(m).__module__.startswith(("timm.", "torch.")) for m in modules if m is not model)
        self._is_plain = known_classes and why_not_zippable(model.blocks) is None
        self._has_running_stats = any(getattr(module, "track_running_stats", False) for module in modules)
        self._is_trained = any(parameter.requires_grad for parameter in model.parameters())
        self._trains_in_part = any(m.training and type(m) not in MODELESS for m in modules)  # as dropout on purpose

    def can_capture(self, training: bool) -> bool:
        """Return whether a pass calls layers of timm and torch only, and writes nothing into the model."""
        if not (self._is_plain and self.is_untouched()):
            return False
        return self._is_trained and not self._has_running_stats if training else not self._trains_in_part

    def is_untouched(self) -> bool:
        """Return whether there is no hook and no replaced `forward` or function."""
        if any(self._hooks) or _has_any_global_hook() or replaced_function() is not None:
            return False
        return not any("forward" in state for state in self._states)

    def is_same(self) -> bool:
        """Return whether every module, tensor and plain attribute is as recorded, and none is new."""
        return self._current() == self._known

    def _current(self) -> tuple:
        chain = itertools.chain.from_iterable
        tensors = [x for x in chain(held.values() for held in self._tensors) if x is not None]
        return (
            list(chain(held.values() for held in self._children)),
            [(x.data_ptr(), x.requires_grad, x.dtype) for x in tensors],
            [len(state) for state in self._states],
            [state.get(name) for state, names in self._attributes for name in names],
        )


def _is_plain(value: object) -> bool:
    return all(isinstance(part, PLAIN_TYPES) for part in (value if isinstance(value, tuple) else (value,)))
