"""Commands on small instances of each family of timm's Eva."""

import json

import onnxruntime
import pytest
import timm
import torch
from conftest import images
from equivalence import CLOSE
from torch.testing import assert_close

import benchmark
import export_onnx
import main_act
import visualize
from training import models, network, weights
from training.checkpoints import Checkpoint
from training.classes import is_of_head
from training.weights import fits, load_weights

FAMILIES = {  # name: image size
    "vit_small_patch16_dinov3": 48,
    "eva02_tiny_patch14_224": 42,
    "eva_giant_patch14_clip_224": 42,
    "vit_small_patch16_rope_mixed_ape_224": 48,
    "vit_base_patch16_rope_reg1_gap_256": 48,
    "vit_pe_spatial_tiny_patch16_512": 48,
    "vit_small_patch16_lingbot": 48,
    "vit_base_patch16_sapiens2": 48,
}
READS_CLASS_TOKEN = {
    "eva_giant_patch14_clip_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_small_patch16_lingbot",
    "vit_base_patch16_sapiens2",
}
NOT_EXPORTED = {
    "vit_small_patch16_dinov3": "the head reads the mean of normalized tokens",
    "vit_base_patch16_sapiens2": "norm1 is a RmsNorm",
}
QUICK = ("vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224")
CACHES = (models.unsupported_reason, models._patch_size, weights.empty_state_dict, network._structure)


@pytest.fixture
def small_models(monkeypatch):
    """Build all timm models at a small size. What was recorded about the full size is forgotten, and the reverse."""
    create = timm.create_model

    def create_small(name, **options):
        kv_heads = {"num_kv_heads": (3, 1, 1, 3)} if "sapiens2" in name else {}
        return create(name, **{"embed_dim": 48, "num_heads": 3, "depth": 4, **kv_heads, **options})

    for cached in CACHES:
        cached.cache_clear()
    monkeypatch.setattr(timm, "create_model", create_small)
    yield create_small
    for cached in CACHES:
        cached.cache_clear()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_commands_run(name, small_models, image_folder, tmp_path, capsys):
    torch.manual_seed(0)
    size, start, out = str(FAMILIES[name]), tmp_path / "start.pth", tmp_path / "out"
    static = small_models(name, num_classes=3, img_size=int(size))
    torch.save(static.state_dict(), start)
    data = ["--data-path", str(image_folder), "--num_workers", "0", "--batch-size", "5", "--output_dir"]

    def run(*flags):
        main_act.main([*data, *map(str, flags)])

    recipe = "--target-macs 0.8 --distillation-type self --warmup-epochs 0 --mixup 0 --cutmix 0 --lr 0.001"
    training = ["--model", name, "--input-size", size, "--pretrained-path", start, "--model-ema-decay", 0.5]
    training += recipe.split()
    run(out, *training, "--epochs", 1)
    output = capsys.readouterr().out
    if name in READS_CLASS_TOKEN:
        assert "gate: directions fitted to the class token's attention" in output
    else:
        assert "the gate reads a channel, not directions: its head does not read a class token" in output
        assert "gate search: channel " in output
    run(out, *training, "--resume", "auto", "--epochs", 2)
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]

    path = out / "checkpoint.pth"
    checkpoint = Checkpoint.load(str(path))
    assert checkpoint.model_name() == name
    run(tmp_path / "eval", "--eval", "--finetune", path, "--budget", 0.8)
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert result["gmacs"] < result["gmacs_static"]
    run(tmp_path / "larger", "--eval", "--finetune", path, "--input-size", 2 * int(size))
    run(tmp_path / "demo", "--demo", "--finetune", path, "--demo-dir", tmp_path / "pictures")
    summary = ["--summary", "--data-path", str(image_folder), "--html", "--output-dir", str(tmp_path / "summary")]
    visualize.main(["--finetune", str(path), *summary])
    assert (tmp_path / "summary" / "summary.html").exists()
    benchmark.main(["--finetune", str(path), *data[:2], "--rounds", "1", "--batch-size", "9"])
    assert "zipped" in capsys.readouterr().out
    graph = str(tmp_path / "graph.onnx")
    if name in NOT_EXPORTED:
        with pytest.raises(SystemExit):
            export_onnx.main([str(path), graph])
        assert NOT_EXPORTED[name] in capsys.readouterr().err
    else:
        export_onnx.main([str(path), graph])
        assert_exported(checkpoint, graph, images(1, int(size)))


@torch.no_grad()
def assert_exported(checkpoint, graph, x):
    """Assert that the graph has the logits of the checkpoint's model."""
    found = onnxruntime.InferenceSession(graph).run(["logits"], {"images": x.numpy()})[0]
    assert_close(torch.tensor(found), checkpoint.build_model().eval()(x), **CLOSE)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.lvd1689m", "vit_small_patch16_rope_mixed_224.naver_in1k"])
def test_pretrained_weights_start_a_run(name, small_models, image_folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    weights, hub_ids = small_models(name, img_size=48).state_dict(), []

    def download(hub_id, **_):
        hub_ids.append(hub_id)
        return dict(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    flags = ["--data-path", image_folder, "--num_workers", 0, "--batch-size", 5, "--output_dir", tmp_path]
    flags += ["--model", name, "--input-size", 48, "--pretrained", "--epochs", 1, "--lr", 0, "--min-lr", 0]
    main_act.main([*map(str, flags), "--warmup-lr", "0"])
    assert hub_ids == [f"timm/{name}"]
    found = "no head" if "dinov3" in name else "a head of 1000 classes"
    message = f"the --pretrained weights have {found} but the dataset has 3 classes; training starts with a new head"
    assert message in capsys.readouterr().err
    saved = Checkpoint.load(str(tmp_path / "checkpoint.pth")).state_dict()
    assert saved["head.weight"].shape == (3, 48)
    assert all(torch.equal(saved[name], value) for name, value in weights.items() if not is_of_head(name))


def test_layer_scale_of_both_classes_keeps_its_names(small_models):
    """DeiT III's release calls it gamma_1, which timm renames for its ViT but not for its Eva."""
    for name, released in (("vit_small_patch16_dinov3", "gamma_1"), ("deit3_small_patch16_224", "ls1.gamma")):
        model = small_models(name)
        weights = {key.replace(released, "gamma_1"): value for key, value in model.state_dict().items()}
        load_weights(model, {key.replace("ls2.gamma", "gamma_2"): value for key, value in weights.items()}, "w", False)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_weights_with_a_head_fit_a_name_without_classifier(name):
    model = timm.create_model(name, device="meta", num_classes=3)
    assert fits(name, model.state_dict())
    model.blocks[0].mlp.fc1 = torch.nn.Linear(1, 1)
    assert not fits(name, model.state_dict())
