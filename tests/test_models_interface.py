"""The interfaces of the adaptive models: timm's methods, adapt(), MACs, registration."""

import copy
import re

import pytest
import timm
import torch
from conftest import assert_halting, halting_model, images, not_plain, with_directions
from equivalence import CLOSE, CLOSE_FLOAT64, assert_same, flops, masked_and_zipped
from eva_models import ROTARY, eva
from timm.layers import GluMlp, SwiGLU
from timm.models import get_pretrained_cfg
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import models_act
import zipping
from benchmarks.synthetic import set_synthetic_depths
from models_act import (
    AdaptiveVisionTransformer,
    AdaptiveVisionTransformerDistilled,
    adapt,
    macs_per_image,
)

pytestmark = pytest.mark.usefixtures("token_store")
BOTH_MODES = pytest.mark.parametrize("zip_tokens", [False, True], ids=["masked", "zipped"])
REGISTERED = timm.list_models("avit*")
FAMILY = {"embed_dim": 24, "num_heads": 3, "depth": 8, "img_size": 64}
AVERAGED = {"global_pool": "avg", "class_token": False}


# timm's interface ---------------------------------------------------------------------------------


@BOTH_MODES
@torch.no_grad()
def test_intermediates_keep_last_state_of_halted_tokens(zip_tokens):
    model = halting_model(zip_tokens=zip_tokens).eval()
    halting = model(images(), return_halting=True)[1]
    assert_halting(halting)
    (final, intermediates), same_halting = model.forward_intermediates(
        images(), output_fmt="NLC", return_prefix_tokens=True, return_halting=True
    )
    assert torch.equal(same_halting.depth, halting.depth)
    assert_close(final, model.forward_features(images()), **CLOSE)
    states = torch.stack([torch.cat([prefix, patches], dim=1) for patches, prefix in intermediates])
    assert len(states) == 8
    last = states.gather(0, (halting.depth.long() - 1)[None, ..., None].expand_as(states[:1]))[0]  # x_depth
    for block, (state, previous) in enumerate(zip(states[1:], states), start=2):
        is_live = halting.depth >= block
        assert torch.equal(state[~is_live], last[~is_live])
        assert ((state - previous).abs().sum(dim=2) > 0).equal(is_live)
    maps = model.forward_intermediates(images(), indices=[2, 5], intermediates_only=True, stop_early=True)
    assert [m.shape for m in maps] == [(6, 24, 4, 4)] * 2
    assert_close(maps[1].flatten(2).transpose(1, 2), intermediates[5][0])
    result = model.forward_intermediates(images(), indices=1, norm=True, output_dict=True, return_prefix_tokens=True)
    assert result.keys() == {"image_intermediates", "image_intermediates_prefix", "image_features"}


@torch.no_grad()
def test_intermediates_after_all_tokens_halted_equal_masked():
    masked, zipped = masked_and_zipped(halting_model(mean=2, spread=0.5).eval())
    maps, halting = zipped.forward_intermediates(images(), [3, 7], intermediates_only=True, return_halting=True)
    assert halting.depth.max() < 8
    assert_close(maps, masked.forward_intermediates(images(), [3, 7], intermediates_only=True), **CLOSE)
    assert_close(maps[1], masked.forward_intermediates(images(), [6], intermediates_only=True)[0], **CLOSE)


@torch.no_grad()
def test_intermediates_without_prefix_tokens_have_timm_shapes():
    options = {"return_prefix_tokens": True, "intermediates_only": True}
    static, model = (halting_model(halting=halting, **AVERAGED).eval() for halting in (False, True))
    expected, found = (m.forward_intermediates(images(), **options) for m in (static, model))
    assert [m.shape for m in found] == [m.shape for m in expected]
    assert static.forward_intermediates(images(), return_halting=True)[1].depth.unique().tolist() == [8]


@torch.no_grad()
def test_pruned_model_limits_depth():
    full, pruned = halting_model().eval(), halting_model().eval()
    pruned.prune_intermediate_layers([3])
    expected, halting = (model(images(), return_halting=True)[1] for model in (full, pruned))
    assert torch.equal(halting.depth, expected.depth.clamp(max=4))
    assert (halting.ponder_cost >= halting.depth).all()


def test_pruned_model_keeps_intermediates():
    model = halting_model().eval()
    full = model.forward_intermediates(images(), indices=[3], intermediates_only=True)
    model.prune_intermediate_layers([3])
    assert len(model.blocks) == 4
    assert_close(model.forward_intermediates(images(), indices=[3], intermediates_only=True), full)


@torch.no_grad()
def test_intermediates_of_static_model_equal_timm():
    model = halting_model(halting=False).eval()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    (state,) = model.forward_intermediates(images(), indices=[1], output_fmt="NLC", intermediates_only=True)
    assert_close(state, model.blocks[1](model.blocks[0](x))[:, 1:])


FAMILIES = [
    {},
    {"distilled": True},
    {"init_values": 0.5, "no_embed_class": True},
    {"reg_tokens": 2, "qk_norm": True},
    {"mlp_layer": SwiGLU, "fc_norm": True, "global_pool": "token"},
    {"mlp_layer": GluMlp, "scale_mlp_norm": True, "scale_attn_norm": True, "class_token": True},
    {"global_pool": "avg", "class_token": False},
]


@pytest.mark.parametrize("options", FAMILIES, ids=str)
@torch.no_grad()
def test_set_halting_channel_keeps_static_outputs(options):
    model = halting_model(halting=False, **options).eval()
    expected, weights = model(images()), copy.deepcopy(model.state_dict())
    model.set_halting_channel(5)
    assert_close(model(images()), expected, **CLOSE)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert {"pos_embed", "blocks.3.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "head.weight"} <= moved
    (moved_tokens, _), (tokens, _) = (m._embed(images()) for m in (model, halting_model(**options)))
    assert_close(moved_tokens[..., 0], tokens[..., 5])
    model.set_halting_channel(5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_set_halting_channel_keeps_what_directions_read():
    model = with_directions(halting_model().eval())
    logits, halting = model(images(), return_halting=True)
    model.set_halting_channel(5)
    found, found_halting = model(images(), return_halting=True)
    assert torch.equal(found_halting.depth, halting.depth)
    assert_close(found, logits, **CLOSE)


class WithAdapter(models_act.AdaptiveVisionTransformer):
    """A backbone with a layer of its own that reads and writes channels of the tokens."""

    def __init__(self, **options):
        super().__init__(**options)
        self.adapter = torch.nn.Linear(self.embed_dim, self.embed_dim)

    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return x + self.adapter(x)


class WithOwnCode(models_act.AdaptiveVisionTransformer):
    """A backbone whose code singles out a channel."""

    def _pos_embed(self, x):
        return super()._pos_embed(x) * torch.linspace(0.5, 2, x.shape[-1])


def use_prune(model):
    prune.l1_unstructured(model.blocks[2].mlp.fc1, "weight", 0.3)


def use_weight_norm(model):
    weight_norm(model.blocks[2].attn.qkv)


def use_quantized_layer(model):
    block = model.blocks[2]
    block.attn = torch.ao.quantization.quantize_dynamic(block.attn, {torch.nn.Linear})


def use_bias_of_another_name(model):
    model.blocks[1].mlp.fc2.scale = torch.nn.Parameter(torch.ones(24))


SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
UNKNOWN_CHANNELS = {
    "layer of a subclass": (WithAdapter, lambda model: None, "the channels of adapter.weight are not known"),
    "code of a subclass": (WithOwnCode, lambda model: None, "WithOwnCode treats channels differently"),
    "code of a headless subclass": (WithOwnCode, lambda model: model.reset_classifier(0), "WithOwnCode treats"),
    "pruned": (models_act.AdaptiveVisionTransformer, use_prune, "fc1.weight_orig are not known"),
    "weight norm": (models_act.AdaptiveVisionTransformer, use_weight_norm, "qkv.parametrizations.weight.original0"),
    "quantized": (models_act.AdaptiveVisionTransformer, use_quantized_layer, "blocks.2.attn.qkv is a Linear"),
    "parameter": (models_act.AdaptiveVisionTransformer, use_bias_of_another_name, "fc2.scale are not known"),
}


@pytest.mark.parametrize(("make", "change", "reason"), UNKNOWN_CHANNELS.values(), ids=UNKNOWN_CHANNELS)
def test_set_halting_channel_of_unknown_layers_raises(make, change, reason):
    """A swap in some of the layers would change the logits."""
    model = make(**SIZES).eval()
    change(model)
    weights = copy.deepcopy(list(model.parameters()))
    assert not model.can_swap_channels
    with pytest.raises(ValueError, match=f"the halting channel must be 0, got 5: .*{re.escape(reason)}"):
        model.set_halting_channel(5)
    model.set_halting_channel(0)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), weights))


@torch.no_grad()
def test_set_halting_channel_of_a_subclass_keeps_logits():
    class Reversed(models_act.AdaptiveVisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x.flip(1))

    model, state = Reversed(**SIZES, halting=False).eval(), torch.get_rng_state()
    expected = model(images())
    model.set_halting_channel(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(model(images()), expected, **CLOSE)


@torch.no_grad()
def test_static_model_equals_timm():
    model = halting_model(halting=False).eval()
    static = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=8, num_heads=3, num_classes=7)
    static.load_state_dict(model.state_dict(), strict=True)
    logits, halting = model(images(), return_halting=True)
    assert torch.equal(logits, static.eval()(images()))
    assert torch.equal(model(images()), logits)
    assert halting.depth.unique().tolist() == [8]
    assert halting.ponder_cost.unique().tolist() == [9]


def test_former_names_are_aliases():
    assert models_act.AdaptiveTokens.halt_by is models_act.AdaptiveTokens.set_halting_channel
    assert zipping.HostTokens is zipping.PackedTokensCPU
    assert zipping.DeviceTokens is zipping.PackedTokensCUDA


def test_distilled_training_returns_two_logits():
    model = halting_model(distilled=True).train()
    assert model(images()).shape == (6, 7)
    model.set_distilled_training(True)
    (logits, logits_dist), halting = model(images(), return_halting=True)
    assert logits.shape == logits_dist.shape == (6, 7)
    assert halting.depth.shape == (6, 18)
    assert model.eval()(images()).shape == (6, 7)


def test_forward_stores_nothing_on_the_model():
    model = halting_model()
    before = set(vars(model)) | {name for name, _ in model.named_buffers()}
    model(images(), return_halting=True)
    assert set(vars(model)) | {name for name, _ in model.named_buffers()} == before


@torch.no_grad()
def test_nan_image_does_not_affect_other_images():
    x = images()
    expected = halting_model().eval()(x)
    x[0] = float("nan")
    assert_close(halting_model().eval()(x)[1:], expected[1:])


class OtherMlp(timm.layers.Mlp):
    pass


UNSUPPORTED = [
    (
        AdaptiveVisionTransformer,
        {"block_fn": timm.models.vision_transformer.ResPostBlock},
        "blocks.0 is a ResPostBlock",
    ),
    (AdaptiveVisionTransformer, {"attn_layer": "diff"}, "blocks.0.attn is a DiffAttention"),
    (AdaptiveVisionTransformer, {"mlp_layer": OtherMlp}, "blocks.0.mlp is a OtherMlp"),
    (AdaptiveVisionTransformer, {"patch_drop_rate": 0.1}, "patch_drop_rate"),
    (AdaptiveVisionTransformer, {"global_pool": "map"}, "global_pool is 'map'"),
    (AdaptiveVisionTransformer, {"global_pool": "max"}, "global_pool is 'max'"),
    (AdaptiveVisionTransformerDistilled, {"reg_tokens": 2}, "reg_tokens"),
    (AdaptiveVisionTransformerDistilled, {"no_embed_class": True}, "no_embed_class"),
]


@pytest.mark.parametrize(("make", "option", "reason"), UNSUPPORTED)
def test_unsupported_option_raises(make, option, reason):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2}
    with pytest.raises(ValueError, match=re.escape(reason)):
        make(**sizes, **option)
    static = make.__bases__[1](**sizes, **option)
    with pytest.raises(ValueError, match=re.escape(reason)):
        adapt(static)


# adapt() ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapt_keeps_weights_modes_and_the_given_model():
    torch.manual_seed(0)
    given = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=8, num_heads=3, num_classes=7)
    given.train().blocks[2].eval()
    model = adapt(given, gate_scale=3.0, halting=False)
    assert type(given) is timm.models.VisionTransformer
    assert type(model) is AdaptiveVisionTransformer
    assert (model.gate_scale, model.gate_center, model.halting) == (3.0, 30.0, False)
    assert [m.training for m in model.modules()] == [m.training for m in given.modules()]
    assert torch.equal(model(images()), given(images()))
    model.halting = True
    model.gate_center = 1e9
    assert_close(model(images()), given(images()), **CLOSE)
    model.head.weight.add_(1)
    assert not torch.equal(model.head.weight, given.head.weight)


def test_adapt_with_unsupported_model_or_option_raises():
    with pytest.raises(
        ValueError, match="expected a timm VisionTransformer, VisionTransformerDistilled or Eva, got ResNet"
    ):
        adapt(timm.create_model("resnet10t", device="meta"))
    with pytest.raises(TypeError, match="takes gate_scale"):
        adapt(timm.create_model("vit_tiny_patch16_224", device="meta"), gate=3)
    with pytest.raises(ValueError, match="got AdaptiveVisionTransformer"):
        adapt(halting_model())


@torch.no_grad()
def test_adapt_with_directions():
    """They move with the model, and the state dict keeps timm's names."""
    given = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=8, num_heads=3, num_classes=7)
    directions = torch.randn(8, 25, dtype=torch.float64)
    model = adapt(given, gate_directions=directions, gate_center=0.0).eval()
    assert model.state_dict().keys() == given.state_dict().keys()
    assert torch.equal(model.gate_directions, directions.float())
    assert copy.deepcopy(model).to("meta").gate_directions.is_meta
    with_class = AdaptiveVisionTransformer(**SIZES | {"depth": 8}, gate_directions=directions, gate_center=0.0).eval()
    with_class.load_state_dict(model.state_dict(), strict=True)
    (logits, halting), (found, found_halting) = (m(images(), return_halting=True) for m in (model, with_class))
    assert torch.equal(found, logits)
    assert torch.equal(found_halting.depth, halting.depth)
    assert len(halting.depth.unique()) > 1


@pytest.mark.parametrize(
    ("directions", "reason"),
    [
        (torch.zeros(8, 24), r"got \[8, 24\]"),
        (torch.zeros(25), r"got \[25\]"),
        ([[0.0] * 25] * 8, "got list"),
        (torch.full((8, 25), torch.nan), "got 200 numbers that are not finite"),
        (torch.zeros(8, 25, dtype=torch.int64), "got a tensor that is not dense or not of real numbers"),
        *((tensor, "got a tensor that is not dense or not of real numbers") for tensor in not_plain((8, 25))),
    ],
)
def test_directions_of_another_shape_or_not_finite_raise(directions, reason):
    model = with_directions(halting_model())
    before = model.gate_directions
    with pytest.raises(ValueError, match=rf"finite numbers of shape \[8, 25\] \(blocks, channels \+ 1\), {reason}"):
        model.set_gate_directions(directions)
    assert model.gate_directions is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zip_tokens", [True, False], ids=["zipped", "masked"])
@torch.no_grad()
def test_model_with_directions_can_be_cast(dtype, zip_tokens):
    model, x = with_directions(halting_model(zip_tokens=zip_tokens)).eval(), images(3)
    expected, halting = model(x, return_halting=True)
    logits, cast = model.to(dtype)(x.to(dtype), return_halting=True)
    assert logits.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(logits, expected.double(), atol=1e-4, rtol=1e-4)
    assert (cast.depth - halting.depth).abs().mean() < 0.5


# MACs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])
@torch.no_grad()
def test_macs_equal_half_the_counted_flops(distilled):
    model = halting_model(distilled=distilled).eval()
    for x in images(3).split(1):
        depth = model(x, return_halting=True)[1].depth
        macs = macs_per_image(model, depth).item()
        assert flops(lambda x=x: model(x, return_halting=True)) == 2 * macs
    model.halting = False
    assert flops(lambda: model(images(1))) == 2 * macs_per_image(model, torch.full_like(depth, 8)).item()


@pytest.mark.parametrize("gate", [(10.0, 30.0), (4.0, 16.0), (5.0, 50.0)])
@pytest.mark.parametrize(
    "options", [{}, {"distilled": True}, {"init_values": 1e-5, "no_embed_class": True}, {"pre_norm": True}, AVERAGED]
)
@torch.no_grad()
def test_synthetic_depths_have_mean_and_spread(gate, options):
    scale, center = gate
    model = halting_model(7, 2, depth=12, img_size=32, gate_scale=scale, gate_center=center, **options).eval()
    depth = model(images(16, size=32), return_halting=True)[1].depth
    assert abs(depth.mean() - 7) < 0.7
    assert abs(depth.std() - 2) < 0.7
    for token in range(model.num_prefix_tokens):
        assert len(depth[:, token].unique()) >= 2, "prefix tokens must halt differently from image to image"


@pytest.mark.parametrize("options", [{"use_abs_pos_emb": False}, {"scale_attn_inner": True}], ids=str)
@torch.no_grad()
def test_synthetic_depths_of_rotary_models_have_mean_and_spread(options):
    model = adapt(eva(ROTARY | {"depth": 12, "img_size": 32, "rope_type": "dinov3"} | options))
    set_synthetic_depths(model, 7, 2)
    depth = model(images(16, size=32), return_halting=True)[1].depth[:, 1:]
    assert abs(depth.mean() - 7) < 0.7
    assert abs(depth.std() - 2) < 0.7


def test_synthetic_depths_of_unsupported_blocks_raise():
    with pytest.raises(ValueError, match="the blocks normalize what they add"):
        set_synthetic_depths(adapt(eva(ROTARY | {"use_post_norm": True})), 5, 1)
    with pytest.raises(ValueError, match="the projections have no bias"):
        set_synthetic_depths(AdaptiveVisionTransformer(embed_dim=24, num_heads=3, proj_bias=False), 5, 1)


# Registration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERED)
def test_timm_weights_load_strictly(name):
    model = timm.create_model(name, device="meta")
    source = get_pretrained_cfg(name).hf_hub_id
    if source:
        base = timm.create_model(source.removeprefix("timm/").split(".")[0], device="meta")
        model.load_state_dict(base.state_dict(), strict=True)
    assert (model.gate_scale, model.gate_center, model.halt_eps) == (10.0, 30.0, 0.01)
    assert model.halting
    assert model.zip_tokens
    assert model.early_exit


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_model_zipped_equals_masked(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, gate_scale=4.0, gate_center=12.0, **FAMILY).train()
    set_synthetic_depths(model, 4.5, 1.5)
    masked, zipped = masked_and_zipped(model)
    assert_halting(assert_same(masked.double(), zipped.double(), images(size=64), tolerance=CLOSE_FLOAT64))


@pytest.mark.parametrize("name", [n for n in REGISTERED if get_pretrained_cfg(n).hf_hub_id])
def test_pretrained_configuration_equals_its_source(name):
    own = get_pretrained_cfg(name)
    assert own.hf_hub_id.startswith("timm/")
    assert own.architecture == name
    source = get_pretrained_cfg(own.hf_hub_id.removeprefix("timm/"), allow_unregistered=False)
    keys = ("url", "mean", "std", "interpolation", "input_size", "num_classes", "first_conv", "classifier")
    for key in keys:
        assert getattr(own, key) == getattr(source, key), key
    assert own.crop_pct == 224 / 256  # as in the original A-ViT
    assert own.hf_hub_id == f"timm/{source.architecture}.{source.tag}"


def _unreachable(*args, **kwargs):
    raise OSError("unreachable")


def test_pretrained_falls_back_from_hub_to_original_url(monkeypatch):
    weights = timm.create_model("deit_tiny_patch16_224").state_dict()
    urls = []

    def download(url, **_):
        urls.append(url)
        return {"model": dict(weights)}

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", _unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", download)
    model = timm.create_model("avit_tiny_patch16_224", pretrained=True, num_classes=5)
    assert urls == ["https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth"]
    assert torch.equal(model.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    assert model.head.out_features == 5


def test_unreachable_pretrained_weights_raise(monkeypatch):
    for loader in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{loader}", _unreachable)
    with pytest.raises(RuntimeError, match="--pretrained-path"):
        timm.create_model("avit_tiny_patch16_224", pretrained=True)
