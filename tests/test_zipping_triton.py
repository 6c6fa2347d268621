"""The Triton kernels, interpreted on the CPU, compute the same as PyTorch ops."""

import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, halting_model, images, with_directions
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import models_act
import zipping
from models_act import halting_step
from zipping import Gate, PackedTokensCUDA, drop_halted

kernels = pytest.importorskip("zipping.kernels", reason="Triton is installed with CUDA builds of torch on Linux")

GATE = Gate.of(scale=1.5, center=0.5, halt_eps=0.01, device=torch.device("cpu"))


@st.composite
def live_tokens(draw):
    """Draw a CUDA store in which some tokens have halted, its rows, their cumulative scores and a gate."""
    batch, length, width = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    num_prefix = draw(st.integers(1, min(3, length)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens, rows = PackedTokensCUDA.pack(torch.randn(batch, length, width, generator=generator).to(dtype), num_prefix)
    share = draw(st.sampled_from([0.0, 0.2, 0.9]))
    tokens, (rows,) = tokens.drop(torch.rand(len(rows), generator=generator) < share, rows)
    assume(len(rows) > 0)
    before = torch.rand(len(rows), generator=generator)
    direction = torch.randn(width + 1, generator=generator) / width**0.5 if draw(st.booleans()) else None
    gate = GATE._replace(direction=direction)
    # keep cumulative scores away from the limit, so that rounding flips no decision
    score = torch.sigmoid(gate.for_rows(tokens, None).logit(rows))
    assume(not ((before + score - GATE.limit).abs() < 1e-5).any())
    return tokens, rows, before, gate


def halt_by_ops(tokens, rows, cumulative, gate, is_last_block, early_exit):
    """Compute what `PackedTokensCUDA.halt` computes, without kernels."""
    step = halting_step(rows, cumulative, gate.for_rows(tokens, None), is_last_block)
    return drop_halted(
        tokens, rows, step.score, step.cumulative, step.halts, is_last_block, early_exit, with_prefix=True
    )


def outputs_and_gradients(halt, tokens, rows, cumulative, gate, is_last_block, early_exit):
    """Return the outputs of one halting step and the gradients of its inputs, by name."""
    rows, cumulative = rows.clone().requires_grad_(), cumulative.clone().requires_grad_()
    output = halt(tokens, rows, cumulative, gate, is_last_block, early_exit)
    is_live = torch.isin(tokens.prefix_token, tokens.token).view(tokens.size[0], -1, 1)
    values = {"score": output.score, "prefix": output.prefix * is_live}
    if not is_last_block:
        values |= {"rows": output.rows, "cumulative": output.cumulative}
    torch.manual_seed(0)
    loss = sum((value * torch.randn_like(value)).sum().float() for value in values.values())
    grad_rows, grad_cumulative = torch.autograd.grad(loss, (rows, cumulative), allow_unused=True)
    values |= {"halts": output.halts, "token": output.tokens.token, "cu_seqlens": output.tokens.cu_seqlens}
    is_cumulative_read = not is_last_block and gate.direction is None  # those of a direction are constants
    return values, {"rows": grad_rows} | ({"cumulative": grad_cumulative} if is_cumulative_read else {})


@settings(max_examples=60)
@given(live_tokens(), st.booleans(), st.booleans())
def test_kernels_compute_the_same_as_ops(case, is_last_block, early_exit):
    values, gradients = outputs_and_gradients(PackedTokensCUDA.halt, *case, is_last_block, early_exit)
    expected, expected_gradients = outputs_and_gradients(halt_by_ops, *case, is_last_block, early_exit)
    assert_close(values, expected)
    half = {"rtol": 0.02, "atol": 0.02}  # sums of gradients are rounded differently
    assert_close(gradients, expected_gradients, **({} if case[1].dtype == torch.float32 else half))


def test_nan_score_halts_no_token():
    tokens, rows = PackedTokensCUDA.pack(torch.full((1, 3, 4), torch.nan), 1)
    halted = PackedTokensCUDA.halt(tokens, rows, torch.zeros(3), GATE, is_last_block=False, early_exit=True)
    assert not halted.halts.any()
    assert len(halted.rows) == 3


def test_rows_are_not_copied_if_no_token_halts():
    tokens, rows = PackedTokensCUDA.pack(torch.full((2, 3, 4), -9.0), 1)
    halted = PackedTokensCUDA.halt(tokens, rows, torch.zeros(6), GATE, is_last_block=False, early_exit=False)
    assert halted.rows.data_ptr() == rows.data_ptr()


# The model ----------------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch):
    """Run models as on CUDA, with Triton kernels; returns the calls of `halt`, one per block."""
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
    "directions": {"has_directions": True},
    "directions, registers": {"has_directions": True, "reg_tokens": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_model_equals_masked_mode(kernel_calls, options, training):
    found, expected = [], []
    for zip_tokens, results in ((True, found), (False, expected)):
        sizes = {name: value for name, value in options.items() if name != "has_directions"}
        model = halting_model(**sizes, zip_tokens=zip_tokens).train(training)
        model = with_directions(model) if "has_directions" in options else model
        torch.manual_seed(1)  # for stochastic depth
        logits, halting = model(images(), return_halting=True)
        loss = logits.square().mean() + halting.ponder_cost.mean() + halting.layer_scores.square().sum()
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        results += [logits, *halting, *gradients]
    assert len(kernel_calls) == (1 if options.get("mean") == -5.0 else model.num_blocks)
    assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_scores_of_a_direction_have_no_gradient():
    tokens, rows = PackedTokensCUDA.pack(torch.randn(2, 5, 3), 1)
    gate = GATE._replace(direction=torch.randn(4))
    halted = PackedTokensCUDA.halt(tokens, rows.requires_grad_(), torch.zeros(10), gate, False, False)
    assert [x.requires_grad for x in (halted.score, halted.cumulative, halted.rows)] == [False, False, True]


@pytest.mark.parametrize("prepare", [lambda model: model, with_directions], ids=["channel 0", "directions"])
@torch.inference_mode()
def test_early_exit_keeps_logits(kernel_calls, prepare):
    model = prepare(halting_model().eval())
    logits = model(images(5))
    assert all(call["early_exit"] for call in kernel_calls)
    model.zip_tokens = False
    assert_close(logits, model(images(5)), rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_under_autocast(kernel_calls):
    model = halting_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, halting = model(images(), return_halting=True)
    assert halting.ponder_cost.dtype == torch.float32
    (logits.float().mean() + halting.ponder_cost.mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("prepare", [lambda model: model, with_directions], ids=["channel 0", "directions"])
@torch.inference_mode()
def test_half_precision_model_equals_ops(kernel_calls, prepare):
    model = prepare(halting_model().eval().bfloat16())
    logits, halting = model(images().bfloat16(), return_halting=True)
    assert (logits.dtype, halting.depth.dtype) == (torch.bfloat16, torch.float32)
    with patch.object(models_act, "uses_kernels", lambda x: False):
        expected, expected_halting = model(images().bfloat16(), return_halting=True)
    assert_close([logits, *halting], [expected, *expected_halting])


def test_strided_rows_equal_ops():
    x = torch.randn(1, 8, 6).transpose(1, 2)
    tokens, rows = PackedTokensCUDA.pack(x, 1)
    assert not rows.is_contiguous()
    found = PackedTokensCUDA.halt(tokens, rows, torch.zeros(6), GATE, is_last_block=False, early_exit=False)
    expected = halt_by_ops(tokens, rows, torch.zeros(6), GATE, is_last_block=False, early_exit=False)
    assert_close([found.rows, found.prefix], [expected.rows, expected.prefix])


def test_gradient_of_scores_only_equals_ops():
    """The other outputs are not used, so their gradients are None."""
    tokens, rows = PackedTokensCUDA.pack(torch.randn(2, 5, 3), 1)
    found = []
    for halt in (PackedTokensCUDA.halt, halt_by_ops):
        leaf = rows.clone().requires_grad_()
        output = halt(tokens, leaf, torch.zeros(10), GATE, is_last_block=False, early_exit=False)
        found += torch.autograd.grad(output.score.square().sum(), leaf)
    assert_close(*found)


def test_unsupported_calls_do_not_use_kernels(kernel_calls):
    """The mean field of all tokens, states after each block, and one gate per image need PyTorch ops."""
    model = halting_model()
    model.forward_features(images())
    model.forward_intermediates(images())
    model(images(), gate_offset=torch.zeros(len(images())))
    assert kernel_calls == []


# Whether they run ---------------------------------------------------------------------------------


def test_kernels_are_not_used_on_cpu():
    assert not zipping.uses_kernels(torch.zeros(1))


@pytest.mark.parametrize("reason", ["no C compiler", "No module named 'triton'"])
def test_missing_triton_warns_once(reason):
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
def test_trial_run_includes_every_kernel(monkeypatch, kernel):
    zipping._kernels_run.cache_clear()
    with torch.inference_mode():
        assert zipping._kernels_run(torch.device("cpu"))  # interpreted
    zipping._kernels_run.cache_clear()
    monkeypatch.setattr(kernels, kernel, None)
    with pytest.warns(UserWarning, match="do not run here"):
        assert not zipping._kernels_run(torch.device("cpu"))
    zipping._kernels_run.cache_clear()


def test_out_of_memory_in_trial_run_raises():
    zipping._kernels_run.cache_clear()
    with (
        patch.object(PackedTokensCUDA, "halt", side_effect=torch.OutOfMemoryError),
        pytest.raises(torch.OutOfMemoryError),
    ):
        zipping._kernels_run(torch.device("cpu"))
    assert zipping._kernels_run(torch.device("cpu"))
    zipping._kernels_run.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "mode"), [*((c, "dynamic") for c in (75, 80, 90, 100)), (80, "planned"), (90, "planned")]
)
def test_kernels_compile_for_other_gpus(capability, mode):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/tmp"}  # without TRITON_INTERPRET
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py", str(capability), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
