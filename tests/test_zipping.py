import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from zipping import MaskedTokens, ZippedTokens, _jagged_attention, ragged_attention


@st.composite
def rounds_of_staying(draw):
    """A dense batch and, for a few rounds, which of its tokens stay: [rounds, B, N] bool."""
    batch, length, rounds = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    share, seed = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    keep_mask = torch.rand(rounds, batch, length, generator=generator) >= share
    return torch.randn(batch, length, 3, generator=generator), keep_mask


@given(rounds_of_staying())
def test_both_stores_keep_the_same_tokens(case):
    x, rounds = case
    masked, dense = MaskedTokens.pack(x)
    zipped, rows = ZippedTokens.pack(x)
    for keep_mask in rounds:
        masked, _ = masked.keep(keep_mask, dense)
        on_rows = torch.empty(len(rows), dtype=torch.bool)
        on_rows[zipped.row[zipped.live]] = keep_mask[zipped.live]
        zipped, (rows,) = zipped.keep(on_rows, rows)
        assert torch.equal(zipped.live, masked.live)
        assert torch.equal(rows[zipped.row[zipped.live]], x[masked.live])
        assert torch.equal(zipped.image[zipped.row[zipped.live]], masked.live.nonzero()[:, 0])
        assert zipped.lengths == sorted(masked.live.sum(dim=1).tolist())
        assert [masked.live[image].sum() for image in zipped.images] == zipped.lengths
        runs = zipped.image.unique_consecutive(return_counts=True)[1].tolist()
        assert runs == [length for length in zipped.lengths if length]  # image by image
        for first in (None, 1):
            assert torch.equal(zipped.unpack(rows, first=first)[0], masked.unpack(dense, first=first)[0])
        per_image = torch.arange(len(x)) + 1.0
        assert torch.equal(zipped.unpack(zipped.spread(per_image))[0], masked.live * per_image[:, None])


def each_image_alone(qkv, lengths):
    parts = (part.permute(1, 2, 0, 3).unbind() for part in qkv.split(lengths))
    return torch.cat([F.scaled_dot_product_attention(q, k, v).transpose(0, 1) for q, k, v in parts])


def assert_attention(attention, lengths, heads, width):
    """Values and gradients are those of each image alone."""
    lengths = sorted(lengths)
    qkv = torch.randn(sum(lengths), 3, heads, width, requires_grad=True)
    out = attention(qkv, lengths)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weights).sum(), qkv)
    if len(out):
        expected = each_image_alone(qkv, [length for length in lengths if length])
        (expected_grad,) = torch.autograd.grad((expected * weights).sum(), qkv)
        assert_close(out, expected)
        assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(LENGTHS, st.sampled_from([1, 4]), st.sampled_from([4, 16]))
def test_attention_stays_within_images(lengths, heads, width):
    assert_attention(ragged_attention, lengths, heads, width)


@pytest.mark.parametrize("lengths", [[3, 5, 5, 9], [0, 0, 4, 1], [7]])
def test_attention_on_jagged_nested_tensors(lengths):
    """What CUDA gets, on the CPU, where only the plain kernel can serve."""
    with sdpa_kernel(SDPBackend.MATH):
        assert_attention(_jagged_attention, lengths, 2, 8)


def test_no_rows_call_no_kernel(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: pytest.fail("a kernel was called"))
    qkv = torch.zeros(0, 3, 2, 4, requires_grad=True)
    assert ragged_attention(qkv, [0, 0]).shape == (0, 2, 4)
    ragged_attention(qkv, [0, 0]).sum().backward()
    assert qkv.grad is not None


def test_unpacking_no_rows_is_zero_with_a_gradient():
    tokens, rows = ZippedTokens.pack(torch.randn(2, 3, 4, requires_grad=True))
    tokens, (rows,) = tokens.keep(torch.zeros(6, dtype=torch.bool), rows)
    (out,) = tokens.unpack(rows)
    assert out.shape == (2, 3, 4)
    assert not out.any()
    assert out.requires_grad


def test_an_image_without_live_tokens_attends_to_all():
    tokens, x = MaskedTokens.pack(torch.randn(2, 3, 4))
    tokens, _ = tokens.keep(torch.tensor([[False] * 3, [False, True, True]]), x)
    assert tokens.attention_mask()[:, 0, 0].tolist() == [[True] * 3, [False, True, True]]
