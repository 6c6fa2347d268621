"""The stand-in for CUDA graphs, and the emulated attention that the planned mode runs on."""

import pytest
import torch
import triton
import triton.language as tl
from graph_standin import Tape, capture, new_pool, warm_up
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from zipping.attention import varlen_attention
from zipping.planned import kernels


@triton.jit
def _square(x, out, SIZE: tl.constexpr):  # noqa: N803
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + offset)
    tl.store(out + offset, value * value)


def square(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    kernels.launch(_square, 2, x, out, SIZE=2)
    return out


@torch.library.custom_op("standin::square", mutates_args=())
def square_operator(x: torch.Tensor) -> torch.Tensor:
    return square(x)


torch.library.register_autograd(
    "standin::square",
    lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def use_all_kinds(x: torch.Tensor) -> torch.Tensor:
    """Use views, allocations, in-place operations, launches and an operator that launches."""
    rows = x.view(2, 2).t()
    total = rows.new_zeros(2, 2)
    total[0] += rows.softmax(-1)[1]
    total.t().mul_(2)
    return square(x + total.reshape(4)) + square_operator(x)


# Replay ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), min_size=1, max_size=3))
@torch.no_grad()
def test_replay_equals_a_call_with_other_inputs(batches):
    x = torch.ones(4)
    result, replay = capture(lambda: use_all_kinds(x), new_pool())
    for batch in batches:
        x.copy_(torch.tensor(batch))
        replay()
        assert torch.equal(result, use_all_kinds(x))


def test_launch_within_an_operator_is_recorded_once():
    x = torch.ones(4)
    with Tape() as tape:
        square_operator(x)
    assert [name for name, *_ in tape.shapes] == ["square"]
    with Tape() as tape:
        square(x)
    assert [name for name, *_ in tape.shapes] == ["empty_like", "_square"]
    assert len(tape.steps) == 1


def test_shapes_do_not_depend_on_the_numbers():
    shapes = []
    for x in (torch.ones(4), torch.arange(4.0), torch.ones(6)):
        with Tape() as tape:
            (x.softmax(-1) * x).sum()
        shapes.append(tape.shapes)
    assert shapes[0] == shapes[1] != shapes[2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replay_outside_the_mode_of_the_capture(mode):
    x, weight = torch.ones(4), nn.Parameter(torch.full((4,), 3.0))
    with mode():
        result, replay = capture(lambda: (x * weight).mul_(2), new_pool())
    x.fill_(2)
    with torch.no_grad():
        weight.fill_(5)
    replay()
    assert result.tolist() == [20] * 4


def test_backward_pass_captured_apart_equals_autograd():
    """Replays of the first graph change no tensor version that autograd compares."""
    layer, x, grad, pool = nn.Linear(4, 3), torch.randn(2, 4), torch.ones(2, 3), new_pool()
    function = nn.Sequential(layer, nn.GELU(), nn.Linear(3, 3), nn.Sigmoid())
    out, replay_forward = capture(lambda: function(x), pool)
    replay_forward()
    grads, replay_backward = capture(lambda: torch.autograd.grad(out, list(function.parameters()), grad), pool)
    for _ in range(2):
        x.normal_()
        grad.normal_()
        replay_forward()
        replay_backward()
        expected = torch.autograd.grad(function(x), list(function.parameters()), grad)
        assert_close(grads, expected, rtol=0, atol=0)


def test_tape_keeps_no_gradient_graph():
    class Ticket:
        alive = 0

        def __init__(self):
            Ticket.alive += 1

        def __del__(self):
            Ticket.alive -= 1

    x = torch.ones(4, requires_grad=True)

    def function():
        out = x * 2
        out.grad_fn.metadata["ticket"] = Ticket()
        return out.sum()

    result, replay = capture(function, new_pool())
    assert Ticket.alive == 1
    result = result.detach()
    assert Ticket.alive == 0
    replay()
    assert result == 8


def test_compiled_function_is_recorded():
    x = torch.ones(4)
    function = torch.compile(lambda x: (x + 1).sin(), backend="aot_eager")
    warm_up(lambda: function(x))
    result, replay = capture(lambda: function(x), new_pool())
    x.fill_(2)
    replay()
    assert_close(result, torch.full((4,), 3.0).sin())


# What a capture leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_nan_before_the_first_replay(dtype):
    x = torch.ones(4, dtype=dtype)
    (product, count, inner), _ = capture(lambda: (x * 2, (x > 0).sum(), torch.empty_like(x).copy_(x)), new_pool())
    assert product.isnan().all()
    assert inner.isnan().all()
    assert count == -1


def test_memory_that_existed_is_unchanged_until_replay():
    x, written, launched, counts = torch.ones(4), torch.zeros(6), torch.zeros(4), torch.zeros(1, dtype=torch.int64)

    def function() -> None:
        written[1:5].add_(x)
        kernels.launch(_square, 2, x, launched, SIZE=2)
        counts.copy_((x > 0).sum())

    _, replay = capture(function, new_pool())
    assert not written.any()
    assert not launched.any()
    assert counts.item() == 0
    for number in (1, 2):
        replay()
        assert written.tolist() == [0, *[number] * 4, 0]
    assert launched.tolist() == [1] * 4
    assert counts.item() == 4


def test_failed_capture_leaves_memory_as_it_was():
    written, state = torch.zeros(4), torch.get_rng_state()

    def function() -> None:
        written.add_(torch.rand(4))
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        capture(function, new_pool())
    assert not written.any()
    assert torch.equal(torch.get_rng_state(), state)
    assert written.tolist() == [0] * 4  # tolist works again


def test_later_capture_of_a_pool_reads_valid_numbers():
    """A store of NaN and -1 has no valid indices; a capture on CUDA does not look at them."""
    rows, order, pool = torch.arange(4.0), torch.tensor([3, 2, 1, 0]), new_pool()
    index, first = capture(lambda: order + 0, pool)
    result, second = capture(lambda: rows[index].mul_(index.add_(1)), pool)
    assert index.tolist() == [-1] * 4
    assert result.isnan().all()
    first()
    second()
    assert result.tolist() == [12, 6, 2, 0]
    assert index.tolist() == [4, 3, 2, 1]


def test_capture_between_replays_keeps_what_was_replayed():
    x, pool = torch.ones(4), new_pool()
    result, replay = capture(lambda: x * 2, pool)
    x.fill_(3)
    replay()
    capture(lambda: result * 2, pool)
    assert result.tolist() == [6] * 4


def test_tape_without_a_replay_function_is_freed():
    pool = new_pool()
    _, replay = capture(lambda: torch.ones(3), pool)
    assert pool[0]() is not None
    del replay
    assert pool[0]() is None


# Random numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [lambda x: nn.functional.dropout(x, 0.5), lambda x: x.new_empty(8).bernoulli_(0.5)])
def test_replay_draws_what_a_call_draws_and_a_capture_draws_nothing(draw):
    x = torch.ones(8)
    torch.manual_seed(0)
    result, replay = capture(lambda: draw(x), new_pool())
    found = []
    for _ in range(4):
        replay()
        found.append(result.clone())
    torch.manual_seed(0)
    assert torch.equal(torch.stack(found), torch.stack([draw(x) for _ in range(4)]))
    assert len(torch.stack(found).unique(dim=0)) > 1


# Reads on the host -------------------------------------------------------------------------------------------

READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 1],
    "masked assignment": lambda x: x.index_put_((x > 1,), torch.ones(2)),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor(4).expand(4)),
    "list": lambda x: x + torch.tensor([1, 2, 3, 4]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_read_on_the_host_is_refused(read):
    with pytest.raises(AssertionError, match="numbers"):
        capture(lambda: read(torch.arange(4.0)), new_pool())


def test_operations_without_a_read_are_recorded():
    x, lengths = torch.arange(4.0), torch.tensor([1, 0, 2, 1])

    def function() -> torch.Tensor:
        y = x[lengths] + torch.where(x > 1, 0.0, x) * torch.tensor(2.0)
        y[y > 2] = 0
        return y.repeat_interleave(lengths, output_size=4)

    result, replay = capture(function, new_pool())
    replay()
    assert torch.equal(result, function())


# Emulated attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_leaves_rows_outside_the_sequences_unwritten(dtype):
    qkv = torch.randn(3, 1, 2, 8, 16).to(dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    out = varlen_attention(*qkv, cu_seqlens, 3)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    for rows in (out[0], *grad[:, 0]):
        assert rows[:, :5].isfinite().all()
        assert rows[:, 5:].isnan().all()


def test_attention_refuses_a_sequence_longer_than_max_seqlen():
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    with pytest.raises(AssertionError):
        varlen_attention(q, k, v, torch.tensor([0, 2, 8], dtype=torch.int32), 5)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_attention_has_the_shapes_of_cuda(name, needs_grad):
    """torch's meta functions describe CUDA's operators; torch.compile relies on them."""
    q, k, v = torch.randn(3, 1, 40, 2, 16)
    cu_seqlens = torch.tensor([0, 3, 40], dtype=torch.int32)
    seqlens = (cu_seqlens, cu_seqlens, 37, 37)
    if name == "flash":
        operator, arguments = torch.ops.aten._flash_attention_forward, (*seqlens, 0.0, False, False)
        q, k, v = (x[0].half() for x in (q, k, v))
    else:
        operator, arguments = torch.ops.aten._efficient_attention_forward, (None, *seqlens, 0.0, 0, needs_grad)
    found = operator(q, k, v, *arguments, scale=0.25)
    described = operator(*(x.to("meta") for x in (q, k, v)), *arguments, scale=0.25)
    for one, other in zip(found, described, strict=True):
        if isinstance(one, torch.Tensor):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        else:
            assert one == other
