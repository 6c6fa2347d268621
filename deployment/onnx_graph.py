"""An adaptive network as an ONNX graph of standard operators, in which tokens really leave.

    proto = write_graph(model, form="single")   # images [1, 3, H, W] -> logits [1, K], live [L]
    proto = write_graph(model, form="batch")    # images [B, 3, H, W] -> logits [B, K], live [B, L]

Nodes are written from the modules of the network, nothing is traced. Tokens are rows [T, C], as in zipping/; those
that go on are compressed before each block, so that it computes fewer. In a batch the rows of all images stand one
after the other, and attention is on padding. A network with `halting` off gives the static graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.layers import Attention, DropPath, GELUTanh, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from models_act import ADAPTIVE, AdaptiveTokens

OPSET, IR_VERSION = 20, 10
GATE = ("gate_scale", "gate_center")  # of a model, and inputs of the graph
MAX_BYTES = 2**31 - 2**20  # of one file; the rest is for the nodes
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
KNOWN = (*ADAPTIVE.values(), PatchEmbed, Block, Attention, Mlp, LayerScale, DropPath, LayerNorm)
KNOWN += (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GELU, GELUTanh, nn.Identity, nn.Dropout, nn.Sequential)


def unfit_part(model: AdaptiveTokens) -> str | None:
    """What in a network cannot be written, if anything."""
    is_mean_of_normed = model.global_pool == "avg" and not isinstance(model.norm, nn.Identity)
    reasons = {
        "its images may be of any size": model.dynamic_img_size,
        "it has no head": model.global_pool == "" or isinstance(model.head, nn.Identity),
        "its head reads the mean of normalised tokens": is_mean_of_normed,
        "blocks were taken out": len(model.blocks) != model.num_blocks,
    }
    parts = (_unfit_module(name, module) for name, module in model.named_modules())
    return next((reason for reason, is_so in reasons.items() if is_so), None) or next(filter(None, parts), None)


def _unfit_module(name: str, module: nn.Module) -> str | None:
    if type(module) not in KNOWN:
        return f"{name} is a {type(module).__name__}"
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return f"{name or 'it'} was changed by a hook or another forward"
    if getattr(module, "gate", None) is not None:
        return f"{name} is gated"
    return None


class Graph:
    """A graph under way: each call writes a node or a number, and returns the name of the result.

    half: floats of two dimensions and more are kept in half precision, and cast back where they are used.
    """

    def __init__(self, half: bool = False):
        self.half, self.numbers = half, count()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes) -> str:
        """A node with one output, which may be given a name."""
        return self._node(operator, [name or self._new_name(operator)], inputs, attributes)[0]

    def add_many(self, operator: str, many: int, *inputs: str, **attributes) -> list[str]:
        return self._node(operator, [self._new_name(operator) for _ in range(many)], inputs, attributes)

    def _node(self, operator: str, outputs: list[str], inputs: Sequence[str], attributes: dict) -> list[str]:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=f"{operator}_{outputs[0]}", **attributes))
        return outputs

    def constant(self, value: np.ndarray | torch.Tensor | float | list[int], name: str | None = None) -> str:
        """Whole numbers and booleans as they are, others as float32."""
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float16 if self.half and array.ndim > 1 else np.float32)
        name = name or self._new_name("constant")
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return self.add("Cast", name, to=FLOAT) if array.dtype == np.float16 else name

    def inner(
        self, write: Callable[..., Sequence[str]], outputs: Sequence[int], inputs: Sequence[Value] = ()
    ) -> onnx.GraphProto:
        """The body of a node; write: given the inputs' names, adds its nodes, returns results; outputs: their types."""
        outer, self.nodes = self.nodes, []
        results = write(*(name for name, *_ in inputs))
        nodes, self.nodes = self.nodes, outer
        infos = [_info(*value) for value in inputs], [_info(*value, None) for value in zip(results, outputs)]
        return helper.make_graph(nodes, "body", *infos)

    def _new_name(self, what: str) -> str:
        return f"{what}_{next(self.numbers)}"


Value = tuple[str, int, Sequence]  # name, type in ONNX's numbers, sizes: of what enters or leaves a graph


def write_graph(model: AdaptiveTokens, form: str = "single", half: bool = False) -> onnx.ModelProto:
    """The network in evaluation, as it stands: its gate, image size and classes.

    form: "single" for one image a call, "batch" for any number; half: weights are kept in half precision.
    Inputs `images` float32, and where it halts `gate_scale`, `gate_center` float32 [], with the network's as defaults;
    outputs `logits` float32, and `live` int64, how many tokens each block computes, early exit counted.
    ValueError, naming the part, for a network that cannot be written, or one too large for a file.
    """
    reason = unfit_part(model)
    if reason:
        raise ValueError(f"no ONNX graph can be written: {reason}")
    size = sum(p.numel() for p in model.parameters()) * (2 if half else 4)
    if size > MAX_BYTES:
        raise ValueError(f"no ONNX graph can be written: weights of {size / 2**30:.1f} GiB, and a file holds 2")
    graph, num_blocks, is_batch = Graph(half), len(model.blocks), form == "batch"
    batch = ["B"] if is_batch else [1]
    inputs = [("images", FLOAT, [*batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size])]
    if model.halting:
        inputs += [(graph.constant(getattr(model, name), name), FLOAT, []) for name in GATE]
    tokens = _embed(graph, model)
    if model.halting:
        read, live = _halting_blocks(graph, model, tokens, is_batch)
    else:
        read, live = _static_blocks(graph, model, tokens)
    _head(graph, model, read)
    if is_batch:
        graph.add("Identity", live, name="live")
    else:
        graph.add("Squeeze", live, graph.constant([0]), name="live")
    outputs = [("logits", FLOAT, [*batch, model.num_classes])]
    outputs.append(("live", INT64, ["B", num_blocks] if is_batch else [num_blocks]))
    infos = ([_info(*value) for value in values] for values in (inputs, outputs))
    proto = helper.make_graph(graph.nodes, type(model).__name__, *infos, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="export_onnx.py")


def _info(name: str, kind: int, sizes: Sequence) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, sizes)


# From images to tokens, and from tokens to logits ------------------------------------------------


def _embed(graph: Graph, model: AdaptiveTokens) -> str:
    """images -> [B, N, C], what enters the first block."""
    embed, channels = model.patch_embed, model.embed_dim
    weights = [graph.constant(p) for p in (embed.proj.weight, embed.proj.bias) if p is not None]
    x = graph.add("Conv", "images", *weights, strides=embed.patch_size)  # [B, C, h, w]
    x = graph.add("Reshape", x, graph.constant([0, channels, embed.num_patches]))
    x = _norm(graph, embed.norm, graph.add("Transpose", x, perm=[0, 2, 1]))
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
    return _norm(graph, model.norm_pre, x)


def _read_weights(model: AdaptiveTokens) -> np.ndarray:
    """[R, N], how much of each token the head's R inputs are.

    The class token, or that and the distillation token, or the mean of patches.
    """
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    weights = np.zeros((2 if hasattr(model, "head_dist") else 1, num_tokens))
    if model.reads_prefix:
        np.fill_diagonal(weights, 1)
    else:
        first = 0 if model.pool_include_prefix else model.num_prefix_tokens
        weights[:, first:] = 1 / (num_tokens - first)
    return weights.astype(np.float32)


def _head(graph: Graph, model: AdaptiveTokens, read: str) -> None:
    """read: [R, B, C] -> logits [B, K], the mean of those of R heads."""
    heads = [model.head, model.head_dist] if hasattr(model, "head_dist") else [model.head]
    x = _norm(graph, model.fc_norm, _norm(graph, model.norm, read))
    rows = [graph.add("Gather", x, graph.constant(index), axis=0) for index in range(len(heads))]
    logits = [_linear(graph, head, row, factor=1 / len(heads)) for head, row in zip(heads, rows)]
    graph.add("Sum", *logits, name="logits")


# Blocks on rows ----------------------------------------------------------------------------------


def _static_blocks(graph: Graph, model: AdaptiveTokens, tokens: str) -> tuple[str, str]:
    """tokens: [B, N, C] -> what the head reads [R, B, C], live tokens [B, L]."""
    weights = _read_weights(model)
    num_tokens = weights.shape[1]
    rows = _rows(graph, model, tokens)
    layout = _Dense(graph, {"rows": rows}, (-1, num_tokens))
    for block in model.blocks:
        rows = _block(graph, block, rows, layout)
    tokens = graph.add("Reshape", rows, graph.constant([-1, num_tokens, model.embed_dim]))
    read = graph.add("Transpose", graph.add("MatMul", graph.constant(weights), tokens), perm=[1, 0, 2])
    sizes = graph.add("Concat", graph.add("Shape", tokens, end=1), graph.constant([len(model.blocks)]), axis=0)
    return read, graph.add("Expand", graph.constant([[num_tokens]]), sizes)


def _halting_blocks(graph: Graph, model: AdaptiveTokens, tokens: str, is_batch: bool) -> tuple[str, str]:
    """tokens: [B, N, C] -> sum_l p_l x_l of what the head reads (Eq. 5) [R, B, C], live tokens [B, L].

    Every block but the first is the branch of an If, which is not entered when no token goes on.
    """
    layout = _Packed if is_batch else _Dense
    state = _halting_block(graph, model, 0, _first_state(graph, model, tokens, is_batch), layout)
    nothing = {name: graph.add("Mul", state[name], graph.constant(zero)) for name, zero in NOTHING.items()}
    results = [state]
    for number in range(1, len(model.blocks)):

        def compute(before: dict[str, str] = state, number: int = number) -> list[str]:
            after = _halting_block(graph, model, number, _live(graph, before), layout)
            return list(after.values())

        def skip(before: dict[str, str] = state) -> list[str]:
            return [graph.add("Identity", value) for value in (before | nothing).values()]

        types = [TYPES[name] for name in state]
        branches = {"then_branch": graph.inner(compute, types), "else_branch": graph.inner(skip, types)}
        state = dict(zip(state, graph.add_many("If", len(state), state["any"], **branches)))
        results.append(state)
    live = [graph.add("Unsqueeze", state["live"], graph.constant([1])) for state in results]
    return graph.add("Sum", *(state["read"] for state in results)), graph.add("Concat", *live, axis=1)


# What is known after a block, by name: its type in ONNX. Of each of the T rows that it computed:
#   rows [T, C]; scores [T], their sum; weights [R, T], see `_read_weights`; image [T], its number, in a batch;
#   anchors [T], whether the head reads it, or its image stays while it does, of which there are A;
#   goes_on [T], whether into the next block;
# and any [1], whether one does; read [R, B, C], what is added to what the head reads; live [B], rows of each image.
TYPES = {"rows": FLOAT, "scores": FLOAT, "weights": FLOAT, "anchors": BOOL, "image": INT64, "goes_on": BOOL}
TYPES |= {"any": BOOL, "read": FLOAT, "live": INT64}
AXES = {"rows": 0, "scores": 0, "weights": 1, "anchors": 0, "image": 0}  # of rows, in what goes into the next block
IMAGE_NUMBERS, NO_ROWS = "image_numbers", "no_rows"  # [B]: 0 to B - 1; zeros
FAR_BELOW = -60.0  # added to a score makes it nothing beside the others, and no denormal number, which are slow
NOTHING = {"read": 0.0, "live": 0}  # what a block adds that is skipped, after a product with the first block's


def _rows(graph: Graph, model: AdaptiveTokens, tokens: str) -> str:
    """[B, N, C] -> [B * N, C]"""
    return graph.add("Reshape", tokens, graph.constant([-1, model.embed_dim]))


def _first_state(graph: Graph, model: AdaptiveTokens, tokens: str, is_batch: bool) -> dict[str, str]:
    """tokens: [B, N, C] -> what goes into the first block."""
    weights = _read_weights(model)
    num_tokens = weights.shape[1]
    is_anchor = np.arange(num_tokens) < (model.num_prefix_tokens if model.reads_prefix else num_tokens)
    values = {"scores": np.zeros(num_tokens), "weights": weights, "anchors": is_anchor}
    state = {name: graph.constant(value) for name, value in values.items()}
    if is_batch:
        batch = graph.add("Shape", tokens, end=1)
        state = {name: graph.add("Tile", value, _repeats(graph, batch, name)) for name, value in state.items()}
        graph.add("Range", graph.constant(0), graph.add("Squeeze", batch), graph.constant(1), name=IMAGE_NUMBERS)
        graph.add("Expand", graph.constant(0), batch, name=NO_ROWS)
        column = graph.add("Unsqueeze", IMAGE_NUMBERS, graph.constant([1]))
        sizes = graph.add("Concat", batch, graph.constant([num_tokens]), axis=0)
        state["image"] = graph.add("Reshape", graph.add("Expand", column, sizes), graph.constant([-1]))
    return {"rows": _rows(graph, model, tokens), **state}


def _repeats(graph: Graph, batch: str, name: str) -> str:
    return batch if AXES[name] == 0 else graph.add("Concat", graph.constant([1]), batch, axis=0)


def _live(graph: Graph, state: dict[str, str]) -> dict[str, str]:
    """What goes into the next block, of the rows that do."""
    taken = {name: axis for name, axis in AXES.items() if name in state}
    return {name: graph.add("Compress", state[name], state["goes_on"], axis=axis) for name, axis in taken.items()}


def _halting_block(
    graph: Graph, model: AdaptiveTokens, number: int, state: dict[str, str], make_layout: type[_Dense] | type[_Packed]
) -> dict[str, str]:
    """Block `number`, from 0, on live rows, then the arithmetic of `models_act.halting_step`, in its order."""
    layout = make_layout(graph, state)
    rows = _block(graph, model.blocks[number], state["rows"], layout)
    channel = graph.add("Gather", rows, graph.constant(0), axis=1)
    score = graph.add("Sigmoid", graph.add("Sub", graph.add("Mul", channel, "gate_scale"), "gate_center"))
    probability = graph.add("Sub", graph.constant(1.0), state["scores"])  # the remainder, where a token halts
    scores = graph.add("Add", state["scores"], score)
    limit = graph.constant(1 - model.halt_eps)
    goes_on = graph.add("Not", graph.add("GreaterOrEqual", scores, limit))  # a score that is no number halts none
    if number < len(model.blocks) - 1:
        probability = graph.add("Where", goes_on, score, probability)
    anchors = (graph.add("Compress", x, state["anchors"], axis=0) for x in (rows, probability, goes_on))
    anchor_rows, anchor_probability, anchor_goes_on = anchors
    share = graph.add("Mul", graph.add("Compress", state["weights"], state["anchors"], axis=1), anchor_probability)
    read = graph.add("MatMul", layout.by_image(share), anchor_rows)
    goes_on, anything = layout.going_on(goes_on, anchor_goes_on)
    after = {"rows": rows, "scores": scores, "goes_on": goes_on, "any": anything, "read": read, "live": layout.live}
    return {name: (state | after)[name] for name in TYPES if name in state or name in after}


class _Dense:
    """Rows of one image, or of images that have all their tokens."""

    bias = None  # for keys, [B, 1, 1, n]

    def __init__(self, graph: Graph, state: dict[str, str], images: tuple[int, int] = (1, -1)):
        self.graph, self.images = graph, images
        self.live = graph.add("Shape", state["rows"], end=1)  # [1], of one image

    def pad(self, x: str, channels: int) -> str:
        """[T, C] -> [B, n, C]"""
        return self.graph.add("Reshape", x, self.graph.constant([*self.images, channels]))

    def unpad(self, x: str) -> str:
        """[B * n, C] -> [T, C]"""
        return x

    def by_image(self, values: str) -> str:
        """[R, A] -> [R, B, A], zero for anchors of other images"""
        return self.graph.add("Unsqueeze", values, self.graph.constant([1]))

    def going_on(self, goes_on: str, anchors: str) -> tuple[str, str]:
        """goes_on: [T] bool; anchors: [A] bool, which of them do -> goes_on, of images with such, and whether any does.

        One image without is left by the next If.
        """
        return goes_on, _any(self.graph, anchors)


class _Packed:
    """Rows of several images, any number of each, in their order.

    Attention is on padding on the right: an image's last row, repeated, which is no key.
    """

    def __init__(self, graph: Graph, state: dict[str, str]):
        self.graph, self.image, add, constant = graph, state["image"], graph.add, graph.constant
        zero, one, axis = constant(0), constant(1), constant([1])
        number_of_rows = add("Shape", self.image)  # [1]
        ones = add("Expand", one, number_of_rows)
        self.live = add("ScatterElements", NO_ROWS, self.image, ones, axis=0, reduction="add")  # [B]
        start = add("CumSum", self.live, zero, exclusive=1)  # [B]
        is_live = add("Cast", self.live, to=BOOL)
        column = add("Unsqueeze", add("Compress", start, is_live, axis=0), axis)  # [I, 1], of the images that have rows
        lengths = add("Unsqueeze", add("Compress", self.live, is_live, axis=0), axis)
        longest = add("ReduceMax", self.live, keepdims=0)
        place = add("Range", zero, longest, one)  # [n]
        self.row = add("Add", column, add("Min", place, add("Sub", lengths, one)))  # [I, n]
        is_key = add("Unsqueeze", add("Less", place, lengths), constant([1, 2]))
        self.bias = add("Where", is_key, constant(0.0), constant(FAR_BELOW))  # [I, 1, 1, n]
        number = add("CumSum", add("Cast", is_live, to=INT64), zero, exclusive=1)  # [B], among these images
        offset = add("Sub", add("Mul", number, longest), start)  # [B], of an image's places from its rows
        rows = add("Range", zero, add("Squeeze", number_of_rows), one)
        self.place = add("Add", rows, add("Gather", offset, self.image))  # [T], of I * n
        anchor_image = add("Compress", self.image, state["anchors"], axis=0)
        is_of = add("Equal", add("Unsqueeze", IMAGE_NUMBERS, axis), add("Unsqueeze", anchor_image, constant([0])))
        self.is_of = add("Cast", is_of, to=FLOAT)  # [B, A]

    def pad(self, x: str, channels: int) -> str:
        return self.graph.add("Gather", x, self.row, axis=0)

    def unpad(self, x: str) -> str:
        return self.graph.add("Gather", x, self.place, axis=0)

    def by_image(self, values: str) -> str:
        return self.graph.add("Mul", self.graph.add("Unsqueeze", values, self.graph.constant([1])), self.is_of)

    def going_on(self, goes_on: str, anchors: str) -> tuple[str, str]:
        add = self.graph.add
        stays = add("Cast", add("MatMul", self.is_of, add("Cast", anchors, to=FLOAT)), to=BOOL)  # [B]
        goes_on = add("And", goes_on, add("Gather", stays, self.image))
        return goes_on, _any(self.graph, stays)


def _any(graph: Graph, mask: str) -> str:
    """[T] bool -> [1] bool"""
    number = graph.add("ReduceSum", graph.add("Cast", mask, to=INT64), keepdims=1)
    return graph.add("Cast", number, to=BOOL)


def _block(graph: Graph, block: Block, rows: str, layout: _Dense | _Packed) -> str:
    """rows: [T, C] -> [T, C]"""
    rows = graph.add("Add", rows, _attention(graph, block.attn, _norm(graph, block.norm1, rows), layout, block.ls1))
    x = _linear(graph, block.mlp.fc1, _norm(graph, block.norm2, rows))
    approximate = "tanh" if isinstance(block.mlp.act, GELUTanh) else block.mlp.act.approximate
    x = _norm(graph, block.mlp.norm, graph.add("Gelu", x, approximate=approximate))
    return graph.add("Add", rows, _linear(graph, block.mlp.fc2, x, block.ls2))


def _attention(graph: Graph, attn: Attention, x: str, layout: _Dense | _Packed, layer_scale: nn.Module) -> str:
    """x: [T, C] -> [T, C], within each image"""
    heads = graph.constant([0, 0, attn.num_heads, attn.head_dim])
    qkv = layout.pad(_linear(graph, attn.qkv, x), 3 * attn.attn_dim)  # [B, n, 3 * C]
    q, k, v = (graph.add("Reshape", part, heads) for part in graph.add_many("Split", 3, qkv, axis=2, num_outputs=3))
    q = graph.add("Mul", _norm(graph, attn.q_norm, q), graph.constant(attn.scale))
    q, v = (graph.add("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))  # [B, H, n, D]
    k = graph.add("Transpose", _norm(graph, attn.k_norm, k), perm=[0, 2, 3, 1])  # [B, H, D, n]
    scores = graph.add("MatMul", q, k)
    scores = scores if layout.bias is None else graph.add("Add", scores, layout.bias)
    x = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    x = graph.add("Reshape", graph.add("Transpose", x, perm=[0, 2, 1, 3]), graph.constant([-1, attn.attn_dim]))
    return _linear(graph, attn.proj, _norm(graph, attn.norm, layout.unpad(x)), layer_scale)


def _linear(graph: Graph, layer: nn.Linear, x: str, layer_scale: nn.Module | None = None, factor: float = 1.0) -> str:
    """x: [T, C] -> [T, D], times layer scale and a factor, which its weights take over."""
    factor = layer_scale.gamma.detach() if isinstance(layer_scale, LayerScale) else torch.tensor(factor)
    weights = [layer.weight.detach() * factor.unsqueeze(-1)]
    weights += [] if layer.bias is None else [layer.bias.detach() * factor]
    return graph.add("Gemm", x, *map(graph.constant, weights), transB=1)


def _norm(graph: Graph, layer: nn.Module, x: str) -> str:
    """Over the last axis, where the layer is one."""
    if isinstance(layer, nn.Identity):
        return x
    weight = torch.ones(layer.normalized_shape) if layer.weight is None else layer.weight
    weights = [graph.constant(p) for p in (weight, layer.bias) if p is not None]
    return graph.add("LayerNormalization", x, *weights, axis=-1, epsilon=layer.eps)
