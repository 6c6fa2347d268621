"""Export of an adaptive ViT to an ONNX graph of standard operators that drops halted tokens.

    proto = write_graph(model, "single")   # images [1, 3, H, W] -> logits [1, K], live [L]
    proto = write_graph(model, "batch")    # images [B, 3, H, W] -> logits [B, K], live [B, L]

The nodes are written from the modules of the model. Nothing is traced. Tokens are rows [T, C], as in `zipping`. Before
each block a Compress node drops the halted rows, so the block computes fewer. In batch mode the rows of all images
are concatenated, and attention pads each image to the longest one. A model with `halting` off gives the static graph.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import helper
from timm.layers import (
    Attention,
    AttentionRope,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLU,
)
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from deployment.graph import FLOAT, INT64, GraphBuilder, value_info
from deployment.layers import rotations_of, write_block, write_linear, write_norm, write_rotations
from deployment.rows import IMAGE_NUMBERS, NO_ROWS, DenseLayout, PackedLayout, State
from models_act import ADAPTIVE, AdaptiveTokens
from zipping.blocks import ROTARY_EMBEDDINGS

OPSET, IR_VERSION = 20, 10
GATE = ("gate_scale", "gate_center")  # attributes of the model, and inputs of the graph
MAX_BYTES = 2**31 - 2**20  # limit of one protobuf file, minus space for the nodes
SUPPORTED_MODULES = (
    *ADAPTIVE.values(),
    *(PatchEmbed, Block, EvaBlock, Attention, AttentionRope, EvaAttention, Mlp, GluMlp, SwiGLU),
    *(LayerScale, DropPath, LayerNorm, *ROTARY_EMBEDDINGS),
    *(nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GELU, GELUTanh, nn.SiLU, nn.Identity, nn.Dropout),
    *(nn.Sequential, nn.ModuleList),
)


def unsupported_part(model: AdaptiveTokens) -> str | None:
    """Return why the model cannot be exported, or None if it can."""
    averages_normalized_tokens = model.global_pool == "avg" and not isinstance(model.norm, nn.Identity)
    reasons = {
        "the image size is dynamic": model.dynamic_img_size and model.pos_embed is not None,
        "images are padded": getattr(model.patch_embed, "dynamic_img_pad", False),
        "the model has no head": model.global_pool == "" or isinstance(model.head, nn.Identity),
        "the head reads the mean of normalized tokens": averages_normalized_tokens,
        "blocks were removed": len(model.blocks) != model.num_blocks,
    }
    modules = (_unsupported_module(name, module) for name, module in model.named_modules())
    return next((reason for reason, applies in reasons.items() if applies), None) or next(filter(None, modules), None)


def _unsupported_module(name: str, module: nn.Module) -> str | None:
    if type(module) not in SUPPORTED_MODULES:
        return f"{name} is a {type(module).__name__}, which is not supported"
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return f"{name or 'the model'} has a hook or a replaced forward"
    if getattr(module, "gate", None) is not None:
        return f"{name} is gated"
    if getattr(module, "num_kv_groups", 1) > 1:
        return f"{name} has fewer keys than queries"
    return None


def write_graph(model: AdaptiveTokens, batch_mode: str = "single", fp16_weights: bool = False) -> onnx.ModelProto:
    """Build the ONNX graph of a model in evaluation mode, with its gate, image size and classes.

    batch_mode: "single" for one image per call, "batch" for any number; fp16_weights: store weights in half precision
    Inputs: `images` float32 and, if the model halts, `gate_scale` and `gate_center`, float32 [], which default to the
    model's. Outputs: `logits` float32 and `live` int64, the number of tokens each block computes, 0 if it is skipped.
    Raises ValueError if a part of the model is not supported or the weights exceed 2 GiB.
    """
    reason = unsupported_part(model)
    if reason:
        raise ValueError(f"cannot export to ONNX: {reason}")
    size = sum(p.numel() for p in model.parameters()) * (2 if fp16_weights else 4)
    if size > MAX_BYTES:
        raise ValueError(f"cannot export to ONNX: the weights take {size / 2**30:.1f} GiB; the limit is 2 GiB")
    graph, num_blocks, is_batch = GraphBuilder(fp16_weights), len(model.blocks), batch_mode == "batch"
    batch = ["B"] if is_batch else [1]
    inputs = [("images", FLOAT, [*batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size])]
    if model.halting:
        inputs += [(graph.constant(getattr(model, name), name), FLOAT, []) for name in GATE]
    tokens = _embed(graph, model)
    write_rotations(graph, model)
    if model.halting:
        head_inputs, live = _halting_blocks(graph, model, tokens, is_batch)
    else:
        head_inputs, live = _static_blocks(graph, model, tokens)
    _head(graph, model, head_inputs)
    if is_batch:
        graph.add("Identity", live, name="live")
    else:
        graph.add("Squeeze", live, graph.constant([0]), name="live")
    outputs = [
        ("logits", FLOAT, [*batch, model.num_classes]),
        ("live", INT64, ["B", num_blocks] if is_batch else [num_blocks]),
    ]
    infos = ([value_info(*value) for value in values] for values in (inputs, outputs))
    proto = helper.make_graph(graph.nodes, type(model).__name__, *infos, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="export_onnx.py")


# Embedding and head ------------------------------------------------------------------------------


def _embed(graph: GraphBuilder, model: AdaptiveTokens) -> str:
    """Embed the images: images -> [B, N, C], the input of the first block."""
    embed, channels = model.patch_embed, model.embed_dim
    weights = [graph.constant(p) for p in (embed.proj.weight, embed.proj.bias) if p is not None]
    x = graph.add("Conv", "images", *weights, strides=embed.patch_size)  # [B, C, h, w]
    x = graph.add("Reshape", x, graph.constant([0, channels, embed.num_patches]))
    x = write_norm(graph, embed.norm, graph.add("Transpose", x, perm=[0, 2, 1]))
    tokens = (model.cls_token, model.reg_token, getattr(model, "dist_token", None))
    prefix = torch.cat([torch.zeros(1, 0, channels)] + [t.detach().cpu() for t in tokens if t is not None], dim=1)
    position = (
        torch.zeros(1, embed.num_patches, channels) if model.pos_embed is None else model.pos_embed.detach().cpu()
    )
    if position.shape[1] > embed.num_patches:
        prefix = prefix + position[:, : prefix.shape[1]]
    x = graph.add("Add", x, graph.constant(position[:, -embed.num_patches :]))
    if prefix.shape[1]:
        sizes = graph.add("Concat", graph.add("Shape", x, end=1), graph.constant([prefix.shape[1], channels]), axis=0)
        x = graph.add("Concat", graph.add("Expand", graph.constant(prefix), sizes), x, axis=1)
    return write_norm(graph, model.norm_pre, x)


def _pooling_weights(model: AdaptiveTokens) -> np.ndarray:
    """Return the weight of each token in each input of the head: [R, N].

    R is 2 for a distilled model, whose heads read the class token and the distillation token, else 1.
    """
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    weights = np.zeros((2 if hasattr(model, "head_dist") else 1, num_tokens))
    if model.reads_prefix:
        np.fill_diagonal(weights, 1)
    else:
        first = 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens
        weights[:, first:] = 1 / (num_tokens - first)
    return weights.astype(np.float32)


def _head(graph: GraphBuilder, model: AdaptiveTokens, head_inputs: str) -> None:
    """Average the logits of the R heads: head_inputs [R, B, C] -> logits [B, K]."""
    heads = [model.head, model.head_dist] if hasattr(model, "head_dist") else [model.head]
    x = write_norm(graph, model.fc_norm, write_norm(graph, model.norm, head_inputs))
    rows = [graph.add("Gather", x, graph.constant(index), axis=0) for index in range(len(heads))]
    logits = [write_linear(graph, head, row, factor=1 / len(heads)) for head, row in zip(heads, rows)]
    graph.add("Sum", *logits, name="logits")


# Blocks on rows ----------------------------------------------------------------------------------


def _static_blocks(graph: GraphBuilder, model: AdaptiveTokens, tokens: str) -> tuple[str, str]:
    """Run all blocks on all tokens: tokens [B, N, C] -> head inputs [R, B, C], live tokens [B, L]."""
    weights = _pooling_weights(model)
    num_tokens = weights.shape[1]
    rows = _flatten(graph, model, tokens)
    layout = DenseLayout(graph, State(rows=rows), (-1, num_tokens))
    for number, block in enumerate(model.blocks):
        rows = write_block(graph, block, rows, layout, rotations_of(model, number))
    tokens = graph.add("Reshape", rows, graph.constant([-1, num_tokens, model.embed_dim]))
    head_inputs = graph.add("Transpose", graph.add("MatMul", graph.constant(weights), tokens), perm=[1, 0, 2])
    sizes = graph.add("Concat", graph.add("Shape", tokens, end=1), graph.constant([len(model.blocks)]), axis=0)
    return head_inputs, graph.add("Expand", graph.constant([[num_tokens]]), sizes)


def _halting_blocks(graph: GraphBuilder, model: AdaptiveTokens, tokens: str, is_batch: bool) -> tuple[str, str]:
    """Run the blocks on live tokens: tokens [B, N, C] -> head inputs [R, B, C], live tokens [B, L].

    The head inputs are the sum over blocks of p_l x_l (Eq. 5), pooled. Every block but the first is the branch of an
    If node, which is skipped once no token is live.
    """
    layout = PackedLayout if is_batch else DenseLayout
    state = _halting_block(graph, model, 0, _first_state(graph, model, tokens, is_batch), layout)
    # A skipped block contributes zeros. Multiplying the first block's tensors by zero gives the right shapes.
    no_head_inputs = graph.add("Mul", state.head_inputs, graph.constant(0.0))
    no_live = graph.add("Mul", state.live, graph.constant(0))
    states = [state]
    for number in range(1, len(model.blocks)):
        skipped = replace(state, head_inputs=no_head_inputs, live=no_live)
        state = _conditional_block(graph, model, number, state, skipped, layout)
        states.append(state)
    live = [graph.add("Unsqueeze", state.live, graph.constant([1])) for state in states]
    return graph.add("Sum", *(state.head_inputs for state in states)), graph.add("Concat", *live, axis=1)


def _conditional_block(
    graph: GraphBuilder,
    model: AdaptiveTokens,
    number: int,
    before: State,
    skipped: State,
    layout: type[DenseLayout] | type[PackedLayout],
) -> State:
    """Run block `number` if any row is live after the one before, else return the `skipped` state unchanged."""

    def compute() -> list[str]:
        return _halting_block(graph, model, number, _drop_halted(graph, before), layout).names()

    def skip() -> list[str]:
        return [graph.add("Identity", name) for name in skipped.names()]

    branches = {
        "then_branch": graph.subgraph(compute, before.types()),
        "else_branch": graph.subgraph(skip, before.types()),
    }
    return before.with_names(graph.add_many("If", len(before.names()), before.any_kept, **branches))


def _flatten(graph: GraphBuilder, model: AdaptiveTokens, tokens: str) -> str:
    """Flatten tokens [B, N, C] to rows [B * N, C]."""
    return graph.add("Reshape", tokens, graph.constant([-1, model.embed_dim]))


def _first_state(graph: GraphBuilder, model: AdaptiveTokens, tokens: str, is_batch: bool) -> State:
    """Return the input of the first block: all tokens [B, N, C], with cumulative scores of zero."""
    weights = _pooling_weights(model)
    num_tokens = weights.shape[1]
    is_prefix = np.arange(num_tokens) < model.num_prefix_tokens
    state = State(
        scores=graph.constant(np.zeros(num_tokens)),
        weights=graph.constant(weights),
        anchors=graph.constant(is_prefix if model.reads_prefix else np.ones_like(is_prefix)),
        prefix=None if model.gate_directions is None else graph.constant(is_prefix),
        position=None if rotations_of(model, 0) is None else graph.constant(np.arange(num_tokens)),
    )
    if is_batch:
        batch = graph.add("Shape", tokens, end=1)  # [1]
        repeated = {}
        for name, axis in state.row_axes().items():
            repeats = batch if axis == 0 else graph.add("Concat", graph.constant([1]), batch, axis=0)
            repeated[name] = graph.add("Tile", getattr(state, name), repeats)
        graph.add("Range", graph.constant(0), graph.add("Squeeze", batch), graph.constant(1), name=IMAGE_NUMBERS)
        graph.add("Expand", graph.constant(0), batch, name=NO_ROWS)
        column = graph.add("Unsqueeze", IMAGE_NUMBERS, graph.constant([1]))
        sizes = graph.add("Concat", batch, graph.constant([num_tokens]), axis=0)
        image = graph.add("Reshape", graph.add("Expand", column, sizes), graph.constant([-1]))
        state = State(**repeated, image=image)
    return replace(state, rows=_flatten(graph, model, tokens))


def _drop_halted(graph: GraphBuilder, state: State) -> State:
    """Return the input of the next block: the rows that are kept."""
    kept = {
        name: graph.add("Compress", getattr(state, name), state.keep, axis=axis)
        for name, axis in state.row_axes().items()
    }
    return State(**kept)


def _halting_block(
    graph: GraphBuilder,
    model: AdaptiveTokens,
    number: int,
    state: State,
    make_layout: type[DenseLayout] | type[PackedLayout],
) -> State:
    """Run block `number` (0 is the first) on live rows, then the arithmetic of `halting_step` in its order.

    A NaN score halts no token: the comparison below is false.
    """
    layout = make_layout(graph, state)
    rotations = rotations_of(model, number)
    if rotations is not None:
        rotations = rotations._replace(name=graph.add("Gather", rotations.name, state.position, axis=0))
    rows = write_block(graph, model.blocks[number], state.rows, layout, rotations)
    score = _score(graph, model, number, rows, state.prefix)
    probability = graph.add("Sub", graph.constant(1.0), state.scores)  # the remainder, used where a token halts
    scores = graph.add("Add", state.scores, score)
    keep = graph.add("Not", graph.add("GreaterOrEqual", scores, graph.constant(1 - model.halt_eps)))
    if number < len(model.blocks) - 1:
        probability = graph.add("Where", keep, score, probability)
    anchor_rows = graph.add("Compress", rows, state.anchors, axis=0)
    anchor_probability = graph.add("Compress", probability, state.anchors, axis=0)
    anchor_keep = graph.add("Compress", keep, state.anchors, axis=0)
    anchor_weights = graph.add("Compress", state.weights, state.anchors, axis=1)
    share = graph.add("Mul", anchor_weights, anchor_probability)
    head_inputs = graph.add("MatMul", layout.per_image(share), anchor_rows)
    keep, any_kept = layout.exit_images(keep, anchor_keep)
    return replace(
        state,
        rows=rows,
        scores=scores,
        keep=keep,
        any_kept=any_kept,
        head_inputs=head_inputs,
        live=layout.live,
    )


def _score(graph: GraphBuilder, model: AdaptiveTokens, number: int, rows: str, is_prefix: str | None) -> str:
    """Compute the halting scores of block `number` from its output: [T, C] -> [T]. See `zipping.gate.Gate`."""
    if model.gate_directions is None:
        value = graph.add("Gather", rows, graph.constant(0), axis=1)
    else:
        direction = model.gate_directions[number].float()
        value = graph.add("MatMul", rows, graph.constant(direction[:-1]))
        value = graph.add("Add", value, graph.constant(direction[-1]))
    score = graph.add("Sigmoid", graph.add("Sub", graph.add("Mul", value, "gate_scale"), "gate_center"))
    return score if is_prefix is None else graph.add("Where", is_prefix, graph.constant(0.0), score)
