"""The terms of A-ViT's training loss, and their sum.

    classification + ponder_token_scale * ponder loss + distr_prior_alpha * distribution prior

The classification loss may be wrapped in a distillation loss. When training to a compute
target, `BudgetController` sets the ponder weight, or `CenterController` the gate center.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from models_act import Halting


class PonderLoss(nn.Module):
    """The mean ponder cost over all tokens of the batch (Eq. 10 of the A-ViT paper)."""

    def forward(self, ponder_cost: Tensor) -> Tensor:
        """Compute the loss.

        ponder_cost: [B, N] float -> scalar
        """
        return ponder_cost.mean()


class BudgetController:
    """A proportional controller that sets the weight of the ponder loss to reach a compute budget.

    With a fixed weight, the ponder loss pushes every halting score up by a constant, and nothing pushes the scores of
    patch tokens back. Here the weight depends on the cost, which is MACs as a share of the static model's. The weight
    is zero at the goal and negative below it.

        goal = budget + (start - budget) * (1 - ramp)   # ramp: half a cosine over the first half of training, then 1
        weight = max_weight * clip((cost - goal) / band, -1, 1)

    budget: target cost in (0, 1]; band: distance from the goal at which the weight reaches its limit;
    updates_per_epoch: number of updates at the limit without progress after which the controller `is_stuck`.
    """

    def __init__(self, budget: float, updates_per_epoch: int, max_weight: float = 0.02, band: float = 0.05):
        self.budget, self.max_weight, self.band = budget, max_weight, band
        self.updates_per_epoch = updates_per_epoch
        self.progress = 0.0  # finished share of the training
        self.start: float | None = None  # cost at the first update
        self.cost: float | None = None  # running mean over updates
        self.stuck_at, self.stuck_for = 1.0, 0  # cost without progress, and for how many updates

    @property
    def goal(self) -> float:
        """The current target cost."""
        start = self.budget if self.start is None else max(self.start, self.budget)
        ramp = (1 - math.cos(math.pi * min(2 * self.progress, 1))) / 2
        return self.budget + (start - self.budget) * (1 - ramp)

    @property
    def weight(self) -> float:
        """The weight of the ponder loss for the next update, 0 before the first."""
        if self.cost is None:
            return 0.0
        return self.max_weight * min(max((self.cost - self.goal) / self.band, -1), 1)

    @property
    def is_stuck(self) -> bool:
        """Return whether the weight was at its limit without progress for one epoch: True for one update only."""
        return self.stuck_for == self.updates_per_epoch

    def observe(self, cost: float, momentum: float = 0.9) -> None:
        """Record the cost of one update.

        cost: mean over the update's images in all processes
        """
        self.start = cost if self.start is None else self.start
        self.cost = cost if self.cost is None else momentum * self.cost + (1 - momentum) * cost
        if self._makes_progress():
            self.stuck_at, self.stuck_for = self.cost, 0
        else:
            self.stuck_for += 1

    def _makes_progress(self) -> bool:
        return abs(self.weight) < self.max_weight or abs(self.cost - self.stuck_at) > self.band

    def metrics(self) -> dict[str, float]:
        """Return what a log shows of an epoch, after the first update."""
        return {"budget_cost": self.cost, "budget_goal": self.goal, "ponder_weight": self.weight}

    def center_step(self, cost: float) -> float:
        """Return by how much the gate center has to change after an update of this cost."""
        return 0.0

    def state_dict(self) -> dict:
        """Return this object's entry of a checkpoint."""
        return {"budget_controller": [self.start, self.cost, self.stuck_at, self.stuck_for]}

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore the state, or raise KeyError, ValueError or similar if the entry is wrong."""
        start, cost, stuck_at, stuck_for = checkpoint["budget_controller"]
        start, cost = (None if value is None else float(value) for value in (start, cost))
        costs = [value for value in (start, cost, float(stuck_at)) if value is not None]
        if not all(0 <= value <= 1 for value in costs) or (start is None) != (cost is None):
            raise ValueError(f"costs must be in [0, 1], and the first two set or None together; got {costs}")
        if int(stuck_for) < 0:
            raise ValueError(f"the number of updates must be at least 0, got {stuck_for}")
        self.start, self.cost, self.stuck_at, self.stuck_for = start, cost, float(stuck_at), int(stuck_for)


class CenterController(BudgetController):
    """An integral controller that moves the gate center to reach a compute budget, for gates by direction.

    No gradient flows through their scores, so a ponder loss could not reach it.

        center = center + gain * (budget - cost)   # after each update
    """

    gain = 1.0  # centers per unit of cost
    weight = 0.0  # of the ponder loss

    @property
    def goal(self) -> float:
        """The target cost, from the first update on."""
        return self.budget

    def center_step(self, cost: float) -> float:
        return self.gain * (self.budget - cost)

    def _makes_progress(self) -> bool:
        return abs(self.cost - self.budget) <= self.band

    def metrics(self) -> dict[str, float]:
        return {"budget_cost": self.cost, "budget_goal": self.goal}


def _gaussian_over_blocks(depth: int) -> Tensor:
    """Return the Gaussian density with mean 8/12 and standard deviation 1/12 of the depth, [depth] float64."""
    density = torch.distributions.Normal(8 * depth / 12, depth / 12)
    return density.log_prob(torch.arange(depth, dtype=torch.float64)).exp()


class DistributionPriorLoss(nn.Module):
    """KL divergence of the target from the blocks' mean halting scores (Eq. 12 of the A-ViT paper).

    The target is a Gaussian density at 0, 1, ..., depth - 1; `target[i]` belongs to block i + 1. For 12 blocks, mean
    and standard deviation are the paper's 8 and 1, so that the peak is at block 9. The first 8 entries sum to 0.98,
    and all of them to 3.26. For other depths, mean and deviation scale with the depth, and the sum of all entries
    stays 3.26.
    """

    def __init__(self, depth: int = 12):
        super().__init__()
        density, paper = _gaussian_over_blocks(depth), _gaussian_over_blocks(12)
        target = 0.98 * density / paper[:8].sum() * (paper.sum() / density.sum())
        self.register_buffer("target", target.float(), persistent=False)

    def forward(self, layer_scores: Tensor) -> Tensor:
        """Compute (1/L) sum_l t_l (log t_l - log q_l) in float32.

        layer_scores: [L], in [0, 1] -> scalar
        q is `layer_scores` scaled to sum to 1, then clamped to [0.01, 0.99]. Value and gradient are finite for any
        scores. If these sum to less than 1e-30, q is 0.01 and the gradient 0.
        Raises ValueError if L differs from the depth.
        """
        if layer_scores.shape != self.target.shape:
            raise ValueError(f"expected {len(self.target)} layer scores, got shape {tuple(layer_scores.shape)}")
        with torch.autocast(layer_scores.device.type, enabled=False):
            scores = layer_scores.float()
            total = scores.sum()
            has_scores = total >= 1e-30
            q = torch.where(has_scores, scores / torch.where(has_scores, total, 1), 0).clamp(0.01, 0.99)
            return F.kl_div(q.log(), self.target, reduction="sum") / len(self.target)


class DistillationLoss(nn.Module):
    """Distillation from a teacher's logits as in DeiT (arXiv 2012.12877, Eq. 2 and 3).

    kind "hard": (1 - alpha) * classification + alpha * cross-entropy with the teacher's predicted class;
    kind "soft": the second term is tau^2 times the KL divergence between distributions softened by tau, averaged over
    all elements.
    """

    def __init__(self, classification: nn.Module, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        if kind not in ("hard", "soft"):
            raise ValueError(f"kind must be 'hard' or 'soft', got {kind!r}")
        self.classification = classification
        self.kind, self.alpha, self.tau = kind, alpha, tau

    def forward(self, logits: tuple[Tensor, Tensor], targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute the loss.

        logits: those of the class head and of the distillation head, [B, K] each; teacher_logits: [B, K] -> scalar
        Raises ValueError if `logits` is a single tensor, because the student has no distillation head.
        """
        if not isinstance(logits, tuple):
            raise ValueError(
                "distillation needs a distilled model with two heads in distilled training; got one tensor of logits"
            )
        class_logits, distillation_logits = logits
        if self.kind == "hard":
            distillation = F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1))
        else:
            student = F.log_softmax(distillation_logits / self.tau, dim=1)
            teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
            distillation = self.tau**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / student.numel()
        return (1 - self.alpha) * self.classification(class_logits, targets) + self.alpha * distillation


class SelfDistillationLoss(nn.Module):
    """Distillation from the static model that training starts from (Hinton et al., arXiv 1503.02531).

    (1 - alpha) * classification + alpha * tau^2 * KL(teacher || student), with distributions softened by tau, averaged
    over images.
    """

    def __init__(self, classification: nn.Module, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        self.classification = classification
        self.alpha, self.tau = alpha, tau

    def forward(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute the loss.

        logits, teacher_logits: [B, K] -> scalar
        """
        student = F.log_softmax(logits / self.tau, dim=1)
        teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
        distillation = self.tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * self.classification(logits, targets) + self.alpha * distillation


class Teacher(nn.Module):
    """A trained classifier in evaluation mode that reads the student's images.

    mean, std: [3] each, the normalization of its training images; student_mean, student_std: that of the student's.
    """

    def __init__(
        self,
        classifier: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        student_mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        student_std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        mean, std, student_mean, student_std = (
            torch.tensor(v)[:, None, None] for v in (mean, std, student_mean, student_std)
        )
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalize the images for the classifier, and classify them.

        images: [B, 3, H, W], normalized for the student -> logits [B, K]
        """
        return self.classifier(images * self.scale + self.shift)


class AdaptiveLoss(nn.Module):
    """The sum of all loss terms, or the classification loss alone for a static model."""

    def __init__(
        self, classification: nn.Module, depth: int, ponder_token_scale: float = 0.001, distr_prior_alpha: float = 0.01
    ):
        super().__init__()
        self.classification = classification
        self.ponder = PonderLoss()
        self.prior = DistributionPriorLoss(depth)
        self.ponder_token_scale = ponder_token_scale
        self.distr_prior_alpha = distr_prior_alpha

    def forward(
        self,
        logits: Tensor | tuple[Tensor, Tensor],
        targets: Tensor,
        halting: Halting | None = None,
        teacher_logits: Tensor | None = None,
        ponder_token_scale: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and its weighted terms by name.

        logits: [B, K], or two such tensors for `DistillationLoss`; targets: [B] int64, or [B, K] soft;
        halting: None for a static model; teacher_logits: [B, K] if distilling;
        ponder_token_scale: replaces the fixed weight for this batch, see `BudgetController`.
        """
        if teacher_logits is None:
            parts = {"classification_loss": self.classification(logits, targets)}
        else:
            parts = {"classification_loss": self.classification(logits, targets, teacher_logits)}
        if halting is not None:
            scale = self.ponder_token_scale if ponder_token_scale is None else ponder_token_scale
            parts["ponder_loss_token"] = scale * self.ponder(halting.ponder_cost)
            parts["distr_prior_loss"] = self.distr_prior_alpha * self.prior(halting.layer_scores)
        return sum(parts.values()), parts


def classification_loss(mixup: bool, smoothing: float) -> nn.Module:
    """Return cross-entropy: with soft targets under mixup, else with label smoothing unless `smoothing` is 0."""
    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
