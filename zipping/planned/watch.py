"""Whether a model is still what its passes were captured from: a captured pass calls no module and no hook."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from zipping.blocks import replaced_function

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FOLLOWED = {"gate_scale", "gate_center", "halt_eps"}  # options of the model that a captured pass reads in each call
PLAIN_TYPES = (bool, int, float, str, type(None))


class ModelWatch:
    """A record of a model's modules, parameters and attributes, and a quick comparison with what they are now.

    The dictionaries of the modules are gathered once, because a walk through the modules takes longer than a batch of
    one image. Values of weights are not compared: captured passes read them.
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
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._known = self._current()
        known_classes = all(type(m).__module__.startswith(("timm.", "torch.")) for m in modules if m is not model)
        self.is_plain = known_classes and self.is_untouched()
        self.has_running_stats = any(getattr(module, "track_running_stats", False) for module in modules)

    def is_untouched(self) -> bool:
        """Return whether there is no hook and no replaced `forward` or function."""
        if any(self._hooks) or _has_any_global_hook() or replaced_function() is not None:
            return False
        return not any("forward" in state for state in self._states)

    def is_same(self) -> bool:
        """Return whether every module, parameter and plain attribute is the recorded one."""
        return self._current() == self._known

    def _current(self) -> tuple:
        chain = itertools.chain.from_iterable
        parameters = [p for p in chain(held.values() for held in self._parameters) if p is not None]
        return (
            list(chain(held.values() for held in self._children)),
            [(p.data_ptr(), p.requires_grad, p.dtype) for p in parameters],
            [state.get(name) for state, names in self._attributes for name in names],
        )


def _is_plain(value: object) -> bool:
    return all(isinstance(part, PLAIN_TYPES) for part in (value if isinstance(value, tuple) else (value,)))
