"""The ops that halting adds to a block, counted instead of timed: on a GPU an op is at least one kernel launch."""

from __future__ import annotations

import copy
from collections import Counter
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import models_act
import zipping
from benchmarks.cases import Case, static_twin
from utils import AMP_DTYPES, autocast
from zipping.planned.plans import Plan
from zipping.planned.weights import CastWeights


class OperationCounter(TorchDispatchMode):
    """Counter of the ops that torch executes, by name, and of host-device syncs and copies.

    operations: number of calls of each op, without views and ops that only allocate memory or rename a tensor
    waits: ops that make the host wait for the device
    copies: tensors built from Python numbers, each a copy to the device

    On a CPU, ragged attention replaces CUDA's kernels for variable sequence lengths, which do not run there.
    """

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view", "promote_types")
    FREE += ("prim::device",)
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave")
    VARLEN = ("_flash_attention_forward", "_efficient_attention_forward")

    def __init__(self):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits = self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in self.WAITS:
            self.waits += 1
        elif name == "lift_fresh":
            self.copies += 1
        elif not function.is_view and name not in self.FREE:
            self.operations["attention" if "attention" in name else name] += 1
        if name in self.VARLEN and not args[0].is_cuda:
            others = [torch.empty(0) if "Tensor" in str(r.type) else 0 for r in function._schema.returns[1:]]
            return self._varlen_attention_on_cpu(args), *others
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _varlen_attention_on_cpu(args: tuple) -> Tensor:
        """Return the output of CUDA's op.

        args: q, k, v, [T, H, D] or [1, T, H, D]; the fifth is cu_seqlens, [number of images + 1].
        """
        q, k, v = (x.view(1, *x.shape[-3:]).transpose(1, 2) for x in args[:3])
        seqlens = [length for length in args[4].diff().tolist() if length]
        return zipping.ragged_attention(q, k, v, seqlens).transpose(1, 2).view_as(args[0])


def count_ops(case: Case, device: torch.device, amp: str) -> list[dict]:
    """Count the ops of a forward pass beyond those of the static model, per block.

    Returns one row per token store, and for logits with and without halting. A CPU counts both stores, a GPU its own.
    The CUDA store is counted without the Triton kernels, which are not torch ops. The planned mode has rows if the
    model and the machine support it.
    """
    model, images = copy.deepcopy(case.model).eval(), case.batches[0]
    model.early_exit = False
    static = _run_counted(static_twin(model).eval(), images, amp)
    rows = []
    for store in ("CUDA",) if device.type == "cuda" else ("CPU", "CUDA"):
        with (
            patch.object(zipping, "uses_device_form", lambda x, store=store: store == "CUDA"),
            patch.object(models_act, "uses_kernels", lambda x: False),
        ):
            for outputs, options in {"logits": {}, "with halting": {"return_halting": True}}.items():
                counter = _run_counted(model, images, amp, **options)
                rows.append(_row(f"{store} store, {outputs}", counter, static, model.num_blocks))
                if store == "CPU":  # has no syncs and no copies to a device
                    del rows[-1]["waits"], rows[-1]["copies"]
    if model.reads_prefix and find_spec("triton"):
        for outputs, return_halting in {"logits": False, "with halting": True}.items():
            counter = _run_planned(model, images, amp, return_halting)
            rows.append(_row(f"planned mode, {outputs}", counter, static, model.num_blocks))
    return rows


def _row(form: str, counter: OperationCounter, static: OperationCounter, num_blocks: int) -> dict:
    names = (counter.operations | static.operations).keys()
    added = {name: (counter.operations[name] - static.operations[name]) / num_blocks for name in names}
    row = {"form": form, "operations": sum(added.values()), "by_name": added}
    return row | {"waits": counter.waits / num_blocks, "copies": counter.copies / num_blocks}


@torch.no_grad()
def _run_counted(model: nn.Module, images: Tensor, amp: str, **options) -> OperationCounter:
    with autocast(images.device, amp), OperationCounter() as counter:
        model(images, **options)
    return counter


class PlannedCounter(OperationCounter):
    """Counter for the planned mode. A launch of a Triton kernel is an op."""

    def launch(self, kernel, programs: int, *args, **options) -> None:
        """Count a launch that `zipping.planned.kernels.launch` would make."""
        self.operations[kernel.__name__] += 1

    @staticmethod
    def _varlen_attention_on_cpu(args: tuple) -> Tensor:
        return torch.empty_like(args[0])


@torch.no_grad()
def _run_planned(model: nn.Module, images: Tensor, amp: str, return_halting: bool) -> PlannedCounter:
    """Count a pass of the planned mode, the cast of the weights included.

    Tensors are fake: they have shapes and no numbers. In the planned mode no shape depends on numbers.
    If the blocks are not fused, both kernels of halting count as the one op that launches them.
    """
    from zipping.planned import capture, kernels, passes  # imported here because Triton may be missing

    size = (len(images), model.patch_embed.num_patches + model.num_prefix_tokens)
    step, plan = passes.choose_step(model, compile_blocks=False), Plan.full(size, model.num_blocks)
    counter = PlannedCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), autocast(images.device, amp):
        inputs = capture.StaticInputs(images, size, model.num_prefix_tokens)
        planned = passes.PlannedPass(model, plan, inputs.tokens, inputs.gate, step, return_halting)
        weights = CastWeights(model, AMP_DTYPES[amp], train=False)
        with weights.in_place(model), patch.object(kernels, "launch", counter.launch), counter:
            weights.cast()
            state = passes.run_blocks(planned, passes.begin(planned, images), range(model.num_blocks))
            passes.finish(planned, state)
    return counter


def format_counts(rows: list[dict]) -> str:
    """Format the rows of `count_ops` as a table."""
    lines = [f"{'':28}{'ops':>11}{'syncs':>7}{'copies':>8}  by name"]
    for row in rows:
        by_name = sorted(row["by_name"].items(), key=lambda item: -abs(item[1]))
        names = ", ".join(f"{name} {value:.1f}" for name, value in by_name if abs(value) >= 0.05)
        syncs, copies = (f"{row[key]:.1f}" if key in row else "" for key in ("waits", "copies"))
        lines.append(f"{row['form']:28}{row['operations']:>11.1f}{syncs:>7}{copies:>8}  {names}")
    return "\n".join(lines)
