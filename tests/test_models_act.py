"""The adaptive models: the definition of halting, and zipped against masked mode."""

import copy
from unittest.mock import patch

import pytest
import timm
import torch
from conftest import assert_halting, halting_model, images, with_directions
from equivalence import CLOSE, assert_same, flops, masked_and_zipped
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import zipping
from models_act import (
    halting_step,
)

pytestmark = pytest.mark.usefixtures("token_store")
BOTH_MODES = pytest.mark.parametrize("zip_tokens", [False, True], ids=["masked", "zipped"])
AVERAGED = {"global_pool": "avg", "class_token": False}
MANY_CASES = {"rtol": 1e-4, "atol": 5e-5}  # in some, float32 in masked mode is off by 2e-5


# The definition -----------------------------------------------------------------------------------


def reference_forward(model, x):
    """Compute the definition in the paper token by token and image by image, with timm's blocks."""
    model.eval()
    outputs, depths, costs = [], [], []
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(x))):
        live = list(range(len(tokens)))
        state = tokens.clone()
        total = torch.zeros(len(tokens))
        output = torch.zeros_like(tokens)
        depth, cost = torch.zeros(len(tokens)), torch.zeros(len(tokens))
        for number, block in enumerate(model.blocks, start=1):
            if not live:
                break
            state[live] = block(state[live][None])[0]
            for n in list(live):
                h = torch.sigmoid(model.gate_scale * state[n, 0] - model.gate_center)
                if model.gate_directions is not None:
                    *weights, bias = model.gate_directions[number - 1]
                    h = torch.sigmoid(model.gate_scale * (state[n] @ torch.stack(weights) + bias) - model.gate_center)
                    h = h * (n >= model.num_prefix_tokens)
                h = torch.ones(()) if number == len(model.blocks) else h
                if total[n] + h >= 1 - model.halt_eps:
                    remainder = 1 - total[n]
                    output[n] += remainder * state[n]
                    depth[n], cost[n] = number, number + remainder
                    live.remove(n)
                else:
                    output[n] += h * state[n]
                total[n] += h
        outputs.append(model.norm(output))
        depths.append(depth)
        costs.append(cost)
    return model.forward_head(torch.stack(outputs)), torch.stack(depths), torch.stack(costs)


@BOTH_MODES
@pytest.mark.parametrize("options", [{}, AVERAGED], ids=["class token", "mean of the patches"])
@torch.no_grad()
def test_model_equals_definition(zip_tokens, options):
    model = halting_model(zip_tokens=zip_tokens, **options).eval()
    logits, halting = model(images(), return_halting=True)
    assert_halting(halting)
    expected_logits, expected_depth, expected_cost = reference_forward(model, images())
    assert torch.equal(halting.depth, expected_depth)
    assert_close(logits, expected_logits, **CLOSE)
    assert_close(halting.ponder_cost, expected_cost, **CLOSE)


@BOTH_MODES
@pytest.mark.parametrize("options", [{"reg_tokens": 2}, AVERAGED], ids=["class token", "mean of the patches"])
@torch.no_grad()
def test_model_with_directions_equals_definition(zip_tokens, options):
    model = with_directions(halting_model(zip_tokens=zip_tokens, **options).eval())
    logits, halting = model(images(), return_halting=True)
    assert len(halting.depth.unique()) >= 4
    expected_logits, expected_depth, expected_cost = reference_forward(model, images())
    assert torch.equal(halting.depth, expected_depth)
    assert_close(logits, expected_logits, **CLOSE)
    assert_close(halting.ponder_cost, expected_cost, **CLOSE)


@BOTH_MODES
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("prepare", [lambda model: model, with_directions], ids=["channel 0", "directions"])
def test_gate_offset_shifts_center_per_image(zip_tokens, training, prepare):
    model = prepare(halting_model(zip_tokens=zip_tokens).train(training))
    x = images()
    offset = torch.linspace(-3, 3, len(x))
    logits, halting = model(x, return_halting=True, gate_offset=offset)
    assert_close(model(x, gate_offset=offset), logits, **CLOSE)
    center, depths = model.gate_center, set()
    for number, own_offset in enumerate(offset.tolist()):
        model.gate_center = center + own_offset
        own_logits, own_halting = model(x[number, None], return_halting=True)
        assert_close(logits[number, None], own_logits, **CLOSE)
        assert torch.equal(halting.depth[number, None], own_halting.depth)
        depths.add(own_halting.depth.mean().item())
    assert len(depths) == len(x)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12))
def test_halting_probabilities_sum_to_one(channel):
    cumulative, total, live = torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool)
    gate = zipping.Gate.of(scale=1.0, center=0.0, halt_eps=0.01, device=total.device)
    for number, value in enumerate(channel, start=1):
        x = torch.tensor([[value, 0.0]])
        step = halting_step(x, cumulative, gate, is_last_block=number == len(channel))
        total = total + step.probability * live
        live, cumulative = live & ~step.halts, step.cumulative
    assert not live.any()
    assert_close(total, torch.ones(1))


# Zipped equals masked -----------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.floats(1, 8), st.floats(0.1, 4), st.integers(1, 5), st.integers(0, 100), st.booleans())
def test_zipped_equals_masked_for_any_depths(mean, spread, batch, seed, has_directions):
    model = halting_model(mean, spread).train()
    masked, zipped = masked_and_zipped(with_directions(model) if has_directions else model)
    x = images(batch, seed=seed)
    assume(distance_from_threshold(masked, x) > 1e-4)  # so that rounding flips no decision
    halting = assert_same(masked, zipped, x, tolerance=MANY_CASES)
    assume(halting.depth.min() < 8)


@settings(max_examples=10)
@given(st.floats(1, 8), st.floats(0.1, 4), st.integers(1, 5), st.integers(0, 100))
def test_zipped_equals_masked_in_float64(mean, spread, batch, seed):
    """Scores stay float32. CPU store only: CUDA has no float64 kernel."""
    masked, zipped = masked_and_zipped(halting_model(mean, spread).train().double())
    x = images(batch, seed=seed).double()
    assume(distance_from_threshold(masked, x) > 1e-4)
    with patch("zipping.uses_device_form", return_value=False):
        assert_same(masked, zipped, x, tolerance={"rtol": 2e-6, "atol": 2e-6})


@torch.no_grad()
def distance_from_threshold(model, x):
    """Return the smallest distance of a live token's cumulative score from the halting threshold."""
    _, states = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    depth = model(x, return_halting=True)[1].depth
    states = torch.stack([torch.cat([prefix, patches], dim=1) for patches, prefix in states])  # [L, B, N, C]
    values = states[..., 0]
    if model.gate_directions is not None:
        weights, bias = model.gate_directions[:, None, None].split([model.embed_dim, 1], dim=-1)
        values = (states * weights).sum(-1) + bias[..., 0]
        values[:, :, : model.num_prefix_tokens] = -torch.inf
    scores = torch.sigmoid(model.gate_scale * values - model.gate_center)
    live = depth >= torch.arange(1, len(states) + 1)[:, None, None]
    distance = (scores.cumsum(0) - (1 - model.halt_eps)).abs()
    return distance[:-1][live[:-1]].min()


# Directions ---------------------------------------------------------------------------------------


DIRECTED = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "distilled": {"distilled": True},
    "mean of the patches": {"global_pool": "avg"},
    "no prefix tokens": AVERAGED,
    "stochastic depth": {"drop_path_rate": 0.5},
}


@pytest.mark.parametrize("options", DIRECTED.values(), ids=DIRECTED)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_zipped_equals_masked_with_directions(options, training):
    model = with_directions(halting_model(**options).train(training))
    if "distilled" in options:
        model.set_distilled_training(True)
    halting = assert_same(*masked_and_zipped(model), images())
    prefix, patches = halting.depth.split([model.num_prefix_tokens, 16], dim=1)
    assert len(patches.unique()) >= 4
    assert (prefix == 8).all()


@BOTH_MODES
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"distilled": True}, {"global_pool": "avg"}], ids=str)
@torch.no_grad()
def test_prefix_tokens_never_halt_with_directions(zip_tokens, options):
    """Neither where every patch halts in block 1, nor at an early exit. Their output is their last state."""
    model = with_directions(halting_model(zip_tokens=zip_tokens, **options).eval())
    model.gate_center = -1e9
    logits, halting = model(images(), return_halting=True)
    assert (halting.depth[:, : model.num_prefix_tokens] == 8).all()
    assert (halting.depth[:, model.num_prefix_tokens :] == 1).all()
    assert_close(model(images()), logits, **CLOSE)
    states = model.forward_intermediates(images(), [7], return_prefix_tokens=True, intermediates_only=True, norm=True)
    features = model.forward_features(images())
    assert_close(features[:, : model.num_prefix_tokens], states[0][1], **CLOSE)


@BOTH_MODES
@torch.no_grad()
def test_logits_with_directions_that_halt_nothing_equal_static_model(zip_tokens, token_store):
    """Bit for bit, because every score is 0. Only CUDA's attention within images rounds in its own way."""
    model = with_directions(halting_model(zip_tokens=zip_tokens).eval())
    model.gate_center = 1e9
    logits, halting = model(images(), return_halting=True)
    assert halting.depth.unique().tolist() == [8]
    model.halting = False
    is_exact = not zip_tokens or token_store == "CPU"
    assert_close(model(images()), logits, **({"rtol": 0, "atol": 0} if is_exact else CLOSE))


@BOTH_MODES
def test_scores_of_directions_have_no_gradient(zip_tokens):
    model = with_directions(halting_model(zip_tokens=zip_tokens).train())
    logits, halting = model(images(), return_halting=True)
    assert not halting.ponder_cost.requires_grad
    assert not halting.layer_scores.requires_grad
    model.set_gate_directions(None)
    assert model(images(), return_halting=True)[1].ponder_cost.requires_grad
    assert logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_leaves_product_with_directions_in_float32(dtype):
    x = torch.randn(3, 24)
    gate = zipping.Gate.of(1.0, 0.0, 0.01, x.device)._replace(direction=torch.randn(25))
    with torch.autocast("cpu", dtype):
        found = gate.logit(x)
    assert torch.equal(found, gate.logit(x))


OPTIONS = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "distilled": {"distilled": True},
    "layer scale": {"init_values": 0.5},
    "qk norm": {"qk_norm": True},
    "attention and mlp norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "no embedding of the class token": {"no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "any image size": {"dynamic_img_size": True},
    "norm after pooling": {"fc_norm": True},
    "mean of the patches": {"global_pool": "avg"},
    "mean of the patches, norm before": {"global_pool": "avg", "fc_norm": False},
    "mean of all tokens": {"global_pool": "avg", "pool_include_prefix": True},
    "no class token": {"global_pool": "avg", "class_token": False},
    "no class token, but registers": {"global_pool": "avg", "class_token": False, "reg_tokens": 2},
    "no final norm": {"final_norm": False},
    "stochastic depth": {"drop_path_rate": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_zipped_equals_masked_for_timm_options(options, training):
    model = halting_model(**options).train(training)
    if "distilled" in options:
        model.set_distilled_training(True)
    halting = assert_same(*masked_and_zipped(model), images())
    assert len(halting.depth.unique()) >= 4
    if "drop_path_rate" not in options or not training:
        assert_halting(halting)


def test_zipped_equals_masked_with_dynamic_img_size():
    model = halting_model(dynamic_img_size=True)
    halting = assert_same(*masked_and_zipped(model), torch.randn(3, 3, 24, 16))
    assert halting.depth.shape == (3, 1 + 6 * 4)
    assert len(halting.depth.unique()) >= 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_other_precisions_and_empty_batch(dtype):
    masked, zipped = masked_and_zipped(halting_model().eval().to(dtype))
    close = {"rtol": 0.02, "atol": 0.02} if dtype != torch.float64 else {}
    assert_close(zipped(images().to(dtype)), masked(images().to(dtype)), **close)
    logits, halting = zipped(images(0).to(dtype), return_halting=True)
    assert (logits.dtype, logits.shape, halting.depth.shape) == (dtype, (0, 7), (0, 17))


@pytest.mark.parametrize(("mean", "depth"), [(30, 8), (-10, 1)], ids=["no token halts", "all halt in block 1"])
def test_zipped_equals_masked_if_all_depths_are_equal(mean, depth):
    halting = assert_same(*masked_and_zipped(halting_model(mean, 0.1)), images())
    assert halting.depth.unique().tolist() == [depth]


@pytest.mark.parametrize("shift", [4.0, -4.0], ids=["class token first", "class token last"])
def test_zipped_equals_masked_if_class_token_halts_first_or_last(shift):
    model = halting_model(5.0, 1.0)
    with torch.no_grad():
        model.cls_token[..., 0] += shift * 6 / model.gate_scale
    halting = assert_same(*masked_and_zipped(model), images())
    class_token, patches = halting.depth[:, 0], halting.depth[:, 1:]
    assert (class_token < patches.amin(1) if shift > 0 else class_token > patches.amax(1)).any()


@pytest.mark.parametrize("training", [False, True])
def test_zipped_equals_masked_with_padded_attention(monkeypatch, training):
    """A small network with several threads pads images of different length into one call. CPU store only."""
    monkeypatch.setattr(zipping, "uses_device_form", lambda x: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = halting_model(img_size=28, drop_path_rate=0.1).train(training)
    with patch.object(zipping.attention, "padded_attention", wraps=zipping.padded_attention) as padded:
        assert_same(*masked_and_zipped(model), images(16, 28))
    assert padded.called


@pytest.mark.parametrize(
    ("zip_tokens", "checkpointed_zip_tokens"),
    [(False, False), (True, True), (False, True)],
    ids=["both masked", "both zipped", "masked, zipped with checkpointing"],
)
def test_gradient_checkpointing_keeps_gradients(zip_tokens, checkpointed_zip_tokens):
    model = halting_model(drop_path_rate=0.2).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing(True)
    model.zip_tokens = zip_tokens
    checkpointed.zip_tokens = checkpointed_zip_tokens
    assert_same(model, checkpointed, images())


@pytest.mark.parametrize(("training", "drop_path_rate"), [(True, 0.0), (True, 0.5), (False, 0.5)])
@torch.no_grad()
def test_zipped_equals_masked_under_bf16_autocast(training, drop_path_rate):
    results = []
    for model in masked_and_zipped(halting_model(drop_path_rate=drop_path_rate).train(training)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            logits, halting = model(images(), return_halting=True)
        results.append((logits.float(), halting, torch.get_rng_state()))
    (logits, halting, state), (zipped_logits, zipped_halting, zipped_state) = results
    assert torch.equal(state, zipped_state)
    assert halting.ponder_cost.dtype == halting.layer_scores.dtype == torch.float32
    if not (training and drop_path_rate):
        assert_halting(halting)
        assert (halting.depth == zipped_halting.depth).float().mean() > 0.97
        assert_close(zipped_logits, logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fused", [True, False])
def test_image_without_live_tokens_has_finite_gradients(fused):
    timm.layers.set_fused_attn(fused)
    try:
        model = halting_model(mean=3.0, spread=0.5, zip_tokens=False).train()
    finally:
        timm.layers.set_fused_attn(True)
    logits, halting = model(images(), return_halting=True)
    assert halting.depth.amax(dim=1).max() < 8, "all images must finish early"
    (logits.sum() + halting.ponder_cost.sum() + halting.layer_scores.sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_unreached_block_gets_zero_gradients(training):
    model = halting_model(mean=3.0, spread=0.5).train(training)
    logits, halting = model(images(), return_halting=True)
    assert halting.depth.max() < 8
    logits.sum().backward()
    for name, parameter in model.blocks[-1].named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@torch.no_grad()
def test_early_exit_keeps_logits_and_saves_flops():
    """It saves FLOPs only if only logits are requested."""
    early = halting_model().eval()
    late = halting_model(early_exit=False).eval()
    halting = late(images(), return_halting=True)[1]
    assert_halting(halting)
    assert (halting.depth[:, 0] < halting.depth[:, 1:].amax(dim=1)).any(), "no image can leave early"
    assert_close(early(images()), late(images()), **CLOSE)
    assert flops(lambda: early(images())) < flops(lambda: late(images()))
    for ask in (lambda model: model(images(), return_halting=True), lambda model: model.forward_features(images())):
        assert flops(lambda ask=ask: ask(early)) == flops(lambda ask=ask: ask(late))
