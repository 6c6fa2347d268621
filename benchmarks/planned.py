"""A-ViT by plans, without CUDA graphs: the difference to the graphed variant is what graphs save on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models_act import AdaptiveTokens, Halting
from zipping.planned.plans import Plan, Planner

if TYPE_CHECKING:
    from zipping.planned.capture import StaticInputs


class PlannedEager(nn.Module):
    """A model that runs each pass by plan, kernel by kernel. Batches that overflow run again by the full plan."""

    def __init__(self, model: AdaptiveTokens):
        super().__init__()
        self.model, self.blocks, self.num_classes = model, model.blocks, model.num_classes
        self.by_shape: dict[torch.Size, tuple[Planner, StaticInputs]] = {}

    def forward(self, images: Tensor, return_halting: bool = False) -> Tensor | tuple[Tensor, Halting]:
        """Return the logits, [B, num_classes], of images [B, 3, H, W], and `Halting` if requested."""
        from zipping.planned.capture import GateNumbers, StaticInputs  # imported here because Triton may be missing

        if images.shape not in self.by_shape:
            size = (len(images), self.model.patch_embed.num_patches + self.model.num_prefix_tokens)
            planner = Planner(size, self.model.num_blocks, keep_all=self.training)
            self.by_shape[images.shape] = planner, StaticInputs(images, size, self.model.num_prefix_tokens)
        planner, inputs = self.by_shape[images.shape]
        inputs.write(images, GateNumbers.of(self.model))
        full = Plan.full(planner.size, planner.num_blocks)
        for plan in (planner.plan or full, full):
            logits, halting, counts = self._run(inputs, plan, return_halting)
            if not plan.overflows(counts):
                break
        planner.observe(counts, overflowed=planner.plan is not None and plan is full)
        return (logits, halting) if return_halting else logits

    def _run(self, inputs: StaticInputs, plan: Plan, return_halting: bool) -> tuple[Tensor, Halting | None, list[int]]:
        from zipping.planned import passes

        step = passes.choose_step(self.model, compile_blocks=False)
        planned = passes.PlannedPass(self.model, plan, inputs.tokens, inputs.gate, step, return_halting)
        state = passes.run_blocks(planned, passes.begin(planned, inputs.images), range(len(plan.capacities)))
        return *passes.finish(planned, state), [plan.capacities[0], *state.counts.tolist()]
