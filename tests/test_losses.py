import pytest
import torch
import torch.nn.functional as F
from conftest import halting_model, images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from losses import (
    AdaptiveLoss,
    BudgetController,
    DistillationLoss,
    DistributionPriorLoss,
    PonderLoss,
    SelfDistillationLoss,
    Teacher,
    classification_loss,
)
from models_act import Halting


def test_prior_target_for_12_blocks_is_the_papers():
    target = DistributionPriorLoss(12).target
    assert target.argmax() == 8  # block 9
    assert_close(target[:8].sum(), torch.tensor(0.98))
    normal = torch.exp(-0.5 * (torch.arange(12) - 8.0) ** 2)
    assert_close(target / target[8], normal)


@pytest.mark.parametrize("depth", [*range(2, 41)])
def test_prior_is_as_strong_for_other_depths(depth):
    """The sum of the target is the weight of the prior: 9.2 for 6 blocks would make it three times as strong."""
    target = DistributionPriorLoss(depth).target
    assert_close(target.sum(), DistributionPriorLoss(12).target.sum())
    assert target.argmax() == pytest.approx(8 * depth / 12, abs=0.5)


@pytest.mark.parametrize("depth", [1, 2, 4, 6, 12, 24])
def test_prior_equals_its_formula(depth):
    scores = torch.rand(depth) * 0.2 + 0.05
    prior = DistributionPriorLoss(depth)
    q, t = (scores / scores.sum()).clamp(max=0.99), prior.target
    assert t.sum() > 0
    assert_close(prior(scores), (t * (t.log() - q.log())).sum() / depth)


@given(st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12), st.sampled_from([torch.float32, torch.bfloat16]))
def test_prior_is_finite_for_any_scores(values, dtype):
    scores = torch.tensor(values, dtype=dtype, requires_grad=True)
    loss = DistributionPriorLoss(12)(scores)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-33])
def test_prior_of_tiny_scores_has_no_gradient(value):
    scores = torch.full((12,), value, requires_grad=True)
    prior = DistributionPriorLoss(12)
    loss = prior(scores)
    loss.backward()
    assert_close(loss, (prior.target * (prior.target.log() - torch.tensor(0.01).log())).sum() / 12)
    assert not scores.grad.any()


def test_prior_is_computed_in_float32_under_autocast():
    scores = torch.rand(12)
    with torch.autocast("cpu", torch.bfloat16):
        assert DistributionPriorLoss(12)(scores) == DistributionPriorLoss(12)(scores.clone())
        assert DistributionPriorLoss(12)(scores).dtype == torch.float32


def test_prior_with_wrong_number_of_scores_raises():
    with pytest.raises(ValueError, match="expected 12 layer scores"):
        DistributionPriorLoss(12)(torch.rand(6))


def test_ponder_loss_is_the_mean_over_all_tokens():
    assert PonderLoss()(torch.tensor([[2.0, 4.0], [6.0, 8.0]])) == 5


@pytest.mark.parametrize(("mixup", "smoothing"), [(True, 0.1), (False, 0.1), (False, 0.0)])
def test_classification_loss(mixup, smoothing):
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    targets = F.one_hot(labels, 5).float() if mixup else labels
    expected = F.cross_entropy(logits, labels, label_smoothing=0.0 if mixup else smoothing)
    assert_close(classification_loss(mixup, smoothing)(logits, targets), expected)


def test_total_is_the_sum_of_named_parts():
    halting = Halting(torch.ones(2, 3), torch.full((2, 3), 5.0), torch.rand(12))
    criterion = AdaptiveLoss(nn.CrossEntropyLoss(), depth=12, ponder_token_scale=0.5, distr_prior_alpha=0.1)
    logits, labels = torch.randn(2, 5), torch.tensor([0, 1])
    total, parts = criterion(logits, labels, halting)
    assert list(parts) == ["classification_loss", "ponder_loss_token", "distr_prior_loss"]
    assert parts["ponder_loss_token"] == 2.5
    assert_close(parts["distr_prior_loss"], 0.1 * DistributionPriorLoss(12)(halting.layer_scores))
    assert_close(total, sum(parts.values()))
    static_total, static_parts = criterion(logits, labels)
    assert list(static_parts) == ["classification_loss"]
    assert static_total == parts["classification_loss"]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_equals_its_formula(kind):
    logits, dist_logits, teacher = torch.randn(3, 4, 6).unbind()
    labels = torch.tensor([0, 1, 2, 3])
    loss = DistillationLoss(nn.CrossEntropyLoss(), kind, alpha=0.3, tau=2.0)((logits, dist_logits), labels, teacher)
    if kind == "hard":
        expected = F.cross_entropy(dist_logits, teacher.argmax(1))
    else:
        p, q = (teacher / 2).softmax(1), (dist_logits / 2).softmax(1)
        expected = 4 * (p * (p.log() - q.log())).mean()
    assert_close(loss, 0.7 * F.cross_entropy(logits, labels) + 0.3 * expected)


def test_invalid_distillation_raises():
    loss = DistillationLoss(nn.CrossEntropyLoss(), "hard")
    with pytest.raises(ValueError, match="distilled model"):
        loss(torch.randn(2, 3), torch.tensor([0, 1]), torch.randn(2, 3))
    with pytest.raises(ValueError, match="must be 'hard' or 'soft'"):
        DistillationLoss(nn.CrossEntropyLoss(), "other")


def test_teacher_gets_images_in_its_own_normalization():
    teacher = Teacher(nn.Flatten(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pixels = torch.rand(2, 3, 4, 4)
    student_mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    student_std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert_close(teacher((pixels - student_mean) / student_std), ((pixels - 0.5) / 0.5).flatten(1))
    assert not teacher.classifier.training


def test_every_term_has_a_gradient():
    """Each gradient reaches the first block, through halting or through the logits."""
    model = halting_model().train()
    logits, halting = model(images(), return_halting=True)
    criterion = AdaptiveLoss(nn.CrossEntropyLoss(), depth=8)
    _, parts = criterion(logits, torch.arange(6), halting)
    weight = model.blocks[0].mlp.fc1.weight
    for name, part in parts.items():
        (grad,) = torch.autograd.grad(part, weight, retain_graph=True)
        assert grad.any(), name


def test_self_distillation_equals_its_formula():
    own, teacher, targets = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    loss = SelfDistillationLoss(nn.CrossEntropyLoss(), alpha=0.3, tau=2.0)
    p, q = (teacher / 2).softmax(1), (own / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    assert_close(loss(own, targets, teacher), 0.7 * F.cross_entropy(own, targets) + 0.3 * 4 * divergence)
    assert_close(loss(own, targets, own), 0.7 * F.cross_entropy(own, targets))


# The controller ----------------------------------------------------------------------------------


@given(st.floats(0.2, 1.0), st.floats(0.3, 1.0), st.floats(0.3, 6.0))
def test_controller_reaches_the_budget(budget, start, gain):
    """In this simulation, the weight sets the rate at which the cost changes, as in training."""
    controller, cost = BudgetController(budget, updates_per_epoch=50), start
    for update in range(400):
        controller.progress = update / 400
        assert abs(controller.weight) <= controller.max_weight
        cost = min(max(cost - gain * 0.01 * controller.weight / controller.max_weight, 0.0), 1.0)
        controller.observe(cost)
    assert controller.goal == budget
    if start - gain * 2 < budget:  # otherwise the budget is out of reach
        assert abs(cost - budget) < 0.05


def test_goal_falls_to_the_budget_in_the_first_half_of_training():
    controller = BudgetController(0.4, updates_per_epoch=10)
    assert controller.weight == 0
    controller.observe(0.9)
    assert (controller.start, controller.goal) == (0.9, 0.9)
    goals = []
    for progress in (0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 1.0):
        controller.progress = progress
        goals.append(controller.goal)
    assert goals == sorted(goals, reverse=True)
    assert goals[2] == pytest.approx(0.65)
    assert goals[-3:] == [pytest.approx(0.4)] * 3


def test_cost_below_the_budget_gives_a_negative_weight():
    controller = BudgetController(0.8, updates_per_epoch=10)
    controller.observe(0.5)
    assert controller.goal == 0.8
    assert controller.weight == -controller.max_weight


def test_unreachable_budget_is_reported_once_within_an_epoch():
    controller, stuck_updates = BudgetController(0.3, updates_per_epoch=10), []
    controller.progress = 1.0
    for update in range(40):
        controller.observe(0.9)
        stuck_updates += [update] if controller.is_stuck else []
    assert len(stuck_updates) == 1
    assert stuck_updates[0] <= 11


def test_controller_resumes_from_its_state():
    controller, again = (BudgetController(0.3, updates_per_epoch=10) for _ in range(2))
    again.load_state_dict(controller.state_dict())
    assert again.state_dict() == controller.state_dict()
    for cost in (0.9, 0.8, 0.7):
        controller.observe(cost)
    again.load_state_dict(controller.state_dict())
    assert again.state_dict() == controller.state_dict()
    assert again.weight == controller.weight
    bad = ([0.5, None, 1.0, 0], [0.5, 2.0, 1.0, 0], [0.5, float("nan"), 1.0, 0], [0.5, 0.5], [0.5, 0.5, 1.0, -1])
    for state in bad:
        with pytest.raises(ValueError, match=r"costs must be in|unpack|at least 0"):
            again.load_state_dict({"budget_controller": state})
    again.load_state_dict({"budget_controller": ["0.5", "0.5", 1.0, 0]})
    again.observe(0.4)
