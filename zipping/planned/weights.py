"""Weights of captured passes: cast together once per pass, where autocast casts each of them in its layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class CastWeights:
    """Leaf tensors that replace the parameters of a model in captured passes.

    Under autocast, the leaves of linear layers and convolutions are copies in the dtype of autocast. All of them are
    cast together, and so are their gradients. The results have the bits of autocast. The other leaves share the memory
    of their parameters. A capture must not use the parameters themselves: autograd may hold a node of a parameter that
    belongs to another stream (DistributedDataParallel keeps such nodes).

    Every captured pass casts the weights first. So it follows every write to them, even if the write does not change
    the parameter's `_version`: torch's fused optimizers and writes through `.data` do not.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, train: bool):
        """Allocate the leaves.

        dtype: of autocast, None if it is off; train: whether gradients will be computed.
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
        """Cast the weights. Every captured pass begins with it."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Replace the parameters in the modules of the model by the leaves inside the context."""
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
        """Compute the gradients of all parameters that are trained. grads: the gradients of the outputs.

        Returns one pair for each combination of the dtypes of leaf and parameter: the gradients, concatenated in one
        flat tensor of the parameters' dtype, and the indices of these parameters in `parameters`. Parameters that the
        outputs do not depend on are missing.
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
