"""Small models of timm's Eva with random weights."""

import torch
from timm.models.eva import Eva

from models_act import AdaptiveEva, adapt

ROTARY = {"use_rot_pos_emb": True, "embed_dim": 24, "num_heads": 3}
SIZES = {"img_size": 16, "patch_size": 4, "depth": 4, "num_classes": 5}


def eva(options: dict, seed: int = 0) -> Eva:
    """Build timm's model in evaluation mode, with noise on all weights, because zeros would hide a branch."""
    torch.manual_seed(seed)
    model = Eva(**SIZES | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def halting_eva(options: dict, x: torch.Tensor, seed: int = 0) -> AdaptiveEva:
    """Build an adaptive model whose tokens halt after different blocks."""
    static = eva(options, seed)
    with torch.no_grad():
        states = adapt(static, halting=False).forward_intermediates(x, intermediates_only=True)
    values = torch.stack(states)[:, :, 0]
    scale = 4 / values.std().item()
    return adapt(static, gate_scale=scale, gate_center=scale * values.mean().item() + 1)
