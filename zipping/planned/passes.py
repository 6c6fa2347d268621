"""A forward pass by plan: its shapes are static, and the host reads nothing from the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from timm.layers import DropPath, LayerNorm
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zipping.attention import varlen_attention
from zipping.blocks import PLAIN_LAYER_TYPES, layers_of, zipped_block
from zipping.outputs import Halting, summarize_halting
from zipping.planned.kernels import Halted, add_norm, decide_and_move, halt
from zipping.planned.plans import Plan
from zipping.planned.tokens import PlannedGate, PlannedTokens
from zipping.rotations import Rotation, rotations_of_blocks

MAX_FUSED_WIDTH = 2048  # channels that a program of the fused kernels holds at a time


class PlannedPass(NamedTuple):
    """Inputs of a forward pass except the images. For all batches of a plan, only the contents of its tensors differ.

    tokens: the store of the first block; gate: without the directions, which the model holds;
    step: runs one block and its halting, see `choose_step`.
    """

    model: VisionTransformer
    plan: Plan
    tokens: PlannedTokens
    gate: PlannedGate
    step: Callable[[PlannedPass, PassState, int], PassState]
    return_halting: bool = False
    early_exit: bool = False

    def capacity_after(self, number: int) -> int | None:
        """Return the rows of the block after this one: 0 if the plan ends, None after the network's last block."""
        if number + 1 < len(self.plan.capacities):
            return self.plan.capacities[number + 1]
        return None if number + 1 == self.model.num_blocks else 0

    def gate_of(self, number: int) -> PlannedGate:
        """Return the gate of this block."""
        directions = self.model.gate_directions
        return self.gate if directions is None else self.gate._replace(direction=directions[number].float())


class BlockRecord(NamedTuple):
    """Record of one block for `finish`. token: [c], of its store; for the others, see `Halted`."""

    token: Tensor
    score: Tensor
    halts: Tensor
    weighted: Tensor | None
    count: Tensor | None


@dataclass(frozen=True)
class PassState:
    """State of a pass between two blocks.

    tokens, rows, cumulative: input of the next block, None after the plan's last;
    dtype: of the mean-field output;
    records: one for each block so far;
    rotations: of each block, see `zipping.rotations`, or None;
    normed: the next block's first norm of `rows`, if it is already computed;
    features: [B, P, C] float32, the mean field so far, if the blocks add to it in place.
    """

    tokens: PlannedTokens | None
    rows: Tensor | None
    cumulative: Tensor | None
    dtype: torch.dtype
    rotations: list[Rotation | None]
    records: tuple[BlockRecord, ...] = ()
    normed: Tensor | None = None
    features: Tensor | None = None

    def after(self, halted: Halted) -> PassState:
        """Return the state after a block with this halting."""
        record = BlockRecord(self.tokens.token, halted.score, halted.halts, halted.weighted, halted.count)
        return replace(
            self,
            tokens=halted.tokens,
            rows=halted.rows,
            cumulative=halted.cumulative,
            normed=halted.normed,
            records=(*self.records, record),
        )

    @property
    def counts(self) -> Tensor:
        """[decisions] int32, the live rows after each decision so far. They may exceed the capacity."""
        return torch.stack([record.count.to(torch.int32) for record in self.records if record.count is not None])


# A pass: begin, run_blocks as often as there are graphs, finish ----------------------------------


def begin(planned: PlannedPass, images: Tensor) -> PassState:
    """Embed the images. images: [B, in_chans, H, W]. Returns the state before the first block."""
    model = planned.model
    x, embedding = model._embed(images)
    rotations = [None] * len(model.blocks) if embedding is None else rotations_of_blocks(model, embedding)
    cumulative = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.float32, device=x.device)
    return PassState(planned.tokens, x.flatten(0, 1), cumulative, x.dtype, rotations)


def run_blocks(planned: PlannedPass, state: PassState, numbers: range) -> PassState:
    """Run the blocks with these numbers, counted from 0. Returns the state after them."""
    for number in numbers:
        state = planned.step(planned, state, number)
    return state


def finish(planned: PlannedPass, state: PassState) -> tuple[Tensor | tuple[Tensor, Tensor], Halting | None]:
    """Run the head. Returns the logits (a pair in distilled training), and `Halting` if requested."""
    model, features = planned.model, state.features
    if features is None:
        features = torch.stack([record.weighted for record in state.records]).sum(dim=0)
    logits = model.forward_head(model.norm(features.to(state.dtype)))
    halting = None
    if planned.return_halting:
        score, halts = _to_dense(planned.plan.size, state.records)
        halting = summarize_halting(score, halts, model.num_prefix_tokens, model.num_blocks)
    return logits, halting


def _to_dense(size: tuple[int, int], records: tuple[BlockRecord, ...]) -> tuple[Tensor, Tensor]:
    """Return the scores and decisions of all blocks, [L, B, N] each, zero for halted tokens.

    Those of surplus rows, whose token is B * N, are written to an extra column that is cut off.
    """
    shape = (len(records), math.prod(size) + 1)
    starts = [number * shape[1] for number in range(shape[0])]
    index = torch.cat(torch._foreach_add([record.token for record in records], starts))

    def dense(values: Tensor) -> Tensor:
        scattered = values.new_zeros(math.prod(shape)).index_copy(0, index, values)
        return scattered.view(shape)[:, :-1].unflatten(1, size)

    return tuple(dense(torch.cat(values)) for values in zip(*((r.score, r.halts) for r in records)))


# One block ---------------------------------------------------------------------------------------


def choose_step(model: VisionTransformer, compile_blocks: bool) -> Callable[[PlannedPass, PassState, int], PassState]:
    """Choose the function that runs a block and its halting: the same for all blocks.

    Compiled if requested and possible, else fused if no gradients are needed and all blocks are those of a DeiT,
    else timm's own block.
    """
    if compile_blocks and all(map(can_compile, model.blocks)):
        return compiled_step
    needs_gradients = model.training or torch.is_grad_enabled()
    return fused_step if not needs_gradients and all(map(can_fuse, model.blocks)) else timm_step


def timm_step(planned: PlannedPass, state: PassState, number: int) -> PassState:
    """Run timm's own block on the rows, then its halting. Differentiable."""
    rows = zipped_block(planned.model.blocks[number], state.rows, state.tokens, state.rotations[number])
    return _halt(planned, state, number, rows)


def _halt(planned: PlannedPass, state: PassState, number: int, rows: Tensor) -> PassState:
    gate, capacity = planned.gate_of(number), planned.capacity_after(number)
    return state.after(halt(state.tokens, rows, state.cumulative, gate, capacity, planned.early_exit))


FUSED_LAYER_TYPES = PLAIN_LAYER_TYPES | {  # and those with layer scale
    tuple(map(type, layers_of(Block(8, 1, init_values=1.0, drop_path=rate, norm_layer=LayerNorm, device="meta"))))
    for rate in (0.0, 0.1)
}


def can_fuse(block: Block) -> bool:
    """Return whether `fused_step` computes what this block does in inference: a DeiT's, with or without layer scale."""
    return (
        tuple(map(type, layers_of(block))) in FUSED_LAYER_TYPES
        and all(norm.weight is not None and norm.bias is not None for norm in (block.norm1, block.norm2))
        and math.prod(block.norm1.normalized_shape) <= MAX_FUSED_WIDTH
    )


def fused_step(planned: PlannedPass, state: PassState, number: int) -> PassState:
    """Run a block and its halting in 9 kernel launches. Not differentiable.

    A branch is not added to the rows before the kernel that needs their sum, which also computes its norm.
    """
    blocks, tokens, capacity = planned.model.blocks, state.tokens, planned.capacity_after(number)
    block, next_norm = blocks[number], blocks[number + 1].norm1 if capacity else None
    rows, dtype = state.rows.contiguous(), _matmul_dtype(block)
    normed, features = state.normed, state.features
    if normed is None:  # before the first block
        _, normed = add_norm(rows, None, None, block.norm1, dtype)
        shape = (tokens.size[0], tokens.num_prefix_tokens, rows.shape[1])
        features = torch.zeros(shape, dtype=torch.float32, device=rows.device)
    branch = block.attn(normed.unsqueeze(0), attn_mask=tokens.attention_mask).squeeze(0)
    rows, normed = add_norm(rows, branch, getattr(block.ls1, "gamma", None), block.norm2, dtype)
    branch = block.mlp(normed)
    halted = decide_and_move(
        tokens, rows, branch, getattr(block.ls2, "gamma", None), state.cumulative, planned.gate_of(number),
        capacity, planned.early_exit, features, next_norm, dtype,
    )  # fmt: skip
    return replace(state, features=features).after(halted)


def _matmul_dtype(block: Block) -> torch.dtype:
    """Return the dtype in which the block computes matrix products."""
    weight = block.attn.qkv.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


# Compiled blocks ---------------------------------------------------------------------------------


def can_compile(block: Block) -> bool:
    """Return whether `compiled_step` computes what this block does."""
    return isinstance(block, Block) and block.attn.gate is None and _matmul_dtype(block).itemsize == 2


def compiled_step(planned: PlannedPass, state: PassState, number: int) -> PassState:
    """Run a block through torch.compile, then its halting. Differentiable.

    Stochastic depth is drawn outside, because torch.compile would make another graph for each rate.
    """
    block, tokens = planned.model.blocks[number], state.tokens
    scales = (_drop_path_scale(layer, state) for layer in (block.drop_path1, block.drop_path2))
    rows = _compiled_block()(block, state.rows, tokens.cu_seqlens, tokens.size[1], *scales)
    return _halt(planned, state, number, rows)


@cache
def _compiled_block() -> Callable:
    """Return the one compiled function of all blocks, plans and batch sizes."""
    return torch.compile(_block, dynamic=True)


def _block(
    block: Block, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale1: Tensor | None, scale2: Tensor | None
) -> Tensor:
    """Compute timm's block in a form that torch.compile traces. rows: [c, C]; scales: [c, 1] or None."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(rows)).view(1, len(rows), 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [1, H, c, D]
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = varlen_attention(attn.q_norm(q), attn.k_norm(k), v, cu_seqlens, max_seqlen, dropout)
    branch = block.ls1(attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2).squeeze(0)))))
    rows = rows + (branch if scale1 is None else branch * scale1)
    branch = block.ls2(block.mlp(block.norm2(rows)))
    return rows + (branch if scale2 is None else branch * scale2)


def _drop_path_scale(drop_path: nn.Module, state: PassState) -> Tensor | None:
    """Draw stochastic depth for all images, as on a dense batch. Returns the factor of each row, [c, 1]."""
    if not (isinstance(drop_path, DropPath) and drop_path.training):
        return None
    scale = drop_path(state.rows.new_ones(state.tokens.size[0], 1))
    return state.tokens.expand_to_tokens(scale)
