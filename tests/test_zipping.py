import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from zipping import MaskedTokens, ZippedTokens, _jagged_attention, ragged_attention

settings.register_profile("quick", deadline=None, max_examples=40)
settings.load_profile("quick")


@st.composite
def departures(draw):
    """A dense batch and, for a few rounds, which of its tokens leave: [rounds, B, N] bool."""
    batch, length, rounds = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    share, seed = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    leaving = torch.rand(rounds, batch, length, generator=generator) < share
    return torch.randn(batch, length, 3, generator=generator), leaving


@given(departures())
def test_both_stores_keep_the_same_tokens(case):
    x, rounds = case
    masked, dense = MaskedTokens.pack(x)
    zipped, rows = ZippedTokens.pack(x)
    for leaving in rounds:
        masked, _ = masked.drop(leaving, dense)
        on_rows = torch.empty(len(rows), dtype=torch.bool)
        on_rows[zipped.row[zipped.live]] = leaving[zipped.live]
        zipped, (rows,) = zipped.drop(on_rows, rows)
        assert torch.equal(zipped.live, masked.live)
        assert torch.equal(rows[zipped.row[zipped.live]], x[masked.live])
        assert torch.equal(zipped.image[zipped.row[zipped.live]], masked.live.nonzero()[:, 0])
        assert zipped.lengths == sorted(masked.live.sum(dim=1).tolist())
        assert zipped.ends.tolist() == torch.tensor(zipped.lengths).cumsum(0).tolist()
        runs = zipped.image.unique_consecutive(return_counts=True)[1].tolist()
        assert runs == [length for length in zipped.lengths if length]  # image by image
        for first in (None, 1):
            assert torch.equal(zipped.unpack(rows, first), masked.unpack(dense, first))
        assert torch.equal(
            zipped.unpack(zipped.spread(torch.arange(len(x)) + 1.0)),
            masked.live * (torch.arange(len(x)) + 1.0)[:, None],
        )


def each_image_alone(q, k, v, lengths):
    parts = zip(*(t.split(lengths) for t in (q, k, v)))
    return torch.cat(
        [F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in qkv)).transpose(0, 1) for qkv in parts]
    )


def assert_attention(attention, lengths, heads, width):
    """Values and gradients are those of each image alone."""
    lengths = sorted(lengths)
    q, k, v = (torch.randn(sum(lengths), heads, width, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, lengths, torch.tensor(lengths).cumsum(0))
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    if not len(out):
        return
    expected = each_image_alone(q, k, v, [length for length in lengths if length])
    assert_close(out, expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected_grads):
        assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(LENGTHS, st.sampled_from([1, 4]), st.sampled_from([4, 16]))
def test_attention_stays_within_images(lengths, heads, width):
    assert_attention(ragged_attention, lengths, heads, width)


@pytest.mark.parametrize("lengths", [[3, 5, 5, 9], [0, 0, 4, 1], [7]])
def test_attention_on_jagged_nested_tensors(lengths):
    """What CUDA gets, on the CPU."""
    assert_attention(_jagged_attention, lengths, 2, 8)


def test_no_rows_call_no_kernel(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: pytest.fail("a kernel was called"))
    q = torch.zeros(0, 2, 4, requires_grad=True)
    ragged_attention(q, q, q, [0, 0], torch.zeros(2)).sum().backward()
    assert q.grad is not None


def test_unpacking_no_rows_is_zero_with_a_gradient():
    tokens, rows = ZippedTokens.pack(torch.randn(2, 3, 4, requires_grad=True))
    tokens, (rows,) = tokens.drop(torch.ones(6, dtype=torch.bool), rows)
    out = tokens.unpack(rows)
    assert out.shape == (2, 3, 4)
    assert not out.any()
    assert out.requires_grad


def test_an_image_without_live_tokens_attends_to_all():
    tokens, x = MaskedTokens.pack(torch.randn(2, 3, 4))
    tokens, _ = tokens.drop(torch.tensor([[True] * 3, [True, False, False]]), x)
    assert tokens.attention_mask()[:, 0, 0].tolist() == [[True] * 3, [False, True, True]]


def test_drop_waits_for_the_device_once(monkeypatch):
    """The lengths are read back once per drop; nothing else in it needs a value on the host."""
    waits = []
    for name in ("tolist", "item", "nonzero", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, o=original, n=name, **k: waits.append(n) or o(self, *a, **k)
        )
    tokens, rows = ZippedTokens.pack(torch.randn(2, 3, 4))
    tokens.drop(torch.tensor([True, False, True, False, False, False]), rows)
    assert waits == ["tolist"]
