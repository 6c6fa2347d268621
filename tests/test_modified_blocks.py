"""Modified blocks: which changes are zipped, which are masked with a warning."""

import warnings
import weakref

import emulated_attention
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_halting, halting_model, images
from equivalence import CLOSE, assert_same, flops, masked_and_zipped
from torch import nn
from torch.testing import assert_close

import zipping

pytestmark = pytest.mark.usefixtures("token_store")


class Adapter(nn.Module):
    """A residual branch around a block, as in adapter tuning, that also reads neighboring tokens."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **options):
        y = self.block(x, **options)
        return y + 0.5 * y.roll(1, dims=1)


class Scaled(nn.Module):
    """A wrapper around a part of a block that halves its output."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, *args, **options):
        return 0.5 * self.part(x, *args, **options)


class LoRA(nn.Module):
    """A low-rank update of the queries, written for [B, N, C] inputs."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, 2)
        self.up = nn.Linear(2, linear.in_features)

    def forward(self, x):
        out = self.linear(x).clone()
        out[:, :, : x.shape[2]] += self.up(self.down(x))
        return out


def replace_forward(module):
    original = module.forward
    module.forward = lambda *args, **options: 0.5 * original(*args, **options)


def wrap(part, wrapper):
    def change(block):
        setattr(block, part, wrapper(getattr(block, part)))

    return change


def put_a_hooked_layer(block):
    """Insert a layer whose hook was registered before."""
    block.attn.qkv = HOOKED


HOOKED = nn.Linear(24, 72)
HOOKED.register_forward_hook(lambda m, a, out: 0.5 * out)
ONE_TOKEN_CHANGES = {  # still zipped
    "LoRA": lambda block: wrap("qkv", LoRA)(block.attn),
    "a wrapped layer": lambda block: wrap("fc1", Scaled)(block.mlp),
    "a layer's forward": lambda block: replace_forward(block.mlp.fc2),
    "another norm": lambda block: setattr(block, "norm1", nn.RMSNorm(24)),
    "layer scale": lambda block: setattr(block, "ls1", timm.layers.LayerScale(24, init_values=0.3)),
}
MANY_TOKEN_CHANGES = {  # masked, with this reason in the warning
    "attention": (wrap("attn", Scaled), "Scaled"),
    "MLP": (wrap("mlp", Scaled), "Scaled"),
    "a block's forward": (replace_forward, "forward"),
    "attention's forward": (lambda block: replace_forward(block.attn), "forward"),
    "an editing hook": (lambda block: block.register_forward_hook(lambda m, a, out: out * 0.5), "hook"),
    "a hook on a layer": (lambda block: block.attn.qkv.register_forward_hook(lambda m, a, out: out.flip(1)), "hook"),
    "a pre-hook": (lambda block: block.mlp.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)), "hook"),
    "an idle layer's forward": (lambda block: replace_forward(block.ls2), "ls2.forward"),
    "a custom layer scale": (wrap("ls1", Scaled), "ls1 is a Scaled"),
    "a custom drop path": (wrap("drop_path1", Scaled), "drop_path1 is a Scaled"),
    "a layer with a hook": (put_a_hooked_layer, "hook"),
    "attention that is not fused": (lambda block: setattr(block.attn, "fused_attn", False), "fused"),
}


def changed(change, x, training=False):
    """Return logits before a change to block 2, then a zipped and a masked model with it.

    The change comes after a first forward pass, as in user code.
    """
    model = halting_model().train(training)
    with torch.no_grad():
        before = model(x)
    pair = masked_and_zipped(model)[::-1]
    for copied in pair:
        torch.manual_seed(0)
        change(copied.blocks[2])
    return before, *pair


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("change", ONE_TOKEN_CHANGES.values(), ids=ONE_TOKEN_CHANGES)
def test_one_token_change_is_zipped(change, training):
    before, zipped, masked = changed(change, images(), training)
    halting = assert_same(masked, zipped, images())
    assert_halting(halting)
    with torch.no_grad():
        assert not torch.allclose(zipped(images()), before)
        assert flops(lambda: zipped(images())) < flops(lambda: masked(images()))


@pytest.mark.parametrize(("change", "reason"), MANY_TOKEN_CHANGES.values(), ids=MANY_TOKEN_CHANGES)
def test_many_token_change_is_masked_with_one_warning(change, reason):
    before, zipped, masked = changed(change, images())
    with pytest.warns(UserWarning, match=reason) as warned:
        logits, halting = zipped(images(), return_halting=True)
    assert len(warned) == 1
    assert warned[0].filename == __file__, "the warning points to the caller"
    assert_halting(halting)
    expected, _ = masked(images(), return_halting=True)
    assert torch.equal(logits, expected)
    assert reason == "fused" or not torch.allclose(logits, before)


PATCHED = (
    timm.models.vision_transformer.Block,
    timm.layers.Attention,
    timm.layers.Mlp,
    nn.Linear,
    timm.layers.LayerNorm,
)


@pytest.mark.parametrize("owner", [*PATCHED, F], ids=lambda owner: owner.__name__)
@torch.no_grad()
def test_function_replaced_globally_is_masked_with_warning(monkeypatch, owner):
    """Libraries for faster attention, or for attention maps, replace functions this way."""
    masked, zipped = masked_and_zipped(halting_model().eval())
    before = zipped(images())
    name = "scaled_dot_product_attention" if owner is F else "forward"
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: 0.5 * original(*args, **options))
    with pytest.warns(UserWarning, match=f"{name} was replaced"):
        found = zipped(images())
    assert torch.equal(found, masked(images()))
    assert not torch.allclose(found, before)


def test_cuda_store_calls_cuda_kernels(token_store):
    emulated_attention.calls.clear()
    halting_model()(images())
    assert bool(emulated_attention.calls) == (token_store == "CUDA")


def test_attention_dropout_reaches_the_kernels(monkeypatch, token_store):
    model, rates = halting_model(attn_drop_rate=0.25), set()
    store = zipping.PackedTokensCUDA if token_store == "CUDA" else zipping.PackedTokensCPU

    def attend(self, q, k, v, dropout_p):
        rates.add(dropout_p)
        return q

    monkeypatch.setattr(store, "_attend", attend)
    for training in (True, False):
        rates.clear()
        model.train(training)(images())
        assert rates == {0.25 * training}


def test_torch_func_gradient_equals_backward():
    model = halting_model().eval()
    parameters = dict(model.named_parameters())
    x = images(2)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    model(x).sum().backward()
    assert_close(gradients["head.weight"], model.head.weight.grad, **CLOSE)


@torch.no_grad()
def test_forward_keeps_at_most_two_block_outputs():
    model = halting_model(zip_tokens=False).eval()
    outputs, alive = [], []
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward, **options: remember(f(x, **options))

    def remember(x):
        outputs.append(weakref.ref(x.untyped_storage()))
        alive.append(sum(output() is not None for output in outputs))
        return x

    model(images())
    assert max(alive) <= 2


@torch.no_grad()
def test_dropout_left_in_training_mode_is_applied():
    """Monte Carlo dropout keeps dropout on in evaluation."""
    model = halting_model(proj_drop_rate=0.5).eval()
    before = model(images())
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))
    assert not torch.allclose(model(images()), before)


def test_adapter_around_a_block_is_masked():
    _, zipped, masked = changed(lambda block: None, images())
    for model in (zipped, masked):
        model.blocks[2] = Adapter(model.blocks[2])
    with pytest.warns(UserWarning, match="blocks.2 is a Adapter"):
        assert torch.equal(zipped(images()), masked(images()))


def test_hooks_get_dense_inputs_until_removed():
    model = halting_model().eval()
    model(images())  # a first pass without hooks
    shapes = []
    modules = [module for block in model.blocks for module in block.modules() if "drop" not in repr(module).lower()]
    handles = [m.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape[:2])) for m in modules]
    with pytest.warns(UserWarning, match="hook"):
        model(images())
    assert len(shapes) >= len(modules)
    assert {shape for shape in shapes if len(shape) == 2} >= {(6, 17)}
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())


def test_global_hooks_run_for_every_module():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        halting_model().eval()(images())
    finally:
        handle.remove()
    assert seen.count(nn.Linear) >= 4 * 4
    assert seen.count(timm.models.vision_transformer.Block) >= 4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_nan_score_halts_no_token(training):
    """A diverged model must not look cheap."""
    for model in masked_and_zipped(halting_model(mean=3).train(training)):
        model.blocks[1].mlp.fc2.bias[0] = float("nan")
        logits, halting = model(images(), return_halting=True)
        assert halting.depth.unique().tolist() == [1, 8]
        in_time = halting.depth[:, 0] == 1  # class tokens that halt before the NaN
        assert torch.equal(logits.isnan().all(dim=1), ~in_time)
        assert torch.equal(halting.ponder_cost.isnan(), halting.depth == 8)
