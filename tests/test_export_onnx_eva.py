"""ONNX export of timm's Eva: rotations are a gather and a few products."""

import pytest
import torch
from eva_models import ROTARY, eva, halting_eva
from test_export_onnx import assert_exact, images, session
from torch.testing import assert_close

from deployment.onnx_graph import write_graph
from models_act import adapt

ROPE = ROTARY | {"attn_type": "rope", "global_pool": "token"}
OPTIONS = {
    "per block": {"rope_type": "mixed"},
    "half a head apart": {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False},
    "next to each other": {"rope_type": "dinov3", "num_reg_tokens": 2, "qk_norm": True, "init_values": 0.5},
    "dynamic image size": {"rope_type": "dinov3", "use_abs_pos_emb": False, "dynamic_img_size": True},
    "mean of patches": {"global_pool": "avg", "class_token": False, "swiglu_mlp": True},
    "separate projections": {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True},
    "biases of queries and values": {"attn_type": "eva", "init_values": 0.5, "attn_only_layer_scale": True},
    "separate biases": {"attn_type": "eva", "qkv_fused": False},
    "no biases": {"qkv_bias": False},
    "not rotated": {"attn_type": "eva", "use_rot_pos_emb": False, "use_pre_transformer_norm": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_masked(options):
    model = halting_eva(ROPE | options | {"img_size": (16, 24)}, images(6, 3, 16, 24))
    live = assert_exact(model, images(6, 3, 16, 24))
    assert len(set(live.ravel().tolist())) > 3, "tokens do not halt"


@pytest.mark.parametrize("kind", ["mixed", "cat"])
def test_half_precision_weights_are_close(kind):
    model = adapt(eva(ROPE | {"rope_type": kind}), halting=False)
    x = images(1, 3, 16, 16)
    logits = session(write_graph(model, fp16_weights=True)).run(["logits"], {"images": x.numpy()})[0]
    assert_close(torch.tensor(logits), model(x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["mixed", "cat"])
def test_gate_by_direction_and_static_graph_equal_masked(kind):
    options = ROPE | {"rope_type": kind}
    directions = torch.randn(4, 25, generator=torch.Generator().manual_seed(0))
    model = adapt(eva(options), gate_directions=directions, gate_scale=2.0, gate_center=0.0)
    assert_exact(model, images(4, 3, 16, 16))
    assert_exact(adapt(eva(options), halting=False), images(4, 3, 16, 16))


UNSUPPORTED = {
    "blocks.0 is a EvaBlockPostNorm": {"use_post_norm": True},
    "blocks.0.attn has fewer keys than queries": {"qkv_fused": False, "num_kv_heads": 1},
    "the head reads the mean of normalized tokens": {"global_pool": "avg", "use_post_transformer_norm": True},
    "the image size is dynamic": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_part_raises_with_its_name(reason):
    with pytest.raises(ValueError, match=f"cannot export to ONNX: {reason}"):
        write_graph(adapt(eva(ROPE | UNSUPPORTED[reason])))
