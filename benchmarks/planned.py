"""A-ViT by plans, without CUDA graphs: the difference to the graphed variant is what graphs save on the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models_act import AdaptiveTokens, Halting
from zipping.planned.plans import Plan, Planner
from zipping.planned.tokens import PlannedGate, PlannedTokens


class PlannedEager(nn.Module):
    """A model that runs each pass by plan, kernel by kernel. Batches that overflow run again by the full plan."""

    def __init__(self, model: AdaptiveTokens):
        super().__init__()
        self.model, self.blocks, self.num_classes = model, model.blocks, model.num_classes
        self.planners: dict[torch.Size, Planner] = {}

    def forward(self, images: Tensor, return_halting: bool = False) -> Tensor | tuple[Tensor, Halting]:
        """Return the logits, [B, num_classes], of images [B, 3, H, W], and `Halting` if requested."""
        size = (len(images), self.model.patch_embed.num_patches + self.model.num_prefix_tokens)
        planner = self.planners.setdefault(images.shape, Planner(size, len(self.blocks), keep_all=self.training))
        full = Plan.full(size, len(self.blocks))
        for plan in (planner.plan or full, full):
            logits, halting, counts = self._run(images, plan, return_halting)
            if not plan.overflows(counts):
                break
        planner.observe(counts, overflowed=plan is full and planner.plan is not None)
        return (logits, halting) if return_halting else logits

    def _run(self, images: Tensor, plan: Plan, return_halting: bool) -> tuple[Tensor, Halting | None, list[int]]:
        from zipping.planned import passes  # imported here because Triton may be missing

        model, device = self.model, images.device
        numbers = torch.tensor([model.gate_scale, 1 - model.halt_eps], device=device)
        gate = PlannedGate(numbers, torch.full((len(images),), -model.gate_center, device=device))
        tokens = PlannedTokens.all_live(plan.size, model.num_prefix_tokens, device)
        step = passes.choose_step(model, compile_blocks=False)
        planned = passes.PlannedPass(model, plan, tokens, gate, step, return_halting)
        state = passes.run_blocks(planned, passes.begin(planned, images), range(len(plan.capacities)))
        return *passes.finish(planned, state), [plan.capacities[0], *state.counts.tolist()]
