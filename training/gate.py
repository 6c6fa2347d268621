"""Which gate a static network's fine-tuning starts from."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from models_act import AdaptiveTokens, macs_per_image
from training.budget import static_macs

SPREAD = 4.0  # standard deviation of the gate's argument over tokens and blocks
FEW_IMAGES, FINALISTS = 32, 16  # all gates are judged on so few, so many of them on all


class GateCandidate(NamedTuple):
    """A gate: the KL divergence of the network's answers from the static network's, and what it costs."""

    divergence: float
    channel: int
    scale: float
    center: float
    cost: float

    def apply(self, model: AdaptiveTokens) -> None:
        model.set_halting_channel(self.channel)
        model.gate_scale, model.gate_center = self.scale, self.center


@torch.inference_mode()
def choose_gate(model: AdaptiveTokens, images: Tensor, device: torch.device, amp: str, cost: float) -> GateCandidate:
    """The channel and gate by which halting changes a static network's answers least, where it costs so much.

    For each channel of the tokens and each sign, the center is found on the states of the static network, which tell
    well when tokens would halt. images: [B, 3, H, W]; every process must call it, and gets the main one's choice.
    """
    model, images = copy.deepcopy(model).to(device).eval(), images.to(device)
    model.halting = False
    with utils.autocast(device, amp):
        expected = F.log_softmax(model(images).float(), dim=1)
        states = _states(model, images)
    model.halting = True
    channels = range(states.shape[-1] if model.can_swap_channels else 1)
    gates = [(channel, sign * _scale(states[..., channel])) for channel in channels for sign in (1, -1)]
    choices = []
    for channel, scale in gates:
        center = _center_of_cost(model, scale * states[..., channel], cost)
        choices.append(GateCandidate(0.0, channel, scale, center, cost))
    choices = sorted(
        _evaluate_gate(choice, model, images[:FEW_IMAGES], expected[:FEW_IMAGES], amp) for choice in choices
    )
    worst = choices[-1]
    best = min(_evaluate_gate(choice, model, images, expected, amp) for choice in choices[:FINALISTS])
    best = utils.all_gather_objects(best)[0]
    utils.log(
        f"gate auto: channel {best.channel}, scale {best.scale:g}, center {best.center:g}: before training, "
        f"{best.cost:.0%} of the multiply-adds for a KL divergence of {best.divergence:.2g} from the static network's "
        f"answers (the worst of {len(choices)} gates: {worst.divergence:.2g})"
    )
    return best


def _states(model: AdaptiveTokens, images: Tensor) -> Tensor:
    """Of the static network's tokens after each block, [L, B, N, C] float32."""
    options = {"intermediates_only": True, "output_fmt": "NLC", "return_prefix_tokens": True, "output_dict": True}
    found = model.forward_intermediates(images, **options)
    patches = found["image_intermediates"]
    prefix = found.get("image_intermediates_prefix", [state[:, :0] for state in patches])
    return torch.stack([torch.cat(both, dim=1).float() for both in zip(prefix, patches)])


def _scale(values: Tensor) -> float:
    """By which values of a channel spread as the gate's argument is to; of two digits."""
    return float(f"{SPREAD / values.std().clamp(min=1e-6).item():.2g}")


def _center_of_cost(model: AdaptiveTokens, argument: Tensor, cost: float) -> float:
    """The center at which tokens with these scale * x, [L, B, N], would halt so that the network costs that share."""
    static, middle = static_macs(model), argument.mean()
    low, high = middle - 32, middle + 32  # on the device: one wait for each gate
    for _ in range(12):
        center = (low + high) / 2
        halts = torch.sigmoid(argument - center).cumsum(dim=0) >= 1 - model.halt_eps
        halts[-1] = True
        depth = halts.float().argmax(dim=0) + 1.0  # [B, N]
        is_cheaper = macs_per_image(model, depth).mean() / static < cost
        low, high = torch.where(is_cheaper, center, low), torch.where(is_cheaper, high, center)
    return float(f"{center.item():.4g}")


def _evaluate_gate(
    choice: GateCandidate, model: AdaptiveTokens, images: Tensor, expected: Tensor, amp: str
) -> GateCandidate:
    """The same with its divergence and cost as measured; expected: the static network's log-probabilities, [B, K]."""
    choice.apply(model)
    with utils.autocast(images.device, amp):
        logits, halting = model(images, return_halting=True)
    model.set_halting_channel(choice.channel)  # back
    found = F.log_softmax(logits.float(), dim=1)
    divergence = F.kl_div(found, expected, reduction="batchmean", log_target=True).item()
    cost = macs_per_image(model, halting.depth).mean().item() / static_macs(model)
    return choice._replace(divergence=divergence, cost=cost)
