"""The parts of A-ViT's training loss, each a small class, and their sum.

classification + ponder_token_scale * ponder loss + distr_prior_alpha * distribution prior,
with the classification loss optionally wrapped in DeiT's distillation.
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
    """Mean ponder cost over every token of the batch (Eq. 10 of the A-ViT paper)."""

    def forward(self, ponder_cost: Tensor) -> Tensor:
        """ponder_cost: [B, N] float -> scalar"""
        return ponder_cost.mean()


class BudgetController:
    """Sets the ponder loss's weight so that training costs what was asked for: proportional control, of both signs.

    The ponder loss alone has no opponent among the patches: it pushes every score up, by a constant, whatever the
    depth. Here its weight follows from the cost itself, vanishes at the goal, and pushes back where the cost is lower.

        goal = budget + (start - budget) * (1 - ramp)   # half a cosine over the first half of training, then flat
        weight = max_weight * clip((cost - goal) / band, -1, 1)

    budget: share of the static network's multiply-adds, above 0 and at most 1; band: of the same kind;
    updates_per_epoch: after so many with the weight at its limit and no progress the controller `is_stuck`.
    """

    def __init__(self, budget: float, updates_per_epoch: int, max_weight: float = 0.02, band: float = 0.05):
        self.budget, self.max_weight, self.band = budget, max_weight, band
        self.updates_per_epoch = updates_per_epoch
        self.progress = 0.0  # share of training that is done
        self.start: float | None = None  # cost of the first update
        self.cost: float | None = None  # running mean over the last updates
        self.stuck_at, self.stuck_for = 1.0, 0  # at which cost, for how many updates

    @property
    def goal(self) -> float:
        """Cost that is aimed at now."""
        start = self.budget if self.start is None else max(self.start, self.budget)
        ramp = (1 - math.cos(math.pi * min(2 * self.progress, 1))) / 2
        return self.budget + (start - self.budget) * (1 - ramp)

    @property
    def weight(self) -> float:
        """Of the ponder loss, for the next update; 0 before the first."""
        if self.cost is None:
            return 0.0
        return self.max_weight * min(max((self.cost - self.goal) / self.band, -1), 1)

    @property
    def is_stuck(self) -> bool:
        """Whether, just now, the cost has stayed away from the goal for an epoch; true once each time."""
        return self.stuck_for == self.updates_per_epoch

    def observe(self, cost: float, momentum: float = 0.9) -> None:
        """cost: of an update's images in all processes, as a share of the static network's."""
        self.start = cost if self.start is None else self.start
        self.cost = cost if self.cost is None else momentum * self.cost + (1 - momentum) * cost
        if abs(self.weight) < self.max_weight or abs(self.cost - self.stuck_at) > self.band:
            self.stuck_at, self.stuck_for = self.cost, 0
        else:
            self.stuck_for += 1

    def state_dict(self) -> dict:
        """The entry of a checkpoint that this keeps up."""
        return {"budget_controller": [self.start, self.cost, self.stuck_at, self.stuck_for]}

    def load_state_dict(self, checkpoint: dict) -> None:
        """KeyError, ValueError or the like where it does not fit."""
        start, cost, stuck_at, stuck_for = checkpoint["budget_controller"]
        costs = [float(value) for value in (start, cost, stuck_at) if value is not None]
        if not all(0 <= value <= 1 for value in costs) or (start is None) != (cost is None):
            raise ValueError(f"costs are shares, not {costs}")
        self.start, self.cost, self.stuck_at, self.stuck_for = start, cost, float(stuck_at), int(stuck_for)


class DistributionPriorLoss(nn.Module):
    """KL divergence of the layers' mean halting scores from a target (Eq. 12 of the A-ViT paper).

    The target is a Gaussian density at 0, 1, ..., depth - 1, scaled so that the entries before its
    mean sum to 0.98; it does not sum to 1. `target[i]` belongs to block i + 1. For 12 blocks mean
    and standard deviation are the paper's 8 and 1; for other depths both scale with the depth, so
    that the peak stays two thirds of the way up.
    """

    def __init__(self, depth: int = 12):
        super().__init__()
        mean, std = 8 * depth / 12, depth / 12
        density = torch.exp(torch.distributions.Normal(mean, std).log_prob(torch.arange(depth, dtype=torch.float64)))
        target = 0.98 * density / density[: max(round(mean), 1)].sum()
        self.register_buffer("target", target.float(), persistent=False)

    def forward(self, layer_scores: Tensor) -> Tensor:
        """layer_scores: [L], each from 0 to 1 -> scalar float32, (1/L) sum_l t_l (log t_l - log q_l).

        q is `layer_scores` scaled to sum 1, then clamped to [0.01, 0.99]. Value and gradient are
        finite for any scores; where they sum to less than 1e-30, q is 0.01 and the gradient 0.
        ValueError if the number of layers is another.
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
    """DeiT's distillation from a teacher's logits (arXiv 2012.12877, Eq. 2 and 3).

    kind "hard": (1 - alpha) * classification + alpha * cross-entropy with the teacher's arg max;
    kind "soft": the second term is tau^2 times the KL divergence between distributions softened
    by tau, averaged over the elements.
    """

    def __init__(self, classification: nn.Module, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        if kind not in ("hard", "soft"):
            raise ValueError(f"distillation is 'hard' or 'soft', not {kind!r}")
        self.classification = classification
        self.kind, self.alpha, self.tau = kind, alpha, tau

    def forward(self, logits: tuple[Tensor, Tensor], targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """logits: class head's and distillation head's, [B, K] each; teacher_logits: [B, K] -> scalar.

        ValueError if the student returned one tensor of logits: it has no distillation head.
        """
        if not isinstance(logits, tuple):
            raise ValueError("distillation needs a distilled model in distilled training, one with two heads")
        class_logits, distillation_logits = logits
        if self.kind == "hard":
            distillation = F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1))
        else:
            student = F.log_softmax(distillation_logits / self.tau, dim=1)
            teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
            distillation = self.tau**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / student.numel()
        return (1 - self.alpha) * self.classification(class_logits, targets) + self.alpha * distillation


class SelfDistillationLoss(nn.Module):
    """Learning from the static network that training starts from, which has the same heads.

    (1 - alpha) * classification + alpha * tau^2 * KL(teacher || student), distributions softened by tau, mean over
    images (Hinton et al., arXiv 1503.02531).
    """

    def __init__(self, classification: nn.Module, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        self.classification = classification
        self.alpha, self.tau = alpha, tau

    def forward(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """logits, teacher_logits: [B, K] -> scalar"""
        student = F.log_softmax(logits / self.tau, dim=1)
        teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
        distillation = self.tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * self.classification(logits, targets) + self.alpha * distillation


class Teacher(nn.Module):
    """A trained classifier in evaluation mode that takes the student's images.

    mean, std: [3] each, what its own input was normalised with; student_mean, student_std: what the student's is.
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
        """images: [B, 3, H, W], normalised as the student's -> logits [B, K]"""
        return self.classifier(images * self.scale + self.shift)


class AdaptiveLoss(nn.Module):
    """The sum of the parts; of a static network, the classification part alone."""

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
        """Returns the total, and its parts by name, scaled as they enter the total.

        targets: [B] int64, or [B, K] soft; teacher_logits: [B, K], where distilling;
        ponder_token_scale: of this batch, where it is not always the same, see `BudgetController`.
        """
        distilled = () if teacher_logits is None else (teacher_logits,)
        parts = {"classification_loss": self.classification(logits, targets, *distilled)}
        if halting is not None:
            scale = self.ponder_token_scale if ponder_token_scale is None else ponder_token_scale
            parts["ponder_loss_token"] = scale * self.ponder(halting.ponder_cost)
            parts["distr_prior_loss"] = self.distr_prior_alpha * self.prior(halting.layer_scores)
        return sum(parts.values()), parts


def classification_loss(mixup: bool, smoothing: float) -> nn.Module:
    """Soft-target cross-entropy under mixup, else label smoothing if any, else cross-entropy."""
    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
