from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import halting_model, images, with_directions
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import losses
import macs
import utils
from engine_act import EpochState, MicroBatchResult, Trainer, evaluate, train_one_epoch
from macs import macs_per_image
from utils import UserError
from zipping.planned.dispatch import count_graph_hits

CPU = torch.device("cpu")


def loader(count=10, batch_size=4):
    return DataLoader(TensorDataset(images(count), torch.arange(count) % 7), batch_size)


def make_trainer(model=None, init_scale=None, growth_interval=2000, **kwargs):
    """Build a trainer. init_scale: that of gradient scaling, None to disable it."""
    model = halting_model() if model is None else model
    criterion = losses.AdaptiveLoss(losses.classification_loss("mixup" in kwargs, 0.0), 8, 0.01, 0.01)
    trainer = Trainer(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), CPU, **kwargs)
    if init_scale is not None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return trainer


@pytest.mark.parametrize("loss_is_finite", [True, False])
def test_update_moves_the_center_of_the_model_and_of_the_average(loss_is_finite):
    model = with_directions(halting_model())
    if not loss_is_finite:
        model.head.bias.data[0] = torch.inf
    budget = losses.CenterController(0.3, updates_per_epoch=10)
    trainer = make_trainer(model, init_scale=2.0, ema=ModelEmaV3(model), budget=budget)
    cost = trainer.update("step", trainer.accumulate_gradients(list(loader(4)))).cost
    moved = [each.gate_center - 12.0 for each in (model, trainer.ema.module)]
    assert moved == pytest.approx([0.3 - cost] * 2 if loss_is_finite else [0.0] * 2)
    assert abs(0.3 - cost) > 0.01


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_evaluation_counts_every_image_once(batch_size):
    model = halting_model().eval()
    result = evaluate(model, loader(10, batch_size), CPU)
    with torch.no_grad():
        logits, halting = model(images(10), return_halting=True)
    labels = torch.arange(10) % 7
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert result["images"] == 10
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result["acc5"] == pytest.approx(100 * top5.float().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["depth_mean"] == pytest.approx(halting.depth.mean().item(), rel=1e-6)
    assert result["class_token_depth"] == pytest.approx(halting.depth[:, 0].mean().item(), rel=1e-6)
    assert result["gmacs"] == pytest.approx(macs_per_image(model, halting.depth).mean().item() / 1e9)
    assert result["depth_max"] == pytest.approx(halting.depth.amax(dim=1).mean().item(), rel=1e-6)
    assert result["depth_min"] == pytest.approx(halting.depth.amin(dim=1).mean().item(), rel=1e-6)
    share = [(halting.depth > block).float().mean().item() for block in range(8)]
    assert result["live_share"] == pytest.approx(share)
    assert sum(share) == pytest.approx(result["depth_mean"], rel=1e-6)


def test_layers_are_read_once_per_batch(monkeypatch):
    """Reading the sizes of all layers takes as long as some blocks of a small model."""
    read = []
    monkeypatch.setattr(macs, "_layers", lambda model, layers=macs._layers: read.append(1) or layers(model))
    evaluate(halting_model(), loader(10, 4), CPU)
    assert len(read) == 3


def test_static_model_has_full_depth_and_only_the_classification_loss():
    model = halting_model(halting=False)
    result = evaluate(model, loader(), CPU)
    assert result["depth_mean"] == 8
    assert result["gmacs"] == result["gmacs_static"]
    result = train_one_epoch(make_trainer(model), loader(), EpochState(0))
    assert result["loss"] == result["classification_loss"]
    assert "depth_mean" not in result


def test_training_lowers_the_loss_and_reports_its_parts():
    trainer, steps = make_trainer(), []
    first = train_one_epoch(trainer, loader(), EpochState(0), lambda stop_requested: steps.append(1))
    assert len(steps) == 3
    for _ in range(8):
        last = train_one_epoch(trainer, loader(), EpochState(0))
    assert last["loss"] < first["loss"]
    parts = [first[name] for name in ("classification_loss", "ponder_loss_token", "distr_prior_loss")]
    assert first["loss"] == pytest.approx(sum(parts))
    assert len(first["live_share"]) == len(first["layer_scores"]) == 8
    assert first["gmacs"] < first["gmacs_static"]
    assert first["macs_saved"] == pytest.approx(1 - first["gmacs"] / first["gmacs_static"])
    assert first["lr"] == 0.1


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_graph_hits_are_the_fraction_of_images_in_replayed_batches(cuda_graphs, every_second_call_replays):
    """Of the batches of 4, 4 and 2 images, the second one is replayed. Without graphs there is no such metric."""
    expected = pytest.approx(0.4) if cuda_graphs else None
    evaluated = evaluate(halting_model(cuda_graphs=cuda_graphs), loader(), CPU)
    assert evaluated.get("graph_hits") == expected
    trained = train_one_epoch(make_trainer(halting_model(cuda_graphs=cuda_graphs)), loader(), EpochState(0))
    assert trained.get("graph_hits") == expected


def test_graph_hits_count_each_micro_batch_and_earlier_attempts(every_second_call_replays):
    trainer, epoch = make_trainer(halting_model(cuda_graphs=True), accum_steps=2), EpochState(0)
    assert train_one_epoch(trainer, loader(8), epoch)["graph_hits"] == pytest.approx(1 / 2)
    resumed = EpochState(0)
    resumed.averages.load_state_dict(epoch.averages.state_dict())
    assert train_one_epoch(trainer, loader(4), resumed)["graph_hits"] == pytest.approx(1 / 3)


def test_calls_that_cannot_use_graphs_have_no_hits(every_second_call_replays):
    model, other = halting_model(cuda_graphs=True), halting_model(cuda_graphs=True)
    with count_graph_hits(model) as hits, torch.no_grad():
        other(images())
    assert hits == {}


def test_adaptive_teacher_with_cuda_graphs_is_not_counted(every_second_call_replays):
    """The first call of the model is not replayed, the second one of the teacher is."""
    teacher, mean_std = halting_model(cuda_graphs=True), ((0.5,) * 3, (0.5,) * 3)
    teacher(images())
    trainer = make_trainer(halting_model(cuda_graphs=True))
    trainer.criterion.classification = losses.SelfDistillationLoss(nn.CrossEntropyLoss())
    trainer.teacher = losses.Teacher(teacher, *mean_std, *mean_std)
    assert train_one_epoch(trainer, loader(4), EpochState(0))["graph_hits"] == 0


def test_seconds_of_an_epoch_include_earlier_attempts():
    result = train_one_epoch(make_trainer(), loader(), EpochState(0, seconds=1000.0))
    assert 1000 < result["seconds"] < 1100


class Clock:
    """A clock that advances only when `advance` is called."""

    seconds = 0.0

    def advance(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.seconds)
    return clock


class SlowLoader(list):
    """A loader whose workers take 4 s to start and 1 s per batch."""

    def __init__(self, clock, batches):
        super().__init__(batches)
        self.clock = clock

    def __iter__(self):
        self.clock.advance(4)
        for batch in super().__iter__():
            self.clock.advance(1)
            yield batch


def test_data_wait_excludes_training_and_progress(clock, monkeypatch, capsys):
    """A step takes 2 s, and the progress line after it 10 s. Neither counts as waiting for the loader."""
    monkeypatch.setattr(utils, "with_progress", partial(utils.with_progress, every=1))
    trainer = make_trainer()
    micro_batch = trainer.micro_batch

    def slow_averages(averages):
        clock.advance(10)
        return {}

    def slow_micro_batch(*batch):
        clock.advance(2)
        return micro_batch(*batch)

    monkeypatch.setattr(utils.MetricAverages, "local", slow_averages)
    trainer.micro_batch = slow_micro_batch
    batches = SlowLoader(clock, [(images(2), torch.arange(2))] * 3)
    result = train_one_epoch(trainer, batches, EpochState(0))
    shown = [line.partition("data_wait ")[2].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == [f"{share:.0%}" for share in (5 / 7, 6 / 20, 7 / 33)]
    assert result["data_wait"] == pytest.approx(7 / 33)
    resumed = train_one_epoch(trainer, batches, EpochState(0, seconds=67.0, waiting_seconds=43.0))
    assert resumed["data_wait"] == pytest.approx(50 / 100), "an earlier attempt counts as well"


def test_epoch_state_restores_its_times():
    epoch, resumed = EpochState(3, 5, seconds=100.0, waiting_seconds=25.0), EpochState(0)
    epoch.averages.add(1, loss=torch.tensor(1.0))
    resumed.load_state_dict(epoch.state_dict())
    assert (resumed.seconds, resumed.waiting_seconds) == (100.0, 25.0)


def test_epoch_state_of_an_older_checkpoint_converts_batches_to_images():
    epoch = EpochState(3, 5)
    epoch.averages.add(1, loss=torch.tensor(1.0))
    checkpoint = {**epoch.state_dict(), "args": {"batch_size": 16}, "processes": 2}
    del checkpoint["images"]
    epoch.load_state_dict(checkpoint)
    assert (epoch.batches, epoch.images) == (5, 160)
    with pytest.raises(ValueError, match="images must be from 0"):
        epoch.load_state_dict({**checkpoint, "processes": -2})


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), "x", None])
def test_invalid_gradient_scale_raises(scale):
    trainer = make_trainer(amp="fp16")
    checkpoint = {**trainer.state_dict(), "scaler": {"scale": 4.0, "_growth_tracker": 7}}
    trainer.load_state_dict(checkpoint)
    assert (trainer.scaler.get_scale(), trainer.scaler.state_dict()["_growth_tracker"]) == (4.0, 7)
    checkpoint["scaler"]["scale"] = scale
    with pytest.raises((TypeError, ValueError)):
        trainer.load_state_dict(checkpoint)


def test_epoch_counts_its_images():
    epoch = EpochState(0, images_per_batch=4)
    train_one_epoch(make_trainer(), loader(8, 4), epoch)
    assert (epoch.batches, epoch.images) == (2, 8)


def test_accumulation_equals_one_large_batch():
    """The prior is off, because it is computed per micro-batch."""
    models = []
    for batch_size, accum_steps in ((8, 1), (2, 4)):
        trainer = make_trainer(accum_steps=accum_steps)
        trainer.criterion.distr_prior_alpha = 0.0
        train_one_epoch(trainer, loader(8, batch_size), EpochState(0))
        models.append(trainer.model)
    for a, b in zip(*(model.parameters() for model in models)):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_incomplete_accumulation_makes_a_step():
    steps = []
    train_one_epoch(make_trainer(accum_steps=2), loader(10, 4), EpochState(0), lambda stop_requested: steps.append(1))
    assert len(steps) == 2  # batches of 4 + 4, then 2


@pytest.mark.parametrize(("count", "mixed"), [(4, 4), (5, 4), (1, 1)])
def test_mixup_of_odd_batches(count, mixed):
    """The loss accepts soft targets only."""
    trainer = make_trainer(mixup=Mixup(0.8, 1.0, num_classes=7))
    loss, _, halting = trainer.micro_batch(images(count), torch.arange(count))
    assert len(halting.depth) == mixed
    assert loss.isfinite()


def test_ema_follows_the_weights():
    model = halting_model()
    trainer = make_trainer(model, ema=ModelEmaV3(model, decay=0.5))
    before = model.head.weight.detach().clone()
    train_one_epoch(trainer, loader(4, 4), EpochState(0))
    assert_close(trainer.ema.module.head.weight, (before + model.head.weight) / 2)


def test_gradient_clipping_bounds_the_step():
    model = halting_model()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    train_one_epoch(make_trainer(model, clip_grad=1e-3), loader(4, 4), EpochState(0))
    change = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert 0 < change.norm() <= 0.1 * 1e-3 * 1.001


def test_nonfinite_loss_raises():
    model = halting_model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    expected = "epoch 3, batch 0: classification_loss is nan, the gradient of cls_token is not finite"
    with pytest.raises(FloatingPointError, match=expected):
        train_one_epoch(make_trainer(model), loader(), EpochState(3))


def poison_gradients(parameter, on_calls):
    """Make the gradient of a parameter infinite in some backward passes."""
    calls = iter(range(10_000))
    parameter.register_hook(lambda grad: grad * float("inf") if next(calls) in on_calls else grad)


def test_nonfinite_gradient_raises():
    model = halting_model()
    poison_gradients(model.blocks[2].mlp.fc1.weight, {1})
    before = {}
    trainer = make_trainer(model, ema=ModelEmaV3(model, decay=0.5))

    def on_update(stop_requested):
        before.update({name: value.clone() for name, value in model.state_dict().items()})

    expected = r"epoch 2, batch 1: the loss is finite, the gradient of blocks\.2\.mlp\.fc1\.weight is not finite"
    with pytest.raises(FloatingPointError, match=expected):
        train_one_epoch(trainer, loader(), EpochState(2), on_update)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Gradient scaling --------------------------------------------------------------------------------


def test_gradient_scaling_skips_steps_and_counts_them():
    """The scale follows torch's rules for a growth interval of 3, where an overflow restarts the count."""
    model = halting_model()
    poison_gradients(model.head.weight, {2})
    trainer, scales, weights = make_trainer(model, init_scale=8.0, growth_interval=3), [], []

    def on_update(stop_requested):
        scales.append(trainer.scaler.get_scale())
        weights.append(model.head.weight.detach().clone())

    result = train_one_epoch(trainer, [(images(2), torch.arange(2))] * 5, EpochState(0), on_update)
    assert scales == [8, 8, 4, 4, 4]
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [False, True, False, False]
    assert result["skipped_steps"] == trainer.skipped_steps == 1
    assert trainer.skipped_in_a_row == 0


def test_skipped_step_changes_nothing():
    model = halting_model()
    trainer = make_trainer(model, init_scale=4.0, ema=ModelEmaV3(model, decay=0.5))
    before = model.head.weight.detach().clone()
    trainer.scaler.scale(model(images()).sum()).backward()
    status = trainer.update("a step", [MicroBatchResult(6, torch.tensor(float("inf")), {}, {}, {})])
    assert status.loss_is_nonfinite
    assert not status.gradient_is_nonfinite
    assert torch.equal(model.head.weight, before)
    assert (trainer.skipped_steps, trainer.scaler.get_scale()) == (1, 4.0), "the gradients did not overflow"


def test_skipped_step_leaves_the_averages_finite():
    trainer = make_trainer(init_scale=4.0)
    good, bad = (images(2), torch.arange(2)), (images(2) * float("nan"), torch.arange(2))
    with pytest.raises(UserError, match="no image could be read"):
        train_one_epoch(trainer, [bad], EpochState(0))
    result = train_one_epoch(trainer, [good, bad], EpochState(0))
    assert result["skipped_steps"] == 2
    assert 0 < result["loss"] < 10


def test_too_many_skipped_steps_raise():
    model = halting_model()
    poison_gradients(model.head.weight, range(1000))
    trainer = make_trainer(model, init_scale=2.0**16)
    with pytest.raises(FloatingPointError, match=r"head\.weight is not finite; 31 steps in a row were skipped"):
        train_one_epoch(trainer, [(images(2), torch.arange(2))] * 40, EpochState(0))
    assert trainer.scaler.get_scale() > 0


def test_gradient_scaling_changes_only_rounding():
    trainers = [make_trainer(init_scale=scale, clip_grad=0.5) for scale in (None, 64.0)]
    for trainer in trainers:
        train_one_epoch(trainer, loader(), EpochState(0))
    assert_close(*(trainer.model.head.weight for trainer in trainers))


# One sync per step -------------------------------------------------------------------------------


class CountedScalars(TorchDispatchMode):
    """Count the reads by `.item()`, `bool()` and similar calls. On CUDA each is a host-device sync."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_training_step_syncs_once(monkeypatch, accum_steps):
    """The sync reads the step's status. Tokens are masked, because zipping reads shapes."""
    reads, tolist = [], torch.Tensor.tolist

    def counted_tolist(x):
        reads.append(x.shape)
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    monkeypatch.setattr("utils.with_progress", lambda batches, *_, **__: batches)
    trainer = make_trainer(halting_model(zip_tokens=False), accum_steps=accum_steps, clip_grad=1.0)
    batches = [(images(2), torch.arange(2))] * 4
    per_step = []
    with CountedScalars() as scalars:
        train_one_epoch(
            trainer, batches, EpochState(0), lambda stop_requested: per_step.append((len(reads), scalars.count))
        )
    assert per_step == [(number, 0) for number in range(1, 4 // accum_steps + 1)]


def test_step_reports_whether_any_process_should_stop():
    asked = iter([False, True])
    seen = []
    train_one_epoch(make_trainer(), loader(8, 4), EpochState(0), seen.append, should_stop=lambda: next(asked))
    assert seen == [False, True]
