"""Layers of a ViT's blocks as nodes of an ONNX graph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from timm.layers import GELUTanh, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from deployment.graph import GraphBuilder
from deployment.rows import DenseLayout, PackedLayout
from models_act import AdaptiveTokens
from zipping.rotations import embed_images, rotations_of_blocks


class RotationTable(NamedTuple):
    """Rotations of the queries and keys of some tokens in one block.

    name: of a tensor [tokens, channels]. Each row has the cosines and then the sines of a token, for each head, or once
    if all heads agree. A rotated value is x * cosine + partner * sine, so the sines have signs.
    """

    name: str
    channels: int


def write_block(
    graph: GraphBuilder, block: nn.Module, rows: str, layout: DenseLayout | PackedLayout, rotation: RotationTable | None
) -> str:
    """Run one transformer block: [T, C] -> [T, C]. rotation: of the rows, or None."""
    is_eva = isinstance(block, EvaBlock)
    scale1, scale2 = (block.gamma_1, block.gamma_2) if is_eva else map(_layer_scale, (block.ls1, block.ls2))
    attended = _attention(graph, block.attn, write_norm(graph, block.norm1, rows), layout, rotation)
    rows = graph.add("Add", rows, write_linear(graph, block.attn.proj, attended, scale1))
    hidden = write_norm(graph, block.mlp.norm, _hidden(graph, block.mlp, write_norm(graph, block.norm2, rows)))
    return graph.add("Add", rows, write_linear(graph, block.mlp.fc2, hidden, scale2))


def _layer_scale(layer: nn.Module) -> Tensor | None:
    return layer.gamma if isinstance(layer, LayerScale) else None


def _hidden(graph: GraphBuilder, mlp: Mlp | GluMlp | SwiGLU, x: str) -> str:
    """Compute the hidden channels of an MLP: [T, C] -> [T, D]."""
    if isinstance(mlp, SwiGLU):
        gate, value = (write_linear(graph, layer, x) for layer in (mlp.fc1_g, mlp.fc1_x))
        return graph.add("Mul", _activation(graph, mlp.act, gate), value)
    x = write_linear(graph, mlp.fc1, x)
    if not isinstance(mlp, GluMlp):
        return _activation(graph, mlp.act, x)
    first, second = graph.add_many("Split", 2, x, axis=1, num_outputs=2)
    gate, value = (second, first) if mlp.gate_last else (first, second)
    return graph.add("Mul", _activation(graph, mlp.act, gate), value)


def _activation(graph: GraphBuilder, act: nn.GELU | GELUTanh | nn.SiLU, x: str) -> str:
    if isinstance(act, nn.SiLU):
        return graph.add("Mul", x, graph.add("Sigmoid", x))
    return graph.add("Gelu", x, approximate="tanh" if isinstance(act, GELUTanh) else act.approximate)


def _attention(
    graph: GraphBuilder, attn: nn.Module, x: str, layout: DenseLayout | PackedLayout, rotation: RotationTable | None
) -> str:
    """Run self-attention within each image, without the output projection: [T, C] -> [T, D]."""
    width = attn.num_heads * attn.head_dim
    heads = graph.constant([0, 0, attn.num_heads, attn.head_dim])
    qkv = layout.pad(_queries_keys_values(graph, attn, x), 3 * width)  # [B, n, 3 * D]
    q, k, v = (graph.add("Reshape", part, heads) for part in graph.add_many("Split", 3, qkv, axis=2, num_outputs=3))
    q, k = write_norm(graph, attn.q_norm, q), write_norm(graph, attn.k_norm, k)
    if rotation is not None:
        q, k = _rotate(graph, attn, rotation, layout, q, k)
    q = graph.add("Mul", q, graph.constant(attn.scale))
    q, v = (graph.add("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))  # [B, H, n, D]
    k = graph.add("Transpose", k, perm=[0, 2, 3, 1])  # [B, H, D, n]
    scores = graph.add("MatMul", q, k)
    scores = scores if layout.bias is None else graph.add("Add", scores, layout.bias)
    x = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    x = graph.add("Reshape", graph.add("Transpose", x, perm=[0, 2, 1, 3]), graph.constant([-1, width]))
    return write_norm(graph, attn.norm, layout.unpad(x))


def _queries_keys_values(graph: GraphBuilder, attn: nn.Module, x: str) -> str:
    """Project rows to queries, keys and values: [T, C] -> [T, 3 * D]. Separate projections are joined."""
    layers = [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj, attn.v_proj]
    biases = [layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight)) for layer in layers]
    if isinstance(attn, EvaAttention) and attn.q_bias is not None:
        biases = [attn.q_bias, attn.k_bias, attn.v_bias]
    weight, bias = (torch.cat([part.detach() for part in parts]) for parts in ([x.weight for x in layers], biases))
    weights = [weight, bias] if bias.any() else [weight]
    return graph.add("Gemm", x, *map(graph.constant, weights), transB=1)


# Rotary position embeddings ----------------------------------------------------------------------


def write_rotations(graph: GraphBuilder, model: AdaptiveTokens) -> None:
    """Add the rotations of the tokens of an image as constants, see `rotations_of`."""
    weight = model.patch_embed.proj.weight
    with torch.no_grad():
        _, embedding = embed_images(model, weight.new_zeros(1, weight.shape[1], *model.patch_embed.img_size))
        rotations = [] if embedding is None else rotations_of_blocks(model, embedding)
    for number, rotation in enumerate(rotations if getattr(model, "rope_mixed", False) else rotations[:1]):
        sine, cosine = rotation.table.float().chunk(2, dim=-1)
        channel = torch.arange(sine.shape[-1], device=sine.device)
        is_first = channel < len(channel) // 2 if rotation.half else channel % 2 == 0
        table = torch.cat([cosine, sine.where(~is_first, -sine)], dim=-1)  # [N, 2 D] or [H, N, 2 D]
        table = table if table.ndim == 2 else table.transpose(0, 1).flatten(1)
        graph.constant(table, rotations_of(model, number).name)


def rotations_of(model: AdaptiveTokens, number: int) -> RotationTable | None:
    """Return the rotations of all tokens of an image in block `number`; None if nothing is rotated."""
    if getattr(model, "rope", None) is None:
        return None
    attn = model.blocks[number].attn
    heads = attn.num_heads if model.rope_mixed else 1
    return RotationTable(f"rotations_{number if model.rope_mixed else 0}", heads * 2 * attn.head_dim)


def _rotate(
    graph: GraphBuilder, attn: nn.Module, rotation: RotationTable, layout: DenseLayout | PackedLayout, *values: str
) -> list[str]:
    """Rotate queries and keys, [B, n, H, D] each. The partner of a channel is half a head away, or next to it."""
    width = attn.head_dim
    table = layout.pad(*rotation)
    table = graph.add("Reshape", table, graph.constant([0, 0, -1, 2 * width]))  # [B, n, heads, 2 D]
    cosine, sine = graph.add_many("Split", 2, table, axis=3, num_outputs=2)
    channel = np.arange(width)
    partner = graph.constant((channel + width // 2) % width if attn.rotate_half else channel ^ 1)
    return [
        graph.add(
            "Add",
            graph.add("Mul", x, cosine),
            graph.add("Mul", graph.add("Gather", x, partner, axis=3), sine),
        )
        for x in values
    ]


# Layers that treat each token separately ---------------------------------------------------------


def write_linear(
    graph: GraphBuilder, layer: nn.Linear, x: str, layer_scale: Tensor | None = None, factor: float = 1.0
) -> str:
    """Apply a linear layer: [T, C] -> [T, D]. Layer scale, or else a factor, is folded into its weights."""
    factor = torch.tensor(factor) if layer_scale is None else layer_scale.detach()
    weights = [layer.weight.detach() * factor.unsqueeze(-1)]
    weights += [] if layer.bias is None else [layer.bias.detach() * factor]
    return graph.add("Gemm", x, *map(graph.constant, weights), transB=1)


def write_norm(graph: GraphBuilder, layer: nn.Module, x: str) -> str:
    """Apply a layer norm over the last axis. An identity adds no node."""
    if isinstance(layer, nn.Identity):
        return x
    weight = torch.ones(layer.normalized_shape) if layer.weight is None else layer.weight
    weights = [graph.constant(p) for p in (weight, layer.bias) if p is not None]
    return graph.add("LayerNormalization", x, *weights, axis=-1, epsilon=layer.eps)
