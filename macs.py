"""MACs (multiply-accumulate operations) of a vision transformer whose tokens halt at different depths."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.flop_counter import FlopCounterMode


def macs_per_image(model: nn.Module, depth: Tensor) -> Tensor:
    """Return the MACs of one forward pass in which the tokens reach these depths.

    model: a ViT of timm; depth: [B, N], 1..L -> [B] float64. For the static model, depth is L everywhere.
    Counts the patch embedding, the projections and MLPs of the blocks, attention (2 n^2 C for n live
    tokens) and the heads. Norms, activations, rotary position embeddings and gates are not counted.
    A gate by direction needs C per token and block.
    """
    return macs_counter(model, depth.shape[1])(depth)


def macs_counter(model: nn.Module, num_tokens: int) -> Callable[[Tensor], Tensor]:
    """Return `macs_per_image` of this model and number of tokens as a function of depth, for repeated calls.

    The sizes of the model's layers are read only once.
    Raises ValueError for a layer whose MACs cannot be counted.
    """
    sizes = {name: _layer_macs(name, module, model.embed_dim) for name, module in _layers(model)}
    per_block = torch.tensor([sizes.pop(name) for name in list(sizes) if "." in name], dtype=torch.float64)
    fixed = _embedding_macs(model.patch_embed, num_tokens - model.num_prefix_tokens)
    for name, (per_token, per_pair) in sizes.items():
        runs = 1 if name.startswith("head") else num_tokens  # the head runs once, other layers on all tokens
        fixed += per_token * runs + per_pair * runs**2

    def count(depth: Tensor) -> Tensor:
        blocks = per_block.to(depth.device, non_blocking=True)
        block = torch.arange(len(blocks), device=depth.device)[:, None, None]
        live = (depth > block).sum(dim=2).double()  # [L, B]
        return fixed + (live * blocks[:, :1] + live**2 * blocks[:, 1:]).sum(dim=0)

    return count


def macs_at_depth(model: nn.Module, depth: float) -> float:
    """Return the MACs of one image of the model's size if every token reaches the same depth."""
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return macs_per_image(model, torch.full((1, num_tokens), float(depth))).item()


def static_macs(model: nn.Module) -> float:
    """Return the MACs of one image of the model's size through every block."""
    return macs_at_depth(model, model.num_blocks)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks and the other layers of a ViT with their names, except the embeddings."""
    for name, module in model.named_children():
        if name == "blocks":
            yield from ((f"blocks.{number}", block) for number, block in _children(module))
        elif name not in ("patch_embed", "rope"):
            yield name, module


STEM_MACS: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # stem -> its image size, its MACs at that size


def _embedding_macs(embed: nn.Module, num_patches: int) -> float:
    """Return the MACs of the patch embedding.

    A convolutional stem is counted once, by torch on the meta device. For image sizes other than
    its own, its MACs are assumed to grow with the number of patches.
    """
    if isinstance(embed, PatchEmbed) and _is_of(embed.proj, nn.Conv2d):
        conv = embed.proj
        return conv.out_channels * conv.in_channels // conv.groups * math.prod(conv.kernel_size) * num_patches
    size, macs = STEM_MACS.get(embed, (None, None))
    if size != embed.img_size:
        weights = {name: value.to("meta") for name, value in embed.state_dict().items()}
        image = torch.empty(1, _input_channels(embed), *embed.img_size, device="meta")
        macs = _counted("patch_embed", embed, lambda: torch.func.functional_call(embed, weights, image))
        STEM_MACS[embed] = embed.img_size, macs
    return macs * num_patches / embed.num_patches


def _input_channels(embed: nn.Module) -> int:
    """Return the number of channels of the images, which is that of the first convolution."""
    return next((m.in_channels for m in embed.modules() if isinstance(m, nn.Conv2d)), 3)


# Layers ------------------------------------------------------------------------------------------


def _layer_macs(name: str, module: nn.Module, width: int) -> tuple[float, float]:
    """Return the MACs of a layer for each of n tokens, and for each of n^2 pairs of tokens.

    Layers of torch and timm are counted by the sizes of their linear layers, so that a parametrized, pruned or
    quantized layer counts like a plain one. Other code is run, see `_measured_macs`.
    """
    module = module._modules.get("_orig_mod", module)  # of torch.compile
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"the MACs of {name} are not known before the model has run once: it is a LazyLinear")
    if _is_linear(module):
        return module.in_features * module.out_features, 0
    is_library_code = _is_library_code(module)
    if not module._modules and not module._parameters and is_library_code:
        return 0, 0
    is_attention = any(_is_of(module, layer) for layer in (Attention, AttentionRope, EvaAttention))
    has_matrices = any(parameter.ndim > 1 for parameter in module._parameters.values() if parameter is not None)
    if not is_library_code or has_matrices or (hasattr(module, "num_heads") and not is_attention):
        return _measured_macs(name, module, width)
    inside = [_layer_macs(f"{name}.{child}", layer, width) for child, layer in _children(module)]
    per_pair = 2 * module.num_heads * module.head_dim if is_attention else 0
    return sum(one for one, _ in inside), sum(two for _, two in inside) + per_pair


def _children(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Return the layers in a module. A sequence runs a layer as often as it holds it."""
    return module._modules.items() if isinstance(module, (nn.Sequential, nn.ModuleList)) else module.named_children()


def _is_library_code(module: nn.Module) -> bool:
    """Return whether torch or timm define the computation of a module."""
    defined_in = getattr(type(module).forward, "__module__", "")
    return "forward" not in vars(module) and defined_in.startswith(("torch.", "timm."))


def _is_of(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Return whether a module computes what this class computes."""
    return isinstance(module, layer) and type(module).forward is layer.forward and "forward" not in vars(module)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer. A quantized one has a method `weight`, which unpacks the weights.

    No weight is read: a parametrized one would be computed.
    """
    is_quantized = callable(getattr(type(module), "weight", None)) and hasattr(module, "in_features")
    return _is_library_code(module) and (isinstance(module, nn.Linear) or is_quantized)


def _measured_macs(name: str, module: nn.Module, width: int) -> tuple[float, float]:
    """Return `_layer_macs` of any layer, from runs of a copy on 1, 2 and 3 tokens.

    Only what it computes counts: the branch of a LoRA layer, but not if it is merged or disabled.
    """
    one, two, three = (_macs_of_run(name, module, width, tokens) for tokens in (1, 2, 3))
    per_pair = (two - 2 * one) / 2
    per_token = one - per_pair
    if three != 3 * per_token + 9 * per_pair or (one == 0 and any(p.ndim > 1 for p in module.parameters())):
        raise ValueError(f"the MACs of {name}, a {type(module).__name__}, cannot be counted")
    if isinstance(module, nn.Linear):  # with a forward of its own, maybe by an op that torch cannot count
        per_token = max(per_token, module.in_features * module.out_features)
    return per_token, per_pair


@torch.inference_mode(False)
@torch.enable_grad()  # else torch's attention takes a path that it cannot count
def _macs_of_run(name: str, module: nn.Module, width: int, num_tokens: int) -> float:
    """Count the MACs of a copy of a layer. Its linear layers are counted by size instead of run."""
    copied, macs = _named(name, module, lambda: copy.deepcopy(module)).eval(), 0.0

    def count_linear(layer: nn.Module, x: Tensor) -> Tensor:
        nonlocal macs
        macs += x.numel() * layer.out_features
        return x.new_zeros(*x.shape[:-1], layer.out_features)

    linear = [layer for layer in copied.modules() if _is_linear(layer)]
    for layer in copied.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    for layer in linear:
        layer.forward = partial(count_linear, layer)
    width = getattr(module, "in_features", linear[0].in_features if linear else width)
    weight = next((p for p in copied.parameters() if p.is_floating_point()), torch.empty(0))
    x = weight.new_zeros(1, num_tokens, width).requires_grad_()
    return _counted(name, module, lambda: copied(x)) + macs


def _counted(name: str, module: nn.Module, run: Callable[[], object]) -> float:
    """Return the MACs of a run that torch counts. Raises ValueError if the run fails."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not all counted
        _named(name, module, run)
    return counter.get_total_flops() / 2


def _named(name: str, module: nn.Module, run: Callable[[], nn.Module]) -> nn.Module:
    """Call `run`, and raise any error as a ValueError that names the module."""
    try:
        return run()
    except Exception as error:  # code of others may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the MACs of {name}, a {type(module).__name__}, cannot be counted: {reason}") from error
