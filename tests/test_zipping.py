"""The stores of live tokens, and attention within each image."""

from typing import NamedTuple

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
    padded_attention,
    ragged_attention,
    stores,
    varlen_attention,
)

STORES = pytest.mark.parametrize("store", [PackedTokensCPU, PackedTokensCUDA])


@st.composite
def halting_rounds(draw):
    """Draw a dense batch, its number of prefix tokens, and which tokens halt in each round: [rounds, B, N] bool."""
    batch, length, rounds = draw(st.integers(1, 5)), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    share, seed = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    halts = torch.rand(rounds, batch, length, generator=generator) < share
    return torch.randn(batch, length, 3, generator=generator), draw(st.integers(1, 2)), halts


class Replay(NamedTuple):
    """A packed store after a round of halting, and the masked store after the same rounds."""

    tokens: PackedTokensCPU | PackedTokensCUDA
    rows: torch.Tensor
    masked: MaskedTokens

    @property
    def token(self) -> torch.Tensor:
        return torch.as_tensor(self.tokens.token)

    @property
    def image(self) -> torch.Tensor:
        """[T], the image of each row."""
        return self.token // self.masked.live.shape[1]


def replay(store, x, num_prefix, rounds, early_exit=False) -> list[Replay]:
    """Run the rounds on a packed and on a masked store; the first entry is before any halting."""
    masked, _ = MaskedTokens.pack(x, num_prefix)
    tokens, rows = store.pack(x, num_prefix)
    history = [Replay(tokens, rows, masked)]
    for halts in rounds:
        tokens, (rows,) = tokens.drop(halts.flatten()[history[-1].token], rows, early_exit=early_exit)
        masked, _ = masked.drop(halts, x)
        if early_exit:
            masked = MaskedTokens(masked.live & masked.live[:, :num_prefix].any(dim=1, keepdim=True), num_prefix)
        history.append(Replay(tokens, rows, masked))
    return history


@STORES
@given(halting_rounds(), st.booleans())
def test_drop_keeps_the_rows_of_live_tokens(store, case, early_exit):
    x = case[0]
    for state in replay(store, *case, early_exit):
        live = state.masked.live.flatten().nonzero().squeeze(1)
        assert torch.equal(state.token.sort().values, live)
        assert torch.equal(state.rows, x.flatten(0, 1)[state.token])


@STORES
@given(halting_rounds(), st.booleans())
def test_rows_stay_grouped_by_image_in_token_order(store, case, early_exit):
    for state in replay(store, *case, early_exit):
        images, counts = state.image.unique_consecutive(return_counts=True)
        assert len(images.unique()) == len(images), "the rows of an image stand together"
        assert all((part.diff() > 0).all() for part in state.token.split(counts.tolist())), "in the order of its tokens"


@given(halting_rounds(), st.booleans())
def test_cpu_store_sorts_images_by_length(case, early_exit):
    for state in replay(PackedTokensCPU, *case, early_exit):
        counts = state.image.unique_consecutive(return_counts=True)[1].tolist()
        assert state.tokens.seqlens == counts == sorted(counts)


@given(halting_rounds(), st.booleans())
def test_cuda_store_keeps_the_order_of_images(case, early_exit):
    batch = len(case[0])
    for state in replay(PackedTokensCUDA, *case, early_exit):
        assert state.image.tolist() == sorted(state.image.tolist())
        assert state.tokens.cu_seqlens.diff().tolist() == state.image.bincount(minlength=batch).tolist()


@STORES
@given(halting_rounds(), st.booleans())
def test_expand_to_tokens_gives_each_row_its_image_value(store, case, early_exit):
    for state in replay(store, *case, early_exit):
        assert torch.equal(state.tokens.expand_to_tokens(torch.arange(len(case[0]))), state.image)


@STORES
@given(halting_rounds(), st.booleans())
def test_prefix_equals_masked_store_for_live_tokens(store, case, early_exit):
    x, num_prefix, _ = case
    for state in replay(store, *case, early_exit):
        live = state.masked.live[:, :num_prefix]
        assert torch.equal(state.tokens.prefix(state.rows)[live], state.masked.prefix(x)[live])


@STORES
@given(halting_rounds(), st.booleans())
def test_scatter_add_equals_masked_store(store, case, early_exit):
    x = case[0]
    for state in replay(store, *case, early_exit):
        total = state.tokens.scatter_add(torch.zeros(x.shape[0] * x.shape[1], 3), state.rows)
        assert torch.equal(total.view_as(x), state.masked.scatter_add(torch.zeros_like(x), x))


@STORES
@given(halting_rounds(), st.booleans())
def test_to_dense_equals_masked_store(store, case, early_exit):
    batch, length = case[0].shape[:2]
    history = replay(store, *case, early_exit)
    values = torch.arange(len(history) * batch * length).view(-1, batch, length) + 1.0
    packed = [of_block.flatten()[state.token] for of_block, state in zip(values, history)]
    (found,) = store.to_dense([state.tokens for state in history], torch.cat(packed))
    (expected,) = MaskedTokens.to_dense([state.masked for state in history], values.flatten(0, 1))
    assert torch.equal(found, expected)


@STORES
def test_prefix_of_no_rows_is_zero_with_a_gradient(store):
    tokens, rows = store.pack(torch.randn(2, 3, 4, requires_grad=True), 1)
    tokens, (rows,) = tokens.drop(torch.ones(6, dtype=torch.bool), rows)
    out = tokens.prefix(rows)
    assert out.shape == (2, 1, 4)
    assert not out.any()
    assert out.requires_grad


# Attention within images --------------------------------------------------------------------------


def attend_each_image(q, k, v, seqlens):
    """Compute attention image by image, with one call for each."""
    parts = zip(*(x.split(seqlens, dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)


def varlen(q, k, v, seqlens):
    cu_seqlens = torch.tensor([0, *np.cumsum(seqlens)], dtype=torch.int32)
    return varlen_attention(q, k, v, cu_seqlens, max_seqlen=50)  # any upper bound gives the same


SEQLENS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(sorted)


@pytest.mark.parametrize("attention", [ragged_attention, padded_attention, varlen])
@given(SEQLENS, st.sampled_from([1, 4]), st.sampled_from([5, 12, 16]))  # CUDA kernels need multiples of 8
def test_attention_stays_within_images(attention, seqlens, heads, width):
    qkv = torch.randn(1, sum(seqlens), 3, heads, width, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # strided as in timm's attention
    out, expected = attention(q, k, v, seqlens), attend_each_image(q, k, v, seqlens)
    weights = torch.randn_like(out)
    grad, expected_grad = (torch.autograd.grad((o * weights).sum(), qkv, retain_graph=True)[0] for o in (out, expected))
    assert_close(out, expected)
    assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    if attention is not varlen or width % 8 == 0:
        assert out.transpose(1, 2).is_contiguous(), "the next layer would have to copy it"


@pytest.mark.parametrize(
    ("seqlens", "num_padded"), [(range(9, 19), 1), (range(9, 59), 2), (range(40, 66), 0), ([17] * 9, 0)]
)
def test_many_calls_for_short_sequences_are_padded_into_few(monkeypatch, seqlens, num_padded):
    """Not sequences of more than 64 rows, and not images of equal length, which one call attends to."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    groups, attend = [], attention._attend_in_group
    monkeypatch.setattr(attention, "_attend_in_group", lambda *args: groups.append(args) or attend(*args))
    q, k, v = torch.randn(3, 1, 3, sum(seqlens), 16)
    assert_close(ragged_attention(q, k, v, list(seqlens)), attend_each_image(q, k, v, list(seqlens)))
    assert len(groups) == num_padded


@pytest.mark.parametrize("poisoned", [slice(0, 1), slice(1, 3), slice(3, 9)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_padding_keeps_extreme_values_within_their_image(value, poisoned):
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    k[:, :, poisoned] = v[:, :, poisoned] = value
    out, expected = padded_attention(q, k, v, [1, 2, 6]), attend_each_image(q, k, v, [1, 2, 6])
    others = torch.ones(9, dtype=torch.bool)
    others[poisoned] = False
    assert_close(out[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlens", [[5], [2, 2], [1, 3, 4]])
def test_varlen_attention_calls_one_kernel_without_copies(dtype, seqlens):
    """Also for one image: dense attention would be planned again for each number of rows. q, k, v stay strided."""
    qkv = torch.randn(1, sum(seqlens), 3, 2, 16).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    emulated_attention.calls.clear()
    out = varlen(q, k, v, seqlens)
    assert out.dtype == dtype
    operator = "efficient" if dtype == torch.float32 else "flash"
    assert emulated_attention.calls == [(operator, dtype, (3 * 2 * 16, 16, 1))]


@pytest.mark.parametrize("has_flash", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_width_not_multiple_of_8_equals_exact_attention(monkeypatch, has_flash, dtype):
    """A model with 180 channels and three heads has heads of width 60."""
    monkeypatch.setattr(attention, "_supports_flash_attention", lambda device: has_flash)
    qkv = torch.randn(3, 1, 2, 6, 60).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    out, expected = varlen(*qkv, [2, 4]), attend_each_image(*exact, [2, 4])
    assert out.dtype == dtype
    assert_close(out, expected.to(dtype), rtol=0.02, atol=0.02)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, weights)
    (expected_grad,) = torch.autograd.grad(expected, exact, weights.double())
    assert_close(grad, expected_grad.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "computed"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_old_gpu_uses_efficient_kernel_in_half_precision(monkeypatch, dtype, computed):
    """Old GPUs have no kernel for bfloat16, so it runs in float32."""
    monkeypatch.setattr(attention, "_supports_flash_attention", lambda device: False)
    q, k, v = torch.randn(3, 1, 2, 6, 16).to(dtype)
    emulated_attention.calls.clear()
    assert varlen(q, k, v, [2, 4]).dtype == dtype
    assert [call[:2] for call in emulated_attention.calls] == [("efficient", computed)]


@STORES
def test_attend_without_rows_calls_no_kernel(store, monkeypatch):
    for name in ("ragged_attention", "varlen_attention"):
        monkeypatch.setattr(stores, name, lambda *args: pytest.fail("a kernel was called"))
    tokens, rows = store.pack(torch.randn(2, 3, 4), 1)
    tokens, _ = tokens.drop(torch.ones(6, dtype=torch.bool), rows)
    q, k, v = torch.zeros(3, 1, 2, 0, 4, requires_grad=True)
    out = tokens.attend(q, k, v)
    assert out.shape == q.shape
    assert all(grad is not None for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_autocast_casts_float32_queries():
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen(q, k, v.bfloat16(), [2, 4])
    assert out.dtype == torch.bfloat16


def test_attention_mask_in_another_function_raises():
    tokens, _ = PackedTokensCPU.pack(torch.randn(1, 3, 4), 1)
    with pytest.raises(TypeError):
        torch.softmax(torch.randn(3, 3) + tokens.attention_mask, dim=-1)


def test_image_without_live_tokens_attends_to_all_tokens():
    tokens, x = MaskedTokens.pack(torch.randn(2, 3, 4), 1)
    tokens, _ = tokens.drop(torch.tensor([[True] * 3, [True, False, False]]), x)
    assert tokens.attention_mask[:, 0, 0].tolist() == [[True] * 3, [False, True, True]]
