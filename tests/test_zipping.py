import emulated_attention
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from zipping import (
    MaskedTokens,
    PackedTokensCPU,
    PackedTokensCUDA,
    attention,
    ragged_attention,
    stores,
    varlen_attention,
)

STORES = pytest.mark.parametrize("store", [PackedTokensCPU, PackedTokensCUDA])


@st.composite
def rounds_of_leaving(draw):
    """A dense batch, how many prefix tokens it has, and for a few rounds which tokens leave: [rounds, B, N] bool."""
    batch, length, rounds = draw(st.integers(1, 5)), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    share, seed = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.rand(rounds, batch, length, generator=generator) < share
    return torch.randn(batch, length, 3, generator=generator), draw(st.integers(1, 2)), leaves


@STORES
@given(rounds_of_leaving(), st.booleans())
def test_stores_of_rows_hold_the_live_tokens_image_by_image(store, case, early_exit):
    x, num_prefix, rounds = case
    batch, length = x.shape[:2]
    masked, dense = MaskedTokens.pack(x, num_prefix)
    tokens, rows = store.pack(x, num_prefix)
    stores, masked_stores = [tokens], [masked]
    for leaves in rounds:
        token = torch.as_tensor(tokens.token)
        tokens, (rows,) = tokens.drop(leaves.flatten()[token], rows, early_exit=early_exit)
        masked, _ = masked.drop(leaves, dense)
        if early_exit:
            masked = MaskedTokens(masked.live & masked.live[:, :num_prefix].any(dim=1, keepdim=True), num_prefix)
        stores, masked_stores = [*stores, tokens], [*masked_stores, masked]

        token = torch.as_tensor(tokens.token)
        image = token // length
        live = masked.live.flatten().nonzero().squeeze(1)
        assert torch.equal(token.sort().values, live)
        assert torch.equal(rows, x.flatten(0, 1)[token])
        images, counts = image.unique_consecutive(return_counts=True)
        assert len(images.unique()) == len(images), "the rows of an image stand together"
        assert all((part.diff() > 0).all() for part in token.split(counts.tolist())), "in the order of its tokens"
        if store is PackedTokensCPU:
            assert tokens.seqlens == counts.tolist() == sorted(counts.tolist())
        else:
            assert tokens.cu_seqlens.diff().tolist() == image.bincount(minlength=batch).tolist()
            assert images.tolist() == sorted(images.tolist())
        assert torch.equal(tokens.expand_to_tokens(torch.arange(batch)), image)
        prefix, expected = tokens.prefix(rows), masked.prefix(dense)
        assert torch.equal(prefix[masked.live[:, :num_prefix]], expected[masked.live[:, :num_prefix]])
        total = tokens.scatter_add(torch.zeros(batch * length, 3), rows)
        assert torch.equal(total.view_as(x), masked.scatter_add(torch.zeros_like(x), dense))

    values = torch.arange(len(stores) * batch * length).view(-1, batch, length) + 1.0
    of_rows = [of_block.flatten()[torch.as_tensor(tokens.token)] for of_block, tokens in zip(values, stores)]
    (table,) = store.to_dense(stores, torch.cat(of_rows))
    (expected,) = MaskedTokens.to_dense(masked_stores, values.flatten(0, 1))
    assert torch.equal(table, expected)


@STORES
def test_prefix_of_no_rows_is_zero_with_a_gradient(store):
    tokens, rows = store.pack(torch.randn(2, 3, 4, requires_grad=True), 1)
    tokens, (rows,) = tokens.drop(torch.ones(6, dtype=torch.bool), rows)
    out = tokens.prefix(rows)
    assert out.shape == (2, 1, 4)
    assert not out.any()
    assert out.requires_grad


# Attention within images -------------------------------------------------------------------------


def each_image_alone(q, k, v, lengths):
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)


def varlen(q, k, v, lengths):
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return varlen_attention(q, k, v, cu_seqlens, max_seqlen=50)  # any bound will do


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(sorted)


@pytest.mark.parametrize("attention", [ragged_attention, varlen])
@given(LENGTHS, st.sampled_from([1, 4]), st.sampled_from([5, 12, 16]))  # CUDA's kernels want multiples of 8
def test_attention_stays_within_images(attention, lengths, heads, width):
    qkv = torch.randn(1, sum(lengths), 3, heads, width, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # as timm's attention has them
    out, expected = attention(q, k, v, lengths), each_image_alone(q, k, v, lengths)
    weights = torch.randn_like(out)
    grad, expected_grad = (torch.autograd.grad((o * weights).sum(), qkv, retain_graph=True)[0] for o in (out, expected))
    assert_close(out, expected)
    assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    if attention is ragged_attention or width % 8 == 0:
        assert out.transpose(1, 2).is_contiguous(), "what follows would have to copy it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[5], [2, 2], [1, 3, 4]])
def test_the_device_gets_one_kernel_and_no_copies(dtype, lengths):
    """One image too: dense attention would plan anew for each number of rows. q, k and v stay strided."""
    qkv = torch.randn(1, sum(lengths), 3, 2, 16).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    emulated_attention.calls.clear()
    out = varlen(q, k, v, lengths)
    assert out.dtype == dtype
    operator = "efficient" if dtype == torch.float32 else "flash"
    assert emulated_attention.calls == [(operator, dtype, (3 * 2 * 16, 16, 1))]


@pytest.mark.parametrize("has_flash", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_any_width_find_a_kernel(monkeypatch, has_flash, dtype):
    """60 is that of 180 channels in three heads."""
    monkeypatch.setattr(attention, "_supports_flash_attention", lambda device: has_flash)
    qkv = torch.randn(3, 1, 2, 6, 60).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    out, expected = varlen(*qkv, [2, 4]), each_image_alone(*exact, [2, 4])
    assert out.dtype == dtype
    assert_close(out, expected.to(dtype), rtol=0.02, atol=0.02)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, weights)
    (expected_grad,) = torch.autograd.grad(expected, exact, weights.double())
    assert_close(grad, expected_grad.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "computed"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_an_old_gpu_gets_the_efficient_kernel_in_half_precision(monkeypatch, dtype, computed):
    """It has none for bfloat16 there."""
    monkeypatch.setattr(attention, "_supports_flash_attention", lambda device: False)
    q, k, v = torch.randn(3, 1, 2, 6, 16).to(dtype)
    emulated_attention.calls.clear()
    assert varlen(q, k, v, [2, 4]).dtype == dtype
    assert [call[:2] for call in emulated_attention.calls] == [("efficient", computed)]


@STORES
def test_no_rows_call_no_kernel(store, monkeypatch):
    for name in ("ragged_attention", "varlen_attention"):
        monkeypatch.setattr(stores, name, lambda *args: pytest.fail("a kernel was called"))
    tokens, rows = store.pack(torch.randn(2, 3, 4), 1)
    tokens, _ = tokens.drop(torch.ones(6, dtype=torch.bool), rows)
    q, k, v = torch.zeros(3, 1, 2, 0, 4, requires_grad=True)
    out = tokens.attend(q, k, v)
    assert out.shape == q.shape
    assert all(grad is not None for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_mixed_precision_casts_what_a_norm_has_left_in_float32():
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen(q, k, v.bfloat16(), [2, 4])
    assert out.dtype == torch.bfloat16


def test_a_mask_that_reaches_another_function_is_refused():
    tokens, _ = PackedTokensCPU.pack(torch.randn(1, 3, 4), 1)
    with pytest.raises(TypeError):
        torch.softmax(torch.randn(3, 3) + tokens.attention_mask, dim=-1)


def test_an_image_without_live_tokens_attends_to_all():
    tokens, x = MaskedTokens.pack(torch.randn(2, 3, 4), 1)
    tokens, _ = tokens.drop(torch.tensor([[True] * 3, [True, False, False]]), x)
    assert tokens.attention_mask[:, 0, 0].tolist() == [[True] * 3, [False, True, True]]
