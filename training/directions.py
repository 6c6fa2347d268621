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

SCALE = 6.0  # of the gate, per standard deviation of the predictions
CENTERS, HALVINGS = 64.0, 14  # of the search: it starts from -CENTERS to CENTERS
IMAGES_AT_ONCE = 64
RIDGE = 1e-4  # relative to the mean square of each channel
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

    The cost is that of the model as it is, before training. Raises FloatingPointError if its states are not finite.
    """
    model, images = copy.deepcopy(model).to(device).eval(), images.to(device)
    model.cuda_graphs = False  # a plan fits the counts of one gate
    directions, explained = fit_directions(model, images)
    if not directions.isfinite().all():
        raise FloatingPointError("the states of the static model are not finite: its weights have diverged")
    model.set_gate_directions(directions)
    model.gate_scale, model.halting = SCALE, True
    low, high, cost_of = -CENTERS, CENTERS, None
    for _ in range(HALVINGS):
        model.gate_center = (low + high) / 2
        depth = _depth(model, images, amp)
        cost_of = cost_of or cost_counter(model, depth.shape[1])
        found = cost_of(depth).item()
        low, high = (model.gate_center, high) if found < cost else (low, model.gate_center)
    middle = model.num_blocks // 2
    report(
        f"gate: directions fitted to the class token's attention; they explain {explained[0]:.0%} of its variance "
        f"after block 1 and {explained[middle - 1]:.0%} after block {middle}. Scale {model.gate_scale:g}, center "
        f"{model.gate_center:.4g}; before training, it uses {found:.0%} of the static model's MACs"
    )
    return DirectionGate(directions.cpu(), model.gate_scale, model.gate_center, found, tuple(explained))


def _depth(model: AdaptiveTokens, images: Tensor, amp: str) -> Tensor:
    """Return the depths of all tokens, [B, N]."""
    with autocast(images.device, amp):
        return torch.cat([model(part, return_halting=True)[1].depth for part in images.split(IMAGES_AT_ONCE)])


@torch.inference_mode()
def fit_directions(model: AdaptiveTokens, images: Tensor) -> tuple[Tensor, list[float]]:
    """Fit the directions of a gate to the static model.

    model: on the device of the images, in evaluation mode; images: [B, 3, H, W].
    Returns the directions, [L, C + 1] float32, and the share of variance explained after each block. The values of the
    patches have a standard deviation of 1, in the quadratic mean over the blocks.
    """
    columns = model.embed_dim + 2  # state, 1, log attention
    moments = torch.zeros(model.num_blocks, columns, columns, dtype=torch.float64, device=images.device)
    for part in images.split(IMAGES_AT_ONCE):
        states, attention = states_and_attention(model, part)
        expected = (attention * attention.shape[1]).clamp(min=MIN_ATTENTION).log()[..., None]  # 0: uniform attention
        for number, state in enumerate(states):
            rows = torch.cat([state, torch.ones_like(expected), expected], dim=2).flatten(0, 1).double()
            moments[number] += rows.T @ rows
    moments /= moments[0, -2, -2].clone()  # means over patches
    weights = _ridge_regression(moments)
    row = torch.cat([weights, -torch.ones_like(weights[:, :1])], dim=1)  # row . columns is the error of a prediction
    error = torch.einsum("li,lij,lj->l", row, moments, row)
    variance = moments[:, -1, -1] - moments[:, -1, -2] ** 2
    spread = (variance - error).mean().clamp(min=1e-12).sqrt()
    return (-weights / spread).float(), (1 - error / variance).tolist()  # little attention: a large value, so it halts


def _ridge_regression(moments: Tensor) -> Tensor:
    """Return the weights that predict the last column from the others.

    moments: mean products of columns, [L, K + 1, K + 1] -> [L, K].
    """
    products, targets = moments[:, :-1, :-1], moments[:, :-1, -1]
    ridge = RIDGE * products.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    return torch.linalg.solve(products + torch.diag_embed(ridge), targets)


def states_and_attention(model: AdaptiveTokens, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run the static model on images [B, 3, H, W].

    Returns the patches' states after each block, [B, patches, C] each, and the class token's attention to the patches,
    [B, patches]: mean over heads and the later half of the blocks, scaled to sum 1 over the patches.
    """
    x, states, attentions = model._embed(images), [], []
    for block in model.blocks:
        recorder = _AttentionRecorder(model.num_prefix_tokens)
        x = block(x, attn_mask=recorder)
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
