"""Search for the channel of the tokens and the gate from which the fine-tuning of a static model starts.

Other programs import this module too (docs/models.md), next to modules of their own. It therefore imports no module
with a common name, such as `utils`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from macs import macs_counter, static_macs
from models_act import AdaptiveTokens
from zipping.channels import swap_channels

SPREAD = 4.0  # standard deviation of the gate's logit over tokens and blocks
AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FEW_IMAGES, FINALISTS = 32, 16  # every gate is evaluated on FEW_IMAGES, and the best FINALISTS on all images


class GateCandidate(NamedTuple):
    """A gate with the KL divergence from the static model's predictions and its cost.

    cost: fraction of the static model's MACs.
    """

    divergence: float
    channel: int
    scale: float
    center: float
    cost: float

    def apply(self, model: AdaptiveTokens) -> None:
        """Make a model halt by this gate."""
        model.set_gate_directions(None)
        model.set_halting_channel(self.channel)
        model.gate_scale, model.gate_center = self.scale, self.center


@torch.inference_mode()
def choose_gate(
    model: AdaptiveTokens,
    images: Tensor,
    device: torch.device,
    amp: str,
    cost: float,
    report: Callable[[str], None] = print,
) -> GateCandidate:
    """Return the gate of this cost by which halting changes a static model's predictions least.

    Candidates are all channels of the tokens with both signs. The center of each is found on the token states of the
    static model, which predict well when tokens would halt.
    images: [B, 3, H, W]; amp: "fp16", "bf16" or "none"; report: called with one line about the choice.
    """
    model, images = copy.deepcopy(model).to(device).eval(), images.to(device)
    model.cuda_graphs = False  # a plan fits the counts of one gate
    model.set_gate_directions(None)
    model.halting = False
    with autocast(device, amp):
        expected = F.log_softmax(model(images).float(), dim=1)
        states = _states(model, images)
    if not expected.isfinite().all():
        raise FloatingPointError("the logits of the static model are not finite: its weights have diverged")
    model.halting = True
    cost_of = cost_counter(model, states.shape[2])
    candidates = _candidates(model, states, cost, cost_of)
    few_images, few_expected = images[:FEW_IMAGES], expected[:FEW_IMAGES]
    ranked = sorted(_evaluate_gate(one, model, few_images, few_expected, amp, cost_of) for one in candidates)
    best = min(_evaluate_gate(one, model, images, expected, amp, cost_of) for one in ranked[:FINALISTS])
    report(
        f"gate search: channel {best.channel}, scale {best.scale:g}, center {best.center:g}; before training, it uses "
        f"{best.cost:.0%} of the static model's MACs, and the KL divergence from the static model's predictions is "
        f"{best.divergence:.2g} (worst of {len(ranked)} gates: {ranked[-1].divergence:.2g})"
    )
    return best


def autocast(device: torch.device, amp: str) -> torch.autocast:
    dtype = AUTOCAST_DTYPES.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def cost_counter(model: AdaptiveTokens, num_tokens: int) -> Callable[[Tensor], Tensor]:
    """Return a function of depths, [B, N], that gives the mean cost of the images, a scalar tensor.

    The sizes of the model's layers are read only once for all gates.
    """
    static, count_macs = static_macs(model), macs_counter(model, num_tokens)
    return lambda depth: count_macs(depth).mean() / static


def _candidates(
    model: AdaptiveTokens, states: Tensor, cost: float, cost_of: Callable[[Tensor], Tensor]
) -> list[GateCandidate]:
    """Return a gate of this cost for each usable channel and sign; states: [L, B, N, C]."""
    candidates = []
    for channel in range(states.shape[-1] if model.can_swap_channels else 1):
        values = states[..., channel]
        for scale in (_scale(values), -_scale(values)):
            center = _center_of_cost(scale * values, 1 - model.halt_eps, cost, cost_of)
            candidates.append(GateCandidate(0.0, channel, scale, center, cost))
    return candidates


def _states(model: AdaptiveTokens, images: Tensor) -> Tensor:
    """Return the token states of the static model after each block, [L, B, N, C] float32."""
    result = model.forward_intermediates(
        images, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True, output_dict=True
    )
    patches = result["image_intermediates"]
    prefix = result.get("image_intermediates_prefix", [state[:, :0] for state in patches])
    return torch.stack([torch.cat(both, dim=1).float() for both in zip(prefix, patches)])


def _scale(values: Tensor) -> float:
    """Return the gate scale that gives the logit a standard deviation of SPREAD, rounded to two digits."""
    return float(f"{SPREAD / values.std().clamp(min=1e-6).item():.2g}")


def _center_of_cost(logits: Tensor, threshold: float, cost: float, cost_of: Callable[[Tensor], Tensor]) -> float:
    """Return the center at which tokens with these scale * x, [L, B, N], would halt at this cost, by bisection.

    threshold: cumulative score at which a token halts
    """
    middle = logits.mean()
    low, high = middle - 32, middle + 32  # tensors, so that there is one host-device sync per gate
    for _ in range(12):
        center = (low + high) / 2
        halts = torch.sigmoid(logits - center).cumsum(dim=0) >= threshold
        halts[-1] = True
        depth = halts.float().argmax(dim=0) + 1.0  # [B, N]
        is_cheaper = cost_of(depth) < cost
        low, high = torch.where(is_cheaper, center, low), torch.where(is_cheaper, high, center)
    return float(f"{center.item():.4g}")


def _evaluate_gate(
    candidate: GateCandidate,
    model: AdaptiveTokens,
    images: Tensor,
    expected: Tensor,
    amp: str,
    cost_of: Callable[[Tensor], Tensor],
) -> GateCandidate:
    """Return the candidate with its measured divergence and cost; expected: [B, K], the static log-probabilities."""
    swap_channels(model, candidate.channel)
    model.gate_scale, model.gate_center = candidate.scale, candidate.center
    with autocast(images.device, amp):
        logits, halting = model(images, return_halting=True)
    swap_channels(model, candidate.channel)  # a second swap restores the channels
    if model.num_classes == 0:  # the logits are features, whose channels are swapped too
        order = torch.arange(logits.shape[1])
        order[[0, candidate.channel]] = order[[candidate.channel, 0]]
        logits = logits[:, order]
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    divergence = F.kl_div(log_probabilities, expected, reduction="batchmean", log_target=True).item()
    return candidate._replace(divergence=divergence, cost=cost_of(halting.depth).item())
