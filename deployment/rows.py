"""Rows of tokens in the ONNX graph: the state that passes between blocks, and the layouts that attention runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace

from deployment.graph import BOOL, FLOAT, INT64, GraphBuilder

IMAGE_NUMBERS, NO_ROWS = "image_numbers", "no_rows"  # tensors [B] of the batch graph: 0 to B - 1; zeros
PADDING_BIAS = -60.0  # exp(-60) is negligible but not denormal; arithmetic on denormal numbers is slow


def _tensor(onnx_type: int, row_axis: int | None = None) -> Field:
    """Declare a tensor of `State`. row_axis: the axis of its T rows, if it has one and enters the next block."""
    return field(default=None, metadata={"type": onnx_type, "row_axis": row_axis})


@dataclass(frozen=True)
class State:
    """Names of the tensors that pass from block to block, for the T rows that a block computes.

    Anchors are the tokens that keep their image in the model: the prefix tokens if the head reads them, else all. An
    image exits once none of its anchors is live. A of the T rows are anchors. R is defined by `_pooling_weights`.
    A tensor that does not exist at some point is None. The outputs of an If node have the order of these fields.
    """

    rows: str | None = _tensor(FLOAT, row_axis=0)  # [T, C] tokens
    scores: str | None = _tensor(FLOAT, row_axis=0)  # [T] cumulative halting scores
    weights: str | None = _tensor(FLOAT, row_axis=1)  # [R, T] pooling weights
    anchors: str | None = _tensor(BOOL, row_axis=0)  # [T] whether the row is an anchor
    prefix: str | None = _tensor(BOOL, row_axis=0)  # [T] whether it is a prefix token, if the gate reads a direction
    position: str | None = _tensor(INT64, row_axis=0)  # [T] number of the token in its image, if attention rotates
    image: str | None = _tensor(INT64, row_axis=0)  # [T] number of the row's image, in batch mode only
    keep: str | None = _tensor(BOOL)  # [T] whether the row enters the next block
    any_kept: str | None = _tensor(BOOL)  # [1] whether any row does
    head_inputs: str | None = _tensor(FLOAT)  # [R, B, C] the block's contribution to the head's inputs
    live: str | None = _tensor(INT64)  # [B] number of rows of each image

    def names(self) -> list[str]:
        return [getattr(self, tensor.name) for tensor in self._existing()]

    def types(self) -> list[int]:
        return [tensor.metadata["type"] for tensor in self._existing()]

    def with_names(self, names: Sequence[str]) -> State:
        """Return the same tensors under other names, given in the order of `names()`."""
        return replace(self, **{tensor.name: name for tensor, name in zip(self._existing(), names)})

    def row_axes(self) -> dict[str, int]:
        """Return the axis of the rows, by the field, for the tensors that enter the next block."""
        axes = {tensor.name: tensor.metadata["row_axis"] for tensor in self._existing()}
        return {name: axis for name, axis in axes.items() if axis is not None}

    def _existing(self) -> list[Field]:
        return [tensor for tensor in fields(self) if getattr(self, tensor.name) is not None]


class DenseLayout:
    """Rows of one image, or of several images that have all their tokens.

    bias: attention bias of the keys; live: [1], number of rows
    """

    bias = None

    def __init__(self, graph: GraphBuilder, state: State, images: tuple[int, int] = (1, -1)):
        self.graph, self.images = graph, images
        self.live = graph.add("Shape", state.rows, end=1)

    def pad(self, x: str, channels: int) -> str:
        """Group rows by image: [T, C] -> [B, n, C]."""
        return self.graph.add("Reshape", x, self.graph.constant([*self.images, channels]))

    def unpad(self, x: str) -> str:
        """Undo `pad`: [B * n, C] -> [T, C]."""
        return x

    def per_image(self, values: str) -> str:
        """Expand values of anchors by image: [R, A] -> [R, B, A], zero for anchors of other images."""
        return self.graph.add("Unsqueeze", values, self.graph.constant([1]))

    def exit_images(self, keep: str, anchor_keep: str) -> tuple[str, str]:
        """Drop the rows of images without live anchors: keep [T], anchor_keep [A] -> keep [T], any kept [1].

        A single image needs no change of `keep`: the next If node skips the block.
        """
        return keep, _any(self.graph, anchor_keep)


class PackedLayout:
    """Rows of B images, concatenated, with any number of rows each. I of the images have rows.

    Attention runs on [I, n] slots, where n is the largest number of rows. An image with fewer rows repeats its last
    row in the remaining slots, and `bias` removes these from the keys.

    live: [B], number of rows of each image
    row_of_slot: [I, n], the row in each slot; slot_of_row: [T], the slot of each row, as an index into I * n
    bias: [I, 1, 1, n], attention bias of the keys
    anchor_of_image: [B, A] float, 1 where the anchor belongs to the image
    """

    def __init__(self, graph: GraphBuilder, state: State):
        self.graph, self.image = graph, state.image
        self.zero, self.one, self.axis_1 = graph.constant(0), graph.constant(1), graph.constant([1])
        num_rows = graph.add("Shape", self.image)  # [1]
        self.live = self._live(num_rows)
        first_row = graph.add("CumSum", self.live, self.zero, exclusive=1)  # [B]
        has_rows = graph.add("Cast", self.live, to=BOOL)  # [B]
        first_rows = self._column(first_row, has_rows)  # [I, 1]
        seqlens = self._column(self.live, has_rows)  # [I, 1]
        max_seqlen = graph.add("ReduceMax", self.live, keepdims=0)  # []
        slots = graph.add("Range", self.zero, max_seqlen, self.one)  # [n]
        self.row_of_slot = self._row_of_slot(first_rows, seqlens, slots)
        self.bias = self._bias(seqlens, slots)
        self.slot_of_row = self._slot_of_row(first_row, has_rows, max_seqlen, num_rows)
        self.anchor_of_image = self._anchor_of_image(state.anchors)

    def _live(self, num_rows: str) -> str:
        """Count the rows of each image: [B]."""
        ones = self.graph.add("Expand", self.one, num_rows)
        return self.graph.add("ScatterElements", NO_ROWS, self.image, ones, axis=0, reduction="add")

    def _column(self, values: str, has_rows: str) -> str:
        """Select the values [B] of the images that have rows, as a column: [I, 1]."""
        return self.graph.add("Unsqueeze", self.graph.add("Compress", values, has_rows, axis=0), self.axis_1)

    def _row_of_slot(self, first_rows: str, seqlens: str, slots: str) -> str:
        """Return the row in each slot, the last row in slots of padding: [I, n]."""
        last = self.graph.add("Sub", seqlens, self.one)
        return self.graph.add("Add", first_rows, self.graph.add("Min", slots, last))

    def _bias(self, seqlens: str, slots: str) -> str:
        """Return 0 for slots with a row and PADDING_BIAS for padding: [I, 1, 1, n]."""
        add, constant = self.graph.add, self.graph.constant
        is_key = add("Unsqueeze", add("Less", slots, seqlens), constant([1, 2]))
        return add("Where", is_key, constant(0.0), constant(PADDING_BIAS))

    def _slot_of_row(self, first_row: str, has_rows: str, max_seqlen: str, num_rows: str) -> str:
        """Return the slot of each row, as an index into I * n: [T]."""
        add = self.graph.add
        number = add("CumSum", add("Cast", has_rows, to=INT64), self.zero, exclusive=1)  # [B], among the I images
        offset = add("Sub", add("Mul", number, max_seqlen), first_row)  # [B], from a row of the image to its slot
        rows = add("Range", self.zero, add("Squeeze", num_rows), self.one)  # [T]
        return add("Add", rows, add("Gather", offset, self.image))

    def _anchor_of_image(self, anchors: str) -> str:
        """Return 1 where an anchor belongs to an image, else 0: [B, A]."""
        add = self.graph.add
        anchor_image = add("Compress", self.image, anchors, axis=0)  # [A]
        column = add("Unsqueeze", IMAGE_NUMBERS, self.axis_1)
        row = add("Unsqueeze", anchor_image, self.graph.constant([0]))
        return add("Cast", add("Equal", column, row), to=FLOAT)

    def pad(self, x: str, channels: int) -> str:
        """Group rows by image and pad them: [T, C] -> [I, n, C]."""
        return self.graph.add("Gather", x, self.row_of_slot, axis=0)

    def unpad(self, x: str) -> str:
        """Undo `pad`: [I * n, C] -> [T, C]."""
        return self.graph.add("Gather", x, self.slot_of_row, axis=0)

    def per_image(self, values: str) -> str:
        """Expand values of anchors by image: [R, A] -> [R, B, A], zero for anchors of other images."""
        expanded = self.graph.add("Unsqueeze", values, self.graph.constant([1]))
        return self.graph.add("Mul", expanded, self.anchor_of_image)

    def exit_images(self, keep: str, anchor_keep: str) -> tuple[str, str]:
        """Drop the rows of images without live anchors: keep [T], anchor_keep [A] -> keep [T], any kept [1]."""
        add = self.graph.add
        num_live_anchors = add("MatMul", self.anchor_of_image, add("Cast", anchor_keep, to=FLOAT))  # [B]
        stays = add("Cast", num_live_anchors, to=BOOL)  # [B]
        keep = add("And", keep, add("Gather", stays, self.image))
        return keep, _any(self.graph, stays)


def _any(graph: GraphBuilder, mask: str) -> str:
    """Reduce a mask [T] to [1]: whether any of it is true."""
    number = graph.add("ReduceSum", graph.add("Cast", mask, to=INT64), keepdims=1)
    return graph.add("Cast", number, to=BOOL)
