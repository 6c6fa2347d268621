"""A-ViT: vision transformers whose tokens can halt after every block.

    import timm, models_act                                  # importing registers the models
    model = timm.create_model("avit_tiny_patch16_224")
    logits = model(images)                                   # [B, num_classes]
    logits, halting = model(images, return_halting=True)     # depth, ponder cost: [B, N]
    model = models_act.adapt(any_plain_timm_vit, gate_scale=5.0, gate_center=10.0)

Paper: Yin et al., A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022, arXiv
2112.07658. The models are timm's ViT, DeiT and Eva classes with another loop over the blocks. The names
in the state dict are timm's, so its weights load unchanged. timm's Eva is the class of DINOv3, EVA-02 and
other ViTs with rotary position embeddings.

Letters in shapes: B images, N tokens of an image, P prefix tokens (class and distillation token,
registers), C channels, L blocks, T live tokens in the batch.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from timm.models import (
    VisionTransformer,
    VisionTransformerDistilled,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from macs import macs_per_image
from zipping import Gate, PackedTokensCUDA, drop_halted, uses_kernels
from zipping.blocks import prepare_blocks, unsupported_part
from zipping.channels import swap_channels, why_not_swappable, why_swap_changes_logits
from zipping.gate import checked_directions
from zipping.halting import HaltingStep, halting_probability, halting_step
from zipping.outputs import (
    Halting,
    HaltingHistory,
    Intermediates,
    MeanField,
    read_timm_result,
    split_states,
    summarize_halting,
    timm_result,
)
from zipping.planned.dispatch import Call, run_by_graphs
from zipping.recording import TRACING_UNSUPPORTED, refuse_symbols
from zipping.rotations import embed_images

__all__ = [
    "AdaptiveEva",
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


# Adaptive models ---------------------------------------------------------------------------------

HALTING_DEFAULTS = {
    "gate_scale": 10.0,
    "gate_center": 30.0,
    "gate_directions": None,
    "halt_eps": 0.01,
    "halting": True,
    "zip_tokens": True,
    "early_exit": True,
    "cuda_graphs": False,
    "compile_blocks": False,
}


class AdaptiveTokens:
    """Mixin that makes timm's plain ViT, DeiT and Eva classes adaptive.

        class AdaptiveX(AdaptiveTokens, X): ...

    gate_scale, gate_center: h = sigmoid(gate_scale * x[..., 0] - gate_center);
    gate_directions: None, or [L, C + 1], see `set_gate_directions`;
    halt_eps: a token halts once its scores sum to 1 - halt_eps or more;
    halting: if False, the model is the static ViT: every token runs through every block;
    zip_tokens: drop halted tokens (zipped mode). If False, halted tokens are masked, at full cost.
    zipping/blocks.py lists the cases in which they are masked anyway;
    early_exit: in zipped mode and evaluation, if only logits are requested, drop an image once its
    prefix tokens have halted;
    cuda_graphs: in zipped mode on CUDA, replay passes from CUDA graphs (planned mode, see zipping/planned);
    compile_blocks: with `cuda_graphs` and in half precision, compile the blocks with torch.compile.
    Other options are timm's. Raises ValueError for options that halting does not support.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, **kwargs):
        options = {name: kwargs.pop(name) for name in HALTING_DEFAULTS if name in kwargs}
        super().__init__(img_size=img_size, patch_size=patch_size, **kwargs)
        _check_supported(self.global_pool, unsupported_part(self))
        self._set_halting(options)

    def _set_halting(self, options: dict) -> None:
        """Set the halting options. Call it after the ViT is built."""
        options = HALTING_DEFAULTS | options
        directions = options.pop("gate_directions")
        for name, value in options.items():
            setattr(self, name, value)
        self.num_blocks = len(self.blocks)  # if blocks are pruned later, the last block stays this one
        self.set_gate_directions(directions)

    def set_gate_directions(self, directions: Tensor | None) -> None:
        """Let the gate read a direction of the patch tokens, h = sigmoid(gate_scale * (w_l . x + b_l) - gate_center).

        directions: [L, C + 1], w_l and b_l for each block l; None lets it read channel 0 of all tokens.
        With directions, prefix tokens live to the last block, and no gradient flows through the scores. The directions
        are a buffer that is not in the state dict. Raises ValueError for another shape or numbers that are not finite.
        """
        self.register_buffer("gate_directions", checked_directions(directions, self), persistent=False)

    @property
    def reads_prefix(self) -> bool:
        """True if the head reads prefix tokens only. If it reads patches, no image can exit early."""
        return self.global_pool == "token"

    def forward(self, x: Tensor, return_halting: bool = False, gate_offset: Tensor | None = None):
        """Return the logits, or with `return_halting` the logits and `Halting`.

        x: [B, in_chans, H, W] -> [B, num_classes];
        gate_offset: [B] float32, added to `gate_center` for each image: above zero, its tokens halt later.
        In distilled training, a distilled model returns a pair of logits.
        """
        refuse_symbols(x)
        early_exit = self.early_exit and self.reads_prefix and not self.training and not return_halting
        call = Call(x, return_halting, early_exit, gate_offset)
        by_graphs = self.cuda_graphs and type(self) in ADAPTIVE.values() and not torch.compiler.is_compiling()
        logits, halting = run_by_graphs(self, call) if by_graphs else self._forward(call)
        return (logits, halting) if return_halting else logits

    def _forward(self, call: Call, history: HaltingHistory | None = None) -> tuple[Tensor, Halting | None]:
        """Return the logits, and `Halting` if requested. history: collects the halting of the blocks."""
        features, halting = self._features(
            call.images,
            prefix_only=self.reads_prefix,
            return_halting=call.return_halting,
            early_exit=call.early_exit,
            gate_offset=call.gate_offset,
            history=history,
        )
        return self.forward_head(features), halting

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the final norm of every token's mean-field output. x: [B, in_chans, H, W] -> [B, N, C]."""
        refuse_symbols(x)
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
        """Return the states after the blocks `indices` and the final features, in timm's formats.

        State l is x_l for tokens of depth l or more. Halted tokens keep their last state, so that maps have
        no holes. The final features are those of `forward_features`, unless `stop_early` skips blocks.
        With `return_halting`, the result is a pair of all this and `Halting`.
        Raises ValueError for an attention mask or an unknown `output_fmt`.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are not supported: halting decides which tokens attend")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        refuse_symbols(x)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if not self.halting:
            halting = self._static_halting(x, self.num_prefix_tokens + grid[0] * grid[1])
            result = super().forward_intermediates(
                x, indices, with_prefix, norm, stop_early, output_fmt, intermediates_only
            )
            patches, prefix, features = read_timm_result(result, with_prefix, not intermediates_only)
        else:
            taken, last = feature_take_indices(len(self.blocks), indices)
            (tokens, embedding), intermediates = self._embed(x), Intermediates(taken)
            options = {"intermediates": intermediates, "num_blocks": last + 1 if stop_early else None}
            output, halting = self._mean_field(tokens, embedding, return_halting, **options)
            states = [state.view_as(tokens) for state in intermediates.states]
            states = [self.norm(state) for state in states] if norm else states
            prefix, patches = split_states(states, self.num_prefix_tokens, grid if output_fmt == "NCHW" else None)
            features = None if intermediates_only else self.norm(output)
        result = timm_result(patches, prefix if with_prefix else None, features, output_dict)
        return (result, halting) if return_halting else result

    @property
    def can_swap_channels(self) -> bool:
        """True if `set_halting_channel` can swap channels: not for a stem without projection, or unknown layers."""
        return self._why_not_swappable() is None

    def set_halting_channel(self, channel: int) -> None:
        """Swap a channel of the tokens with channel 0, which the gate reads, in all weights and gate directions.

        The static model computes the same logits as before. Without a head, its features have the channels swapped.
        Raises ValueError if `can_swap_channels` is False.
        """
        if channel == 0:
            return
        reason = self._why_not_swappable()
        if reason:
            raise ValueError(f"the halting channel must be 0, got {channel}: {reason}")
        swap_channels(self, channel)

    def _why_not_swappable(self) -> str | None:
        """Return why the channels cannot be swapped; None if they can. A class with code of its own is tried out."""
        reason = why_not_swappable(self)
        if reason is None and type(self) not in ADAPTIVE.values():
            return why_swap_changes_logits(self)
        return reason

    halt_by = set_halting_channel  # former name, kept for other programs

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, as in timm. Raises ValueError for an unsupported pooling."""
        if global_pool is not None:
            _check_supported(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def __prepare_scriptable__(self):
        """Raise NotImplementedError when torch.jit.script starts."""
        raise NotImplementedError(TRACING_UNSUPPORTED.format("TorchScript"))

    def _features(self, x: Tensor, return_halting: bool = False, **options) -> tuple[Tensor, Halting | None]:
        """Return the normed features, and `Halting` if requested. options, shapes: see `_run_blocks`."""
        if not self.halting:
            features = super().forward_features(x)
            return features, self._static_halting(features, features.shape[1]) if return_halting else None
        output, halting = self._mean_field(*self._embed(x), return_halting, **options)
        return self.norm(output), halting

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the input of the first block, and its rotary position embedding, see `embed_images`."""
        return embed_images(self, x)

    def _mean_field(self, *inputs: Tensor | bool | None, **options) -> tuple[Tensor, Halting | None]:
        """Call `_run_blocks`; outside torch.compile in zipped mode, which would compile a graph for each size."""
        if self.zip_tokens and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return torch.compiler.disable(self._run_blocks)(*inputs, **options)
        return self._run_blocks(*inputs, **options)

    def _run_blocks(
        self,
        x: Tensor,
        embedding: Tensor | None,
        return_halting: bool,
        prefix_only: bool = False,
        early_exit: bool = False,
        gate_offset: Tensor | None = None,
        intermediates: Intermediates | None = None,
        num_blocks: int | None = None,
        history: HaltingHistory | None = None,
    ) -> tuple[Tensor, Halting | None]:
        """Return the mean-field output, sum_l p_l x_l (Eq. 5), and `Halting` if requested.

        x, embedding: of `_embed`; x: [B, N, C] -> [B, N, C], or [B, P, C] with `prefix_only`;
        intermediates, history: collect the states and the halting of the blocks; num_blocks: how many to run, or all.
        """
        tokens, rows, block_forwards = prepare_blocks(self, x, embedding, self.zip_tokens)
        cumulative = torch.zeros(rows.shape[:-1], dtype=torch.float32, device=x.device)
        is_logits_only = prefix_only and intermediates is None and gate_offset is None
        use_triton = is_logits_only and isinstance(tokens, PackedTokensCUDA) and uses_kernels(x)
        history, mean_field = history or HaltingHistory(), (None if prefix_only else MeanField(rows, x.shape))
        blocks = zip(self.blocks[:num_blocks], block_forwards, Gate.of_blocks(self, x.device))
        for number, (block, block_forward, gate) in enumerate(blocks, start=1):
            rows = block_forward(block, rows, tokens)
            is_last_block = number == self.num_blocks
            if use_triton and len(rows) > 0:
                output = tokens.halt(rows, cumulative, gate, is_last_block, early_exit=early_exit)
            else:
                step = halting_step(rows, cumulative, gate.for_rows(tokens, gate_offset), is_last_block)
                output = drop_halted(
                    tokens, rows, step.score, step.cumulative, step.halts, is_last_block, early_exit, prefix_only
                )
            history.add(tokens, cumulative, output)
            if mean_field is not None:
                mean_field.add(tokens, halting_probability(output.score, cumulative, output.halts), rows)
            if intermediates is not None:
                intermediates.add(number - 1, tokens, rows)
            tokens, rows, cumulative = output.tokens, output.rows, output.cumulative
            # In training or with gradients, run the remaining blocks on zero rows too: they draw the same
            # random numbers as in masked mode, and their parameters get zero gradients instead of None.
            if is_last_block or (rows.shape[0] == 0 and not (self.training or torch.is_grad_enabled())):
                break
        output, halting = self._collect(history, mean_field, return_halting)
        return output.to(x.dtype), halting

    def _collect(
        self, history: HaltingHistory, mean_field: MeanField | None, return_halting: bool
    ) -> tuple[Tensor, Halting | None]:
        """Return the mean-field output, of the prefix tokens if `mean_field` is None, and `Halting` if requested."""
        score, cumulative_before, halts = history.concatenated()
        halting = None
        probability = halting_probability(score, cumulative_before, halts)
        if return_halting:
            probability, score, halts = history.to_dense(probability, score, halts)  # [L, B, N]
            halting = summarize_halting(score, halts, self.num_prefix_tokens, self.num_blocks)
        elif mean_field is None:
            (probability,) = history.to_dense(probability)
        output = history.prefix_mean_field(probability) if mean_field is None else mean_field.output()
        return output, halting

    def _static_halting(self, x: Tensor, num_tokens: int) -> Halting:
        """Return the halting of the static model: depth L, remainder 1. x: [B, ...]."""
        depth = x.new_full((x.shape[0], num_tokens), self.num_blocks, dtype=torch.float32)
        return Halting(depth, depth + 1, depth.new_zeros(self.num_blocks))


class AdaptiveVisionTransformer(AdaptiveTokens, VisionTransformer):
    """timm's VisionTransformer with adaptive tokens."""


class AdaptiveVisionTransformerDistilled(AdaptiveTokens, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (class and distillation token) with adaptive tokens."""


class AdaptiveEva(AdaptiveTokens, Eva):
    """timm's Eva (rotary position embeddings, or the blocks of EVA) with adaptive tokens."""


ADAPTIVE = {
    VisionTransformer: AdaptiveVisionTransformer,
    VisionTransformerDistilled: AdaptiveVisionTransformerDistilled,
    Eva: AdaptiveEva,
}


def adapt(model: VisionTransformer | Eva, **halting) -> AdaptiveTokens:
    """Return an adaptive copy of a plain timm ViT, with the same weights, head, mode and device.

    halting: options of `AdaptiveTokens`.
    Raises ValueError for a model of another class or with an unsupported part, TypeError for an unknown option.
    """
    return adapt_(copy.deepcopy(model), **halting)


def adapt_(model: VisionTransformer | Eva, **halting) -> AdaptiveTokens:
    """Make a plain timm ViT adaptive in place; see `adapt`. The model's class changes."""
    if type(model) not in ADAPTIVE:
        *names, last = (timm_class.__name__ for timm_class in ADAPTIVE)
        expected = f"expected a timm {', '.join(names)} or {last}"
        raise ValueError(f"this model cannot be made adaptive: {expected}, got {type(model).__name__}")
    unknown = sorted(halting.keys() - HALTING_DEFAULTS)
    if unknown:
        raise TypeError(f"adapt() takes {', '.join(HALTING_DEFAULTS)}; got {', '.join(unknown)}")
    _check_supported(model.global_pool, unsupported_part(model))
    model.__class__ = ADAPTIVE[type(model)]
    model._set_halting(halting)
    return model


def _check_supported(global_pool: str, reason: str | None = None) -> None:
    """Raise ValueError for an unsupported pooling, or for the given reason."""
    if not reason and global_pool not in ("token", "avg", ""):
        reason = f"global_pool is {global_pool!r}, not 'token', 'avg' or ''"
    if reason:
        raise ValueError(f"this model cannot be made adaptive: {reason}")


# Registration with timm --------------------------------------------------------------------------


def _create_avit(
    variant: str, pretrained: bool = False, model_cls: type[AdaptiveTokens] = AdaptiveVisionTransformer, **kwargs
):
    """Build a registered model; with `pretrained`, timm loads the weights of its source model.

    Tries the Hugging Face hub, then the URL of the original release.
    Raises RuntimeError if neither can be reached.
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
    except Exception as hub_error:  # the hub client may raise anything
        overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "hf_hub_id": None, "source": ""}
        try:
            return build(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        except OSError as url_error:
            reasons = [str(error).partition("\n")[0] or type(error).__name__ for error in (hub_error, url_error)]
            raise RuntimeError(
                f"no pretrained weights for {variant}: could not reach the Hugging Face hub ({reasons[0]}) "
                f"or the original URL ({reasons[1]}). "
                "Download the file on another machine and pass it with --pretrained-path."
            ) from url_error


EVALUATION = {"crop_pct": 224 / 256, "crop_mode": "center", "interpolation": "bicubic"}  # as in the original A-ViT


def _cfg(source: str | None = None, **kwargs) -> dict:
    """Return timm's configuration of the pretrained model `source`, with the evaluation crop of A-ViT.

    The hub id is written in full: timm would complete "timm/" with the name of the adaptive model.
    """
    if source is None:
        mean_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return {"url": "", "first_conv": "patch_embed.proj", "classifier": "head", **mean_std, **EVALUATION, **kwargs}
    config = get_pretrained_cfg(source, allow_unregistered=False).to_dict()
    del config["architecture"], config["tag"]  # they name the source model
    return config | {"hf_hub_id": f"timm/{source}", **EVALUATION, **kwargs}


TINY = {"embed_dim": 192, "num_heads": 3}
SMALL = {"embed_dim": 384, "num_heads": 6}
MEDIUM = {"embed_dim": 512, "num_heads": 8}
BASE = {"embed_dim": 768, "num_heads": 12}
DISTILLED = {"model_cls": AdaptiveVisionTransformerDistilled}
DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
MINI = {"embed_dim": 96, "num_heads": 3, "weight_init": "reset"}  # timm's default initialization trains poorly here
MICRO = MINI | {"img_size": 32, "patch_size": 4, "embed_dim": 48}  # for images of about 32 x 32 pixels

# The source of the pretrained weights and the sizes of each model. Each becomes a function of this module.
MODELS = {
    "avit_micro_patch4_32": (None, MICRO),
    "avit_mini_patch16_224": (None, MINI),
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
    {"avit_micro_patch4_32": _cfg(num_classes=10, input_size=(3, 32, 32), fixed_input_size=True)}
    | {"avit_mini_patch16_224": _cfg(fixed_input_size=True)}
    | {f"{name}.{source.replace('.', '_')}": _cfg(source) for name, source in SOURCES.items()}
)


def _register(name: str, sizes: dict) -> None:
    """Define the function with this name that creates the model, and register it with timm."""

    def create(pretrained: bool = False, **kwargs) -> AdaptiveTokens:
        return _create_avit(name, pretrained, **{**sizes, **kwargs})

    create.__name__ = create.__qualname__ = name
    globals()[name] = register_model(create)


for _name, (_, _sizes) in MODELS.items():
    _register(_name, _sizes)
del _name, _sizes
