"""Gates by direction: linear predictions of the class token's late attention, fitted to a static model.

The patches that matter are those to which the class token attends in the later half of the blocks. After each block,
the logarithm of this attention is predicted from the state of a patch, by ridge regression. Patches with little
predicted attention halt first.

Other programs import this module too, see training/gate.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models_act import AdaptiveTokens
from training.gate import autocast, cost_counter
from zipping.blocks import run_block
from zipping.rotations import embeddings_of_blocks

SCALE = 6.0  # of the gate, per standard deviation of the predictions
CENTERS, HALVINGS = 64.0, 14  # of the search: it starts from -CENTERS to CENTERS
IMAGES_AT_ONCE = 16
RIDGE = 1e-4  # relative to the variance of each channel
MIN_ATTENTION = 1e-3  # relative to uniform attention; smaller values are clipped before the logarithm


class DirectionGate(NamedTuple):
    """A gate by direction, with its cost and the fit.

    directions: [L, C + 1] float32 on the CPU, see `AdaptiveTokens.set_gate_directions`;
    cost: fraction of the static model's MACs;
    explained: share of the variance of the log attention that is explained (R^2) after each block.
    """

    directions: Tensor
    scale: float
    center: float
    cost: float
    explained: tuple[float, ...]

    def apply(self, model: AdaptiveTokens) -> None:
        """Make a model halt by this gate."""
        model.set_gate_directions(self.directions)
        model.gate_scale, model.gate_center = self.scale, self.center


def why_no_directions(model: AdaptiveTokens) -> str | None:
    """Return why no directions can be fitted to a model; None if they can."""
    if model.cls_token is None or not model.reads_prefix:
        return "its head does not read a class token"
    return None if all(block.attn.fused_attn for block in model.blocks) else "its attention is not fused"


@torch.inference_mode()
def fit_gate(
    model: AdaptiveTokens,
    images: Tensor,
    device: torch.device,
    amp: str,
    cost: float,
    report: Callable[[str], None] = print,
) -> DirectionGate:
    """Return the gate by direction of this cost, fitted to a static model. Arguments: see `choose_gate`.

    The cost is that of the model as it is, before training. Raises FloatingPointError if its numbers are not finite.
    """
    model = copy.deepcopy(model).to(device).eval()
    model.cuda_graphs = False  # a plan fits the counts of one gate
    directions, explained = fit_directions(model, images)
    if not directions.isfinite().all():
        raise FloatingPointError("the states of the static model are not finite: its weights have diverged")
    model.set_gate_directions(directions)
    model.gate_scale, model.halting = SCALE, True
    low, high, cost_of = -CENTERS, CENTERS, None
    for _ in range(HALVINGS):
        model.gate_center = (low + high) / 2
        depth = _depth(model, images, device, amp)
        cost_of = cost_of or cost_counter(model, depth.shape[1])
        found = cost_of(depth).item()
        low, high = (model.gate_center, high) if found < cost else (low, model.gate_center)
    gate = DirectionGate(directions.cpu(), model.gate_scale, model.gate_center, found, tuple(explained))
    middle = max(1, model.num_blocks // 2)
    report(
        f"gate: directions fitted to the class token's attention; they explain {explained[0]:.0%} of its variance "
        f"after block 1 and {explained[middle - 1]:.0%} after block {middle}. Scale {gate.scale:g}, center "
        f"{gate.center:.4g}; before training, it uses {found:.0%} of the static model's MACs"
    )
    return gate


def _depth(model: AdaptiveTokens, images: Tensor, device: torch.device, amp: str) -> Tensor:
    """Return the depths of all tokens, [B, N]."""
    depths = []
    for part in images.split(IMAGES_AT_ONCE):
        with autocast(device, amp):
            logits, halting = model(part.to(device), return_halting=True)
        if not logits.isfinite().all():
            raise FloatingPointError("the logits are not finite: the weights have diverged, or --amp overflows")
        depths.append(halting.depth)
    return torch.cat(depths)


@torch.inference_mode()
def fit_directions(model: AdaptiveTokens, images: Tensor) -> tuple[Tensor, list[float]]:
    """Fit the directions of a gate to the static model, in float32.

    model: in evaluation mode; images: [B, 3, H, W], on any device.
    Returns the directions, [L, C + 1] float32 on the model's device, and the share of variance explained after each
    block. The predictions have a standard deviation of 1, in the quadratic mean over the blocks.
    """
    size, device = model.embed_dim + 2, next(model.parameters()).device  # columns: 1, state, log attention
    moments = torch.zeros(model.num_blocks, size, size, dtype=torch.float64, device=device)
    for part in images.split(IMAGES_AT_ONCE):
        states, attention = states_and_attention(model, part.to(device))
        expected = (attention * attention.shape[1]).clamp(min=MIN_ATTENTION).log()[..., None]  # 0: uniform attention
        for number, state in enumerate(states):
            rows = torch.cat([torch.ones_like(expected), state, expected], dim=2).flatten(0, 1).double()
            moments[number] += rows.T @ rows
    moments /= moments[:, :1, :1].clone()  # means over patches
    mean = moments[:, 0, 1:]
    covariance = moments[:, 1:, 1:] - mean[:, :, None] * mean[:, None]
    weights, explained = _ridge_regression(covariance)
    bias = mean[:, -1:] - (mean[:, None, :-1] @ weights[..., None])[..., 0]
    spread = (explained * covariance[:, -1, -1]).mean().clamp(min=1e-12).sqrt()
    directions = -torch.cat([weights, bias], dim=1) / spread  # little attention: a large value, so the patch halts
    return directions.float(), explained.tolist()


def _ridge_regression(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Predict the last column from the others. covariance: [L, K + 1, K + 1].

    Returns the weights, [L, K], and the share of variance explained, [L].
    """
    products, targets, variance = covariance[:, :-1, :-1], covariance[:, :-1, -1], covariance[:, -1, -1]
    variances = products.diagonal(dim1=1, dim2=2).clamp(min=0)
    floor = 1e-6 * variances.mean(dim=1, keepdim=True) + 1e-12  # for channels that are constant
    weights = torch.linalg.solve(products + torch.diag_embed(RIDGE * variances + floor), targets)
    predicted = (weights[:, None] @ products @ weights[..., None])[:, 0, 0]
    error = variance - 2 * (weights * targets).sum(dim=1) + predicted
    return weights, (variance - error) / variance.clamp(min=1e-12)


def states_and_attention(model: AdaptiveTokens, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run the static model on images [B, 3, H, W].

    Returns the patches' states after each block, [B, patches, C] each, and the class token's attention to the patches,
    [B, patches]: the share of each patch in each head, as a mean over heads and the later half of the blocks.
    """
    x, embedding = model._embed(images)
    states, attentions = [], []
    for block, rotary in zip(model.blocks, embeddings_of_blocks(model, embedding)):
        recorder = _AttentionRecorder(model.num_prefix_tokens)
        x = run_block(block, x, recorder, rotary)
        states.append(x[:, model.num_prefix_tokens :])
        attentions.append(recorder.attention)
    return states, torch.stack(attentions[model.num_blocks // 2 :]).mean(dim=0)


class _AttentionRecorder:
    """Stand-in attention mask that changes nothing and records the class token's attention in a block of timm.

    torch calls `__torch_function__` in place of `F.scaled_dot_product_attention`, see `PerImageAttentionMask`.
    """

    def __init__(self, num_prefix_tokens: int):
        self.num_prefix_tokens = num_prefix_tokens
        self.attention: Tensor | None = None  # [B, patches], mean over heads

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        recorder = kwargs.pop("attn_mask")
        q, k, _ = args  # [B, H, N, D]
        logits = (q[:, :, :1] @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
        recorder.attention = logits[:, :, 0, recorder.num_prefix_tokens :].softmax(dim=-1).mean(dim=1)
        return function(*args, **kwargs)
