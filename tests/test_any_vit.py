"""Plain timm ViTs, made adaptive by name."""

import copy
import json
import re
from functools import cache
from unittest.mock import patch

import pytest
import timm
import torch
from conftest import ROOT, images
from equivalence import CLOSE, assert_same, flops, masked_and_zipped
from processes import Script
from timm.layers import PatchEmbed
from torch import nn
from torch.testing import assert_close

import benchmark
import main_act
import visualize
from benchmarks import cases
from datasets import IMAGENET
from models_act import AdaptiveTokens, adapt, macs_per_image
from training import models
from training.budget import budget_curve, min_cost
from training.checkpoints import Checkpoint
from training.models import create_model, preprocessing, timm_vit_names, unsupported_reason
from utils import UserError

CLIP = "vit_base_patch32_clip_224.openai"
SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 6, "num_classes": 7}
CPU = torch.device("cpu")


# All timm names -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reasons():
    """Return why each timm ViT is not supported, or None. Each model is built on the meta device only once."""
    with patch.object(models, "build_on_meta", cache(models.build_on_meta)):
        yield {name: unsupported_reason(name) for name in timm_vit_names()}


def options_of(model: AdaptiveTokens) -> tuple:
    """Return what distinguishes models except for their sizes."""
    block = model.blocks[0]
    parts = (model.patch_embed, model.norm_pre, model.norm, model.fc_norm, model.head, getattr(model, "rope", None))
    parts += (block, block.norm1, block.attn, block.attn.q_norm, block.attn.norm, block.mlp, block.mlp.act)
    parts += (getattr(block.mlp, "norm", None), getattr(block, "ls1", None))
    kinds = tuple(type(part).__name__ for part in parts)
    biases = (getattr(block.attn.qkv, "bias", None) is None, block.mlp.fc2.bias is None)
    tokens = (model.num_prefix_tokens, model.cls_token is None, model.no_embed_class, model.dynamic_img_size)
    options = (model.global_pool, getattr(model, "pool_include_prefix", False), getattr(model, "rope_mixed", False))
    rotary = tuple(getattr(block.attn, name, None) for name in ("rotate_half", "qkv_bias_separate"))
    rotary += tuple(getattr(block, name, None) is None for name in ("gamma_1", "gamma_2"))
    return type(model).__name__, *options, *kinds, *biases, *tokens, *rotary, has_grouped_queries(model)


def has_grouped_queries(model: AdaptiveTokens) -> bool:
    return any(getattr(block.attn, "num_kv_groups", 1) > 1 for block in model.blocks)


def smallest_size(model: AdaptiveTokens) -> int:
    """Return an image size of nine patches, or more if a convolutional stem needs it."""
    patch = model.patch_embed.feat_ratio()
    return 3 * patch if isinstance(model.patch_embed, PatchEmbed) else 4 * patch


@pytest.mark.slow
def test_every_timm_vit_is_supported_or_has_a_reason(reasons):
    details = {reason.split(": ", 1)[1] for reason in reasons.values() if reason}
    assert sum(reason is None for reason in reasons.values()) >= 225
    assert all(" is a " in detail or "global_pool is " in detail for detail in details), details
    fitting = [name for name, reason in reasons.items() if reason is None]
    for name in fitting:
        model = copy.deepcopy(models.build_on_meta(name))
        size = smallest_size(model)
        model.reset_classifier(5)
        if isinstance(model.patch_embed, PatchEmbed):
            model.set_input_size((size, size))
        else:
            size = model.patch_embed.img_size[0]
        logits, halting = model(torch.empty(2, 3, size, size, device="meta"), return_halting=True)
        assert logits.shape == (2, 5), name
        assert halting.depth.shape == (2, model.num_prefix_tokens + model.patch_embed.num_patches), name
    page = (ROOT / "docs" / "models.md").read_text()
    if f"timm {timm.__version__};" in page:
        rows = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \| `([^`]+)` \|$", page, flags=re.MULTILINE)
        assert sum(int(names) for names, _, _ in rows) == len(fitting)
        assert sum(int(weights) for _, weights, _ in rows) == sum(len(timm.list_pretrained(f"{n}.*")) for n in fitting)
        assert all(example.split(".")[0] in fitting for _, _, example in rows)


@pytest.mark.slow
def test_every_combination_of_options(reasons):
    """Check the smallest timm model with each combination, at a reduced size."""
    representatives = {}
    for name in (name for name, reason in reasons.items() if reason is None):
        model = models.build_on_meta(name)
        size = sum(p.numel() for p in model.parameters())
        key = options_of(model)
        if key not in representatives or size < representatives[key][0]:
            representatives[key] = size, name
    assert len(representatives) >= 30
    for _, name in representatives.values():
        check_adaptive(name)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch32_clip_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_tiny_r_s16_p8_224",
        "vit_medium_patch16_gap_240",
        "aimv2_large_patch14_224",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch16_dinov3",
        "eva02_tiny_patch14_224",
        "eva_giant_patch14_clip_224",
        "vit_small_patch16_rope_mixed_ape_224",
        "vit_base_patch16_rope_reg1_gap_256",
        "vit_pe_spatial_tiny_patch16_512",
        "vit_base_patch16_sapiens2",
    ],
)
def test_typical_timm_vit(name):
    check_adaptive(name)


def check_adaptive(name: str) -> None:
    """Check that a model equals timm's if nothing halts, that zipped equals masked, and its MACs."""
    torch.manual_seed(0)
    original = models.build_on_meta(name)
    size, sizes = smallest_size(original), dict(SMALL)
    if isinstance(original.patch_embed.proj, nn.Identity):  # the stem determines the width
        sizes |= {"embed_dim": original.embed_dim, "num_heads": original.blocks[0].attn.num_heads}
    if "sapiens2" in name:  # one number for each block
        sizes |= {"num_kv_heads": (3, 3, 1, 1, 3, 3)}
    static = timm.create_model(name, img_size=size, **sizes).eval()
    with torch.no_grad():
        for parameter in static.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = images(4, size)
    with torch.no_grad():
        for zip_tokens in (False, True):
            never_halting = adapt(static, gate_center=1e9, zip_tokens=zip_tokens)
            assert torch.equal(never_halting(x), static(x)), name
        if never_halting.can_swap_channels:
            never_halting.set_halting_channel(5)
            assert_close(never_halting(x), static(x), **CLOSE)
        model = with_medium_gate(never_halting, x)
        halting = assert_same(*masked_and_zipped(model), x, gradients=False)
        assert len(halting.depth.unique()) >= 3, f"{name}: tokens do not halt at several depths"
        depth = model(x[:1], return_halting=True)[1].depth
        assert flops(lambda: model(x[:1], return_halting=True)) == 2 * macs_per_image(model, depth).item(), name
        maps, same_halting = model.forward_intermediates(x, [2, 5], intermediates_only=True, return_halting=True)
        assert torch.equal(same_halting.depth, halting.depth)
        assert [m.shape for m in maps] == [(4, model.embed_dim, *model.patch_embed.grid_size)] * 2
    assert_same(*masked_and_zipped(model.train()), x)


def test_halting_channel_of_stem_without_projection_raises():
    model = adapt(timm.create_model("vit_base_mci_224", device="meta"))
    model.set_halting_channel(0)
    with pytest.raises(ValueError, match="the halting channel must be 0, got 3"):
        model.set_halting_channel(3)


def with_medium_gate(model: AdaptiveTokens, x: torch.Tensor) -> AdaptiveTokens:
    """Set a gate that saves about half of the MACs that can be saved."""
    static = adapt(cases.static_twin(model), halting=False)
    states = static.forward_intermediates(x, intermediates_only=True)
    model.gate_scale = 4 / torch.stack(states)[:, :, 0].std().item()
    model.gate_center = model.gate_scale * torch.stack(states)[:, :, 0].mean().item()
    model.gate_center = budget_curve(model, [(x,)], CPU, "none").center((min_cost(model) + 1) / 2)
    return model


# Dense tasks --------------------------------------------------------------------------------------


def segmentation_example() -> str:
    """Return the code of docs/models.md for dense tasks."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "Segmenter" in block)
    return code


def test_segmentation_example_of_docs_learns(monkeypatch):
    """Run the code of docs/models.md on a small model: predict for each pixel which half of an image is bright."""
    create, steps = timm.create_model, 40
    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 6, "init_values": 0.5}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: create("vit_small_patch16_dinov3", img_size=32, **small))
    masks = torch.zeros(8, 32, 32, dtype=torch.long)
    for number in range(8):
        masks[number, :, : 4 * (number + 1)] = 1
    x = images(8, 32) + 2 * masks[:, None]
    losses, names = [], {"images": x, "batches": [(x, masks)] * steps}
    entropy = torch.nn.functional.cross_entropy

    def recorded_entropy(*args):
        losses.append(entropy(*args))
        return losses[-1]

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded_entropy)
    exec(segmentation_example(), names)
    assert len(losses) == steps
    assert losses[-1] < 0.5 * losses[0]
    assert len(names["halting"].depth.unique()) >= 3, "tokens do not halt"
    assert names["logits"].shape == (8, 2, 32, 32)


OWN_MODULES = ("utils", "datasets", "losses", "samplers", "readers", "engine_act", "visualization", "deployment")
NEIGHBOR = """
import importlib, os, sys
root, elsewhere, modules, example = sys.argv[2:]
os.chdir(elsewhere)
sys.path = ["", *(path for path in sys.path if path and not path.startswith(root)), root]
import timm, torch
create = timm.create_model
timm.create_model = lambda *_, **__: create("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3)
images, masks = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
batches = [(images, masks)]
exec(example)
assert torch.isfinite(logits).all()
for name in modules.split():
    assert importlib.import_module(name).OWN, name
"""


def test_segmentation_example_of_docs_runs_next_to_modules_of_the_same_names(tmp_path):
    """The user's project has modules with names of this repository, and this repository comes last on the path."""
    for name in OWN_MODULES:
        (tmp_path / f"{name}.py").write_text("OWN = True\n")
    code = segmentation_example()
    process = Script("-c", NEIGHBOR, ROOT, tmp_path, " ".join(OWN_MODULES), code, log=tmp_path / "log")
    assert process.wait() == 0, process.errors()


# Names on the command line ------------------------------------------------------------------------


def test_preprocessing_is_that_of_the_model():
    assert preprocessing("avit_small_patch16_224") == preprocessing("avit3_base_patch16_384") == IMAGENET
    clip = preprocessing(CLIP)
    assert clip.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    assert (clip.crop_pct, clip.interpolation) == (0.9, "bicubic")
    squashed = preprocessing("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k")
    assert squashed.crop_mode == "squash"


def test_unreachable_weights_raise(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("unreachable\nand more")

    for loader in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{loader}", unreachable)
    with pytest.raises(UserError, match=f"^--pretrained: the weights of {CLIP} cannot be loaded: unreachable$"):
        create_model(CLIP, (32, 32), pretrained=True)


def test_unsupported_input_size_raises():
    with pytest.raises(UserError, match=r"^--input-size 48 48 is not supported by vit_tiny_r_s16_p8_224: "):
        create_model("vit_tiny_r_s16_p8_224", (48, 48))


def test_recorded_model_is_ignored_if_weights_do_not_fit():
    weights = timm.create_model("avit_micro_patch4_32", num_classes=3).state_dict()
    recorded = {"model": "aimv2_3b_patch14_448", "input_size": [1024]}
    assert Checkpoint({"model": weights, "args": recorded}, "c").model_name() == "avit_micro_patch4_32"


def test_commands_run_with_a_timm_model(image_folder, tmp_path, monkeypatch, capsys):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    torch.manual_seed(0)
    weights = timm.create_model("vit_tiny_patch16_224").state_dict()
    hub_ids = []

    def download(hub_id, **_):
        hub_ids.append(hub_id)
        return dict(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    out, data = tmp_path / "out", ["--data-path", str(image_folder), "--num_workers", "0", "--batch-size", "5"]
    model = ["--model", name, "--input-size", "48", "--gate_scale", "5", "--gate_center", "5"]
    main_act.main([*data, *model, "--pretrained", "--output_dir", str(out), "--epochs", "1", "--no-repeated-aug"])
    assert hub_ids == ["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"]
    assert "but the dataset has 3 classes; training starts with a new head" in capsys.readouterr().err
    path = str(out / "checkpoint.pth")
    assert Checkpoint.load(path).model_name() == name

    main_act.main([*data, *model, "--eval", "--finetune", path, "--output_dir", str(out)])
    result = json.loads((out / "eval.json").read_text())
    assert result["gmacs"] < result["gmacs_static"]

    loaded = Checkpoint.load(path).build_model().eval()
    assert loaded.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    visualize.main(["--finetune", path, str(image_folder / "val"), "--output-dir", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 9
    options = ["--rounds", "1", "--batch-size", "9", "--mean-depth", "7"]
    benchmark.main(["--finetune", path, "--model", name, "--data-path", str(image_folder), *options])
    benchmark.main(["--model", name, "--input-size", "48", *options])
    assert "zipped, early exit" in capsys.readouterr().out


def test_commands_run_with_a_model_without_class_token(image_folder, tmp_path, capsys):
    out, data = tmp_path / "out", ["--data-path", str(image_folder), "--num_workers", "0", "--batch-size", "5"]
    model = ["--model", "vit_wee_patch16_reg1_gap_256", "--input-size", "48", "--gate_scale", "5", "--gate_center", "5"]
    main_act.main([*data, *model, "--output_dir", str(out), "--epochs", "1", "--no-repeated-aug"])
    (line,) = map(json.loads, (out / "log.txt").read_text().splitlines())
    assert "test_patch_depth_mean" in line
    assert "test_class_token_depth" not in line
    path = ["--finetune", str(out / "checkpoint.pth")]
    main_act.main([*data, *model[:4], "--demo", *path, "--demo-dir", str(tmp_path / "demo")])
    capsys.readouterr()
    summary = ["--summary", "--data-path", str(image_folder), "--html", "--output-dir", str(tmp_path / "summary")]
    visualize.main([*path, *summary])
    assert "class token" not in (tmp_path / "summary" / "summary.html").read_text()
    assert not (tmp_path / "summary" / "class_token_depth.png").exists()


def test_synthetic_depths_of_unsupported_model_exit_with_message(monkeypatch, capsys):
    small = adapt(timm.create_model("aimv2_large_patch14_224", img_size=28, **SMALL))
    monkeypatch.setattr(cases, "create_model", lambda *_: small)
    with pytest.raises(SystemExit):
        benchmark.main(["--model", "aimv2_large_patch14_224"])
    assert "Pass a trained checkpoint with --finetune." in capsys.readouterr().err
