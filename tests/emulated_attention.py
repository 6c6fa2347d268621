"""CPU versions of CUDA's attention operators for sequences of different lengths, registered on import.

With them, the CUDA store runs in any test, forward and backward. The interface and the shapes are
those of aten's operators on CUDA; torch.compile checks them. Attention is computed sequence by sequence,
in float64. Rows outside all sequences are NaN in outputs and gradients, because CUDA leaves them unwritten.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

library = torch.library.Library("aten", "IMPL")
calls: list[tuple] = []  # name, dtype and strides of q of each call, forward or backward


def _sequences(cu_seqlens: Tensor, max_seqlen: int, num_rows: int) -> Iterator[slice]:
    starts = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert starts == sorted(starts)
    assert starts[0] == 0, starts
    assert starts[-1] <= num_rows, (starts, num_rows)
    assert all(end - start <= max_seqlen for start, end in pairwise(starts)), (starts, max_seqlen)
    return map(slice, starts[:-1], starts[1:])


def _unwritten(x: Tensor) -> Tensor:
    return torch.full(x.shape, torch.nan, dtype=x.dtype)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q, k: [n, H, D] -> [H, n, n]"""
    return (torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale).softmax(-1)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    assert q.shape[-1] * q.element_size() % 16 == 0, "no kernel found to launch!"  # same check as on CUDA
    out = _unwritten(q)
    for rows in _sequences(cu_seqlens, max_seqlen, len(q)):
        out[rows] = torch.einsum("hqk,khd->qhd", _weights(q[rows], k[rows], scale), v[rows].double()).to(q.dtype)
    return out


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, ...]:
    grads = tuple(_unwritten(x) for x in (q, k, v))
    for rows in _sequences(cu_seqlens, max_seqlen, len(q)):
        weights, (g, value) = _weights(q[rows], k[rows], scale), (x[rows].double() for x in (grad, v))
        grad_weights = torch.einsum("qhd,khd->hqk", g, value)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        found = (
            torch.einsum("hqk,khd->qhd", grad_logits, k[rows].double()),
            torch.einsum("hqk,qhd->khd", grad_logits, q[rows].double()),
            torch.einsum("hqk,qhd->khd", weights, g),
        )
        for target, part in zip(grads, found):
            target[rows] = part
    return grads


def flash_forward(q, k, v, cu_seqlens, _k, max_seqlen, _l, dropout_p, is_causal, return_debug_mask, *, scale, **_):
    """q, k, v: [T, H, D] in half precision."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert (dropout_p, is_causal, return_debug_mask) == (0, False, False)
    calls.append(("flash", q.dtype, q.stride()))
    out = _forward(q, k, v, cu_seqlens, max_seqlen, scale)
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, torch.zeros(q.shape[1], len(q)), seed, unused, torch.empty(0, dtype=q.dtype)


def flash_backward(grad, q, k, v, out, logsumexp, cu_seqlens, _k, max_seqlen, *_, scale, **__):
    calls.append(("flash backward", q.dtype, q.stride()))
    return _backward(grad, q, k, v, cu_seqlens, max_seqlen, scale)


def efficient_forward(
    q, k, v, bias, cu_seqlens, _k, max_seqlen, _l, dropout_p, mask_type, needs_grad=False, *, scale, **_
):
    """q, k, v: [1, T, H, D]"""
    assert (bias, dropout_p, mask_type) == (None, 0, 0)
    calls.append(("efficient", q.dtype, q.stride()[1:]))
    padded = -(-max_seqlen // 32) * 32 if needs_grad else 0
    out = _forward(q[0], k[0], v[0], cu_seqlens, max_seqlen, scale)[None]
    number = torch.zeros((), dtype=torch.int64)
    return out, torch.zeros(len(cu_seqlens) - 1, q.shape[2], padded), number, number.clone(), max_seqlen, max_seqlen


def efficient_backward(grad, q, k, v, bias, out, cu_seqlens, _k, max_seqlen, _l, logsumexp, *_, scale, **__):
    assert 0 < max_seqlen <= q.shape[1], f"Invalid max_seqlen_k:{max_seqlen}"  # as on CUDA
    assert logsumexp.shape[-1] >= max_seqlen, "logsumexp was not computed"
    calls.append(("efficient backward", q.dtype, q.stride()[1:]))
    grads = _backward(grad[0], q[0], k[0], v[0], cu_seqlens, max_seqlen, scale)
    return *(x[None] for x in grads), torch.empty(())


library.impl("_flash_attention_forward", flash_forward, "CPU")
library.impl("_flash_attention_backward", flash_backward, "CPU")
library.impl("_efficient_attention_forward", efficient_forward, "CPU")
library.impl("_efficient_attention_backward", efficient_backward, "CPU")
