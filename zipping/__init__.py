"""Zipping: keep only the live tokens of a batch, as packed rows, so that halted tokens cost no compute.

A batch of images is a dense tensor [B, N, C]. After each block some tokens halt. A *store* records
which tokens are live. There are three stores with one interface:

* `MaskedTokens` keeps all tokens in place and masks the halted ones. It saves no compute.
* `PackedTokensCPU` and `PackedTokensCUDA` keep the live tokens only, as packed rows [T, C], image
  by image. Norms, projections and MLPs run on the rows. Attention runs within each image.

The CPU store keeps NumPy indices and sorts images by their number of rows. The CUDA store keeps
its indices on the device, where reading a value is a host-device sync. Stores are immutable:

    tokens, rows = pack(x, num_prefix_tokens=1)                              # [B, N, C] -> [T, C]
    rows = rows + attention(rows[None], attn_mask=tokens.attention_mask)[0]  # within each image
    tokens, (rows, state) = tokens.drop(halts, rows, state)                  # halts: [T] bool

`to_dense` scatters the values of all blocks back to [L, B, N]. If Triton works, its kernels compute
the scores and drop the rows together: `PackedTokensCUDA.halt`.

Files: `stores.py` (the stores), `attention.py` (attention within images), `blocks.py` (timm's block
on packed rows), `gate.py` (the gate), `halting.py` (the halting arithmetic), `outputs.py` (outputs
collected over all blocks), `kernels.py` (Triton kernels), `rotations.py` (rotary position embeddings),
`recording.py` (graphs for other images), `channels.py` (swap of the channel that the gate reads).
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from zipping.attention import ATTENTION, PerImageAttentionMask, padded_attention, ragged_attention, varlen_attention
from zipping.gate import Gate
from zipping.recording import is_recorded
from zipping.stores import (
    BlockOutput,
    MaskedTokens,
    PackedTokens,
    PackedTokensCPU,
    PackedTokensCUDA,
    drop_halted,
)

__all__ = [
    "ATTENTION",
    "BlockOutput",
    "DeviceTokens",
    "Gate",
    "HostTokens",
    "MaskedTokens",
    "PackedTokens",
    "PackedTokensCPU",
    "PackedTokensCUDA",
    "PerImageAttentionMask",
    "can_pack",
    "drop_halted",
    "pack",
    "padded_attention",
    "ragged_attention",
    "uses_device_form",
    "uses_kernels",
    "varlen_attention",
]

HostTokens, DeviceTokens = PackedTokensCPU, PackedTokensCUDA  # former names, kept for other programs


def uses_device_form(x: Tensor) -> bool:
    """Return whether the live tokens of `x` are kept in `PackedTokensCUDA` instead of `PackedTokensCPU`."""
    return x.is_cuda


def uses_kernels(x: Tensor) -> bool:
    """Return whether the Triton kernels run on the device of `x`."""
    return x.is_cuda and _kernels_run(x.device)


@cache
def _kernels_run(device: torch.device) -> bool:
    """Run the kernels once, forward and backward, and return whether they work.

    Triton may be missing, or the C compiler that it needs. Raises torch.OutOfMemoryError
    without caching a result, so that the next call tries again.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            rows = torch.tensor([[0.0], [9.0]], device=device, requires_grad=True)  # the second one halts
            tokens, _ = PackedTokensCUDA.pack(rows.detach()[None], num_prefix_tokens=1)
            gate = Gate.of(scale=1.0, center=0.0, halt_eps=0.0, device=device)
            output = tokens.halt(rows, rows.new_ones(2) / 4, gate, is_last_block=False, early_exit=False)
            (output.prefix.sum() + output.rows.sum()).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an import, a compiler or a driver may raise anything
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"the Triton kernels do not run here ({reason}). Zipping uses PyTorch ops instead, "
            "which is slower for small batches. Install Triton and a C compiler to enable the kernels.",
            stacklevel=2,
        )
        return False
    return True


def can_pack(x: Tensor) -> bool:
    """Return whether the live tokens of `x` can be packed rows.

    x: [B, N, C]. The result is False on other devices than CPU and CUDA, for an empty batch, in
    float64 on CUDA, inside a transform of torch.func, and if the call is recorded.
    """
    if x.device.type not in ("cpu", "cuda") or torch._C._functorch.is_functorch_wrapped_tensor(x) or is_recorded(x):
        return False
    return len(x) > 0 and not (uses_device_form(x) and x.dtype == torch.float64)


def pack(x: Tensor, num_prefix_tokens: int) -> tuple[PackedTokensCPU | PackedTokensCUDA, Tensor]:
    """Return the packed store in which every token is live, and the rows.

    x: [B, N, C] -> rows: [B * N, C].
    """
    return (PackedTokensCUDA if uses_device_form(x) else PackedTokensCPU).pack(x, num_prefix_tokens)
