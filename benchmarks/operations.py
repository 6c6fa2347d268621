"""Ops that halting adds to a block."""

from __future__ import annotations

import copy
from collections import Counter
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models_act
import zipping
from benchmarks.cases import Case, static_twin
from utils import autocast


class OperationCounter(TorchDispatchMode):
    """Counts the operations that torch is asked for, by name, and apart `waits` for the device and `copies` to it.

    Left out are views, and what gives a tensor memory or a name and does no work. On a CPU, other
    operators stand in for CUDA's attention.
    """

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view", "promote_types")
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
        elif name == "lift_fresh":  # a tensor of numbers that the host has
            self.copies += 1
        elif not function.is_view and name not in self.FREE:
            self.operations["attention" if "attention" in name else name] += 1
        if name in self.VARLEN and not args[0].is_cuda:
            q, k, v = (x.view(1, *x.shape[-3:]).transpose(1, 2) for x in args[:3])
            out = zipping.ragged_attention(q, k, v, list(filter(None, args[4].diff().tolist())))
            others = [torch.empty(0) if "Tensor" in str(r.type) else 0 for r in function._schema.returns[1:]]
            return out.transpose(1, 2).view_as(args[0]), *others
        return function(*args, **(kwargs or {}))


def count(case: Case, device: torch.device, amp: str) -> list[dict]:
    """A row for each form, and for logits alone and with halting: operations per block beyond a static block's.

    CUDA's form without Triton's kernels, which are no operations.
    """
    model, images = copy.deepcopy(case.model).eval(), case.batches[0]
    model.early_exit = False
    static = _operations(static_twin(model).eval(), images, amp)
    rows = []
    for form in ("device",) if device.type == "cuda" else ("CPU", "device"):
        with (
            patch.object(zipping, "uses_device_form", lambda x, form=form: form == "device"),
            patch.object(models_act, "uses_kernels", lambda x: False),
        ):
            for what, options in {"logits": {}, "with halting": {"return_halting": True}}.items():
                found = _operations(model, images, amp, **options)
                names = (found.operations | static.operations).keys()
                beyond = {n: (found.operations[n] - static.operations[n]) / model.num_blocks for n in names}
                row = {"form": f"{form} form, {what}", "operations": sum(beyond.values()), "by_name": beyond}
                if form == "device":  # on a CPU nothing is waited for, and numbers need no copy
                    row |= {"waits": found.waits / model.num_blocks, "copies": found.copies / model.num_blocks}
                rows.append(row)
    return rows


@torch.no_grad()
def _operations(model: nn.Module, images: Tensor, amp: str, **options) -> OperationCounter:
    with autocast(images.device, amp), OperationCounter() as counter:
        model(images, **options)
    return counter


def format_counts(rows: list[dict]) -> str:
    lines = [f"{'':28}{'operations':>11}{'waits':>7}{'copies':>8}  by name"]
    for row in rows:
        by_name = sorted(row["by_name"].items(), key=lambda item: -abs(item[1]))
        names = ", ".join(f"{name} {value:.1f}" for name, value in by_name if abs(value) >= 0.05)
        waits, copies = (f"{row[key]:.1f}" if key in row else "" for key in ("waits", "copies"))
        lines.append(f"{row['form']:28}{row['operations']:>11.1f}{waits:>7}{copies:>8}  {names}")
    return "\n".join(lines)
