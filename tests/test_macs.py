"""MACs of modified models: equal to what torch counts, or to those of the plain layer, or an error."""

import copy

import pytest
import torch
from conftest import halting_model, images
from equivalence import flops
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization as register

from macs import macs_counter, macs_per_image

DEPTH = torch.full((1, 17), 8.0)


def macs(model) -> float:
    return macs_per_image(model, DEPTH).item()


def torch_macs(model) -> float:
    with torch.no_grad():
        return flops(lambda: model(images(1))) / 2


def static(**options) -> nn.Module:
    return halting_model(halting=False, **options).eval()


class LoRA(nn.Module):
    """A layer with a low-rank branch, as peft makes them."""

    def __init__(self, base_layer, merged=False):
        super().__init__()
        self.base_layer, self.merged = base_layer, merged
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(self.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, self.out_features, bias=False)})

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B["default"](self.lora_A["default"](x))


class RawLoRA(nn.Linear):
    """A subclass of the linear layer with matrices of its own."""

    def __init__(self, base_layer):
        super().__init__(base_layer.in_features, base_layer.out_features)
        self.down = nn.Parameter(torch.randn(self.in_features, 4))
        self.up = nn.Parameter(torch.randn(4, self.out_features))

    def forward(self, x):
        return super().forward(x) + x @ self.down @ self.up


class OwnAttention(nn.Module):
    """An attention of another class."""

    def __init__(self, dim):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 3, batch_first=True)

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.attention(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """A block around a block, which runs it twice."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **options):
        return self.block(self.block(x, **options), **options)


def replace(part, wrapper):
    def change(model):
        parent, _, name = part.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapper(model.get_submodule(part)))

    return change


def replace_forward(model):
    layer = model.blocks[2].mlp.fc1
    original = layer.forward
    layer.forward = lambda x: original(original(x)[..., :24])


MEASURED = {
    "LoRA": replace("blocks.1.attn.qkv", LoRA),
    "merged LoRA": replace("blocks.1.attn.qkv", lambda layer: LoRA(layer, merged=True)),
    "LoRA of each kind": lambda m: [replace(f"blocks.1.{p}", LoRA)(m) for p in ("attn.proj", "mlp.fc1", "mlp.fc2")],
    "LoRA in LoRA": replace("blocks.1.mlp.fc2", lambda layer: LoRA(LoRA(layer))),
    "LoRA with matrices": replace("blocks.1.mlp.fc2", RawLoRA),
    "forward": replace_forward,
    "attention": replace("blocks.3.attn", lambda _: OwnAttention(24)),
    "block": replace("blocks.3", Twice),
    "no MLP": replace("blocks.3.mlp", lambda _: nn.Identity()),
    "smaller MLP": replace("blocks.3.mlp", lambda _: nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 24))),
    "head": replace("head", lambda _: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 50), nn.Linear(50, 7))),
    "no head": lambda model: model.reset_classifier(0),
    "layer on all tokens": replace("norm_pre", lambda _: nn.Linear(24, 24)),
    "fewer blocks": lambda model: model.prune_intermediate_layers(3),
    "patch embedding": replace("patch_embed.proj", lambda conv: nn.Sequential(conv, nn.Conv2d(24, 24, 1))),
    "shared block": lambda model: setattr(model, "blocks", nn.Sequential(*[model.blocks[0]] * 4)),
    "shared layer": replace("blocks.3.mlp", lambda _: nn.Sequential(*[nn.Linear(24, 24)] * 2)),
    "a hook": lambda model: model.blocks[1].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", MEASURED.values(), ids=MEASURED)
def test_macs_are_those_that_torch_counts(change):
    model = static()
    before = macs(model)
    change(model)
    assert macs(model) == torch_macs(model)
    assert (macs(model) == before) == (change in map(MEASURED.get, ("merged LoRA", "attention", "a hook")))


def test_gated_attention_is_counted():
    model = static()
    for block in model.blocks:
        block.attn.gate = nn.Linear(24, 24)
    assert macs(model) == torch_macs(model)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_macs_of_another_attention_grow_with_live_tokens(depth):
    """The pairs of tokens are counted, for any number of live tokens."""
    model, other = static(), static()
    for block in other.blocks:
        block.attn = OwnAttention(24)
    depths = torch.randint(1, depth + 1, (5, 17)).float()
    assert torch.equal(macs_per_image(other, depths), macs_per_image(model, depths))


def quantize(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def each_linear(change):
    def change_all(model):
        for module in [m for m in model.modules() if type(m) is nn.Linear]:
            change(module)

    return change_all


AS_PLAIN = {
    "weight norm": each_linear(parametrizations.weight_norm),
    "spectral norm": each_linear(parametrizations.spectral_norm),
    "orthogonal": each_linear(parametrizations.orthogonal),
    "former weight norm": each_linear(nn.utils.weight_norm),
    "pruning": each_linear(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    "two parametrizations": each_linear(lambda m: register(parametrizations.spectral_norm(m), "weight", nn.ReLU())),
    "patch embedding": lambda model: parametrizations.weight_norm(model.patch_embed.proj),
    "compiled": replace("blocks.1", torch.compile),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", AS_PLAIN.values(), ids=AS_PLAIN)
def test_macs_of_a_changed_weight_are_those_of_the_plain_layer(change):
    model = static()
    before = macs(model)
    change(model)
    assert macs(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [parametrizations.orthogonal, quantize], ids=["parametrized", "quantized"])
def test_macs_of_lora_on_a_changed_layer(base):
    model, plain = static(), static()
    replace("blocks.1.mlp.fc2", LoRA)(plain)
    holder = nn.Sequential(model.blocks[1].mlp.fc2)
    holder = quantize(holder) if base is quantize else nn.Sequential(base(holder[0]))
    model.blocks[1].mlp.fc2 = LoRA(holder[0])
    assert macs(model) == macs(plain)


class Failing(nn.Module):
    def forward(self, x, **options):
        raise IndexError("no such expert")


class Latent(nn.Module):
    """A layer whose compute does not grow from zero: it attends from tokens of its own."""

    def __init__(self):
        super().__init__()
        self.latent = nn.Linear(24, 24)

    def forward(self, x):
        return self.latent(torch.cat([x, x[:, :1]], dim=1))[:, :-1]


class Opaque(nn.Module):
    """A layer whose ops torch cannot count."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 24))

    def forward(self, x):
        return (x[..., None] * self.weight).sum(dim=-2)


UNKNOWN = {
    "failing": (replace("blocks.1.mlp", lambda _: Failing()), "blocks.1.mlp, a Failing, cannot be counted: no such"),
    "constant": (replace("blocks.1.mlp", lambda _: Latent()), "blocks.1.mlp, a Latent, cannot be counted"),
    "opaque": (replace("blocks.1.mlp", lambda _: Opaque()), "blocks.1.mlp, a Opaque, cannot be counted"),
    "lazy": (replace("blocks.1.attn.qkv", lambda _: nn.LazyLinear(72)), "blocks.1.attn.qkv are not known before"),
    "attention of torch": (replace("blocks.1.attn", lambda _: nn.MultiheadAttention(24, 3)), "blocks.1.attn, a Multi"),
    "embedding": (replace("patch_embed.proj", lambda _: Failing()), "patch_embed, a PatchEmbed, cannot be counted"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_macs_that_cannot_be_counted_raise(change, message):
    model = static()
    change(model)
    with pytest.raises(ValueError, match=f"the MACs of {message}"):
        macs(model)


def test_counting_changes_nothing():
    """Counting runs copies of unknown layers: no hook is called, and no mode, gradient or random state changes."""
    model, calls = halting_model(drop_path_rate=0.1).train(), []
    replace("blocks.1.mlp.fc1", LoRA)(model)
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *args: calls.append(args))
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode():
        macs_counter(model, 17)(DEPTH)
    assert calls == []
    assert model.blocks[1].mlp.fc1.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
