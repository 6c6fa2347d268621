"""The baselines in which tokens leave or merge at fixed rates: what stays, results, gradients and MACs."""

import json
from unittest.mock import patch

import pytest
import timm
import torch
from conftest import images, with_directions
from equivalence import flops
from hypothesis import given
from hypothesis import strategies as st
from timm.models import _registry
from torch.testing import assert_close

import models_act
from experiments import baselines, merging, stages
from experiments.baselines import register
from experiments.settings import setting
from macs import macs_per_image, static_macs
from training.checkpoints import Checkpoint
from training.network import differences


@pytest.fixture(autouse=True, scope="module")
def registry():
    """Restore the registry afterwards: other tests must not find the baselines among the registered models."""
    with patch.dict(_registry._model_entrypoints), patch.dict(models_act.default_cfgs):
        yield


def build(kind, size=32, halting=False, **options):
    torch.manual_seed(0)
    model = timm.create_model(register(kind), img_size=size, num_classes=3, halting=halting, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)  # so that attention differs between tokens
    return model


def live_counts(depth):
    """Return the number of tokens in each block: [B, L]. depth: [B, N]"""
    return torch.stack([(depth > block).sum(dim=1) for block in range(12)], dim=1)


@torch.no_grad()
def cost(model, x):
    halting = model(x, return_halting=True)[1]
    return (macs_per_image(model, halting.depth) / static_macs(model)).tolist()


COUNTS = (64, 50, 50, 31, 30, 20, 20, 9, 3, 1, 0)
THREE_STEPS = [65] * 2 + [41] * 2 + [18] * 2 + [6] * 6
LIVE = {  # tokens of an image of 64 patches in each block
    "evit:2:40:4:17:6:5": THREE_STEPS,
    "fused:2:40:4:17:6:5": THREE_STEPS,
    "random:2:40:4:17:6:5": THREE_STEPS,
    "counts:" + ",".join(map(str, COUNTS)): [65, *(1 + count for count in COUNTS)],
}


@pytest.mark.parametrize("kind", LIVE)
@torch.no_grad()
def test_blocks_run_the_same_number_of_tokens_in_every_image(kind):
    model, seen = build(kind, halting=kind.startswith("counts")), []
    for block in model.blocks:
        block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    depth = model(images(3, 32), return_halting=True)[1].depth
    assert live_counts(depth).tolist() == [LIVE[kind]] * 3
    assert seen == LIVE[kind]
    assert (depth[:, 0] == 12).all()
    assert len(depth.unique(dim=0)) == 3  # not the same patches in every image


@torch.no_grad()
def test_fused_token_is_the_weighted_average_of_all_that_leave():
    model, x = build("fused:2:5"), images(2, 32)
    entering = {}
    model.blocks[2].register_forward_pre_hook(lambda _, args: entering.update(x=args[0]))
    depth = model(x, return_halting=True)[1].depth
    attention = {}
    block, state = model.blocks[1], model.blocks[0](model._embed(x)[0])
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, args, out: attention.update(weights=out))
    state, weights = block(state), attention["weights"].mean(dim=1)[:, 0, 1:]
    for image in range(2):
        order = weights[image].argsort(descending=True)
        assert set((depth[image, 1:] == 12).nonzero()[:, 0].tolist()) == set(order[:5].tolist())
        weight = weights[image, order[4:], None]
        expected = (weight * state[image, 1 + order[4:]]).sum(dim=0) / weight.sum()
        assert_close(entering["x"][image, -1], expected)


# A-ViT with the same counts in every image --------------------------------------------------------


def halting_pair(counts, **gate):
    """Return A-ViT and the baseline of these counts, with the same weights and gate. The class token never halts."""
    adaptive = build("full", halting=True, **gate)
    adaptive.cls_token.data[..., 0] = -100.0
    same = build("counts:" + ",".join(map(str, counts)), halting=True, **gate)
    same.load_state_dict(adaptive.state_dict())
    return adaptive, same


def test_same_counts_equal_adaptive_model_on_an_image_with_these_counts():
    gate, x = {"gate_scale": 4.0, "gate_center": 2.0}, images(1, 32)
    adaptive, _ = halting_pair(COUNTS, **gate)
    counts = live_counts(adaptive(x, return_halting=True)[1].depth)[0]
    assert counts[1] > counts[4] > counts[-1]  # tokens halt in several blocks
    adaptive, same = halting_pair((counts[1:] - 1).tolist(), **gate)
    outputs = [model(x, return_halting=True) for model in (adaptive, same)]
    (expected, halting), (logits, same_halting) = outputs
    assert_close(logits, expected)
    assert_close(tuple(same_halting), tuple(halting))
    gradients = []
    for model, (logits, halting) in zip((adaptive, same), outputs):
        (logits.sum() + halting.ponder_cost.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_same_counts_with_directions_equal_the_adaptive_model():
    x, adaptive = images(1, 32), with_directions(build("full", halting=True, gate_scale=4.0, gate_center=2.0))
    counts = live_counts(adaptive(x, return_halting=True)[1].depth)[0]
    assert counts[1] > counts[4] > counts[-1]
    kind = "counts:" + ",".join(str(count - 1) for count in counts[1:].tolist())
    same = with_directions(build(kind, halting=True, gate_scale=4.0, gate_center=2.0))
    same.load_state_dict(adaptive.state_dict())
    (expected, halting), (logits, same_halting) = (model(x, return_halting=True) for model in (adaptive, same))
    assert_close(logits, expected)
    assert_close(tuple(same_halting), tuple(halting))


def test_regate_keeps_the_gate_of_the_one_and_the_weights_of_the_other(tmp_path):
    static, trained = (build("full") for _ in range(2))
    common = {"classes": ["a", "b", "c"], "args": {"model": "avit_micro_patch4_32", "input_size": [32]}}
    gate = {"gate_scale": 6.0, "gate_center": 1.5, "halt_eps": 0.01, "gate_directions": torch.randn(12, 49)}
    torch.save({"model": static.state_dict(), "gate": None, **common}, tmp_path / "static.pth")
    torch.save({"model": trained.state_dict(), "gate": gate, **common}, tmp_path / "trained.pth")
    files = [str(tmp_path / f"{name}.pth") for name in ("trained", "static", "out")]
    stages.main(["regate", *files])
    model = Checkpoint.load(files[2]).build_model()
    assert (model.gate_scale, model.gate_center) == (6.0, 1.5)
    assert torch.equal(model.gate_directions, gate["gate_directions"])
    assert all(
        torch.equal(value.half().float(), model.state_dict()[name]) for name, value in static.state_dict().items()
    )
    torch.save({"model": trained.state_dict(), "gate": {"gate_scale": 6.0}, **common}, tmp_path / "trained.pth")
    with pytest.raises(SystemExit, match="expected a gate by direction"):
        stages.main(["regate", *files])


@torch.no_grad()
def test_gate_offset_and_early_halting_of_the_class_token():
    same = halting_pair(COUNTS, gate_scale=0.0, gate_center=0.0)[
        1
    ]  # each score is 1/2: all halt after the second block
    x, seen = images(2, 32), []
    for block in same.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[:, :1]))
    logits = same(x)
    assert_close(logits, same.forward_head(same.norm((seen[0] + seen[1]) / 2)))
    offset = torch.tensor([0.0, 100.0])  # the second image keeps all its scores at 0
    assert_close(same(x, gate_offset=offset)[1], same.forward_head(same.norm(seen[-1]))[1])


@torch.no_grad()
def test_counts_without_halting_run_the_static_model():
    adaptive, same = halting_pair(COUNTS)
    adaptive.halting = same.halting = False
    assert torch.equal(same(images(2, 32)), adaptive(images(2, 32)))


def test_counts_of_recorded_stage(tmp_path, capsys):
    share = [1.0] + [(1 + count) / 65 + 0.004 for count in COUNTS[:-1]] + [0.013]  # the class token halts in an image
    (tmp_path / "test.json").write_text(json.dumps({"eval": {"live_share": share}}))
    (tmp_path / "training.json").write_text(json.dumps({"epochs": [{}, {"test_live_share": share}]}))
    for name in ("test", "training"):
        stages.main(["counts", str(tmp_path / f"{name}.json"), "64"])
        kind = capsys.readouterr().out.strip()
        assert kind == "counts:" + ",".join(map(str, COUNTS))
        register(kind)


def test_counts_refuse_a_budget():
    with pytest.raises(SystemExit, match="MACs are fixed"):
        baselines.main(["counts:1,1", "--target_macs=0.3"])


# Merging ------------------------------------------------------------------------------------------


def tokens(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, key = torch.randn(2, 1 + n, 6, generator=generator), torch.randn(2, 1 + n, 4, generator=generator)
    return x, torch.randint(1, 5, (2, 1 + n), generator=generator).float(), key


@given(st.integers(1, 30), st.integers(0, 15), st.integers(0, 3))
def test_merging_keeps_class_token_and_weighted_sum(n, rate, seed):
    x, size, key = tokens(n, seed)
    merged = merging.num_merged(1 + n, rate)
    out, out_size = merging.merge(x, size, key, merged)
    assert out.shape == (2, 1 + n - merged, 6)
    assert torch.equal(out_size.sum(dim=1), size.sum(dim=1))
    assert_close((out * out_size[..., None]).sum(dim=1), (x * size[..., None]).sum(dim=1), rtol=1e-4, atol=1e-4)
    assert_close(out[:, 0], x[:, 0])
    assert torch.equal(out_size[:, 0], size[:, 0])


def test_most_similar_pairs_merge():
    x, _, key = tokens(6)
    key[:, 5], key[:, 2] = 3 * key[:, 4], 0.5 * key[:, 3]  # patches 5 and 4, 2 and 3: sources are patches 1, 3, 5
    out, size = merging.merge(x, torch.ones(2, 7), key, 2)
    assert size.tolist() == [[1, 1, 2, 2, 1]] * 2  # class token, source 1, targets 2, 4, 6
    assert_close(out, torch.stack([x[:, 0], x[:, 1], x[:, 2:4].mean(1), x[:, 4:6].mean(1), x[:, 6]], dim=1))


@torch.no_grad()
def test_merged_copies_count_as_often_as_in_full_model():
    model, full = build("tome:32"), build("full")
    full.load_state_dict(model.state_dict())
    model.rate = 0
    assert_close(model(images(2, 32)), full(images(2, 32)), rtol=1e-4, atol=1e-5)
    # Without positions, the patches of an image of one color are copies: merging them changes nothing.
    model.rate = 32
    for each in (model, full):
        each.pos_embed.zero_()
    plain = torch.ones(2, 3, 32, 32) * torch.tensor([0.3, -1.0])[:, None, None, None]
    assert_close(model(plain), full(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rates", "size"), [("1", 32), ("5", 32), ("9:4", 56), ("17:11", 56), ("60", 56)])
@torch.no_grad()
def test_macs_of_merging_equal_those_that_torch_counts(rates, size):
    model, x = build(f"tome:{rates}", size), images(1, size)
    depth = model(x, return_halting=True)[1].depth
    one_token = macs_per_image(model, torch.tensor([[12.0, 12.0]])) - macs_per_image(
        model, torch.tensor([[12.0, 11.0]])
    )
    pair = 2 * depth.shape[1] * 2 * model.embed_dim  # one more token attends to all tokens, and they to it
    counted = flops(lambda: model(x)) / 2
    assert abs(macs_per_image(model, depth).item() - counted) <= (one_token.item() + pair) / 2


# All of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fused:2:40:4:17", "evit:2:40", "tome:9", "counts:" + ",".join(map(str, COUNTS))])
def test_gradients_reach_every_parameter(kind):
    model = build(kind, halting=kind.startswith("counts"), drop_path_rate=0.1, gate_scale=1.0, gate_center=9.0).train()
    model(images(2, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(block.attn.qkv.weight.grad.abs().max() > 0 for block in model.blocks)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("evit:3:20", "evit:3:9"),
        ("evit:3:20", "fused:3:20"),
        ("tome:3", "tome:3:2"),
        ("counts:9,9,9,9,9,9,9,9,9,9,9", "counts:9,9,9,9,9,9,9,9,9,9,8"),
    ],
)
def test_checkpoint_of_other_kind_is_recognized(kind, other):
    assert len(differences(register(kind), register(other), (32, 32))) == 1


@pytest.mark.parametrize("budget", [0.45, 0.3, 0.2])
@pytest.mark.parametrize("method", ["evit", "tome"])
def test_setting_has_the_macs_of_the_budget(method, budget):
    with torch.device("meta"):
        full = timm.create_model("avit_micro_patch4_32", img_size=56)
    kind = setting(method, budget, full)
    assert cost(build(kind, 56), images(1, 56)) == pytest.approx([budget], abs=0.0015)
    blocks = {0.45: "3 6 9", 0.3: "2 4 6", 0.2: "1 2 3"}
    assert method == "tome" or kind.split(":")[1::2] == blocks[budget].split()


INVALID_NUMBERS = {
    "takes pairs of a block and a number": "evit:3 evit:3:20:5",
    "ascending": "random:3:20:2:10 evit:3:20:4:20 evit:0:20 evit:12:20 evit:3:0",
    "invalid literal": "tome tome:x evit:a:3",
    "longer": "tome:1:2:3 narrow:1:2",
    "none larger": "counts:3,2,1 counts:9,9,9,9,9,9,9,9,9,9,10 counts:9,9,9,9,9,9,9,9,9,9,-1",
}


@pytest.mark.parametrize(("message", "kinds"), INVALID_NUMBERS.items())
def test_invalid_numbers_raise(message, kinds):
    for kind in kinds.split():
        with pytest.raises(ValueError, match=message):
            timm.create_model(register(kind), img_size=32)


def test_setting_of_unknown_method_raises():
    with pytest.raises(ValueError, match="expected tome"):
        setting("narrow", 0.3, build("full"))
