"""Live tokens of a batch: what stays, what leaves, and attention among those that stay.

Three stores with one interface. `MaskedTokens` keeps every token in a dense `[B, N, ...]` and knows
which are live. The others keep the live ones alone, as the rows of `[T, ...]`, image by image, so
that everything computed on the rows costs less as tokens leave: `PackedTokensCPU` on the CPU, where a
decision is read at once, and `PackedTokensCUDA` on CUDA, where reading one means to wait. All are
immutable: `drop` returns a new store. Nothing here knows why a token leaves, or what a row means.

    tokens, rows = pack(x, num_prefix_tokens=1)                      # x: [B, N, C] -> rows: [T, C]
    rows = rows + attention(rows[None], attn_mask=tokens.attention_mask)[0]      # within each image
    tokens, (rows, state) = tokens.drop(leaves, rows, state)         # leaves: [T] bool

A store of rows holds which token each row is, and where images begin. What is reported of all blocks
is put together at the end, by `tables`. On CUDA, where Triton is, its kernels decide and drop in one
go: `PackedTokensCUDA.halt`.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from zipping.attention import ATTENTION, PerImageAttentionMask, ragged_attention, varlen_attention
from zipping.stores import MaskedTokens, PackedTokens, PackedTokensCPU, PackedTokensCUDA

__all__ = [
    "ATTENTION",
    "DeviceTokens",
    "HostTokens",
    "MaskedTokens",
    "PackedTokens",
    "PackedTokensCPU",
    "PackedTokensCUDA",
    "PerImageAttentionMask",
    "can_pack",
    "pack",
    "ragged_attention",
    "uses_device_form",
    "uses_kernels",
    "varlen_attention",
]

HostTokens, DeviceTokens = PackedTokensCPU, PackedTokensCUDA  # their earlier names


def uses_device_form(x: Tensor) -> bool:
    """Whether the live tokens of x are kept as `PackedTokensCUDA`, else as `PackedTokensCPU`."""
    return x.is_cuda


def uses_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels run where x is."""
    return x.is_cuda and _kernels_run(x.device)


@cache
def _kernels_run(device: torch.device) -> bool:
    """Tried once, forward and backward: Triton may be missing, or the compiler of C that it needs."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            rows = torch.tensor([[0.0], [9.0]], device=device, requires_grad=True)  # the second one leaves
            tokens, _ = PackedTokensCUDA.pack(rows.detach()[None], num_prefix_tokens=1)
            gate = (rows.new_zeros(()), rows.new_ones(()))
            _, _, prefix, _, kept, _ = tokens.halt(rows, rows.new_ones(2) / 4, *gate, 1.0, last=False, early_exit=False)
            (prefix.sum() + kept.sum()).backward()
    except torch.OutOfMemoryError:
        raise  # which says nothing about kernels
    except Exception as error:  # whatever an import, a compiler or a driver raises
        reason = str(error).partition("\n")[0]
        warnings.warn(f"zipping is slower than it could be: Triton's kernels do not run here ({reason})", stacklevel=2)
        return False
    return True


def can_pack(x: Tensor) -> bool:
    """x: [B, N, C]; whether its live tokens can be rows. Not in float64 on CUDA, nor inside torch.func's transforms."""
    if x.device.type not in ("cpu", "cuda") or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return len(x) > 0 and not (uses_device_form(x) and x.dtype == torch.float64)


def pack(x: Tensor, num_prefix_tokens: int) -> tuple[PackedTokensCPU | PackedTokensCUDA, Tensor]:
    """x: [B, N, C] -> the store in which every token is live, in the form of its device, and its rows [B * N, C]."""
    return (PackedTokensCUDA if uses_device_form(x) else PackedTokensCPU).pack(x, num_prefix_tokens)
