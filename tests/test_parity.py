"""Agreement with the outputs and gradients of the original A-ViT, recorded in tests/parity."""

import pytest
import torch
from torch.testing import assert_close

import losses

pytestmark = pytest.mark.usefixtures("token_store")
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
BOTH_MODES = pytest.mark.parametrize("zip_tokens", [False, True], ids=["masked", "zipped"])


@BOTH_MODES
def test_evaluation_outputs_equal_original(parity, zip_tokens):
    model = parity.model(zip_tokens=zip_tokens).eval()
    with torch.no_grad():
        logits, halting = model(parity.values["images"], return_halting=True)
    assert len(halting.depth.unique()) >= 4, "the case does not halt"
    assert halting.depth[:, 0].min() < parity.config["depth"], "no class token halts early"
    assert_close(logits, parity.values["logits_eval"], **TOLERANCE)
    assert torch.equal(halting.depth, parity.values["depth"])
    assert_close(halting.ponder_cost, parity.values["ponder"], **TOLERANCE)
    assert_close(halting.layer_scores, parity.values["halting_score"], **TOLERANCE)


@BOTH_MODES
def test_losses_and_gradients_equal_original(parity, zip_tokens):
    values, config = parity.values, parity.config
    model = parity.model(zip_tokens=zip_tokens).train()
    logits, halting = model(values["images"], return_halting=True)
    soft = losses.classification_loss(mixup=True, smoothing=0.0)
    if config["distilled"]:
        logits, logits_dist = logits
        assert_close(logits_dist, values["logits_dist_train"], **TOLERANCE)
        extra = soft(logits_dist, values["soft_targets"].flip(0))
    else:
        extra = torch.zeros(())
    assert_close(logits, values["logits_train"], **TOLERANCE)

    criterion = losses.AdaptiveLoss(soft, config["depth"], config["ponder_token_scale"], config["distr_prior_alpha"])
    total, parts = criterion(logits, values["soft_targets"], halting)
    assert_close(criterion.prior.target, values["prior_target"], **TOLERANCE)
    expected = {
        "classification_loss": values["classification_loss"],
        "ponder_loss_token": config["ponder_token_scale"] * values["ponder_mean"],
        "distr_prior_loss": config["distr_prior_alpha"] * values["prior_kl"],
    }
    parts["classification_loss"] = parts["classification_loss"] + extra
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert_close(part.double(), expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    total = total + extra
    assert_close(total.double(), values["total_loss"], **TOLERANCE)

    total.backward()
    assert {name for name, _ in model.named_parameters()} == parity.grads.keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, parity.grads[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
