"""Variants that run by CUDA graphs, and the static model prepared with the same care.

A form is the way in which a model runs. It does not change what the model computes:

    planned              by plans, without CUDA graphs (A-ViT only)
    graphed              by CUDA graphs, in training of the backward pass too; weights are cast in one go
    compiled, graphed    the same, with blocks compiled by torch.compile

Each form is measured for the static model, for A-ViT in zipped mode, and with early exit. One more variant of the
static model, "static, compiled", is compiled as a whole by torch.compile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import utils
from benchmarks.cases import EARLY_EXIT, STATIC, ZIPPED, static_twin
from benchmarks.planned import PlannedEager
from models_act import AdaptiveTokens
from zipping.planned import dispatch
from zipping.planned.plans import Planner
from zipping.planned.weights import CastWeights

PLANNED, GRAPHED, COMPILED_GRAPHED = "planned", "graphed", "compiled, graphed"
WHOLE_COMPILED = "static, compiled"
WARM_UP_BATCHES = Planner.start + 4  # the batches before the first plan, its capture, and a few replays


class Variant(NamedTuple):
    """A variant that runs by CUDA graphs. eager: the variant of the same model without them."""

    eager: str
    form: str

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.eager.removesuffix(' (timm)')}, {self.form}"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(ZIPPED, PLANNED),
        *(Variant(eager, form) for form in (GRAPHED, COMPILED_GRAPHED) for eager in (STATIC, ZIPPED, EARLY_EXIT)),
    )
}


def eager_variant(name: str) -> str:
    """Return the eager variant that computes the same."""
    if name in VARIANTS:
        return VARIANTS[name].eager
    return STATIC if name == WHOLE_COMPILED else name


def same_form(name: str) -> str:
    """Return the static variant that runs in the form of this variant."""
    if name in VARIANTS and VARIANTS[name].form != PLANNED:
        return Variant(STATIC, VARIANTS[name].form).name
    return name if name == WHOLE_COMPILED else STATIC


def build_graphed(model: AdaptiveTokens, train: bool, names: Iterable[str]) -> dict[str, nn.Module]:
    """Build the variants with these names from one model. Training has no early exit.

    Forgets what torch.compile has compiled before: it runs a function eagerly after 8 versions for different sizes.
    """
    torch.compiler.reset()
    found = {}
    for name in names:
        eager, form = VARIANTS.get(name, (STATIC, ""))
        if eager == STATIC:
            static = static_twin(model).train(train)
            found[name] = GraphedStatic(static, form == COMPILED_GRAPHED) if form else _compile_whole(static)
        elif form == PLANNED:
            found[name] = PlannedEager(copy.deepcopy(model).train(train))
        elif not (train and eager == EARLY_EXIT):
            found[name] = copy.deepcopy(model)
            found[name].early_exit = eager == EARLY_EXIT
            found[name].cuda_graphs, found[name].compile_blocks = True, form == COMPILED_GRAPHED
    return found


def _compile_whole(static: nn.Module) -> nn.Module:
    """Compile a model as a whole. In inference, torch.compile captures CUDA graphs of its own."""
    static.compile(mode="default" if static.training else "reduce-overhead", dynamic=False)
    return static


class GraphedStatic(nn.Module):
    """The static model by CUDA graphs.

    The first batch of each size captures them, with the model's mode and the autocast type of that call.
    """

    def __init__(self, static: nn.Module, compiled: bool):
        super().__init__()
        self.static, self.blocks, self.num_classes = static, static.blocks, static.num_classes
        for block in static.blocks if compiled else ():
            block.compile(dynamic=False)
        self.replays: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [B, num_classes], of images [B, 3, H, W]."""
        if images.shape not in self.replays:
            self.replays[images.shape] = self._captured(images)
        return self.replays[images.shape](images)

    def _captured(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        kind = images.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        weights = CastWeights(self.static, dtype if enabled else None, self.training)
        capture_passes = _capture_training if self.training else _capture_inference
        with torch.autocast(kind, dtype, enabled, cache_enabled=False), weights.in_place(self.static):
            return capture_passes(self.static, weights, images)


def _capture_inference(static: nn.Module, weights: CastWeights, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture the forward pass and return a function that replays it for other images."""
    from zipping.planned import capture  # imported here because Triton may be missing

    def run() -> Tensor:
        weights.cast()
        return static(static_images)

    with torch.inference_mode(False), torch.no_grad():
        static_images = images.clone()
        capture.warm_up(run)
        logits, replay = capture.capture(run, capture.new_pool())

    def replay_for(images: Tensor, _weights: CastWeights = weights) -> Tensor:  # the graph reads their memory
        static_images.copy_(images)
        replay()
        return logits.clone()

    return replay_for


def _capture_training(static: nn.Module, weights: CastWeights, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture both passes. Returns a function that replays the forward pass; autograd replays the backward pass."""
    from zipping.planned import capture  # imported here because Triton may be missing

    static_images, pool = images.clone(), capture.new_pool()

    def run() -> list[Tensor]:
        weights.cast()
        return [static(static_images)]

    capture.warm_up_training(run, weights)
    outputs, replay = capture.capture(run, pool)
    backward = capture.BackwardGraph(outputs, weights, pool)

    def replay_for(images: Tensor) -> Tensor:
        static_images.copy_(images)
        replay()
        (logits,) = backward.outputs()
        return logits

    return replay_for


# Preparation and hit rate ------------------------------------------------------------------------


class Preparation(NamedTuple):
    """Cost of the calls before the first timed one. pool_mib: device memory that CUDA graphs reserve, in MiB."""

    seconds: float
    pool_mib: float


def prepare(call: Callable[[], None], num_batches: int, device: torch.device) -> Preparation:
    """Run a call until plans exist and graphs are captured. num_batches: batches of a call."""
    before, start = pool_mib(device), utils.synchronized_time(device)
    for _ in range(math.ceil(WARM_UP_BATCHES / num_batches)):
        call()
    return Preparation(utils.synchronized_time(device) - start, pool_mib(device) - before)


def pool_mib(device: torch.device) -> float:
    """Return the memory in the pools of CUDA graphs in MiB, torch.compile's included. 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()  # releases the pools of graphs that no longer exist
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)) / 2**20


def hit_rate(model: nn.Module, before: dispatch.GraphReport) -> float | None:
    """Return the fraction of A-ViT's batches since `before` that was replayed from graphs. None if there is none."""
    report = dispatch.graph_report(model).since(before)
    return report.hit_rate if report.batches else None
