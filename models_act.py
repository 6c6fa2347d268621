"""A-ViT: vision transformers whose tokens decide after every block whether to go on.

    import timm, models_act                                  # importing registers the models
    model = timm.create_model("avit_tiny_patch16_224")
    logits = model(images)                                   # [B, num_classes]
    logits, halting = model(images, return_halting=True)     # depth, ponder cost: [B, N]

The paper: Yin et al., A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022,
arXiv 2112.07658. The classes are timm's ViT and DeiT with another way through the blocks; weights
have timm's names, so DeiT's load as they are.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models import (
    VisionTransformer,
    VisionTransformerDistilled,
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models.deit import default_cfgs as deit_cfgs
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn

from zipping import MaskedTokens, ZippedTokens


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
    """One block's halting arithmetic, a value per token: see `halting_step`."""

    score: Tensor
    probability: Tensor
    cumulative: Tensor
    goes_on: Tensor


def halting_step(
    x: Tensor, cumulative: Tensor, *, gate_scale: float, gate_center: float, halt_eps: float, last: bool
) -> HaltingStep:
    """The halting arithmetic after one block, for live tokens (Eq. 4 to 8 of the paper).

    x: [..., C], the block's output; cumulative: [...] float32, the sum of the token's earlier
    scores. Returns, each [...]: `score`, h_l in float32; `probability`, p_l; `cumulative`, with
    this block's score (1 in the last block); `goes_on`, bool, False where that reaches
    1 - halt_eps: the token halts.
    """
    score = torch.sigmoid(gate_scale * x[..., 0].float() - gate_center)
    now = cumulative + (torch.ones_like(score) if last else score)
    goes_on = now < 1 - halt_eps
    return HaltingStep(score, torch.where(goes_on, score, 1 - cumulative), now, goes_on)


class _HaltingTrace:
    """Collects, block by block, what `Halting` reports."""

    def __init__(self, tokens: MaskedTokens | ZippedTokens, num_prefix_tokens: int, num_blocks: int):
        self.num_prefix_tokens = num_prefix_tokens
        self.num_blocks = num_blocks
        self.depth = torch.zeros(tokens.live.shape, device=tokens.live.device)
        self.spent = torch.zeros_like(self.depth)  # h_1 + ... + h_{depth-1}
        self.layer_scores: list[Tensor] = []

    def add(self, tokens: MaskedTokens | ZippedTokens, step: HaltingStep) -> None:
        self.depth = self.depth + tokens.live
        score, spent = tokens.unpack(step.score, step.score * step.goes_on)
        self.spent = self.spent + spent
        self.layer_scores.append(score[:, self.num_prefix_tokens :].mean())

    def halting(self) -> Halting:
        unreached = self.num_blocks - len(self.layer_scores)
        layer_scores = torch.stack(self.layer_scores + [self.spent.new_zeros(())] * unreached)
        return Halting(self.depth, self.depth + (1 - self.spent), layer_scores)


class _AdaptiveTokens:
    """Makes one of timm's plain ViT classes adaptive: put it before that class in the bases.

    gate_scale, gate_center: h = sigmoid(gate_scale * x[..., 0] - gate_center);
    halt_eps: a token halts when its scores sum to 1 - halt_eps or more;
    halting: False gives the static ViT, every token through every block;
    zip_tokens: halted tokens leave the computation (else they are masked, at full cost);
    early_exit: at inference, when logits alone are asked for, an image whose prefix tokens have
    all halted leaves as a whole; zipped form only.
    Everything else is timm's. ValueError for an option that halting cannot honour.
    """

    def __init__(
        self,
        *args,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        halt_eps: float = 0.01,
        halting: bool = True,
        zip_tokens: bool = True,
        early_exit: bool = True,
        **kwargs,
    ):
        _refuse_unsupported(**kwargs)
        super().__init__(*args, **kwargs)
        self.gate_scale = gate_scale
        self.gate_center = gate_center
        self.halt_eps = halt_eps
        self.halting = halting
        self.zip_tokens = zip_tokens
        self.early_exit = early_exit
        self.num_blocks = len(self.blocks)  # "the last block" stays this one if blocks are pruned

    def forward(self, x: Tensor, return_halting: bool = False):
        """x: [B, in_chans, H, W] -> logits [B, num_classes], with `return_halting` also `Halting`.

        A distilled model in distilled training returns a pair of logits instead.
        """
        reads_prefix = self.global_pool == "token"
        features, halting = self._features(
            x,
            first=self.num_prefix_tokens if reads_prefix else None,
            return_halting=return_halting,
            early_exit=self.early_exit and reads_prefix and not self.training and not return_halting,
        )
        logits = self.forward_head(features)
        return (logits, halting) if return_halting else logits

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, N, C], the final norm of every token's mean-field output."""
        return self._features(x)[0]

    def _features(
        self, x: Tensor, first: int | None = None, return_halting: bool = False, early_exit: bool = False
    ) -> tuple[Tensor, Halting | None]:
        """Features of the `first` tokens of each image (all by default), and their halting if asked."""
        if not self.halting:
            features = super().forward_features(x)
            return features, self._static_halting(features) if return_halting else None
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        output, halting = self._mean_field(x, first, return_halting, early_exit)
        return self.norm(output), halting

    def _mean_field(
        self, x: Tensor, first: int | None, return_halting: bool, early_exit: bool
    ) -> tuple[Tensor, Halting | None]:
        """x: [B, N, C] through the blocks -> sum_l p_l x_l for the `first` tokens (Eq. 5)."""
        store = ZippedTokens if self.zip_tokens else MaskedTokens
        tokens, rows = store.pack(x)
        cumulative = torch.zeros(rows.shape[:-1], device=x.device)
        output = torch.zeros(1, device=x.device)
        trace = _HaltingTrace(tokens, self.num_prefix_tokens, self.num_blocks) if return_halting else None
        for number, block in enumerate(self.blocks, start=1):
            rows = self._run_block(block, rows, tokens)
            step = halting_step(
                rows,
                cumulative,
                gate_scale=self.gate_scale,
                gate_center=self.gate_center,
                halt_eps=self.halt_eps,
                last=number == self.num_blocks,
            )
            probability, state = tokens.unpack(step.probability, rows, first=first)
            output = output + probability.unsqueeze(-1) * state
            if return_halting:
                trace.add(tokens, step)
            staying = step.goes_on
            if early_exit and self.zip_tokens:
                prefix_stays = tokens.unpack(staying, first=self.num_prefix_tokens)[0].any(dim=1)  # [B]
                staying = staying & tokens.spread(prefix_stays)
            tokens, (rows, cumulative) = tokens.keep(staying, rows, step.cumulative)
            if len(rows) == 0 and not self.training:
                break
        return output.to(x.dtype), trace.halting() if return_halting else None

    def _run_block(self, block: Block, rows: Tensor, tokens: MaskedTokens | ZippedTokens) -> Tensor:
        run = partial(_zipped_block if self.zip_tokens else _masked_block, block)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, rows, tokens)
        return run(rows, tokens)

    def _static_halting(self, features: Tensor) -> Halting:
        """All weight on the last block: no score before it, remainder 1."""
        depth = features.new_full(features.shape[:2], self.num_blocks, dtype=torch.float32)
        return Halting(depth, depth + 1, depth.new_zeros(self.num_blocks))


class AdaptiveVisionTransformer(_AdaptiveTokens, VisionTransformer):
    """timm's VisionTransformer with adaptive tokens."""


class AdaptiveVisionTransformerDistilled(_AdaptiveTokens, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (class and distillation token) with adaptive tokens."""


def _refuse_unsupported(
    *,
    block_fn: type = Block,
    attn_layer: type | str = Attention,
    mlp_layer: type = Mlp,
    patch_drop_rate: float = 0.0,
    class_token: bool = True,
    global_pool: str = "token",
    **_,
) -> None:
    """ValueError, naming it, for an option of timm's VisionTransformer that halting cannot honour."""
    refused = {
        "block_fn": block_fn is not Block,
        "attn_layer": attn_layer not in (Attention, "", "attn"),
        "mlp_layer": mlp_layer not in (Mlp, GluMlp, SwiGLU),
        "patch_drop_rate": patch_drop_rate > 0,
        "class_token": not class_token,
        "global_pool": global_pool not in ("token", ""),
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"an adaptive vision transformer does not support {name}={locals()[name]!r}")


def _masked_block(block: Block, x: Tensor, tokens: MaskedTokens) -> Tensor:
    """x: [B, N, C] -> [B, N, C]; timm's own block, halted tokens masked as keys."""
    return block(x, attn_mask=tokens.attention_mask())


def _zipped_block(block: Block, rows: Tensor, tokens: ZippedTokens) -> Tensor:
    """rows: [T, C] -> [T, C]; what timm's block does, on live tokens alone."""
    attended = block.ls1(_zipped_attention(block.attn, block.norm1(rows), tokens))
    rows = rows + _drop_path(block.drop_path1, attended, tokens)
    return rows + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(rows))), tokens)


def _zipped_attention(attn: Attention, rows: Tensor, tokens: ZippedTokens) -> Tensor:
    """rows: [T, C] -> [T, C]"""
    qkv = attn.qkv(rows).view(-1, 3, attn.num_heads, attn.head_dim)  # [T, 3, H, D]
    if not isinstance(attn.q_norm, nn.Identity):
        q, k, v = qkv.unbind(1)
        qkv = torch.stack([attn.q_norm(q), attn.k_norm(k), v], dim=1)
    out = tokens.attend(qkv, attn.attn_drop.p if attn.training else 0.0).flatten(1)
    return attn.proj_drop(attn.proj(attn.norm(out)))


def _drop_path(drop_path: nn.Module, branch: Tensor, tokens: ZippedTokens) -> Tensor:
    """Stochastic depth per image: draws for all images, like timm's on a dense batch."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return branch
    scale = drop_path(branch.new_ones(len(tokens.lengths), 1))  # [B, 1]
    return branch * tokens.spread(scale)


# What a model costs ------------------------------------------------------------------------------


def macs_per_image(model: _AdaptiveTokens, depth: Tensor) -> Tensor:
    """Multiply-adds of one forward pass in which tokens reach these depths.

    depth: [B, N], 1..L -> [B] float64. Counts patch embedding, the blocks' projections and MLPs,
    attention (2 n^2 C for n live tokens), and the heads; norms and activations are left out, as is
    usual. Of a static pass: depth L everywhere.
    """
    embed = model.patch_embed.proj.weight.numel() * (depth.shape[1] - model.num_prefix_tokens)
    heads = sum(_linear_weights(module) for name, module in model.named_children() if name.startswith("head"))
    blocks = depth.new_tensor([[_linear_weights(b), 2 * b.attn.attn_dim] for b in model.blocks], dtype=torch.float64)
    reached = torch.arange(len(blocks), device=depth.device)[:, None, None]
    live = (depth > reached).sum(dim=2).double()  # [L, B]
    return embed + heads + (live * blocks[:, :1] + live**2 * blocks[:, 1:]).sum(dim=0)


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def impose_depths(model: _AdaptiveTokens, mean: float, spread: float) -> None:
    """Set weights so that tokens halt around depth `mean` with standard deviation `spread`, in blocks.

    For tests and benchmarks. Channel 0 then grows by the same step in every block and starts, for
    each token, from its position (half of the variance), its content (a quarter) and its image (a
    quarter; the only part for prefix tokens), which the first head of block 1 brings to all of the
    image's tokens. The shares hold for images of standard normal noise. Other weights, and so the
    rest of the computation, stay as they are.

    ValueError for a model whose projections have no bias or that normalises before its blocks.
    """
    blocks, grid, channels = model.blocks, model.patch_embed.num_patches, model.embed_dim
    if blocks[0].mlp.fc2.bias is None or not isinstance(model.norm_pre, nn.Identity):
        raise ValueError("impose_depths needs proj_bias=True and pre_norm=False")
    slope = 6.0  # rise of the gate's logit per block: steep enough to halt within one or two
    step = slope / model.gate_scale  # the same in units of channel 0
    crossing = mean - _halting_lag(slope)  # the block where the logit of an average token crosses 0
    start = (model.gate_center / slope - crossing) * step  # in channel 0; + l * step after block l

    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        block.attn.proj.weight[0], block.attn.proj.bias[0] = 0, 0
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = 0, step
        for scale in (block.ls1, block.ls2):
            if not isinstance(scale, nn.Identity):
                scale.gamma[0] = 1

    kernel = model.patch_embed.proj.weight
    content, shared = torch.randn(2, *kernel.shape[1:], generator=generator).to(kernel)
    content, shared = content / content.norm(), shared / shared.norm()  # of unit variance on normal noise
    kernel[0], kernel[1], kernel[2] = 0.5 * spread * step * content, shared, -shared
    if model.patch_embed.proj.bias is not None:
        model.patch_embed.proj.bias[:3] = 0

    _impose_start(model, start, math.sqrt(0.5) * spread * step, generator)
    _impose_image_term(blocks[0], 0.5 * spread * step * math.sqrt(grid), start, channels)


def _impose_start(model: _AdaptiveTokens, start: float, position_std: float, generator: torch.Generator) -> None:
    """Channels 0 to 2 before the first block: `start` plus a term of the position; 0, 0."""
    prefix = [t for t in (model.cls_token, model.reg_token, getattr(model, "dist_token", None)) if t is not None]
    for token in prefix:
        token[..., :3] = 0
        token[..., 0] = start
    if model.pos_embed is None:
        model.patch_embed.proj.bias[0] = start
        return
    model.pos_embed[..., :3] = 0
    patches = model.pos_embed[:, -model.patch_embed.num_patches :, 0]
    quantiles = torch.linspace(0, 1, patches.numel() + 2)[1:-1][torch.randperm(patches.numel(), generator=generator)]
    patches.copy_(start + position_std * math.sqrt(2) * torch.erfinv(2 * quantiles - 1))


def _impose_image_term(block: Block, std: float, start: float, channels: int) -> None:
    """Block 1's attention adds the image's mean content (channel 1 - channel 2) to channel 0.

    `std` is that of the term times the square root of the number of patches.
    """
    attn = block.attn
    queries, value = slice(attn.head_dim), 2 * attn.attn_dim  # of the first head; its first value channel
    for parameter in attn.qkv.parameters():
        parameter[queries] = 0  # the first head attends evenly
        parameter[value] = 0
    attn.qkv.weight[value, 1], attn.qkv.weight[value, 2] = 1, -1
    block.norm1.weight[1:3] = 1
    if block.norm1.bias is not None:
        block.norm1.bias[1:3] = 0
    norm = math.sqrt((start**2 + 2) / channels + 1 / 3)  # what norm1 divides by, roughly
    attn.proj.weight[0, 0] = std * norm / 2


def _halting_lag(slope: float) -> float:
    """Mean blocks between a logit's crossing of 0 and the halting of its token."""
    crossing = 20 + torch.linspace(0, 1, 101)[:-1]
    cumulative = torch.sigmoid(slope * (torch.arange(1, 41)[:, None] - crossing)).cumsum(0)  # [l, crossing]
    depth = (cumulative < 0.99).sum(0) + 1
    return (depth - crossing).mean().item()


# Registration with timm --------------------------------------------------------------------------


def _create_avit(variant: str, pretrained: bool = False, distilled: bool = False, **kwargs):
    """Build a registered model; `pretrained` starts from DeiT's weights, loaded by timm.

    The hub is tried first, then the address of the original release. RuntimeError, naming
    --pretrained-path, if neither can be reached.
    """
    build = partial(
        build_model_with_cfg,
        AdaptiveVisionTransformerDistilled if distilled else AdaptiveVisionTransformer,
        variant,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
    )
    if not pretrained:
        return build(pretrained=False, **kwargs)
    try:
        return build(pretrained=True, **kwargs)
    except OSError as hub_error:  # includes requests' and huggingface_hub's errors
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


def _cfg(source: str | None = None, **kwargs) -> dict:
    """timm's configuration of a pretrained model, for one that starts from its weights.

    The hub id is spelt out: timm would complete "timm/" with the name of our model.
    """
    if source is None:
        mean_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        base = {"url": "", "first_conv": "patch_embed.proj", "classifier": "head", **mean_std}
    else:
        architecture, tag = source.split(".")
        base = deit_cfgs[architecture].cfgs[tag].to_dict() | {"hf_hub_id": f"timm/{source}"}
        for derived in ("architecture", "tag"):
            base.pop(derived, None)
    return base | kwargs


default_cfgs = generate_default_cfgs(
    {
        "avit_micro_patch4_32": _cfg(
            num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic", fixed_input_size=True
        ),
        "avit_tiny_patch16_224.deit_fb_in1k": _cfg("deit_tiny_patch16_224.fb_in1k"),
        "avit_small_patch16_224.deit_fb_in1k": _cfg("deit_small_patch16_224.fb_in1k"),
        "avit_tiny_distilled_patch16_224.deit_fb_in1k": _cfg("deit_tiny_distilled_patch16_224.fb_in1k"),
        "avit_small_distilled_patch16_224.deit_fb_in1k": _cfg("deit_small_distilled_patch16_224.fb_in1k"),
    }
)


@register_model
def avit_micro_patch4_32(pretrained: bool = False, **kwargs) -> AdaptiveVisionTransformer:
    args = dict(img_size=32, patch_size=4, embed_dim=48, depth=12, num_heads=3, weight_init="reset")
    return _create_avit("avit_micro_patch4_32", pretrained, **{**args, **kwargs})


@register_model
def avit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> AdaptiveVisionTransformer:
    args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_avit("avit_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def avit_small_patch16_224(pretrained: bool = False, **kwargs) -> AdaptiveVisionTransformer:
    args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_avit("avit_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def avit_tiny_distilled_patch16_224(pretrained: bool = False, **kwargs) -> AdaptiveVisionTransformerDistilled:
    args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_avit("avit_tiny_distilled_patch16_224", pretrained, distilled=True, **{**args, **kwargs})


@register_model
def avit_small_distilled_patch16_224(pretrained: bool = False, **kwargs) -> AdaptiveVisionTransformerDistilled:
    args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_avit("avit_small_distilled_patch16_224", pretrained, distilled=True, **{**args, **kwargs})
