"""A pass by plan computes the same as the masked mode, whatever its surplus rows hold."""

import pytest
import torch
from conftest import halting_model, images, with_directions
from eva_models import ROTARY, halting_eva
from graph_standin import Tape
from graphed_models import KINDS, SIZE, masked
from torch.testing import assert_close

from zipping.planned import passes
from zipping.planned.passes import PlannedPass, begin, can_fuse, choose_step, finish, run_blocks
from zipping.planned.plans import Plan
from zipping.planned.tokens import PlannedGate, PlannedTokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def planned_pass(model, plan, offset=0.0, **options):
    tokens = PlannedTokens.all_live(plan.size, model.num_prefix_tokens, torch.device("cpu"))
    center = torch.full((plan.size[0],), model.gate_center) + offset
    gate = PlannedGate(torch.tensor([model.gate_scale, 1 - model.halt_eps]), -center)
    return PlannedPass(model, plan, tokens, gate, options.pop("step", choose_step(model, False)), **options)


def run(model, x, plan, **options):
    """Return logits, halting and live rows before each block."""
    planned = planned_pass(model, plan, **options)
    state = run_blocks(planned, begin(planned, x), range(len(plan.capacities)))
    return *finish(planned, state), [plan.size[0] * plan.size[1], *state.counts.tolist()]


def tight_plan(model, x, grid=8, **options):
    """Return a plan for these images in particular."""
    full = Plan.full((len(x), model.patch_embed.num_patches + model.num_prefix_tokens), model.num_blocks)
    torch.manual_seed(0)  # for stochastic depth
    *_, counts = run(model, x, full, **options)
    return Plan.for_counts(full.size, counts, grid, keep_all=not options.get("early_exit"))


def gradients(model, logits, halting):
    logits = logits if isinstance(logits, tuple) else (logits,)
    weights = torch.arange(logits[0].numel()).view_as(logits[0]).sin()
    loss = sum((x * weights).sum() for x in logits) + halting.ponder_cost.square().mean()
    loss = loss + halting.layer_scores.square().sum()
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_training_equals_masked_mode(kind):
    model = halting_model(**{**SIZE, **kind}).train()
    if kind.get("distilled"):
        model.set_distilled_training(True)
    plan = tight_plan(model, images(4))
    torch.manual_seed(0)
    logits, halting, counts = run(model, images(4), plan, return_halting=True)
    assert not plan.overflows(counts)
    torch.manual_seed(0)
    twin = masked(model)
    expected, expected_halting = twin(images(4), return_halting=True)
    assert_close((logits, *halting), (expected, *expected_halting), rtol=1e-4, atol=2e-5)
    assert_close(gradients(model, logits, halting), gradients(twin, expected, expected_halting), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("early_exit", [False, True], ids=["with halting", "early exit"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_inference_equals_masked_mode(kind, early_exit):
    model = halting_model(**{**SIZE, **kind}).eval()
    plan = tight_plan(model, images(4), early_exit=early_exit)
    logits, halting, counts = run(model, images(4), plan, return_halting=not early_exit, early_exit=early_exit)
    assert not plan.overflows(counts)
    expected, expected_halting = masked(model)(images(4), return_halting=True)
    assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    if halting is not None:
        assert_close([*halting], [*expected_halting], rtol=1e-4, atol=2e-5)


def test_blocks_of_a_deit_are_fused():
    """The parametrized tests above enter both kinds of steps."""
    assert {name: all(map(can_fuse, halting_model(**kind).blocks)) for name, kind in KINDS.items()} == {
        name: name != "normed queries and keys" for name in KINDS
    }


@torch.no_grad()
def test_fused_and_general_step_agree():
    model = halting_model(**SIZE).eval()
    plan = tight_plan(model, images(4))
    fused, general = (
        run(model, images(4), plan, return_halting=True, step=step) for step in (passes.fused_step, passes.timm_step)
    )
    assert_close((fused[0], *fused[1]), (general[0], *general[1]), rtol=1e-4, atol=1e-5)
    assert fused[2] == general[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_autocast_equals_masked_mode(dtype, training):
    model = halting_model(**SIZE).train(training)
    plan = Plan.full((4, 17), model.num_blocks)
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(training):
        logits, halting, _ = run(model, images(4), plan, return_halting=True)
        expected, expected_halting = masked(model)(images(4), return_halting=True)
    same = (halting.depth == expected_halting.depth).all(dim=1)
    assert same.float().mean() > 0.6
    assert_close(logits[same].float(), expected[same].float(), rtol=0.05, atol=0.05)
    assert halting.ponder_cost.dtype == torch.float32


def test_gates_that_differ_between_images_equal_masked_mode():
    model, offset = halting_model(**SIZE).train(), torch.linspace(-3, 3, 4)
    plan = tight_plan(model, images(4), offset=offset)
    logits, halting, _ = run(model, images(4), plan, return_halting=True, offset=offset)
    twin = masked(model)
    expected = twin(images(4), return_halting=True, gate_offset=offset)
    assert_close((logits, *halting), (expected[0], *expected[1]), rtol=1e-4, atol=2e-5)
    assert_close(gradients(model, logits, halting), gradients(twin, *expected), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", [{}, {"distilled": True}, {"init_values": 0.5, "reg_tokens": 2}], ids=str)
def test_training_with_directions_equals_masked_mode(kind):
    model = with_directions(halting_model(**SIZE, **kind).train())
    if kind.get("distilled"):
        model.set_distilled_training(True)
    offset = torch.linspace(-1, 1, 4)
    plan = tight_plan(model, images(4), offset=offset)
    logits, halting, counts = run(model, images(4), plan, return_halting=True, offset=offset)
    assert counts[-1] < counts[1]
    assert (halting.depth[:, : model.num_prefix_tokens] == model.num_blocks).all()
    assert not halting.ponder_cost.requires_grad
    twin = masked(model)
    expected, expected_halting = twin(images(4), return_halting=True, gate_offset=offset)
    assert_close((logits, *halting), (expected, *expected_halting), rtol=1e-4, atol=2e-5)
    assert_close(gradients(model, logits, halting), gradients(twin, expected, expected_halting), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("early_exit", [False, True], ids=["with halting", "early exit"])
@pytest.mark.parametrize("step", [passes.fused_step, passes.timm_step])
@torch.no_grad()
def test_inference_with_directions_equals_masked_mode(step, early_exit):
    model = with_directions(halting_model(**SIZE, init_values=0.5).eval())
    plan = tight_plan(model, images(4), early_exit=early_exit, step=step)
    options = {"return_halting": not early_exit, "early_exit": early_exit, "step": step}
    logits, halting, counts = run(model, images(4), plan, **options)
    assert not plan.overflows(counts)
    assert 0 < counts[-1] < counts[1]
    expected, expected_halting = masked(model)(images(4), return_halting=True)
    assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    if halting is not None:
        assert_close([*halting], [*expected_halting], rtol=1e-4, atol=2e-5)


# Overflows ---------------------------------------------------------------------------------------


def test_overflow_is_counted_and_writes_no_other_memory():
    model = halting_model(**SIZE).train()
    plan = tight_plan(model, images(4), grid=1)
    *_, counts = run(model, images(4), plan)
    assert not plan.overflows(counts)
    for number in range(1, model.num_blocks):
        capacities = (*plan.capacities[:number], *(min(c, counts[number] - 1) for c in plan.capacities[number:]))
        too_small = plan._replace(capacities=capacities)
        logits, halting, found = run(model, images(4), too_small, return_halting=True)
        assert too_small.overflows(found)
        assert found[: number + 1] == counts[: number + 1], "true up to the first overflow"
        assert logits.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(model, logits, halting))


@torch.no_grad()
def test_plan_that_ends_too_early_overflows():
    model = halting_model(**SIZE).eval()
    plan = tight_plan(model, images(4))
    *_, counts = run(model, images(4), plan._replace(capacities=plan.capacities[:3]))
    assert len(counts) == 4
    assert counts[3] > 0
    assert plan._replace(capacities=plan.capacities[:3]).overflows(counts)


# Static shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_two_batches_need_the_same_ops_on_the_same_shapes(training):
    """No number is read on the host either: the tape refuses that."""
    model = halting_model(**SIZE, drop_path_rate=0.1).train(training)
    plan, recorded, depths = Plan((4, 17), (68, 68, 56, 40)), [], []
    for seed in (1, 2):
        planned = planned_pass(model, plan, return_halting=True)
        x = images(4, seed=seed)
        with torch.set_grad_enabled(training), Tape() as tape:
            state = run_blocks(planned, begin(planned, x), range(model.num_blocks))
            logits, halting = finish(planned, state)
            if training:
                gradients(model, logits, halting)
        recorded.append(tape.shapes)
        depths.append(halting.depth)
    assert not torch.equal(*depths)
    assert recorded[0] == recorded[1]


# Compiled blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiled_step_equals_general_step(monkeypatch, training):
    """One graph for all blocks with stochastic depth, and one for the first, which has none."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(passes, "_compiled_block", lambda: torch.compile(passes._block, dynamic=True, backend=backend))
    model = halting_model(**SIZE, drop_path_rate=0.2, init_values=0.5).train(training)
    plan = Plan((4, 17), (68, 64, 48, 32))
    results = []
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        for step in (choose_step(model, True), passes.timm_step):
            torch.manual_seed(0)
            logits, halting, counts = run(model, images(4), plan, return_halting=True, step=step)
            results.append([logits, *halting, counts, torch.get_rng_state()])
    assert choose_step(model, True) is passes.timm_step, "float32 is not compiled"
    assert_close(*results, rtol=1e-3, atol=1e-3)
    assert 1 <= len(graphs) <= 3


ROTATED = {
    "EVA-02": {"swiglu_mlp": True, "rope_type": "cat", "drop_path_rate": 0.2},
    "per block": {"rope_type": "mixed", "attn_type": "rope", "init_values": 0.5},
    "registers": {"rope_type": "dinov3", "num_reg_tokens": 2, "use_abs_pos_emb": False},
    "not rotated": {"use_rot_pos_emb": False, "use_post_norm": True},
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("options", ROTATED.values(), ids=ROTATED)
def test_rotated_tokens_equal_masked_mode(options, training):
    model = halting_eva(ROTARY | {"global_pool": "token"} | options, images(4)).train(training)
    plan = tight_plan(model, images(4))
    twin = masked(model)
    torch.manual_seed(0)
    logits, halting, counts = run(model, images(4), plan, return_halting=True)
    assert not plan.overflows(counts)
    assert plan.capacities[-1] < plan.capacities[0]
    torch.manual_seed(0)
    expected, expected_halting = twin(images(4), return_halting=True)
    assert_close((logits, *halting), (expected, *expected_halting), rtol=1e-4, atol=2e-5)
    if training:
        assert_close(
            gradients(model, logits, halting), gradients(twin, expected, expected_halting), rtol=1e-4, atol=5e-5
        )
