"""Shared fixtures: parity cases, models whose tokens halt, small datasets."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # run kernels on the CPU; set before torch may import Triton

import functools
import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import emulated_attention  # noqa: F401 - registers CUDA's operators for the fixture token_store
import graph_standin as standin
import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

import models_act
import zipping
from benchmarks.synthetic import set_synthetic_depths
from visualization.image_record import ImageRecord
from zipping.planned.dispatch import GraphReport
from zipping.planned.plans import Planner

ROOT = Path(__file__).parent.parent

settings.register_profile(
    "repository",
    deadline=None,  # durations vary between machines
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # token_store is the same for all examples
)
settings.load_profile("repository")
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25}
PARITY = sorted((ROOT / "tests" / "parity").glob("*.npz"))


@pytest.fixture(params=["CPU", "CUDA"])
def token_store(request, monkeypatch) -> str:
    """Run the test with the CPU store and with the CUDA store, whose operators are emulated."""
    monkeypatch.setattr(zipping, "uses_device_form", lambda x: request.param == "CUDA")
    return request.param


@pytest.fixture
def graph_standin(monkeypatch) -> None:
    """Capture passes on the CPU, by tapes in place of CUDA graphs."""
    for name in ("capture", "warm_up", "new_pool"):
        monkeypatch.setattr(f"zipping.planned.capture.{name}", getattr(standin, name))
    monkeypatch.setattr("zipping.planned.dispatch.supports_graphs", lambda images: True)


@pytest.fixture
def graphs_on_cpu(graph_standin, monkeypatch) -> None:
    """Run models with `cuda_graphs` as on CUDA, by plans that hold. Few programs save time in the interpreter."""
    from graphed_models import LOOSE  # it imports this module

    monkeypatch.setattr("zipping.planned.kernels.ROWS", 128)
    monkeypatch.setattr("zipping.uses_device_form", lambda x: True)
    monkeypatch.setattr("zipping.planned.runner.Planner", functools.partial(Planner, **LOOSE))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill memory that is allocated and not written with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class ParityCase:
    """Case of tests/parity: a small model with its inputs, outputs, losses and gradients."""

    def __init__(self, path: Path):
        arrays = dict(np.load(path))
        self.config = json.loads(str(arrays.pop("config")))
        self.values = {name: torch.from_numpy(value) for name, value in arrays.items()}
        self.weights, self.grads = (
            {name.removeprefix(group): value for name, value in self.values.items() if name.startswith(group)}
            for group in ("weights/", "grads/")
        )

    def model(self, **kwargs) -> torch.nn.Module:
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
        names += ("gate_scale", "gate_center", "halt_eps")
        distilled = self.config["distilled"]
        make = models_act.AdaptiveVisionTransformerDistilled if distilled else models_act.AdaptiveVisionTransformer
        model = make(**{name: self.config[name] for name in names}, **kwargs)
        model.load_state_dict(self.weights, strict=True)
        if distilled:
            model.set_distilled_training(True)
        return model


@pytest.fixture(params=PARITY, ids=lambda path: path.stem)
def parity(request) -> ParityCase:
    return ParityCase(request.param)


@pytest.fixture
def every_second_call_replays(monkeypatch) -> None:
    """Report every second call of a model with `cuda_graphs` as replayed from a CUDA graph."""
    calls, forward = WeakKeyDictionary(), models_act.AdaptiveTokens.forward

    def counted_forward(model, *args, **kwargs):
        calls[model] = calls.get(model, 0) + model.cuda_graphs
        return forward(model, *args, **kwargs)

    def graph_report(model):
        batches = calls.get(model, 0)
        return GraphReport(batches, replayed=batches // 2)

    monkeypatch.setattr(models_act.AdaptiveTokens, "forward", counted_forward)
    monkeypatch.setattr("zipping.planned.dispatch.graph_report", graph_report)


def halting_model(mean: float = 4.5, spread: float = 1.5, distilled: bool = False, **kwargs) -> torch.nn.Module:
    """Return a small model whose tokens halt at many depths. All parameters are random, none is zero."""
    make = models_act.AdaptiveVisionTransformerDistilled if distilled else models_act.AdaptiveVisionTransformer
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 8, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(0)
    model = make(**{**sizes, "gate_scale": 4.0, "gate_center": 12.0, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    set_synthetic_depths(model, mean, spread)
    with torch.no_grad():  # let halting depend slightly on all weights, so that gradients flow through it
        for block in model.blocks:
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                weight[0] += 0.02 * torch.randn_like(weight[0])
    return model


def with_directions(model: torch.nn.Module) -> torch.nn.Module:
    """Let the gate read directions near channel 0, so that patch tokens still halt at many depths; return the model."""
    generator = torch.Generator().manual_seed(3)
    directions = 0.03 * torch.randn(model.num_blocks, model.embed_dim + 1, generator=generator)
    directions[:, 0] += 1
    model.set_gate_directions(directions)
    return model


def not_plain(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Return tensors of this shape that a hostile file may contain where a dense tensor of real numbers belongs."""
    zeros = torch.zeros(shape)
    return [
        zeros.to_sparse(),
        torch.quantize_per_tensor(zeros, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([zeros, zeros]),
        zeros.to("meta"),
        zeros.to(torch.complex64),
    ]


def save_halting_micro(path: Path, num_classes: int, **entries) -> Path:
    """Save a checkpoint of avit_micro_patch4_32 whose tokens halt around block 6; return its path."""
    torch.manual_seed(0)
    model = timm.create_model("avit_micro_patch4_32", num_classes=num_classes)
    set_synthetic_depths(model, 6, 2)
    gate = {"gate_scale": model.gate_scale, "gate_center": model.gate_center}
    torch.save({"model": model.state_dict(), "gate": gate, **entries}, path)
    return path


def images(batch: int = 6, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make_record(index=0, depth=((1, 2), (3, 8)), target=0, prediction=0, confidence=0.9, **kwargs) -> ImageRecord:
    values = {"name": f"image {index}", "pixels": np.full((4, 4, 3), index % 256, np.uint8), "macs": 2.0}
    values |= {"depth": np.array(depth, np.uint8), "prefix_depth": np.array([4], np.uint8), "static_macs": 8.0}
    values |= {"index": index, "target": target, "prediction": prediction, "confidence": confidence}
    return ImageRecord(**values | kwargs)


def assert_halting(halting: models_act.Halting, num_blocks: int = 8) -> None:
    """Assert that tokens halt at several depths, class tokens halt early and images finish early."""
    assert len(halting.depth.unique()) >= 4, "tokens do not halt at several depths"
    assert halting.depth[:, 0].min() < num_blocks, "no class token halts early"
    assert halting.depth.amax(dim=1).min() < num_blocks, "no image finishes early"


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Folder in ImageNet's layout: 3 classes with 5 training and 3 validation images each, 40 x 36 pixels."""
    return make_image_folder(tmp_path / "data")


def make_image_folder(root: Path, classes: int = 3, train: int = 5, val: int = 3, size=(40, 36)) -> Path:
    rng = np.random.default_rng(0)
    for part, count in {"train": train, "val": val}.items():
        for c in range(classes):
            folder = root / part / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def make_fashion(root: Path, train: int = 120, test: int = 20) -> Path:
    """Write Fashion-MNIST's four files with random pixels; all images differ."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for part, count in {"train": train, "t10k": test}.items():
        pixels = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        for kind, array in {"images-idx3": pixels, "labels-idx1": np.arange(count, dtype=np.uint8) % 10}.items():
            header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (root / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return root


def make_shards(root: Path, shards: int = 4, images: int = 4, classes: int = 16, val_shards: int = 3) -> Path:
    """Write WebDataset shards. The label of an image is its number modulo `classes`; 5 images per validation shard."""
    root.mkdir(parents=True)
    splits = {}
    for split, count, length in (("train", shards, images), ("validation", val_shards, 5)):
        names = [f"{split}-{number:04d}.tar" for number in range(count)]
        for number, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for index in range(number * length, (number + 1) * length):
                    pixels = np.full((32, 32, 3), index * 7 % 256, np.uint8)
                    png = io.BytesIO()
                    Image.fromarray(pixels).save(png, "PNG")
                    for suffix, content in {"png": png.getvalue(), "cls": str(index % classes).encode()}.items():
                        member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        splits[split] = {"name": split, "num_samples": count * length, "filenames": names}
        splits[split]["shard_lengths"] = [length] * count
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root
