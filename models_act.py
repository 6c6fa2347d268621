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
    get_pretrained_cfg,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn

from zipping import MaskedTokens, ZippedTokens

__all__ = [
    "AdaptiveTokens",
    "AdaptiveVisionTransformer",
    "AdaptiveVisionTransformerDistilled",
    "Halting",
    "HaltingStep",
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
    """One block's halting arithmetic, a value per token: see `halting_step`."""

    score: Tensor
    probability: Tensor
    cumulative: Tensor
    continues: Tensor


def halting_step(
    x: Tensor, cumulative: Tensor, *, gate_scale: float, gate_center: float, halt_eps: float, last: bool
) -> HaltingStep:
    """The halting arithmetic after one block, for live tokens (Eq. 4 to 8 of the paper).

    x: [..., C], the block's output; cumulative: [...] float32, the sum of the token's earlier
    scores. Returns, each [...]: `score`, h_l in float32; `probability`, p_l; `cumulative`, with
    this block's score (1 in the last block); `continues`, bool, False where that reaches
    1 - halt_eps: the token halts.
    """
    score = torch.sigmoid(gate_scale * x[..., 0].float() - gate_center)
    now = cumulative + (torch.ones_like(score) if last else score)
    continues = now < 1 - halt_eps
    return HaltingStep(score, torch.where(continues, score, 1 - cumulative), now, continues)


class _HaltingTrace:
    """Collects, block by block, what `Halting` reports."""

    def __init__(self, tokens: MaskedTokens | ZippedTokens, num_prefix_tokens: int, num_blocks: int):
        self.num_prefix_tokens = num_prefix_tokens
        self.num_blocks = num_blocks
        self.depth = torch.zeros(tokens.live.shape, device=tokens.live.device)
        self.score_before_halting = torch.zeros_like(self.depth)  # h_1 + ... + h_{depth-1}
        self.layer_scores: list[Tensor] = []

    def add(self, tokens: MaskedTokens | ZippedTokens, step: HaltingStep) -> None:
        self.depth = self.depth + tokens.live
        score, score_before_halting = tokens.unpack(step.score, step.score * step.continues)
        self.score_before_halting = self.score_before_halting + score_before_halting
        self.layer_scores.append(score[:, self.num_prefix_tokens :].mean())

    def halting(self) -> Halting:
        unreached = self.num_blocks - len(self.layer_scores)
        layer_scores = torch.stack(self.layer_scores + [self.score_before_halting.new_zeros(())] * unreached)
        return Halting(self.depth, self.depth + (1 - self.score_before_halting), layer_scores)


class AdaptiveTokens:
    """Makes any of timm's plain ViT or DeiT classes adaptive: put it before that class in the bases.

        class AdaptiveX(AdaptiveTokens, X): ...

    gate_scale, gate_center: h = sigmoid(gate_scale * x[..., 0] - gate_center);
    halt_eps: a token halts when its scores sum to 1 - halt_eps or more;
    halting: False gives the static ViT, every token through every block;
    zip_tokens: halted tokens leave the computation (else they are masked, at full cost, as also on
    meta tensors and in torch.export and torch.jit.trace, which need static shapes);
    early_exit: at inference, when logits alone are asked for, an image whose prefix tokens have
    all halted leaves as a whole; zipped form only.
    Everything else is timm's. ValueError for an option that halting cannot honour.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        halt_eps: float = 0.01,
        halting: bool = True,
        zip_tokens: bool = True,
        early_exit: bool = True,
        **kwargs,
    ):
        _refuse_unsupported(distilled=isinstance(self, VisionTransformerDistilled), **kwargs)
        super().__init__(img_size=img_size, patch_size=patch_size, **kwargs)
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
    ):
        """timm's interface: the states after the blocks `indices`, and the final features.

        State l is x_l for tokens of depth l or more and zero for the others; the final features are
        those of `forward_features`, unless `stop_early` leaves out blocks. ValueError for an
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
            return super().forward_intermediates(x, indices, **options)
        taken, last = feature_take_indices(len(self.blocks), indices)
        embedded = self._embed(x)
        states = dict.fromkeys(taken, torch.zeros_like(embedded))  # of blocks that no token reaches
        num_blocks = last + 1 if stop_early else len(self.blocks)
        output, _ = self._mean_field(embedded, None, states=states, num_blocks=num_blocks)
        found = [self.norm(states[index]) if norm else states[index] for index in taken]
        prefix = [state[:, : self.num_prefix_tokens] for state in found]
        patches = [state[:, self.num_prefix_tokens :] for state in found]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        if output_dict:
            result = {"image_intermediates": patches}
            result |= {"image_intermediates_prefix": prefix} if return_prefix_tokens else {}
            return result | ({} if intermediates_only else {"image_features": self.norm(output)})
        intermediates = list(zip(patches, prefix)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (self.norm(output), intermediates)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's interface. ValueError for a pooling that the constructor refuses."""
        if global_pool is not None:
            _refuse_unsupported(distilled=False, global_pool=global_pool)
        super().reset_classifier(num_classes, global_pool)

    def __prepare_scriptable__(self):
        """What torch.jit.script asks first."""
        raise NotImplementedError(
            "TorchScript is not supported: the shapes of an adaptive vision transformer depend on its input; "
            "use torch.compile on the masked form (zip_tokens=False)"
        )

    def _features(
        self, x: Tensor, first: int | None = None, return_halting: bool = False, early_exit: bool = False
    ) -> tuple[Tensor, Halting | None]:
        """Features of the `first` tokens of each image (all by default), and their halting if asked."""
        if not self.halting:
            features = super().forward_features(x)
            return features, self._static_halting(features) if return_halting else None
        output, halting = self._mean_field(self._embed(x), first, return_halting, early_exit)
        return self.norm(output), halting

    def _embed(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, N, C], what enters the first block."""
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def _mean_field(
        self,
        x: Tensor,
        first: int | None,
        return_halting: bool = False,
        early_exit: bool = False,
        states: dict[int, Tensor] | None = None,
        num_blocks: int | None = None,
    ) -> tuple[Tensor, Halting | None]:
        """x: [B, N, C] through the blocks -> sum_l p_l x_l for the `first` tokens (Eq. 5).

        states: for each block index in it, gets the state after that block, [B, N, C], zero where a
        token has left;
        num_blocks: how many blocks to run, all by default.
        """
        zipped = self.zip_tokens and not _needs_static_shapes(x)
        tokens, rows = (ZippedTokens if zipped else MaskedTokens).pack(x)
        cumulative = torch.zeros(rows.shape[:-1], device=x.device)
        output = torch.zeros(1, device=x.device)
        trace = _HaltingTrace(tokens, self.num_prefix_tokens, self.num_blocks) if return_halting else None
        for number, block in enumerate(self.blocks[:num_blocks], start=1):
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
            if states is not None and number - 1 in states:
                (states[number - 1],) = tokens.unpack(rows)
            if number == self.num_blocks:
                break
            keep_mask = step.continues
            if early_exit and zipped:
                prefix_stays = tokens.unpack(keep_mask, first=self.num_prefix_tokens)[0].any(dim=1)  # [B]
                keep_mask = keep_mask & tokens.spread(prefix_stays)
            tokens, (rows, cumulative) = tokens.keep(keep_mask, rows, step.cumulative)
            if rows.shape[0] == 0 and not (self.training or torch.is_grad_enabled()):
                break  # else the blocks to come draw their random numbers, and get zero gradients
        return output.to(x.dtype), trace.halting() if return_halting else None

    def _run_block(self, block: Block, rows: Tensor, tokens: MaskedTokens | ZippedTokens) -> Tensor:
        run = partial(_zipped_block if isinstance(tokens, ZippedTokens) else _masked_block, block)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, rows, tokens)
        return run(rows, tokens)

    def _static_halting(self, features: Tensor) -> Halting:
        """All weight on the last block: no score before it, remainder 1."""
        depth = features.new_full(features.shape[:2], self.num_blocks, dtype=torch.float32)
        return Halting(depth, depth + 1, depth.new_zeros(self.num_blocks))


class AdaptiveVisionTransformer(AdaptiveTokens, VisionTransformer):
    """timm's VisionTransformer with adaptive tokens."""


class AdaptiveVisionTransformerDistilled(AdaptiveTokens, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (class and distillation token) with adaptive tokens."""


def _refuse_unsupported(
    *,
    distilled: bool,
    block_fn: type = Block,
    attn_layer: type | str = Attention,
    mlp_layer: type = Mlp,
    patch_drop_rate: float = 0.0,
    class_token: bool = True,
    global_pool: str = "token",
    reg_tokens: int = 0,
    pos_embed: str = "learn",
    no_embed_class: bool = False,
    **_,
) -> None:
    """ValueError, naming it, for an option of timm's VisionTransformer that halting cannot honour."""
    refused = {
        "block_fn": (block_fn, block_fn is not Block),
        "attn_layer": (attn_layer, attn_layer not in (Attention, "", "attn")),
        "mlp_layer": (mlp_layer, mlp_layer not in (Mlp, GluMlp, SwiGLU)),
        "patch_drop_rate": (patch_drop_rate, patch_drop_rate > 0),
        "class_token": (class_token, not class_token),
        "global_pool": (global_pool, global_pool not in ("token", "")),
        # timm's distilled class ignores the first two, and fails on the third
        "reg_tokens": (reg_tokens, distilled and reg_tokens > 0),
        "pos_embed": (pos_embed, distilled and pos_embed != "learn"),
        "no_embed_class": (no_embed_class, distilled and no_embed_class),
    }
    for name, (value, is_refused) in refused.items():
        if is_refused:
            raise ValueError(f"an adaptive vision transformer does not support {name}={value!r}")


def _needs_static_shapes(x: Tensor) -> bool:
    """Where shapes cannot follow the depths: without values, and in a graph that is to serve other images."""
    return x.is_meta or torch.jit.is_tracing() or torch.compiler.is_exporting()


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


def macs_per_image(model: AdaptiveTokens, depth: Tensor) -> Tensor:
    """Multiply-adds of one forward pass in which tokens reach these depths.

    depth: [B, N], 1..L -> [B] float64. Counts patch embedding, the blocks' projections and MLPs,
    attention (2 n^2 C for n live tokens), and the heads; norms and activations are left out, as is
    usual. Of a static pass: depth L everywhere.
    """
    embed = model.patch_embed.proj.weight.numel() * (depth.shape[1] - model.num_prefix_tokens)
    heads = sum(_linear_weights(module) for name, module in model.named_children() if name.startswith("head"))
    per_block = [[_linear_weights(b), 2 * b.attn.attn_dim] for b in model.blocks]
    blocks = torch.tensor(per_block, dtype=torch.float64).to(depth.device, non_blocking=True)
    reached = torch.arange(len(blocks), device=depth.device)[:, None, None]
    live = (depth > reached).sum(dim=2).double()  # [L, B]
    return embed + heads + (live * blocks[:, :1] + live**2 * blocks[:, 1:]).sum(dim=0)


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


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


def _cfg(source: str | None = None, **kwargs) -> dict:
    """timm's configuration of the pretrained model `source`, for one that starts from its weights.

    The hub id is spelt out: timm would complete "timm/" with the name of our model.
    """
    if source is None:
        mean_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return {"url": "", "first_conv": "patch_embed.proj", "classifier": "head", **mean_std, **kwargs}
    own = {"architecture", "tag"}  # of the configuration, not of the weights
    config = get_pretrained_cfg(source, allow_unregistered=False).to_dict()
    return {k: v for k, v in config.items() if k not in own} | {"hf_hub_id": f"timm/{source}", **kwargs}


TINY = {"embed_dim": 192, "num_heads": 3}
SMALL = {"embed_dim": 384, "num_heads": 6}
MEDIUM = {"embed_dim": 512, "num_heads": 8}
BASE = {"embed_dim": 768, "num_heads": 12}
DISTILLED = {"model_cls": AdaptiveVisionTransformerDistilled}
DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
# For images of 32 x 32 pixels or so; timm's default initialisation hardly trains at this width.
MICRO = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "num_heads": 3, "weight_init": "reset"}
MICRO_CFG = _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic", fixed_input_size=True)

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
