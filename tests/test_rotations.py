"""timm's Eva, whose attention rotates queries and keys by the place of their patch."""

import copy
import math

import pytest
import timm
import torch
from conftest import images
from equivalence import CLOSE, assert_same, flops, masked_and_zipped
from eva_models import ROTARY, SIZES, eva, halting_eva
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import AttentionRope, RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import Eva
from torch.testing import assert_close

import zipping
from models_act import AdaptiveEva, adapt, macs_per_image
from training.directions import states_and_attention
from zipping.attention import PerImageAttentionMask
from zipping.rotations import embed_images, rotations_of_blocks

pytestmark = pytest.mark.usefixtures("token_store")
KINDS = ("cat", "mixed", "dinov3", "mrope")


@st.composite
def block_options(draw) -> dict:
    options = {name: draw(st.booleans()) for name in ("qkv_bias", "qkv_fused", "swiglu_mlp", "scale_mlp")}
    options |= {"scale_attn_inner": draw(st.booleans()), "attn_type": draw(st.sampled_from(["eva", "rope"]))}
    options |= {"use_post_norm": draw(st.booleans()), "init_values": draw(st.sampled_from([None, 0.5]))}
    options["swiglu_align_to"] = draw(st.sampled_from([0, 8])) if options["swiglu_mlp"] else 0
    if options["use_post_norm"]:
        return options
    options |= {name: draw(st.booleans()) for name in ("qk_norm", "attn_only_layer_scale")}
    if options["attn_type"] == "rope" and not options["qkv_fused"]:
        options["num_kv_heads"] = draw(st.sampled_from([None, 1, (3, 1, 1, 3)]))
    return options


@st.composite
def eva_options(draw) -> dict:
    options = {"embed_dim": 24, "num_heads": 3, "class_token": draw(st.booleans())}
    options |= {"num_reg_tokens": draw(st.integers(0, 2)), "no_embed_class": draw(st.booleans())}
    options |= {name: draw(st.booleans()) for name in ("use_abs_pos_emb", "use_rot_pos_emb", "dynamic_img_size")}
    options |= {name: draw(st.booleans()) for name in ("use_pre_transformer_norm", "use_post_transformer_norm")}
    options |= {"use_fc_norm": draw(st.sampled_from([None, True, False]))}
    options["global_pool"] = draw(st.sampled_from(["avg"] + ["token"] * options["class_token"]))
    options |= draw(block_options())
    if options["use_rot_pos_emb"]:
        kind = draw(st.sampled_from(KINDS))
        grouped = options.get("num_kv_heads") is not None
        options["rope_type"] = "cat" if kind == "mixed" and grouped else kind
        options["rope_rotate_half"] = options["rope_type"] != "mixed" and draw(st.booleans())
        options["rope_shift_coords"] = draw(st.sampled_from([None, 0.3]))
        if options["rope_type"] == "mrope":
            options["rope_mrope_section"] = (2, 1, 1)
        else:
            options["rope_grid_indexing"] = draw(st.sampled_from(["ij", "xy"]))
    return options


@settings(max_examples=25)
@given(eva_options(), st.integers(0, 99))
def test_every_combination_of_options(options, seed):
    x = images(4, 16)
    static = eva(options, seed)
    with torch.no_grad():
        for zip_tokens in (False, True):
            never_halting = adapt(static, gate_center=1e9, zip_tokens=zip_tokens)
            assert_close(never_halting(x), static(x), **CLOSE)
        never_halting.set_halting_channel(5)
        found, expected = never_halting(x), static(x)
    assert_close(found, expected, **CLOSE)
    model = halting_eva(options, x, seed)
    halting = assert_same(*masked_and_zipped(model), x, gradients=False)
    assert len(halting.depth.unique()) >= 2
    masked, zipped = masked_and_zipped(model)
    assert_close(zipped.forward_intermediates(x), masked.forward_intermediates(x), **CLOSE)
    with torch.no_grad():
        depth = model(x[:1], return_halting=True)[1].depth
        assert flops(lambda: model(x[:1], return_halting=True)) == 2 * macs_per_image(model, depth).item()
    model = halting_eva(options | {"drop_path_rate": 0.3}, x, seed)
    assert_same(*masked_and_zipped(model.train()), x)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_rotations_equal_those_of_timm_in_any_order(kind):
    """The rows of an image in another order have the same attention as timm's, with the same order of its rows."""
    model = eva(ROTARY | {"rope_type": kind, "attn_type": "rope", "num_reg_tokens": 2})
    x, embedding = embed_images(model, images(1, 16))
    attn, rotation = model.blocks[1].attn, rotations_of_blocks(model, embedding)[1]
    tokens, rows = zipping.pack(x, model.num_prefix_tokens)
    expected = attn(x, rope=embedding[1] if kind == "mixed" else embedding)
    assert_close(attn(rows[None], attn_mask=PerImageAttentionMask(tokens, rotation)), expected, **CLOSE)
    halts = torch.zeros(len(rows), dtype=torch.bool)
    halts[[0, 2, 3, 7]] = True  # two prefix tokens, two patches
    kept, (left,) = tokens.drop(halts, rows)
    mask = torch.where(halts, -math.inf, 0.0).expand(1, 1, 1, -1)
    expected = attn(x, rope=embedding[1] if kind == "mixed" else embedding, attn_mask=mask)
    found = attn(left[None], attn_mask=PerImageAttentionMask(kept, rotation))
    assert_close(found, expected[:, ~halts], **CLOSE)
    assert not torch.allclose(attn(left[None], attn_mask=PerImageAttentionMask(kept)), found, atol=1e-3)


def test_prefix_tokens_are_not_rotated():
    model = eva(ROTARY | {"num_reg_tokens": 2})
    _, embedding = embed_images(model, images(1, 16))
    rotation = rotations_of_blocks(model, embedding)[0]
    x = torch.randn(1, 3, 4, 8)
    assert torch.equal(rotation.rotate(torch.tensor([0, 1, 2, 2]), x)[0], x)
    expected = apply_rot_embed_cat(x, embedding[[0, 0, 5, 15]])
    assert torch.equal(rotation.rotate(torch.tensor([3, 3, 8, 18]), x)[0], expected)


@pytest.mark.parametrize("kind", ["cat", "mixed", "dinov3"])
def test_random_coordinates_are_drawn_once_in_both_modes(kind):
    options = ROTARY | {"rope_type": kind, "rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "global_pool": "token"}
    model = halting_eva(options, images(4, 16)).train()
    assert_same(*masked_and_zipped(model), images(4, 16))
    logits = [model(images(4, 16)) for _ in range(2)]
    assert not torch.equal(*logits)


def test_checkpointed_blocks_give_the_same_gradients():
    options = ROTARY | {"rope_type": "mixed", "attn_type": "rope", "drop_path_rate": 0.3}
    model = halting_eva(options, images(4, 16)).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    assert_same(model, checkpointed, images(4, 16))
    assert model.rope.freqs.grad.abs().max() > 0


@pytest.mark.parametrize("attn_type", ["eva", "rope"])
def test_all_tokens_halted_give_zero_gradients(attn_type):
    """Blocks run on no rows."""
    options = ROTARY | {"rope_type": "mixed", "attn_type": attn_type, "drop_path_rate": 0.3}
    model = adapt(eva(options), gate_center=-1e3).train()
    halting = assert_same(*masked_and_zipped(model), images(4, 16))
    assert halting.depth.unique().tolist() == [1]


def test_low_precision_equals_masked():
    masked, zipped = masked_and_zipped(halting_eva(ROTARY | {"rope_type": "dinov3", "qk_norm": True}, images(4, 16)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (logits, halting), (found, same) = (m(images(4, 16), return_halting=True) for m in (masked, zipped))
    assert_close(found, logits, rtol=0.05, atol=0.05)
    assert_close(same.depth, halting.depth)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_rotations_follow_the_image_size(dynamic):
    model = halting_eva(
        ROTARY | {"rope_type": "dinov3", "use_abs_pos_emb": False, "dynamic_img_size": dynamic}, images(4, 16)
    )
    small = model(images(4, 16))
    x = torch.randn(4, 3, 24, 12)
    if not dynamic:
        model.set_input_size((24, 12))
    halting = assert_same(*masked_and_zipped(model), x, gradients=False)
    assert halting.depth.shape == (4, 19)
    if not dynamic:
        model.set_input_size((16, 16))
    assert torch.equal(model(images(4, 16)), small)


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("with_prefix", [False, True])
@torch.no_grad()
def test_static_intermediates_equal_timm(output_fmt, with_prefix):
    static = eva(ROTARY | {"num_reg_tokens": 1})
    model, options = adapt(static, halting=False), {"return_prefix_tokens": with_prefix, "output_fmt": output_fmt}
    expected, found = (m.forward_intermediates(images(2, 16), [1, 3], **options) for m in (static, model))
    assert_close(found, expected, rtol=0, atol=0)
    result = model.forward_intermediates(images(2, 16), [1, 3], output_dict=True, **options)
    assert_close(result["image_features"], expected[0], rtol=0, atol=0)
    patches, prefix = zip(*expected[1]) if with_prefix else (expected[1], None)
    assert_close(result["image_intermediates"], list(patches), rtol=0, atol=0)
    assert ("image_intermediates_prefix" in result) == with_prefix
    if with_prefix:
        assert_close(result["image_intermediates_prefix"], list(prefix), rtol=0, atol=0)


class OwnEmbedding(RotaryEmbeddingCat):
    """A rotary embedding that may differ between images."""


def test_unsupported_model_raises():
    for options, reason in (
        ({"global_pool": "map"}, "global_pool is 'map'"),
        ({"global_pool": "max"}, "global_pool is 'max'"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate is above 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            adapt(Eva(**SIZES | ROTARY | options))
        with pytest.raises(ValueError, match=reason):
            AdaptiveEva(**SIZES | ROTARY | options)
    model = Eva(**SIZES | ROTARY)
    model.rope.__class__ = OwnEmbedding
    with pytest.raises(ValueError, match="rope is a OwnEmbedding"):
        adapt(model)


class OwnAttention(AttentionRope):
    """Attention that may treat tokens by their order."""


def test_modified_attention_is_masked():
    model = halting_eva(ROTARY | {"attn_type": "rope", "global_pool": "token"}, images(4, 16))
    expected = model(images(4, 16))
    model.blocks[1].attn.__class__ = OwnAttention
    with pytest.warns(UserWarning, match=r"zipping is disabled because blocks.1.attn is a OwnAttention"):
        assert_close(model(images(4, 16)), expected, **CLOSE)


@pytest.mark.parametrize("module", [timm.layers.attention, timm.models.eva], ids=["layers", "models"])
def test_replaced_rotation_is_masked(module, monkeypatch):
    model = halting_eva(ROTARY | {"attn_type": "rope" if module is timm.layers.attention else "eva"}, images(4, 16))
    original = module.apply_rot_embed_cat
    monkeypatch.setattr(module, "apply_rot_embed_cat", lambda x, emb, half=False: original(x, emb * 0.5, half=half))
    masked, zipped = masked_and_zipped(model)
    with pytest.warns(UserWarning, match="zipping is disabled because .*apply_rot_embed_cat was replaced"):
        assert_close(zipped(images(4, 16)), masked(images(4, 16)), **CLOSE)


class LowRank(torch.nn.Module):
    """A linear layer with an addition of low rank, as of LoRA."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.layer = layer
        self.down, self.up = torch.nn.Linear(layer.in_features, 2), torch.nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def test_replaced_linear_layers_are_zipped():
    model = halting_eva(ROTARY | {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True}, images(4, 16))
    for block in model.blocks:
        block.attn.q_proj, block.mlp.fc1_g = LowRank(block.attn.q_proj), LowRank(block.mlp.fc1_g)
    assert_same(*masked_and_zipped(model), images(4, 16))


@pytest.mark.parametrize("kind", ["cat", "mixed", "dinov3"])
@torch.no_grad()
def test_attention_of_the_class_token_is_recorded_with_rotations(kind):
    """A gate by direction is fitted to it."""
    model = adapt(eva(ROTARY | {"rope_type": kind, "num_reg_tokens": 1, "global_pool": "token"}), halting=False)
    states, found = states_and_attention(model, images(3, 16))
    expected = model.forward_intermediates(images(3, 16), intermediates_only=True, output_fmt="NLC")
    assert_close(states, expected, **CLOSE)
    weights = []
    for block in model.blocks:
        block.attn.fused_attn = False  # timm computes the weights, and passes them to its dropout
        block.attn.attn_drop.register_forward_hook(lambda layer, args, out: weights.append(args[0]))
    model(images(3, 16))
    later = torch.stack(weights[2:])[:, :, :, 0, 2:]  # [blocks, B, H, patches]
    assert_close(found, (later / later.sum(dim=-1, keepdim=True)).mean(dim=(0, 2)), **CLOSE)
