"""Weights as a captured pass reads them: cast together, where autocast would cast each of them in every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class CastWeights:
    """The parameters of a model as leaves of their own, for passes that are captured.

    Under autocast, weights of linear layers and convolutions are cast in one go, and so are their gradients. The
    numbers are those of autocast. Other parameters keep their memory, under another name: autograd may already hold a
    node for a parameter on another stream (DistributedDataParallel keeps them), which a capture must not meet.

    A captured pass casts the weights itself, each time. So it follows every write to them, also writes that do not
    change a parameter's `_version`, as those of torch's fused optimizers and those through `.data`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, train: bool):
        """Make the leaves.

        dtype: of the matrix products under autocast, None without it; train: whether gradients will be computed.
        """
        is_cast = {
            id(parameter)
            for module in model.modules()
            if type(module) in (nn.Linear, nn.Conv2d)  # subclasses may compute with the weights before autocast does
            for parameter in module.parameters(recurse=False)
            if dtype is not None and parameter.dtype == torch.float32
        }
        self.parameters = list(model.parameters())
        self.trained = [number for number, p in enumerate(self.parameters) if train and p.requires_grad]
        self._leaves = [p.detach() for p in self.parameters]
        cast = [number for number, p in enumerate(self.parameters) if id(p) in is_cast]
        for number in cast:
            self._leaves[number] = torch.empty_like(self._leaves[number], dtype=dtype)
        self._targets = [self._leaves[number].detach() for number in cast]
        self._sources = [self.parameters[number].detach() for number in cast]
        for number in self.trained:
            self._leaves[number].requires_grad_()

    def cast(self) -> None:
        """Cast the weights. Part of each captured pass."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Let the modules of the model hold the leaves inside the context."""
        leaf_of = {id(p): leaf for p, leaf in zip(self.parameters, self._leaves)}
        places = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        for held, name, parameter in places:
            held[name] = leaf_of[id(parameter)]
        try:
            yield
        finally:
            for held, name, parameter in places:
                held[name] = parameter

    def gradients(self, outputs: list[Tensor], grads: list[Tensor]) -> list[tuple[Tensor, list[int]]]:
        """Compute the gradients of all parameters that are trained.

        Returns, for each pair of dtypes, the gradients in one flat tensor of the parameters' dtype, and the places of
        their parameters in `parameters`. Parameters that the outputs do not depend on are missing.
        """
        leaves = [self._leaves[number] for number in self.trained]
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        groups: dict[tuple, list[tuple[int, Tensor]]] = {}
        for number, gradient in zip(self.trained, found):
            if gradient is not None:
                groups.setdefault((gradient.dtype, self.parameters[number].dtype), []).append((number, gradient))
        return [
            (torch.cat([gradient.flatten() for _, gradient in group]).to(dtype), [number for number, _ in group])
            for (_, dtype), group in groups.items()
        ]
