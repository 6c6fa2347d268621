"""The kernels of CUDA, interpreted on the CPU: they do what the operations in their place do."""

import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, halting_model, images
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import models_act
import zipping
from models_act import halting_step
from zipping import Gate, PackedTokensCUDA, drop_halted

kernels = pytest.importorskip("zipping.kernels", reason="torch brings Triton on Linux, with CUDA")

GATE = Gate.of(scale=1.5, center=0.5, halt_eps=0.01, device=torch.device("cpu"))


@st.composite
def live_tokens(draw):
    """A store of CUDA's in which some tokens have left already, its rows, and the sums of their scores."""
    batch, length, width = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    num_prefix = draw(st.integers(1, min(3, length)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens, rows = PackedTokensCUDA.pack(torch.randn(batch, length, width, generator=generator).to(dtype), num_prefix)
    share = draw(st.sampled_from([0.0, 0.2, 0.9]))
    tokens, (rows,) = tokens.drop(torch.rand(len(rows), generator=generator) < share, rows)
    assume(len(rows) > 0)
    before = torch.rand(len(rows), generator=generator)
    # no sum so near to the limit that rounding decides
    score = torch.sigmoid(GATE.minus_center + GATE.scale * rows[:, 0].float())
    assume(not ((before + score - GATE.limit).abs() < 1e-5).any())
    return tokens, rows, before


def halt_by_ops(tokens, rows, cumulative, gate, is_last_block, early_exit):
    """Compute what `PackedTokensCUDA.halt` computes, without kernels."""
    step = halting_step(rows, cumulative, gate, is_last_block)
    return drop_halted(
        tokens, rows, step.score, step.cumulative, step.halts, is_last_block, early_exit, with_prefix=True
    )


def outputs_and_gradients(halt, tokens, rows, cumulative, is_last_block, early_exit):
    """Return the outputs of one halting step and the gradients of its inputs, by name."""
    rows, cumulative = rows.clone().requires_grad_(), cumulative.clone().requires_grad_()
    output = halt(tokens, rows, cumulative, GATE, is_last_block, early_exit)
    is_live = torch.isin(tokens.prefix_token, tokens.token).view(tokens.size[0], -1, 1)
    values = {"score": output.score, "prefix": output.prefix * is_live}
    if not is_last_block:
        values |= {"rows": output.rows, "cumulative": output.cumulative}
    torch.manual_seed(0)
    loss = sum((value * torch.randn_like(value)).sum().float() for value in values.values())
    grad_rows, grad_cumulative = torch.autograd.grad(loss, (rows, cumulative), allow_unused=True)
    values |= {"halts": output.halts, "token": output.tokens.token, "cu_seqlens": output.tokens.cu_seqlens}
    gradients = {"rows": grad_rows} if is_last_block else {"rows": grad_rows, "cumulative": grad_cumulative}
    return values, gradients


@settings(max_examples=60)
@given(live_tokens(), st.booleans(), st.booleans())
def test_kernels_compute_the_same_as_ops(case, is_last_block, early_exit):
    values, gradients = outputs_and_gradients(PackedTokensCUDA.halt, *case, is_last_block, early_exit)
    expected, expected_gradients = outputs_and_gradients(halt_by_ops, *case, is_last_block, early_exit)
    assert_close(values, expected)
    half = {"rtol": 0.02, "atol": 0.02}  # sums of gradients are rounded differently
    assert_close(gradients, expected_gradients, **({} if case[1].dtype == torch.float32 else half))


def test_a_score_that_is_not_a_number_halts_no_token():
    tokens, rows = PackedTokensCUDA.pack(torch.full((1, 3, 4), torch.nan), 1)
    halted = PackedTokensCUDA.halt(tokens, rows, torch.zeros(3), GATE, is_last_block=False, early_exit=True)
    assert not halted.halts.any()
    assert len(halted.rows) == 3


def test_where_no_token_halts_nothing_is_copied():
    tokens, rows = PackedTokensCUDA.pack(torch.full((2, 3, 4), -9.0), 1)
    halted = PackedTokensCUDA.halt(tokens, rows, torch.zeros(6), GATE, is_last_block=False, early_exit=False)
    assert halted.rows.data_ptr() == rows.data_ptr()


# The network -------------------------------------------------------------------------------------


@pytest.fixture
def by_kernels(monkeypatch):
    """What CUDA gets, with a count of the blocks that did halt by kernels."""
    calls = []

    def halt(self, *args, original=PackedTokensCUDA.halt, **kwargs):
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PackedTokensCUDA, "halt", halt)
    monkeypatch.setattr(zipping, "uses_device_form", lambda x: True)
    monkeypatch.setattr(models_act, "uses_kernels", lambda x: True)
    return calls


OPTIONS = {
    "class token": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 2},
    "stochastic depth": {"drop_path_rate": 0.2},
    "every token halts in block 1": {"mean": -5.0},
    "no token halts": {"mean": 30.0, "spread": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_network_is_the_masked_one(by_kernels, options, training):
    found, expected = [], []
    for zip_tokens, results in ((True, found), (False, expected)):
        model = halting_model(**options, zip_tokens=zip_tokens).train(training)
        torch.manual_seed(1)  # of stochastic depth
        logits, halting = model(images(), return_halting=True)
        loss = logits.square().mean() + halting.ponder_cost.mean() + halting.layer_scores.square().sum()
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        results += [logits, *halting, *gradients]
    assert len(by_kernels) == (1 if options.get("mean") == -5.0 else model.num_blocks)
    assert_close(found, expected, rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def test_images_leave_as_a_whole(by_kernels):
    model = halting_model().eval()
    logits = model(images(5))
    assert all(call["early_exit"] for call in by_kernels)
    model.zip_tokens = False
    assert_close(logits, model(images(5)), rtol=1e-4, atol=1e-5)


def test_mixed_precision(by_kernels):
    model = halting_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, halting = model(images(), return_halting=True)
    assert halting.ponder_cost.dtype == torch.float32
    (logits.float().mean() + halting.ponder_cost.mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.inference_mode()
def test_a_network_in_half_precision(by_kernels):
    model = halting_model().eval().bfloat16()
    logits, halting = model(images().bfloat16(), return_halting=True)
    assert (logits.dtype, halting.depth.dtype) == (torch.bfloat16, torch.float32)
    with patch.object(models_act, "uses_kernels", lambda x: False):
        expected, expected_halting = model(images().bfloat16(), return_halting=True)
    assert_close([logits, *halting], [expected, *expected_halting])


def test_rows_need_not_be_contiguous():
    x = torch.randn(1, 8, 6).transpose(1, 2)
    tokens, rows = PackedTokensCUDA.pack(x, 1)
    assert not rows.is_contiguous()
    found = PackedTokensCUDA.halt(tokens, rows, torch.zeros(6), GATE, is_last_block=False, early_exit=False)
    expected = halt_by_ops(tokens, rows, torch.zeros(6), GATE, is_last_block=False, early_exit=False)
    assert_close([found.rows, found.prefix], [expected.rows, expected.prefix])


def test_gradients_that_are_not_asked_for():
    """Of scores alone, where nothing is made of the rows that stay."""
    tokens, rows = PackedTokensCUDA.pack(torch.randn(2, 5, 3), 1)
    found = []
    for halt in (PackedTokensCUDA.halt, halt_by_ops):
        leaf = rows.clone().requires_grad_()
        output = halt(tokens, leaf, torch.zeros(10), GATE, is_last_block=False, early_exit=False)
        found += torch.autograd.grad(output.score.square().sum(), leaf)
    assert_close(*found)


def test_what_the_kernels_cannot_do_runs_in_operations(by_kernels):
    """The mean field of all tokens, states after each block, and gates that differ between images."""
    model = halting_model()
    model.forward_features(images())
    model.forward_intermediates(images())
    model(images(), gate_offset=torch.zeros(len(images())))
    assert by_kernels == []


# Whether they run --------------------------------------------------------------------------------


def test_kernels_are_for_cuda():
    assert not zipping.uses_kernels(torch.zeros(1))


@pytest.mark.parametrize("reason", ["no C compiler", "No module named 'triton'"])
def test_a_machine_without_triton_is_told_once(reason):
    zipping._kernels_run.cache_clear()
    x = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    with patch.object(PackedTokensCUDA, "halt", side_effect=RuntimeError(f"{reason}\nat length")):
        with pytest.warns(UserWarning, match=f"Triton kernels do not run here \\({reason}\\)"):
            assert not zipping.uses_kernels(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not zipping.uses_kernels(x)
    zipping._kernels_run.cache_clear()


@pytest.mark.parametrize("kernel", ["_halting_kernel", "_compact_kernel", "_halting_backward_kernel"])
def test_the_trial_runs_every_kernel(monkeypatch, kernel):
    zipping._kernels_run.cache_clear()
    with torch.inference_mode():
        assert zipping._kernels_run(torch.device("cpu"))  # interpreted
    zipping._kernels_run.cache_clear()
    monkeypatch.setattr(kernels, kernel, None)
    with pytest.warns(UserWarning, match="do not run here"):
        assert not zipping._kernels_run(torch.device("cpu"))
    zipping._kernels_run.cache_clear()


def test_too_little_memory_says_nothing_about_kernels():
    zipping._kernels_run.cache_clear()
    with (
        patch.object(PackedTokensCUDA, "halt", side_effect=torch.OutOfMemoryError),
        pytest.raises(torch.OutOfMemoryError),
    ):
        zipping._kernels_run(torch.device("cpu"))
    assert zipping._kernels_run(torch.device("cpu"))
    zipping._kernels_run.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_they_compile_for_gpus_that_are_not_here(capability):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/tmp"}  # not interpreted
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
