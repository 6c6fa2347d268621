import argparse
import os
import pickle
import random

import hostile_checkpoints
import pytest
import timm
import torch
from conftest import halting_model, save_halting_micro
from safetensors.torch import save_file

from training import checkpoints
from training.checkpoints import Checkpoint
from utils import UserError


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save(tmp_path, content, name="c.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def test_a_foreign_checkpoint_with_a_namespace_loads(tmp_path):
    weights = halting_model().state_dict()
    location = save(tmp_path, {"model": weights, "args": argparse.Namespace(gate_scale=5.0, gate_center=50)})
    checkpoint = checkpoints.load_checkpoint(location)
    assert Checkpoint(checkpoint, location).state_dict().keys() == weights.keys()
    assert checkpoint["args"].gate_center == 50


def test_no_code_of_a_checkpoint_runs(tmp_path):
    trap = tmp_path / "trap"
    location = save(tmp_path, {"model": halting_model().state_dict(), "extra": Malicious(trap)})
    with pytest.raises(UserError, match="running its code is refused"):
        checkpoints.load_checkpoint(location)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load_checkpoint(str(tmp_path / "plain.pth"))
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50), bytes(1000)])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        checkpoints.load_checkpoint(str(tmp_path / "c.pth"))


def test_a_truncated_checkpoint(tmp_path):
    location = save(tmp_path, {"model": halting_model().state_dict()})
    data = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        checkpoints.load_checkpoint(location)


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.ones(2), {}, {"model": {}}, {"model": {"a": 1}}, {"model": 5}, {"a": torch.ones(1, device="meta")}],
)
def test_files_without_weights(tmp_path, content):
    location = save(tmp_path, content)
    with pytest.raises(UserError, match=r"not a checkpoint|holds no weights"):
        Checkpoint.load(location).state_dict()


def test_a_missing_file_names_its_neighbours(tmp_path):
    save(tmp_path, {}, "tiny-10-30.pth")
    with pytest.raises(UserError, match=r"no such file \(did you mean tiny-10-30\.pth\?\)"):
        checkpoints.load_checkpoint(str(tmp_path / "tiny-10-3.pth"))


def test_an_https_url_is_downloaded_once(tmp_path, monkeypatch):
    location = save(tmp_path, {"model": halting_model().state_dict()})
    asked = []
    monkeypatch.setattr(checkpoints, "download_cached_file", lambda url, **_: asked.append(url) or location)
    checkpoints.load_checkpoint("https://example.org/c.pth")
    ((url, name),) = asked
    assert url == "https://example.org/c.pth"
    assert name.endswith("-c.pth")
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load_checkpoint("http://example.org/c.pth")


def test_model_is_preferred_to_its_average():
    model, average = halting_model(), halting_model()
    with torch.no_grad():
        average.head.bias += 1
    checkpoint = {"model": model.state_dict(), "model_ema": average.state_dict()}
    assert torch.equal(Checkpoint(checkpoint, "c").state_dict()["head.bias"], model.head.bias)
    assert torch.equal(Checkpoint(checkpoint, "c").state_dict(use_ema=True)["head.bias"], average.head.bias)
    with pytest.raises(UserError, match="no model_ema"):
        Checkpoint({"model": model.state_dict()}, "c").state_dict(use_ema=True)


def test_weights_fit_strictly():
    weights = {f"module.{name}": value for name, value in halting_model().state_dict().items()}
    model = halting_model(mean=2.0)
    checkpoints.load_weights(model, Checkpoint({"model": weights}, "c").state_dict(), "c", replace_head=False)
    assert torch.equal(model.pos_embed, halting_model().pos_embed)


@pytest.mark.parametrize("replace_head", [True, False])
def test_another_class_count(replace_head, capsys):
    model = halting_model(num_classes=5)
    own_head = model.head.weight.clone()
    weights = halting_model().state_dict()
    if not replace_head:
        with pytest.raises(UserError, match="its head has 7 classes, the data has 5"):
            checkpoints.load_weights(model, weights, "c", replace_head=False)
        return
    checkpoints.load_weights(model, weights, "c", replace_head=True)
    assert "7 classes is replaced by a new one of 5" in capsys.readouterr().err
    assert torch.equal(model.head.weight, own_head)
    assert torch.equal(model.cls_token, weights["cls_token"])


def test_position_embeddings_are_resampled():
    model = halting_model(img_size=24)
    checkpoints.load_weights(model, halting_model().state_dict(), "c", replace_head=False)
    assert model.pos_embed.shape == (1, 37, 24)
    assert torch.equal(model.pos_embed[:, 0], halting_model().pos_embed[:, 0])


def test_position_embeddings_of_a_rectangle(tmp_path):
    wide = halting_model(img_size=(8, 32)).state_dict()  # 2 x 8 patches, as many as 4 x 4
    model = halting_model()
    checkpoints.load_weights(model, wide, "c", replace_head=False, trained_size=(8, 32))
    assert not torch.equal(model.pos_embed, wide["pos_embed"])
    same = halting_model(img_size=(8, 32))
    checkpoints.load_weights(same, wide, "c", replace_head=False)
    assert torch.equal(same.pos_embed, wide["pos_embed"])
    with pytest.raises(UserError, match="pos_embed is of 8 patches"):
        checkpoints.load_weights(model, halting_model(img_size=(8, 16)).state_dict(), "c", replace_head=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.weight"), r"blocks\.1\.attn\.qkv\.weight is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "extra is not in this model"),
        (lambda w: w.update({"norm.weight": torch.ones(5)}), r"norm\.weight is \(5,\), expected \(24,\)"),
        (lambda w: w.update({"pos_embed": torch.ones(17, 24)}), r"pos_embed is \(17, 24\)"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 17, 20)}), r"pos_embed is \(1, 17, 20\)"),
        (lambda w: w.update({"head.weight": torch.ones(7, 20)}), r"head\.weight is \(7, 20\)"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(24, 3, 8, 8)}), r"proj\.weight is \(24, 3, 8, 8\)"),
    ],
)
def test_weights_of_another_shape_are_named(change, message):
    weights = dict(halting_model().state_dict())
    change(weights)
    model = halting_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        checkpoints.load_weights(model, weights, "c", replace_head=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_deits_weights_fit():
    model = timm.create_model("avit_tiny_patch16_224")
    deit = timm.create_model("deit_tiny_patch16_224").state_dict()
    checkpoints.load_weights(model, deit, "c", replace_head=False)


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("avit_small_patch16_224", {"num_classes": 3}, "it fits avit_small_patch16_224"),
        ("avit_base_patch16_384", {}, "it fits avit_base_patch16_384 or avit_base_patch16_224"),
        ("avit_tiny_distilled_patch16_224", {}, "it fits avit_tiny_distilled_patch16_224"),
        ("deit3_small_patch16_224", {}, "it fits avit3_small_patch16_224 or avit3_small_patch16_384"),
        ("avit_tiny_patch16_224", {"depth": 3}, "and 105 more$"),
    ],
)
def test_weights_of_another_member_of_the_family(name, options, hint):
    model = timm.create_model("avit_tiny_patch16_224", depth=12)
    weights = timm.create_model(name, device="meta", **options).state_dict()
    with pytest.raises(UserError, match="does not fit the model: .*" + hint):
        checkpoints.load_weights(model, weights, "c", replace_head=True)


def test_safetensors(tmp_path):
    weights = halting_model().state_dict()
    save_file(weights, str(tmp_path / "w.safetensors"))
    checkpoint = checkpoints.load_checkpoint(str(tmp_path / "w.safetensors"))
    model = halting_model(mean=2.0)
    checkpoints.load_weights(model, Checkpoint(checkpoint, "w").state_dict(), "w", replace_head=False)
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        checkpoints.load_checkpoint(str(tmp_path / "broken.safetensors"))


HOSTILE = [name for name in vars(hostile_checkpoints.Kinds) if not name.startswith("_")]


@pytest.mark.parametrize("kind", HOSTILE)
def test_broken_and_hostile_files_are_refused(tmp_path, kind, monkeypatch):
    """See hostile_checkpoints.py, which can try more of them."""
    monkeypatch.setattr(checkpoints, "_hint_at_fitting_models", lambda weights: "")  # slow
    kinds = hostile_checkpoints.Kinds(tmp_path / "trap")
    for seed in range(5):
        (tmp_path / "c.pth").write_bytes(getattr(kinds, kind)(random.Random(seed)))
        assert hostile_checkpoints.try_file(tmp_path / "c.pth") == "refused"
        assert not (tmp_path / "trap").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint({"epoch": 1}, path)

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save_checkpoint({"epoch": 2}, path)
    assert checkpoints.load_checkpoint(str(path)) == {"epoch": 1}


# The gate ----------------------------------------------------------------------------------------

NO_FLAGS = {"gate_scale": None, "gate_center": None}
NAMESPACE = argparse.Namespace(gate_scale=100, gate_center=3)


def resolved(flags, content, location):
    sources = [] if content is None else Checkpoint(content, location).gate_sources()
    return checkpoints.resolve_gate(flags, sources)


@pytest.mark.parametrize(
    ("flags", "checkpoint", "location", "expected", "source"),
    [
        (NO_FLAGS, None, "", (10, 30), "the defaults"),
        (NO_FLAGS, {"model": {}}, "dir/tiny-10-30.pth", (10, 30), "the file name"),
        (NO_FLAGS, {"model": {}}, "dir/small-10-75.pth", (10, 75), "the file name"),
        (NO_FLAGS, {"model": {}}, "dir/tiny-2.5-30.5.pth", (2.5, 30.5), "the file name"),
        (NO_FLAGS, {"model": {}}, "visualization-tiny.pth", (5, 50), "the file name"),
        (NO_FLAGS, {"args": NAMESPACE}, "foreign.pth", (100, 3), "the checkpoint's args"),
        (NO_FLAGS, {"args": NAMESPACE}, "tiny-10-30.pth", (10, 30), "the file name"),
        (NO_FLAGS, {"gate": {"gate_scale": 4.0, "gate_center": 16.0}}, "tiny-10-30.pth", (4, 16), "the checkpoint"),
        (NO_FLAGS, {"gate": None, "args": {"gate_scale": 7, "gate_center": 8}}, "static.pth", (10, 30), "the defaults"),
        (
            NO_FLAGS,
            {"args": argparse.Namespace(gate_scale="rm -rf", gate_center=float("nan"))},
            "f.pth",
            (10, 30),
            "the defaults",
        ),
        ({"gate_scale": 1.0, "gate_center": 2.0}, {"args": NAMESPACE}, "tiny-10-30.pth", (1, 2), "the command line"),
        (NO_FLAGS, {}, "deit_tiny_patch16_224-a1311bcf.pth", (10, 30), "the defaults"),
    ],
)
def test_where_the_gate_comes_from(flags, checkpoint, location, expected, source, capsys):
    gate = resolved(flags, checkpoint, location)
    assert (gate["gate_scale"], gate["gate_center"]) == expected
    assert capsys.readouterr().out.count(f"from {source}") == 2


def test_sources_that_disagree_are_told(capsys):
    resolved({"gate_scale": 5.0, "gate_center": None}, {"args": NAMESPACE}, "tiny-10-30.pth")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 4 - 1
    assert "gate_scale: the command line says 5, the file name says 10; the command line counts" in warnings[0]


# What a checkpoint tells --------------------------------------------------------------------------


def test_what_our_checkpoints_record(tmp_path):
    args = {"model": "avit_micro_patch4_32", "input_size": [16, 40]}
    checkpoint = Checkpoint.load(str(save_halting_micro(tmp_path / "c.pth", 3, args=args, classes=["a", "b", "c"])))
    assert checkpoint.model_name() == "avit_micro_patch4_32"
    assert checkpoint.image_size() == (16, 40)
    assert checkpoint.class_names() == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"args": argparse.Namespace(model="deit_tiny")},
        {"args": {"model": ["avit_micro_patch4_32"], "input_size": "32"}, "classes": "abc"},
        {"args": 7, "classes": ["a", "b"]},
        {"args": {"model": "resnet50", "input_size": [1, 2, 3]}, "classes": ["a", "b", 3]},
        {"args": {"input_size": [10**6]}, "classes": ["a", "b", "a"]},
    ],
)
def test_what_cannot_be_trusted_is_found_out(tmp_path, entries):
    checkpoint = Checkpoint.load(str(save_halting_micro(tmp_path / "c.pth", 3, **entries)))
    assert checkpoint.model_name() == "avit_micro_patch4_32"
    assert checkpoint.image_size() is None
    assert list(checkpoint.class_names()) == ["class 0", "class 1", "class 2"]


def test_the_published_checkpoints_model_and_classes(tmp_path):
    model = timm.create_model("avit_tiny_patch16_224")
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="avit_tiny")}, tmp_path / "t-10-30.pth")
    checkpoint = Checkpoint.load(str(tmp_path / "t-10-30.pth"))
    assert checkpoint.model_name() == "avit_tiny_patch16_224"
    assert checkpoint.class_names()["n01443537"].startswith("goldfish")
    assert len(checkpoint.class_names()) == 1000


def test_weights_of_no_model_of_ours(tmp_path):
    torch.save({"model": timm.create_model("resnet10t").state_dict()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="fits none of our models"):
        Checkpoint.load(str(tmp_path / "c.pth")).model_name()


@pytest.mark.parametrize(
    "head", [None, torch.zeros(()), torch.zeros(3), torch.zeros(0, 48), torch.zeros(1).expand(3 * 10**7, 48)]
)
def test_weights_without_a_head(tmp_path, head):
    path = save_halting_micro(tmp_path / "c.pth", 3)
    checkpoint = torch.load(path)
    del checkpoint["model"]["head.weight"]
    checkpoint["model"] |= {} if head is None else {"head.weight": head}
    with pytest.raises(UserError, match="have no head"):
        Checkpoint(checkpoint, str(path)).class_names()


@pytest.mark.parametrize(("entries", "is_static"), [({}, False), ({"gate": None}, True)])
def test_static_checkpoints_of_ours(tmp_path, entries, is_static):
    assert Checkpoint.load(str(save_halting_micro(tmp_path / "c.pth", 3, **entries))).is_static == is_static
