"""ONNX export: graphs equal the masked model in several runtimes, from the command line to JavaScript."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT, halting_model, save_halting_micro, with_directions
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import nn

import export_onnx
from benchmarks.synthetic import set_synthetic_depths
from datasets import build_dataset, evaluation_transform, load_image
from deployment.onnx_graph import write_graph
from models_act import adapt
from training.checkpoints import Checkpoint
from training.models import create_model
from zipping.gate import Gate

onnxruntime.set_default_logger_severity(3)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
BUNDLED = [path for path in sorted((ROOT / "experiments").glob("*/*.pth")) if "static" not in path.stem]
BATCH_MODES = ("single", "batch")
TOLERANCE = 1e-4


def session(graph: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    content = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def call(run, batch_mode: str, x: torch.Tensor, **gate) -> tuple[np.ndarray, np.ndarray]:
    """Run a session on a batch: x [B, 3, H, W] -> logits [B, K], live [B, L]."""
    feed = {name: np.array(value, np.float32) for name, value in gate.items()}
    if batch_mode == "batch":
        return tuple(run(None, {"images": x.numpy(), **feed}))
    results = [run(None, {"images": image.numpy(), **feed}) for image in x.split(1)]
    return np.concatenate([logits for logits, _ in results]), np.stack([live for _, live in results])


@torch.no_grad()
def expected(model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the masked model's logits [B, K] and the tokens of each block under early exit [B, L]."""
    model.zip_tokens = False
    logits, halting = model.eval()(x, return_halting=True)
    depth = halting.depth
    if model.reads_prefix and model.halting:
        depth = depth.minimum(depth[:, : model.num_prefix_tokens].amax(dim=1, keepdim=True))
    live = torch.stack([(depth > number).sum(dim=1) for number in range(len(model.blocks))], dim=1)
    return logits.numpy(), live.numpy()


def assert_exact(
    model: nn.Module, x: torch.Tensor, modes: tuple[str, ...] = BATCH_MODES, run_of=lambda g: session(g).run
):
    """Compare graphs with the masked model. Return the live tokens, [B, L]."""
    logits, live = expected(model, x)
    for mode in modes:
        graph = write_graph(model, mode)
        onnx.checker.check_model(graph, full_check=True)
        assert {node.domain for node in graph.graph.node} == {""}
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 20)]
        assert graph.ir_version == 10
        found_logits, found_live = call(run_of(graph), mode, x)
        assert found_live.dtype == np.int64
        np.testing.assert_array_equal(found_live, live)
        np.testing.assert_allclose(found_logits, logits, rtol=0, atol=TOLERANCE)
    return live


def images(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# Equal to the masked model -------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 4},
    "layer scale": {"init_values": 0.5, "no_embed_class": True},
    "mean of patches": {"global_pool": "avg"},
    "no prefix tokens": {"global_pool": "avg", "class_token": False},
    "registers alone, no positions": {"global_pool": "avg", "class_token": False, "reg_tokens": 2, "pos_embed": "none"},
    "mean of all": {"global_pool": "avg", "pool_include_prefix": True},
    "more norms": {"qk_norm": True, "pre_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False},
    "another activation": {"act_layer": "gelu_tanh"},
    "gated MLP": {"mlp_layer": timm.layers.GluMlp, "act_layer": nn.SiLU},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLU, "scale_mlp_norm": True},
    "one block": {"depth": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_model_option_equals_masked(options):
    model = halting_model(img_size=(16, 24), **options)
    live = assert_exact(model, images(6, 3, 16, 24))
    assert options.get("depth") == 1 or (live[:, -1] == 0).any()  # some image exits early


DIRECTED = ("plain", "distilled", "registers", "mean of patches", "no prefix tokens", "mean of all", "one block")


@pytest.mark.parametrize("name", DIRECTED)
def test_model_with_directions_equals_masked(name):
    model = with_directions(halting_model(img_size=(16, 24), **OPTIONS[name]))
    live = assert_exact(model, images(6, 3, 16, 24))
    assert (live[:, -1] >= model.num_prefix_tokens).all()
    assert name == "one block" or len(np.unique(live)) > 4


@pytest.mark.parametrize("distilled", [False, True])
def test_static_graph_computes_all_tokens(distilled):
    model = halting_model(distilled=distilled, halting=False)
    live = assert_exact(model, images(5, 3, 16, 16))
    assert (live == live[0, 0]).all()
    assert [value.name for value in write_graph(model).graph.input] == ["images"]


def test_no_halting_and_immediate_halting_equal_masked():
    for center, blocks in ((1e9, 8), (-1e9, 1)):
        model = halting_model()
        model.gate_center = center
        live = assert_exact(model, images(3, 3, 16, 16))
        assert ((live > 0).sum(axis=1) == blocks).all()


def test_empty_batch_gives_empty_outputs():
    logits, live = call(session(write_graph(halting_model(), "batch")).run, "batch", images(0, 3, 16, 16))
    assert logits.shape == (0, 7)
    assert live.shape == (0, 8)


@pytest.mark.parametrize("batch_mode", BATCH_MODES)
@pytest.mark.parametrize("prepare", [lambda model: model, with_directions], ids=["channel 0", "directions"])
def test_gate_inputs_override_the_defaults(batch_mode, prepare):
    model = prepare(halting_model())
    run = session(write_graph(model, batch_mode)).run
    x, seen = images(4, 3, 16, 16), set()
    for scale, center in ((4.0, 12.0), (4.0, 20.0), (6.0, 12.0)):
        model.gate_scale, model.gate_center = scale, center
        logits, live = expected(model, x)
        found_logits, found_live = call(run, batch_mode, x, gate_scale=scale, gate_center=center)
        np.testing.assert_array_equal(found_live, live)
        np.testing.assert_allclose(found_logits, logits, rtol=0, atol=TOLERANCE)
        seen.add(int(live.sum()))
    assert len(seen) == 3


def margins(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return how near any cumulative score of an image is to the halting threshold: [B].

    Below about 1e-6, rounding decides whether a token halts.
    """
    outputs = []
    model.eval()
    hooks = [block.register_forward_hook(lambda m, args, out: outputs.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    gates = Gate.of_blocks(model, x.device)
    scores = torch.stack([torch.sigmoid(gate.logit(out)) for gate, out in zip(gates, outputs)]).cumsum(dim=0)
    if model.gate_directions is not None:
        scores = scores[..., model.num_prefix_tokens :]  # prefix tokens do not halt
    return (scores - (1 - model.halt_eps)).abs().amin(dim=(0, 2))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31 - 1),
    distilled=st.booleans(),
    reg_tokens=st.integers(0, 3),
    depth=st.integers(1, 6),
    heads=st.integers(1, 3),
    height=st.sampled_from([8, 12, 20]),
    pool=st.sampled_from(["token", "avg"]),
    mean=st.floats(0.5, 6),
    spread=st.floats(0, 3),
)
def test_random_models_equal_masked(seed, distilled, reg_tokens, depth, heads, height, pool, mean, spread):
    options = {} if distilled else {"reg_tokens": reg_tokens, "global_pool": pool}
    sizes = {"embed_dim": 8 * heads, "num_heads": heads, "depth": depth, "img_size": (height, 16)}
    model = halting_model(mean, spread, distilled, **sizes, **options)
    torch.manual_seed(seed)
    with torch.no_grad():  # prefix tokens halt at different depths, the class token not always last
        for name in ("cls_token", "dist_token", "reg_token"):
            token = getattr(model, name, None)
            if token is not None:
                token[..., 0] += 2 * torch.randn(token.shape[:-1])
    x = images(3, 3, height, 16, seed=seed % 1000)
    model.zip_tokens = False
    assume(margins(model, x).min() > 1e-5)
    assert_exact(model, x)


@pytest.mark.parametrize("batch_mode", BATCH_MODES)
@pytest.mark.parametrize("prepare", [lambda model: model, with_directions], ids=["channel 0", "directions"])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}], ids=["class token", "registers"])
def test_onnx_reference_evaluator_agrees(batch_mode, options, prepare):
    model = prepare(halting_model(depth=4, mean=2, **options))
    assert_exact(model, images(2, 3, 16, 16), (batch_mode,), lambda graph: ReferenceEvaluator(graph).run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("avit_tiny_patch16_224", 4),
        ("avit_tiny_patch16_224", 7.3),
        ("avit_tiny_patch16_224", 11),
        ("avit_tiny_distilled_patch16_224", 7.3),
        ("avit_small_patch16_224", 11),
        ("avit3_small_patch16_224", 4),
    ],
)
def test_every_family_at_full_size_equals_masked(name, mean):
    size = (224, 224) if mean != 11 else (160, 256)
    torch.manual_seed(0)
    model = create_model(name, size)
    set_synthetic_depths(model, mean, 2)
    live = assert_exact(model, images(2, 3, *size))
    assert live[:, 4].sum() < live[:, 0].sum() or mean == 11


def images_of(checkpoint: Checkpoint, folder: Path, size: tuple[int, int]) -> torch.Tensor:
    """Return 1,000 images of the dataset that a bundled model was trained on, or those that its demo shows."""
    name = checkpoint.recorded_flag("data_set")
    if name == "IMNET":
        files = sorted((folder / "results" / "depths").glob("*_ref.jpg"))
        return torch.stack([evaluation_transform(size)(load_image(file)) for file in files])
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs dataset-fashion-mnist")
    data = build_dataset(name, str(FASHION_MNIST), False, size)
    return torch.stack([data[index][0] for index in range(1000)])


@pytest.mark.slow
@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_models_equal_masked_on_many_images(path):
    checkpoint = Checkpoint.load(str(path))
    model = checkpoint.build_model()
    x = images_of(checkpoint, path.parent, model.patch_embed.img_size)
    logits, live = expected(model, x)
    decided = margins(model, x).numpy() > 1e-6  # else rounding decides, for about one image in 1,000
    assert decided.mean() > 0.99
    for mode in BATCH_MODES:
        found_logits, found_live = call(session(write_graph(model, mode)).run, mode, x)
        np.testing.assert_array_equal(found_live[decided], live[decided])
        np.testing.assert_allclose(found_logits[decided], logits[decided], rtol=0, atol=TOLERANCE)
    assert live.mean() < 0.8 * live[0, 0]


# Old and other runtimes --------------------------------------------------------------------------

OLD_SCRIPT = """
import sys, numpy, onnxruntime
assert onnxruntime.__version__ == "1.19.2", onnxruntime.__version__
onnxruntime.set_default_logger_severity(3)
graph, images, out = sys.argv[1:]
run = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run
logits, live = run(None, {"images": numpy.load(images)})
numpy.savez(out, logits=logits, live=live)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="onnxruntime 1.19.2 has no wheel for this Python")
def test_oldest_supported_runtime_equals_masked(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "old", "onnxruntime==1.19.2"]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"onnxruntime 1.19.2 does not install: {installed.stderr[-200:]}")
    for model, mode in ((halting_model(reg_tokens=2), "batch"), (halting_model(), "single")):
        x = images(6 if mode == "batch" else 1, 3, 16, 16)
        onnx.save(write_graph(model, mode), tmp_path / "graph.onnx")
        np.save(tmp_path / "images.npy", x.numpy())
        argv = [
            sys.executable,
            "-c",
            OLD_SCRIPT,
            *(tmp_path / name for name in ("graph.onnx", "images.npy", "out.npz")),
        ]
        environment = {"PYTHONPATH": str(tmp_path / "old"), "PATH": ""}
        subprocess.run(argv, check=True, env=environment)
        found = np.load(tmp_path / "out.npz")
        logits, live = expected(model, x)
        np.testing.assert_array_equal(found["live"].reshape(live.shape), live)
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=TOLERANCE)


# The command -------------------------------------------------------------------------------------


def run(*argv) -> None:
    export_onnx.main([*map(str, argv)])


def error_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("export_onnx.py: error: ")
    assert error.count("\n") == 1
    return error


def test_exported_checkpoint_equals_masked_and_has_metadata(tmp_path, capsys):
    classes, curve = ["a cat", "a dog", "ä"], [[2.0, 0.2], [30.0, 0.6], [40.0, 0.9]]  # the gate's center is 30
    checkpoint = save_halting_micro(tmp_path / "c.pth", 3, classes=classes, budget_curves={"model": curve})
    graph = tmp_path / "out.onnx"
    run(checkpoint, graph, "--batch-mode", "batch")
    assert "images of 32 x 32, 3 classes, gate scale 10, center 30" in capsys.readouterr().out
    metadata = {p.key: json.loads(p.value) for p in onnx.load(graph).metadata_props}
    assert metadata["classes"] == classes
    assert metadata["budget_curve"] == [*curve[:2], [pytest.approx(95 / 3), 0.65]], "larger budgets need other weights"
    assert metadata["image_size"] == [32, 32]
    assert metadata["depth"] == 12
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    assert (metadata["interpolation"], metadata["crop_pct"]) == ("bilinear", 1.0)
    x = images(4, 3, 32, 32)
    logits, live = expected(Checkpoint.load(str(checkpoint)).build_model(), x)
    found_logits, found_live = call(session(graph).run, "batch", x)
    np.testing.assert_array_equal(found_live, live)
    np.testing.assert_allclose(found_logits, logits, rtol=0, atol=TOLERANCE)
    run(checkpoint, graph, "--budget", "0.4")
    assert "one image of 32 x 32, 3 classes, gate scale 10, center 16," in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if ".onnx" in path.name] == ["out.onnx"]


def test_fp16_weights_halve_the_file(tmp_path):
    checkpoint = save_halting_micro(tmp_path / "c.pth", 3)
    sizes, results = [], []
    for flags in ((), ("--fp16-weights",)):
        run(checkpoint, tmp_path / "out.onnx", *flags)
        sizes.append((tmp_path / "out.onnx").stat().st_size)
        results.append(call(session(tmp_path / "out.onnx").run, "single", images(4, 3, 32, 32))[0])
    assert sizes[1] < 0.6 * sizes[0]
    np.testing.assert_allclose(*results, rtol=0, atol=0.05)


def test_earlier_flag_spellings_are_accepted_but_hidden(capsys):
    args = export_onnx.make_parser().parse_args(["c.pth", "out.onnx", "--form", "batch", "--half"])
    assert (args.batch_mode, args.fp16_weights) == ("batch", True)
    args = export_onnx.make_parser().parse_args(["c.pth", "out.onnx"])
    assert (args.batch_mode, args.fp16_weights) == ("single", False)
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert "--batch-mode" in shown
    assert "--form" not in shown
    assert "--half" not in shown


def test_checkpoint_trained_without_halting_is_static(tmp_path, capsys):
    checkpoint = save_halting_micro(tmp_path / "c.pth", 3, gate=None)
    run(checkpoint, tmp_path / "out.onnx")
    assert "trained without halting" in capsys.readouterr().err
    _, live = call(session(tmp_path / "out.onnx").run, "single", images(2, 3, 32, 32))
    assert (live == 65).all()


def test_invalid_input_fails_with_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch):
    checkpoint, out = save_halting_micro(tmp_path / "c.pth", 3), tmp_path / "out.onnx"
    assert "no such file" in error_of(capsys, tmp_path / "missing.pth", out)
    assert "no does not exist" in error_of(capsys, checkpoint, tmp_path / "no" / "out.onnx")
    assert "is a directory" in error_of(capsys, checkpoint, tmp_path)
    assert "--budget and --static cannot be combined" in error_of(
        capsys, checkpoint, out, "--static", "--budget", "0.5"
    )
    assert "has no budget curve, so --budget cannot be used" in error_of(capsys, checkpoint, out, "--budget", "0.5")
    assert "invalid choice" in error_of(capsys, checkpoint, out, "--batch-mode", "many")
    name = "vit_tiny_r_s16_p8_224"
    weights = create_model(name, (224, 224), num_classes=3).state_dict()
    torch.save({"model": weights, "gate": {"gate_scale": 10.0, "gate_center": 30.0}}, tmp_path / "other.pth")
    assert "patch_embed is a HybridEmbed" in error_of(capsys, tmp_path / "other.pth", out, "--model", name)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    assert "the onnx package is not installed. Run: pip install -r requirements-export.txt" in error_of(
        capsys, checkpoint, out
    )
    assert not out.exists()


UNSUPPORTED = {
    "the image size is dynamic": {"dynamic_img_size": True},
    "the head reads the mean of normalized tokens": {"global_pool": "avg", "fc_norm": False},
    "blocks.0.mlp.act is a QuickGELU": {"act_layer": "quick_gelu"},
    "blocks.0.norm1 is a RmsNorm": {"norm_layer": "rmsnorm"},
    "the model has no head": {"num_classes": 0},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_part_raises_with_its_name(reason):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = adapt(timm.models.VisionTransformer(**sizes, **UNSUPPORTED[reason]))
    with pytest.raises(ValueError, match=f"cannot export to ONNX: {reason}"):
        write_graph(model)


def test_modified_or_too_large_models_raise(monkeypatch):
    model = halting_model()
    del model.blocks[-1]
    with pytest.raises(ValueError, match="blocks were removed"):
        write_graph(model)
    model = halting_model()
    model.blocks[1].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"blocks\.1 has a hook or a replaced forward"):
        write_graph(model)
    monkeypatch.setattr("deployment.onnx_graph.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="the limit is 2 GiB"):
        write_graph(halting_model())
