"""Dispatch of the calls of a model: by CUDA graphs or in the dynamic mode. Can be imported without Triton."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.models import VisionTransformer
from torch import Tensor

from zipping import uses_kernels
from zipping.outputs import Halting
from zipping.recording import is_recorded
from zipping.rotations import has_fixed_rotations

if TYPE_CHECKING:
    from zipping.planned.runner import GraphRunner


class Call(NamedTuple):
    """Arguments of a call of a model. images: [B, in_chans, H, W]; for the others, see `AdaptiveTokens.forward`."""

    images: Tensor
    return_halting: bool = False
    early_exit: bool = False
    gate_offset: Tensor | None = None


# Logits (a pair in distilled training), and `Halting` if requested
Result = tuple[Tensor | tuple[Tensor, Tensor], Halting | None]


@dataclass
class GraphReport:
    """Counts of the calls of a model, from the first one on.

    batches: calls that graphs support; replayed: those whose result came from a graph;
    overflows: calls whose plan had too few rows; plans, captures: how many were made.
    """

    batches: int = 0
    replayed: int = 0
    overflows: int = 0
    plans: int = 0
    captures: int = 0

    @property
    def hit_rate(self) -> float:
        """The fraction of the batches that was replayed; NaN if there was none."""
        return self.replayed / self.batches if self.batches else math.nan

    def since(self, before: GraphReport) -> GraphReport:
        """Return the counts of the calls after an earlier report."""
        return GraphReport(*map(operator.sub, astuple(self), astuple(before)))


RUNNERS: WeakKeyDictionary[VisionTransformer, GraphRunner] = WeakKeyDictionary()  # not copied or saved with a model


def run_by_graphs(model: VisionTransformer, call: Call) -> Result:
    """Run a call of a model by CUDA graphs if possible, else in the dynamic mode."""
    if not _is_supported(model, call):
        return model._forward(call)
    if model not in RUNNERS:
        from zipping.planned.runner import GraphRunner  # imported here because Triton may be missing

        RUNNERS[model] = GraphRunner(model)
    return RUNNERS[model](call)


def graph_report(model: VisionTransformer) -> GraphReport:
    """Return a copy of the counts of the calls of a model, all 0 if none could use graphs."""
    return replace(RUNNERS[model].report) if model in RUNNERS else GraphReport()


@contextlib.contextmanager
def count_graph_hits(model: VisionTransformer) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that receives `graph_hits`, the fraction of the model's calls in this context replayed by graphs.

    It stays empty if none of these calls can use CUDA graphs, as on a CPU.
    """
    hits, before = {}, graph_report(model)
    yield hits
    report = graph_report(model).since(before)
    if report.batches:
        hits["graph_hits"] = torch.tensor(report.hit_rate)


def supports_graphs(images: Tensor) -> bool:
    """Return whether the images are on the current CUDA device, and whether Triton kernels run there."""
    return images.is_cuda and images.device.index == torch.cuda.current_device() and uses_kernels(images)


def _is_supported(model: VisionTransformer, call: Call) -> bool:
    """Return whether the planned mode supports a call. docs/cuda_graphs.md lists what it does not support."""
    images, has_grad = call.images, torch.is_grad_enabled()
    is_supported = model.halting and model.zip_tokens and model.reads_prefix and not model.grad_checkpointing
    if not (is_supported and has_fixed_rotations(model)):
        return False
    if len(model.blocks) != model.num_blocks or not hasattr(model.patch_embed, "dynamic_feat_size"):
        return False
    if len(images) == 0 or images.requires_grad or images.dtype == torch.float64:
        return False
    if call.gate_offset is not None and call.gate_offset.requires_grad:
        return False
    if not (call.return_halting and has_grad if model.training else not has_grad):
        return False
    has_observer = torch._C._len_torch_dispatch_stack() > 0  # such as FlopCounterMode, which sees no op of a replay
    in_transform = torch._C._functorch.maybe_current_level() is not None
    return not (has_observer or in_transform or is_recorded(images)) and supports_graphs(images)
