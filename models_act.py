"""A-ViT: vision transformers whose tokens decide after every block whether to go on.

    import timm, models_act                                  # importing registers the models
    model = timm.create_model("avit_tiny_patch16_224")
    logits = model(images)                                   # [B, num_classes]
    logits, halting = model(images, return_halting=True)     # depth, ponder cost: [B, N]
    model = models_act.adapt(any_plain_vit_of_timm, gate_scale=5.0, gate_center=10.0)

The paper: Yin et al., A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022,
arXiv 2112.07658. The classes are timm's ViT and DeiT with another way through the blocks; weights
have timm's names, so DeiT's load as they are.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import (
    VisionTransformer,
    VisionTransformerDistilled,
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from macs import macs_per_image
from zipping import MaskedTokens, PackedTokensCPU, PackedTokensCUDA, can_pack, pack, uses_kernels
from zipping.blocks import (
    SUPPORTED_PARTS,
    is_plain,
    masked_block,
    plain_block,
    replaced_function,
    why_not_zippable,
    zipped_block,
)

__all__ = [
    "AdaptiveTokens",
    "AdaptiveVisionTransformer",
    "AdaptiveVisionTransformerDistilled",
    "Halting",
    "HaltingStep",
    "adapt",
    "adapt_",
    "halting_step",
    "macs_per_image",
]


class Halting(NamedTuple):
    """What the tokens of a batch did.

    depth: [B, N] float, 1..L, the number of blocks that processed the token (N_k in the paper);
    ponder_cost: [B, N] float, depth + remainder, differentiable (rho, Eq. 9);
    layer_scores: [L] float, mean halting score of the patch tokens after each block, a halted
    token counting 0, differentiable.
    """

    depth: Tensor
    ponder_cost: Tensor
    layer_scores: Tensor


class HaltingStep(NamedTuple):
    """One block's halting arithmetic, a value per token: see `halting_step`; `cumulative` is None once it is used."""

    cumulative: Tensor | None
    score: Tensor
    before: Tensor
    halts: Tensor

    @property
    def probability(self) -> Tensor:
        """p_l (Eq. 8): the remainder where the token halts."""
        return torch.where(self.halts, 1 - self.before, self.score)


class Gate(NamedTuple):
    """What a halting score follows from, as tensors of no dimension: a number would be made one in every block."""

    scale: float
    minus_center: Tensor
    limit: Tensor  # 1 - halt_eps

    @classmethod
    def of(cls, scale: float, center: float, halt_eps: float, device: torch.device) -> Gate:
        options = {"dtype": torch.float32, "device": device}
        return cls(scale, torch.full((), -center, **options), torch.full((), 1 - halt_eps, **options))

    def shifted(self, offset: Tensor) -> Gate:
        """offset: a value per token, of the shape that `halting_step` sees them in, added to the center."""
        return self._replace(minus_center=self.minus_center - offset)


def halting_step(x: Tensor, before: Tensor, gate: Gate, last: bool) -> HaltingStep:
    """The halting arithmetic after one block, for live tokens (Eq. 4 to 8 of the paper).

    x: [..., C], the block's output; before: [...] float32, the sum of the token's earlier scores.
    Returns, each [...]: `score`, h_l in float32; `before`; `cumulative`, c_l, the sum of both; `halts`,
    bool, True where that reaches 1 - halt_eps, and everywhere in the last block. A score that is not a
    number halts no token: it goes on, and the logits show it.
    """
    score = torch.sigmoid(torch.add(gate.minus_center, x.select(-1, 0).float(), alpha=gate.scale))
    cumulative = before + score
    halts = cumulative >= gate.limit
    return HaltingStep(cumulative, score, before, torch.ones_like(halts) if last else halts)


class _Halted(NamedTuple):
    """What is left after one block's halting.

    step: what the block's live tokens did; prefix: [B, P, C], the prefix tokens' states, anything where one has
    left, or None; tokens, rows, before: of the tokens that go on, before the next block.
    """

    step: HaltingStep
    prefix: Tensor | None
    tokens: MaskedTokens | PackedTokensCPU | PackedTokensCUDA
    rows: Tensor
    before: Tensor


def _halt(
    tokens: MaskedTokens | PackedTokensCPU | PackedTokensCUDA,
    rows: Tensor,
    before: Tensor,
    gate: Gate,
    last: bool,
    early_exit: bool,
    with_prefix: bool,
) -> _Halted:
    """One block's halting: the decisions, and that halted tokens leave, but for the last block."""
    step = halting_step(rows, before, gate, last)
    prefix = tokens.prefix(rows) if with_prefix else None
    if not last:
        tokens, (rows, before) = tokens.drop(step.halts, rows, step.cumulative, early_exit=early_exit)
    return _Halted(step, prefix, tokens, rows, before)


def _halt_by_kernels(tokens: PackedTokensCUDA, rows: Tensor, before: Tensor, gate: Gate, **options: bool) -> _Halted:
    """`_halt` on CUDA, with prefix and one gate for all images."""
    if len(rows) == 0:
        return _halt(tokens, rows, before, gate, with_prefix=True, **options)
    score, halts, prefix, *kept = tokens.halt(rows, before, gate.minus_center, gate.limit, gate.scale, **options)
    return _Halted(HaltingStep(None, score, before, halts), prefix, *kept)


class _Trace:
    """Collects what the blocks do to the tokens; what is reported of all of them is put together at the end."""

    def __init__(self):
        self.stores: list[MaskedTokens | PackedTokensCPU | PackedTokensCUDA] = []
        self.steps: list[HaltingStep] = []
        self.prefix_states: list[Tensor] = []  # [B, P, C] after each block, anything where a token has left

    def add(self, tokens: MaskedTokens | PackedTokensCPU | PackedTokensCUDA, halted: _Halted) -> None:
        """tokens: live before that."""
        self.stores.append(tokens)
        self.steps.append(halted.step)
        self.prefix_states.append(halted.prefix)

    def joined(self) -> HaltingStep:
        """The steps of all blocks, one after the other; cumulative scores, which nobody asks for, are left out."""
        score, before, halts = (
            torch.cat([getattr(step, name) for step in self.steps]) for name in ("score", "before", "halts")
        )
        return HaltingStep(cumulative=None, score=score, before=before, halts=halts)

    def tables(self, *values: Tensor) -> list[Tensor]:
        """values: as in `joined` -> each [L, B, N], zero where a token has left."""
        return self.stores[0].tables(self.stores, *values)

    def mean_field(self, probability: Tensor) -> Tensor:
        """probability: [L, B, N] -> sum_l p_l x_l of the prefix tokens (Eq. 5), [B, P, C]."""
        states = torch.stack(self.prefix_states)
        probability = probability[:, :, : states.shape[2], None]
        return (probability * states).masked_fill(probability == 0, 0).sum(dim=0)


def _halting(halts: Tensor, score: Tensor, num_prefix_tokens: int, num_blocks: int) -> Halting:
    """halts, score: [L, B, N], of the blocks that were run, of `num_blocks`."""
    block = torch.arange(1, len(halts) + 1, device=halts.device)[:, None, None]
    depth = (block * halts).sum(dim=0)
    remainder = 1 - (score * ~halts).sum(dim=0)
    layer_scores = score[:, :, num_prefix_tokens:].mean(dim=(1, 2))
    if len(halts) < num_blocks:  # nothing was left to run, or the model is pruned, and tokens may not have halted
        depth = depth.where(depth > 0, len(halts))
        layer_scores = F.pad(layer_scores, (0, num_blocks - len(halts)))
    return Halting(depth.float(), depth + remainder, layer_scores)


HALTING = {  # options of a model, and their defaults
    "gate_scale": 10.0,
    "gate_center": 30.0,
    "halt_eps": 0.01,
    "halting": True,
    "zip_tokens": True,
    "early_exit": True,
}
POOLINGS = ("token", "avg", "")
NO_GRAPH = (
    "{} is not supported: the shapes of an adaptive vision transformer depend on its input; "
    "use torch.compile on the masked form (zip_tokens=False), or export_onnx.py"
)


class AdaptiveTokens:
    """Makes any of timm's plain ViT or DeiT classes adaptive: put it before that class in the bases.

        class AdaptiveX(AdaptiveTokens, X): ...

    gate_scale, gate_center: h = sigmoid(gate_scale * x[..., 0] - gate_center);
    halt_eps: a token halts when its scores sum to 1 - halt_eps or more;
    halting: False gives the static ViT, every token through every block;
    zip_tokens: halted tokens leave the computation (else they are masked, at full cost, as also in
    torch.export and torch.jit.trace, which need static shapes, where there is no kernel, and, with
    a warning, where a hook or another module in a block may look at several tokens);
    early_exit: at inference, when logits alone are asked for, an image whose prefix tokens have
    all halted leaves as a whole; zipped form only.
    Everything else is timm's. ValueError for an option that halting cannot honour.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, **kwargs):
        halting = {name: kwargs.pop(name) for name in HALTING if name in kwargs}
        super().__init__(img_size=img_size, patch_size=patch_size, **kwargs)
        _refuse(_unfit_part(self) or _unfit_pooling(self.global_pool))
        self._set_halting(halting)

    def _set_halting(self, options: dict) -> None:
        """Of a model that is complete but for this."""
        for name, value in (HALTING | options).items():
            setattr(self, name, value)
        self.num_blocks = len(self.blocks)  # "the last block" stays this one if blocks are pruned

    @property
    def reads_prefix(self) -> bool:
        """Whether the head reads prefix tokens alone; where it reads patches no image can leave as a whole."""
        return self.global_pool == "token"

    def forward(self, x: Tensor, return_halting: bool = False, gate_offset: Tensor | None = None):
        """x: [B, in_chans, H, W] -> logits [B, num_classes], with `return_halting` also `Halting`.

        gate_offset: [B] float32, added to `gate_center` for each image: above zero its tokens stay longer.
        A distilled model in distilled training returns a pair of logits instead.
        """
        if isinstance(x, torch.fx.Proxy):
            raise NotImplementedError(NO_GRAPH.format("torch.fx"))
        features, halting = self._features(
            x,
            prefix_only=self.reads_prefix,
            return_halting=return_halting,
            early_exit=self.early_exit and self.reads_prefix and not self.training and not return_halting,
            gate_offset=gate_offset,
        )
        logits = self.forward_head(features)
        return (logits, halting) if return_halting else logits

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, N, C], the final norm of every token's mean-field output."""
        return self._features(x)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
        return_halting: bool = False,
    ):
        """timm's interface: the states after the blocks `indices`, and the final features.

        State l is x_l for tokens of depth l or more, and the last state of those that have left, so
        that a map is whole; the final features are those of `forward_features`, unless `stop_early`
        leaves out blocks. With `return_halting` a pair of all this and `Halting`. ValueError for an
        attention mask: which tokens attend is decided by halting.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(
                "an adaptive vision transformer takes no attn_mask or is_causal: halting sets its own mask"
            )
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is NCHW or NLC, not {output_fmt!r}")
        options = {"return_prefix_tokens": return_prefix_tokens, "norm": norm, "stop_early": stop_early}
        options |= {"output_fmt": output_fmt, "intermediates_only": intermediates_only, "output_dict": output_dict}
        if not self.halting:
            found = super().forward_intermediates(x, indices, **options)
            num_patches = math.prod(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
            num_tokens = self.num_prefix_tokens + num_patches
            return (found, self._static_halting(x, num_tokens)) if return_halting else found
        taken, last = feature_take_indices(len(self.blocks), indices)
        states = dict.fromkeys(taken)
        num_blocks = last + 1 if stop_early else len(self.blocks)
        output, halting = self._mean_field(
            self._embed(x), states=states, num_blocks=num_blocks, return_halting=return_halting
        )
        found = [self.norm(states[index]) if norm else states[index] for index in taken]
        prefix = [state[:, : self.num_prefix_tokens] for state in found]
        patches = [state[:, self.num_prefix_tokens :] for state in found]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": patches}
            result |= {"image_intermediates_prefix": prefix} if return_prefix_tokens else {}
            result |= {} if intermediates_only else {"image_features": self.norm(output)}
        else:
            intermediates = list(zip(patches, prefix)) if return_prefix_tokens else patches
            result = intermediates if intermediates_only else (self.norm(output), intermediates)
        return (result, halting) if return_halting else result

    @property
    def can_swap_channels(self) -> bool:
        """Whether patches are projected to their channels; a stem of convolutions may do without."""
        return not isinstance(self.patch_embed.proj, nn.Identity)

    @torch.no_grad()
    def set_halting_channel(self, channel: int) -> None:
        """Lets the halting score read another channel of the tokens: swaps it with channel 0, in all weights.

        As a static network the model stays what it is, but for the order of its channels. ValueError for another
        one where that is out of reach, see `can_swap_channels`.
        """
        if channel != 0 and not self.can_swap_channels:
            raise ValueError("a stem without a projection gives the channels their order: only channel 0 can be read")
        order = [channel, 0]
        for name, parameter in self.named_parameters():
            axis = _channel_axis(name)
            if axis is not None and channel != 0:
                swapped = parameter.index_select(axis, torch.tensor(order, device=parameter.device))
                parameter.index_copy_(axis, torch.tensor(order[::-1], device=parameter.device), swapped)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's interface. ValueError for a pooling that the constructor refuses."""
        if global_pool is not None:
            _refuse(_unfit_pooling(global_pool))
        super().reset_classifier(num_classes, global_pool)

    def __prepare_scriptable__(self):
        """What torch.jit.script asks first."""
        raise NotImplementedError(NO_GRAPH.format("TorchScript"))

    def _features(self, x: Tensor, return_halting: bool = False, **options) -> tuple[Tensor, Halting | None]:
        """Features of all tokens, or of the prefix tokens, [B, N or P, C], and the halting of all if asked.

        options: of `_run_blocks`.
        """
        if not self.halting:
            features = super().forward_features(x)
            return features, self._static_halting(features, features.shape[1]) if return_halting else None
        output, halting = self._mean_field(self._embed(x), return_halting=return_halting, **options)
        return self.norm(output), halting

    def _embed(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, N, C], what enters the first block."""
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def _mean_field(self, x: Tensor, **options) -> tuple[Tensor, Halting | None]:
        """`_run_blocks`, out of torch.compile's sight in the zipped form: there would be a graph for each size."""
        if self.zip_tokens and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return torch.compiler.disable(self._run_blocks)(x, **options)
        return self._run_blocks(x, **options)

    def _run_blocks(
        self,
        x: Tensor,
        prefix_only: bool = False,
        return_halting: bool = False,
        early_exit: bool = False,
        gate_offset: Tensor | None = None,
        states: dict[int, Tensor] | None = None,
        num_blocks: int | None = None,
    ) -> tuple[Tensor, Halting | None]:
        """x: [B, N, C] through the blocks -> sum_l p_l x_l (Eq. 5), [B, N, C], or [B, P, C] of prefix tokens.

        states: for each block index in it, gets the state after that block, [B, N, C], the last one
        where a token has left;
        num_blocks: how many blocks to run, all by default.
        """
        ways = self._ways(x)
        make_store = MaskedTokens.pack if masked_block in ways else pack
        tokens, rows = make_store(x, self.num_prefix_tokens)
        if self.grad_checkpointing and torch.is_grad_enabled():
            ways = [partial(checkpoint, way) for way in ways]
        dense = rows.shape  # in which every token has its place
        before = torch.zeros(dense[:-1], dtype=torch.float32, device=x.device)
        output = None if prefix_only else x.new_zeros(dense, dtype=torch.promote_types(x.dtype, before.dtype))
        gate = Gate.of(self.gate_scale, self.gate_center, self.halt_eps, x.device)
        trace, latest = _Trace(), None
        in_one_go = prefix_only and states is None and gate_offset is None and isinstance(tokens, PackedTokensCUDA)
        by_kernels = in_one_go and uses_kernels(x)
        halt = _halt_by_kernels if by_kernels else partial(_halt, with_prefix=prefix_only)
        for number, (block, way) in enumerate(zip(self.blocks[:num_blocks], ways), start=1):
            rows = way(block, rows, tokens)
            own_gate = gate if gate_offset is None else gate.shifted(tokens.spread(gate_offset))
            last = number == self.num_blocks
            halted = halt(tokens, rows, before, own_gate, last=last, early_exit=early_exit)
            trace.add(tokens, halted)
            if not prefix_only:
                output = tokens.add_to(output, halted.step.probability.unsqueeze(-1) * rows)
            if states is not None:
                latest = tokens.put(rows.new_empty(dense) if latest is None else latest, rows)
                states |= {index: latest.view_as(x) for index in states if index >= number - 1}
            _, _, tokens, rows, before = halted
            if last or (rows.shape[0] == 0 and not (self.training or torch.is_grad_enabled())):
                break  # else the blocks to come draw their random numbers, and get zero gradients
        steps = trace.joined()
        tables = trace.tables(steps.probability, *((steps.halts, steps.score) if return_halting else ()))
        output = trace.mean_field(tables[0]) if prefix_only else output.view_as(x)
        halting = _halting(*tables[1:], self.num_prefix_tokens, self.num_blocks) if return_halting else None
        return output.to(x.dtype), halting

    def _ways(self, x: Tensor) -> list[Callable]:
        """x: [B, N, C] -> how each block runs: all masked, or each on rows of live tokens, plain where it may be."""
        to_serve_other_images = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if not self.zip_tokens or to_serve_other_images or not can_pack(x):
            return [masked_block] * len(self.blocks)
        plain = [is_plain(block) for block in self.blocks._modules.values()]
        obstacle = replaced_function() or (None if all(plain) else why_not_zippable(self.blocks))
        if obstacle:
            message = f"halted tokens are masked, which saves nothing: {obstacle}"
            warnings.warn(message, stacklevel=8)  # whoever called the model
            return [masked_block] * len(self.blocks)
        in_full = torch.is_grad_enabled() or _has_any_global_hook()
        in_short = [short and not (in_full or block.training) for short, block in zip(plain, self.blocks)]
        return [plain_block if short else zipped_block for short in in_short]

    def _static_halting(self, x: Tensor, num_tokens: int) -> Halting:
        """x: [B, ...]; all weight on the last block: no score before it, remainder 1."""
        depth = x.new_full((len(x), num_tokens), self.num_blocks, dtype=torch.float32)
        return Halting(depth, depth + 1, depth.new_zeros(self.num_blocks))


class AdaptiveVisionTransformer(AdaptiveTokens, VisionTransformer):
    """timm's VisionTransformer with adaptive tokens."""


class AdaptiveVisionTransformerDistilled(AdaptiveTokens, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (class and distillation token) with adaptive tokens."""


ADAPTIVE = {
    VisionTransformer: AdaptiveVisionTransformer,
    VisionTransformerDistilled: AdaptiveVisionTransformerDistilled,
}


def _channel_axis(name: str) -> int | None:
    """Which axis of a parameter of a ViT are the channels of its tokens, by its name; None where there is none."""
    in_block = re.sub(r"^blocks\.\d+\.", "", name)
    if re.fullmatch(r"(head|head_dist)\.weight|attn\.qkv\.weight|mlp\.fc1(_g|_x)?\.weight", in_block):
        return 1
    if re.fullmatch(r"(cls|dist|reg)_token|pos_embed", name):
        return 2
    written = r"patch_embed\.proj|attn\.proj|mlp\.fc2|norm[12]?|norm_pre|fc_norm|patch_embed\.norm"
    return 0 if re.fullmatch(rf"({written})\.(weight|bias)|ls[12]\.gamma", in_block) else None


def adapt(model: VisionTransformer, **halting) -> AdaptiveTokens:
    """An adaptive copy of a plain ViT of timm's: the same weights, head, mode and device.

    halting: options of `AdaptiveTokens`. ValueError, with the reason, for a model of another class, or with a part that
    halting cannot honour; TypeError for an unknown option.
    """
    return adapt_(copy.deepcopy(model), **halting)


def adapt_(model: VisionTransformer, **halting) -> AdaptiveTokens:
    """`adapt` in place, which leaves no model of the class it was."""
    names = " or ".join(kind.__name__ for kind in ADAPTIVE)
    _refuse(None if type(model) in ADAPTIVE else f"a {type(model).__name__} is no {names} of timm's")
    unknown = sorted(halting.keys() - HALTING)
    if unknown:
        raise TypeError(f"adapt() takes {', '.join(HALTING)}, not {', '.join(unknown)}")
    _refuse(_unfit_part(model) or _unfit_pooling(model.global_pool))
    model.__class__ = ADAPTIVE[type(model)]
    model._set_halting(halting)
    return model


def _refuse(reason: str | None) -> None:
    if reason:
        raise ValueError(f"its tokens cannot be adaptive: {reason}")


def _unfit_part(model: VisionTransformer) -> str | None:
    """What in a ViT of timm's halting cannot honour, if anything."""
    for name, block in model.blocks.named_children():
        for part in ("", "attn", "mlp"):
            module = block.get_submodule(part)
            if type(module) not in SUPPORTED_PARTS[part]:
                return f"{f'blocks.{name}.{part}'.rstrip('.')} is a {type(module).__name__}"
    if isinstance(model, VisionTransformerDistilled) and (model.num_reg_tokens or model.no_embed_class):
        return "timm's distilled class has no reg_tokens and no no_embed_class"
    if not isinstance(model.patch_drop, nn.Identity):
        return "patch_drop_rate is above 0"
    return None


def _unfit_pooling(global_pool: str) -> str | None:
    return None if global_pool in POOLINGS else f"global_pool is {global_pool!r}, not 'token', 'avg' or ''"


# Registration with timm --------------------------------------------------------------------------


def _create_avit(
    variant: str, pretrained: bool = False, model_cls: type[AdaptiveTokens] = AdaptiveVisionTransformer, **kwargs
):
    """Build a registered model; `pretrained` starts from its source's weights, loaded by timm.

    The hub is tried first, then the address of the original release. RuntimeError, naming
    --pretrained-path, if neither can be reached.
    """
    build = partial(
        build_model_with_cfg,
        model_cls,
        variant,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
    )
    if not pretrained:
        return build(pretrained=False, **kwargs)
    try:
        return build(pretrained=True, **kwargs)
    except Exception as hub_error:  # whatever the hub's client raises
        overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "hf_hub_id": None, "source": ""}
        try:
            return build(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        except OSError as url_error:
            raise RuntimeError(
                f"no pretrained weights for {variant}: neither the hub ({_first_line(hub_error)}) nor the "
                f"original address ({_first_line(url_error)}) could be reached; download them elsewhere "
                "and give the file with --pretrained-path"
            ) from url_error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


EVALUATION = {"crop_pct": 224 / 256, "crop_mode": "center", "interpolation": "bicubic"}


def _cfg(source: str | None = None, **kwargs) -> dict:
    """timm's configuration of the pretrained model `source`, for one that starts from its weights.

    Images are evaluated as in the original, however those of its source were. The hub id is spelt
    out: timm would complete "timm/" with the name of our model.
    """
    if source is None:
        mean_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return {"url": "", "first_conv": "patch_embed.proj", "classifier": "head", **mean_std, **EVALUATION, **kwargs}
    own = {"architecture", "tag"}  # of the configuration, not of the weights
    config = get_pretrained_cfg(source, allow_unregistered=False).to_dict()
    return {k: v for k, v in config.items() if k not in own} | {"hf_hub_id": f"timm/{source}", **EVALUATION, **kwargs}


TINY = {"embed_dim": 192, "num_heads": 3}
SMALL = {"embed_dim": 384, "num_heads": 6}
MEDIUM = {"embed_dim": 512, "num_heads": 8}
BASE = {"embed_dim": 768, "num_heads": 12}
DISTILLED = {"model_cls": AdaptiveVisionTransformerDistilled}
DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
# For images of 32 x 32 pixels or so; timm's default initialisation hardly trains at this width.
MICRO = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "num_heads": 3, "weight_init": "reset"}
MICRO_CFG = _cfg(num_classes=10, input_size=(3, 32, 32), fixed_input_size=True)

# Every model: whose weights it starts from, and its sizes. Each becomes a function of this module.
MODELS = {
    "avit_micro_patch4_32": (None, MICRO),
    "avit_tiny_patch16_224": ("deit_tiny_patch16_224.fb_in1k", TINY),
    "avit_small_patch16_224": ("deit_small_patch16_224.fb_in1k", SMALL),
    "avit_base_patch16_224": ("deit_base_patch16_224.fb_in1k", BASE),
    "avit_base_patch16_384": ("deit_base_patch16_384.fb_in1k", BASE),
    "avit_tiny_distilled_patch16_224": ("deit_tiny_distilled_patch16_224.fb_in1k", DISTILLED | TINY),
    "avit_small_distilled_patch16_224": ("deit_small_distilled_patch16_224.fb_in1k", DISTILLED | SMALL),
    "avit_base_distilled_patch16_224": ("deit_base_distilled_patch16_224.fb_in1k", DISTILLED | BASE),
    "avit_base_distilled_patch16_384": ("deit_base_distilled_patch16_384.fb_in1k", DISTILLED | BASE),
    "avit3_small_patch16_224": ("deit3_small_patch16_224.fb_in1k", DEIT3 | SMALL),
    "avit3_small_patch16_384": ("deit3_small_patch16_384.fb_in1k", DEIT3 | SMALL),
    "avit3_medium_patch16_224": ("deit3_medium_patch16_224.fb_in1k", DEIT3 | MEDIUM),
    "avit3_base_patch16_224": ("deit3_base_patch16_224.fb_in1k", DEIT3 | BASE),
    "avit3_base_patch16_384": ("deit3_base_patch16_384.fb_in1k", DEIT3 | BASE),
}
SOURCES = {name: source for name, (source, _) in MODELS.items() if source}
default_cfgs = generate_default_cfgs(
    {"avit_micro_patch4_32": MICRO_CFG}
    | {f"{name}.{source.replace('.', '_')}": _cfg(source) for name, source in SOURCES.items()}
)


def _register(name: str, sizes: dict) -> None:
    """Makes the function of that name by which timm, and whoever imports it, creates the model."""

    def create(pretrained: bool = False, **kwargs) -> AdaptiveTokens:
        return _create_avit(name, pretrained, **{**sizes, **kwargs})

    create.__name__ = create.__qualname__ = name
    globals()[name] = register_model(create)


for _name, (_, _sizes) in MODELS.items():
    _register(_name, _sizes)
del _name, _sizes
