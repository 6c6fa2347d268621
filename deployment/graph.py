"""Builder of an ONNX graph: nodes and constants with unique names. It does not depend on any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class GraphBuilder:
    """An ONNX graph under construction. Each call adds a node or a constant and returns the name of its output.

    fp16_weights: store floating-point constants with two or more dimensions in half precision. A Cast node restores
        float32 where they are used.
    """

    def __init__(self, fp16_weights: bool = False):
        self.fp16_weights = fp16_weights
        self.numbers = count()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes) -> str:
        """Add a node with one output and return the name of that output. name: a fixed name for it."""
        return self._add_node(operator, [name or self._new_name(operator)], inputs, attributes)[0]

    def add_many(self, operator: str, num_outputs: int, /, *inputs: str, **attributes) -> list[str]:
        """Add a node with several outputs and return their names."""
        outputs = [self._new_name(operator) for _ in range(num_outputs)]
        return self._add_node(operator, outputs, inputs, attributes)

    def _add_node(self, operator: str, outputs: list[str], inputs: Sequence[str], attributes: dict) -> list[str]:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=f"{operator}_{outputs[0]}", **attributes))
        return outputs

    def constant(self, value: np.ndarray | torch.Tensor | float | list[int], name: str | None = None) -> str:
        """Add a constant. Integers and booleans keep their type, other numbers become float32.

        name: a fixed name for it, by which nodes refer to it, so that it is not stored in half precision
        """
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.kind == "f":
            is_half = self.fp16_weights and array.ndim > 1 and name is None
            array = array.astype(np.float16 if is_half else np.float32)
        name = name or self._new_name("constant")
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return self.add("Cast", name, to=FLOAT) if array.dtype == np.float16 else name

    def subgraph(self, write: Callable[[], Sequence[str]], output_types: Sequence[int]) -> onnx.GraphProto:
        """Build a graph without inputs, for a branch of an If node.

        write: adds the nodes of the branch and returns the names of its outputs; output_types: their ONNX types
        """
        outer_nodes, self.nodes = self.nodes, []
        outputs = write()
        nodes, self.nodes = self.nodes, outer_nodes
        infos = [value_info(name, onnx_type, None) for name, onnx_type in zip(outputs, output_types)]
        return helper.make_graph(nodes, "body", [], infos)

    def _new_name(self, kind: str) -> str:
        return f"{kind}_{next(self.numbers)}"


def value_info(name: str, onnx_type: int, shape: Sequence | None) -> onnx.ValueInfoProto:
    """Describe an input or output of a graph. shape: None if unknown."""
    return helper.make_tensor_value_info(name, onnx_type, shape)
