"""The models in timm's interfaces: heads, features, checkpoints, compilation, export."""

import copy
import itertools

import pytest
import timm
import torch
from conftest import assert_halting, halting_model, images
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from torch._dynamo.utils import counters
from torch.testing import assert_close

import models_act
from benchmarks.synthetic import set_synthetic_depths

pytestmark = pytest.mark.usefixtures("token_store")
REGISTERED = timm.list_models("avit*")
SMALL = {"embed_dim": 24, "num_heads": 3, "depth": 8, "img_size": 64, "num_classes": 5}
SMALL |= {"gate_scale": 4.0, "gate_center": 12.0}
BOTH_MODES = pytest.mark.parametrize("zip_tokens", [False, True], ids=["masked", "zipped"])


def small(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **options)
    set_synthetic_depths(model, 4.5, 1.5)
    return model


@BOTH_MODES
@pytest.mark.parametrize("name", REGISTERED)
@torch.no_grad()
def test_forward_head_of_features_equals_forward(name, zip_tokens):
    model = small(name, zip_tokens=zip_tokens).eval()
    x = images(size=64)
    assert_halting(model(x, return_halting=True)[1])
    features = model.forward_features(x)
    assert features.shape == (6, model.patch_embed.num_patches + model.num_prefix_tokens, 24)
    assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (6, model.head_hidden_size)
    model.reset_classifier(0)
    assert_close(model(x), pooled)
    model.reset_classifier(3)
    assert model(x).shape == (6, 3)
    heads = model.get_classifier()
    assert all(head.out_features == 3 for head in (heads if isinstance(heads, tuple) else (heads,)))


@BOTH_MODES
@pytest.mark.parametrize("name", REGISTERED)
@torch.no_grad()
def test_features_only_keeps_last_state_of_halted_tokens(name, zip_tokens):
    full = small(name, zip_tokens=zip_tokens).eval()
    options = {"zip_tokens": zip_tokens, "features_only": True, "out_indices": (1, 3, 5)}
    extractor = timm.create_model(name, **SMALL, **options).eval()
    weights = full.state_dict()
    extractor.model.load_state_dict({key: weights[key] for key in extractor.model.state_dict()})
    assert len(extractor.model.blocks) == 6
    depth = full(images(size=64), return_halting=True)[1].depth[:, full.num_prefix_tokens :]
    maps = extractor(images(size=64))
    assert extractor.feature_info.channels() == [24] * 3
    side = 64 // extractor.feature_info.reduction()[0]
    assert [state.shape for state in maps] == [(6, 24, side, side)] * 3
    for block, (earlier, later) in zip((2, 4), itertools.pairwise(maps)):
        has_changed = (earlier != later).any(dim=1).flatten(1)
        assert torch.equal(has_changed, depth > block)  # halted tokens keep their last state
    assert_close(maps, full.forward_intermediates(images(size=64), indices=[1, 3, 5], intermediates_only=True))


@BOTH_MODES
@torch.no_grad()
def test_get_intermediate_layers_equals_forward_intermediates(zip_tokens):
    model = halting_model(zip_tokens=zip_tokens).eval()
    expected = model.forward_intermediates(images(), indices=[2, 5], output_fmt="NLC", intermediates_only=True)
    assert_close(model.get_intermediate_layers(images(), n=[2, 5]), expected)
    with pytest.raises(ValueError, match="attn_mask"):
        model.get_intermediate_layers(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        model.forward_intermediates(images(), is_causal=True)


def test_reset_classifier_to_unsupported_pooling_raises():
    model = halting_model()
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")
    assert model.head.out_features == 7
    model.reset_classifier(7, "")
    assert model(images()).shape == halting_model(global_pool="")(images()).shape == (6, 17, 7)  # every token


@pytest.mark.parametrize("name", REGISTERED)
def test_layer_decay_groups_parameters_as_timm(name):
    model = small(name)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    first, last = model.blocks[0].attn.qkv.weight, model.blocks[7].attn.qkv.weight
    assert scales[id(first)] == pytest.approx(scales[id(last)] * 0.5**7)
    assert scales[id(model.pos_embed)] < scales[id(first)]
    assert decays[id(first)] == 0.1
    for token in ("pos_embed", "cls_token", "dist_token"):
        if hasattr(model, token):
            assert decays[id(getattr(model, token))] == 0


@BOTH_MODES
@pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])
@torch.no_grad()
def test_set_input_size_resamples_as_timm_does(zip_tokens, distilled):
    model = halting_model(zip_tokens=zip_tokens, distilled=distilled).eval()
    resampled = resample_abs_pos_embed(model.pos_embed, [6, 3], [4, 4], num_prefix_tokens=model.num_prefix_tokens)
    model.set_input_size((24, 12))
    assert_close(model.pos_embed, resampled)
    halting = model(torch.randn(4, 3, 24, 12), return_halting=True)[1]
    assert halting.depth.shape == (4, 18 + model.num_prefix_tokens)
    assert len(halting.depth.unique()) >= 3
    assert model.forward_intermediates(torch.randn(4, 3, 24, 12), intermediates_only=True)[0].shape == (4, 24, 6, 3)


@pytest.mark.parametrize("in_chans", [1, 5])
@torch.no_grad()
def test_zipped_equals_masked_for_other_in_chans(in_chans):
    model = halting_model(in_chans=in_chans).eval()
    masked = copy.deepcopy(model)
    masked.zip_tokens = False
    x = torch.randn(6, in_chans, 16, 16, generator=torch.Generator().manual_seed(0))
    logits, halting = model(x, return_halting=True)
    assert_halting(halting)
    assert_close(masked(x), logits)


@pytest.mark.parametrize("name", REGISTERED)
def test_timm_loads_saved_weights(name, tmp_path):
    model = small(name)
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        other = timm.create_model(name, **SMALL, checkpoint_path=str(tmp_path / file))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        load_checkpoint(other, str(tmp_path / file), strict=True)


def test_pretrained_file_adapts_channels_head_and_size(tmp_path):
    """Load a file as pretrained=True does."""
    source = timm.create_model("deit3_small_patch16_224", depth=2)
    save_file(source.state_dict(), str(tmp_path / "w.safetensors"))
    overlay = {"file": str(tmp_path / "w.safetensors")}
    options = {"depth": 2, "in_chans": 1, "num_classes": 4, "img_size": 64}
    model = timm.create_model("avit3_small_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert torch.equal(model.blocks[1].ls1.gamma, source.blocks[1].ls1.gamma)
    assert_close(model.pos_embed, resample_abs_pos_embed(source.pos_embed, [4, 4], [14, 14], num_prefix_tokens=0))
    assert model.default_cfg["hf_hub_id"] == "timm/deit3_small_patch16_224.fb_in1k"


@pytest.mark.parametrize("token_store", ["host"], indirect=True)  # masked models use none
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_masked_model_is_one_graph_with_same_results(backend):
    model = halting_model(3.0, 1.2, depth=5, zip_tokens=False).train()
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    outcomes = []
    for candidate in (model, compiled):
        logits, halting = candidate(images(), return_halting=True)
        (logits.square().sum() + halting.ponder_cost.sum()).backward()
        outcomes.append((logits, halting.ponder_cost, halting.depth, [p.grad for p in candidate.parameters()]))
    assert_halting(halting, num_blocks=5)
    assert torch.equal(outcomes[0][2], outcomes[1][2])
    assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_zipped_blocks_stay_eager_in_a_compiled_model():
    """Otherwise each number of live tokens would need its own graph."""
    model = halting_model().eval()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    graphs = set()
    for seed in range(4):
        logits, halting = compiled(images(seed=seed), return_halting=True)
        assert torch.equal(halting.depth, model(images(seed=seed), return_halting=True)[1].depth)
        assert_close(logits, model(images(seed=seed)))
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")  # tracing warns about every Python number
@pytest.mark.parametrize("graph", ["export", "trace"])
@torch.no_grad()
def test_exported_and_traced_models_run_on_other_images(graph):
    model = halting_model().eval()
    if graph == "export":
        batch = torch.export.Dim("batch", max=64)
        exported = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: batch}}).module()
    else:
        exported = torch.jit.trace(model, images())
    other = images(batch=9 if graph == "export" else 6, seed=5)
    assert_halting(model(other, return_halting=True)[1])
    assert_close(exported(other), model(other))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_scripting_raises():
    for model in (halting_model(), torch.nn.Sequential(halting_model())):
        with pytest.raises(NotImplementedError, match="TorchScript is not supported"):
            torch.jit.script(model)


@BOTH_MODES
def test_meta_tensors_have_output_shapes(zip_tokens):
    model = timm.create_model("avit_small_patch16_224", device="meta", zip_tokens=zip_tokens)
    logits, halting = model(torch.randn(2, 3, 224, 224, device="meta"), return_halting=True)
    assert (logits.shape, halting.depth.shape) == ((2, 1000), (2, 197))


def test_custom_backbone_with_mixin_is_adaptive():
    class Reversed(timm.models.VisionTransformer):
        """A custom backbone that reverses the order of the patches."""

        def _pos_embed(self, x):
            return super()._pos_embed(x.flip(1))

    class AdaptiveReversed(models_act.AdaptiveTokens, Reversed):
        pass

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 8, "num_heads": 3}
    model = AdaptiveReversed(**sizes, gate_scale=4.0, gate_center=12.0).eval()
    set_synthetic_depths(model, 4.5, 1.5)
    with torch.no_grad():
        logits, halting = model(images(), return_halting=True)
        model.zip_tokens = False
        assert_halting(halting)
        assert_close(model(images()), logits)
        static = Reversed(**sizes).eval()
        static.load_state_dict(model.state_dict(), strict=True)
        model.halting = False
        assert torch.equal(model(images()), static(images()))


@pytest.mark.parametrize("name", ["avit_micro_patch4_32", "avit_tiny_distilled_patch16_224"])
def test_model_runs_in_timm_scripts(name, tmp_path):
    """Make the calls of timm's train.py and validate.py, with their arguments."""
    unset = dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
    flags = {"pretrained": False, "in_chans": 3, "drop_rate": 0.0, "scriptable": False, "checkpoint_path": ""}
    model = timm.create_model(name, **SMALL, **unset, **flags)
    config = timm.data.resolve_data_config({"img_size": 64}, model=model)
    assert config["input_size"] == (3, 64, 64)
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    average = timm.utils.ModelEmaV3(model)
    loss = torch.nn.functional.cross_entropy(model(images(size=64)), torch.arange(6) % 5)
    loss.backward()
    timm.utils.clip_grad.dispatch_clip_grad(model.parameters(), 1.0, mode="agc")
    optimizer.step()
    average.update(model)
    saver = timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    other = timm.create_model(name, **SMALL, checkpoint_path=str(tmp_path / "last.pth.tar"))
    with torch.inference_mode():
        assert torch.equal(other.eval()(images(size=64)), model.eval()(images(size=64)))
