"""Choose plans, graphs and fallbacks for the calls of a model whose `cuda_graphs` is on."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor

from zipping.outputs import Halting, HaltingHistory
from zipping.planned import capture
from zipping.planned.capture import GateNumbers, InferenceGraph, StaticInputs, TrainingGraph
from zipping.planned.dispatch import Call, GraphReport, Result
from zipping.planned.passes import PlannedPass, choose_step, fused_step
from zipping.planned.plans import Plan, Planner
from zipping.planned.watch import ModelWatch
from zipping.planned.weights import CastWeights

MAX_CAPTURES = 6  # passes of a model that stay captured
EVICTION_GAP = 64  # batches between two evictions at least: a capture takes as long as many passes
MAX_STAGED_IMAGES = 8  # with early exit, batches of up to this size are captured in stages
STAGE = 3  # blocks in a stage


class Kind(NamedTuple):
    """Conditions of a call that a captured pass depends on, in addition to its plan and to the model itself.

    num_tokens: of an image; amp: dtype of autocast, None if it is off; modes: global settings of torch.
    """

    device: torch.device
    training: bool
    image_shape: tuple[int, ...]
    dtype: torch.dtype
    return_halting: bool
    early_exit: bool
    num_tokens: int
    amp: torch.dtype | None
    modes: tuple

    @classmethod
    def of(cls, model: VisionTransformer, call: Call) -> Kind:
        """Return the kind of a call, in the current state of autocast and of torch's global settings."""
        images, device_type = call.images, call.images.device.type
        amp = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        modes = (*_tf32_modes(), torch.are_deterministic_algorithms_enabled())
        num_tokens = math.prod(model.patch_embed.dynamic_feat_size(images.shape[2:])) + model.num_prefix_tokens
        outputs = (call.return_halting, call.early_exit)
        return cls(images.device, model.training, images.shape[1:], images.dtype, *outputs, num_tokens, amp, modes)


class GraphRunner:
    """Runs the calls of one model. Every result is that of the model in its current state, up to rounding.

    The first batches of a kind run in the dynamic mode, and the planner observes their counts. Later, the pass of a
    plan is captured at its first use. While the device runs a replay, the host checks whether the model has changed
    since the capture. If so, the batch runs in the dynamic mode and the captured passes are dropped.
    """

    def __init__(self, model: VisionTransformer):
        self._model = weakref.ref(model)  # a strong reference would keep the model in `RUNNERS`
        self.report = GraphReport()
        self._watches: dict[bool, ModelWatch] = {}  # by whether the model trains
        self._planners: dict[tuple[Kind, int], Planner] = {}
        self._graphs: OrderedDict[tuple[Kind, Plan], InferenceGraph | TrainingGraph] = OrderedDict()
        self._weights: dict[tuple[torch.dtype | None, bool], CastWeights] = {}
        self._last_trained: Callable[[], TrainingGraph | None] = lambda: None  # a weak reference
        self._has_failed = False
        self._next_eviction = 0  # the number of batches at which a captured pass may make room for another
        self._stream: torch.cuda.Stream | None = None  # of the last call
        self._lock = threading.RLock()  # the calls of several threads would write over each other's images

    def __call__(self, call: Call) -> Result:
        """Run a call."""
        with self._lock:
            return self._run(call)

    def _run(self, call: Call) -> Result:
        model = self._model()
        if self._has_failed:
            return model._forward(call)
        kind = Kind.of(model, call)
        self.report.batches += 1
        planner = self._planner(kind, len(call.images))
        if planner.plan is None:
            return self._run_dynamic(call, planner)
        self._wait_for_last_stream(call.images.device)
        with _autocast_without_cache(call.images.device):
            return (self._train if kind.training else self._infer)(call, kind, planner)

    def _wait_for_last_stream(self, device: torch.device) -> None:
        """Order calls on different streams: a replay overwrites what the last one still reads."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _run_dynamic(self, call: Call, planner: Planner, overflowed: bool = False) -> Result:
        """Run a call in the dynamic mode. Its counts are true, so the planner observes them."""
        history = HaltingHistory()
        result = self._model()._forward(call, history)
        self._observe(call, planner, history.row_counts, overflowed)
        return result

    def _infer(self, call: Call, kind: Kind, planner: Planner) -> Result:
        """Replay the pass of the plan, and after an overflow that of the full plan."""
        for plan in (planner.plan, Plan.full(planner.size, planner.num_blocks)):
            graph = self._captured(call, kind, plan)
            if graph is None:
                return self._run_dynamic(call, planner)
            graph.launch(call.images, GateNumbers.of(self._model(), call.gate_offset))
            is_valid, counts = self._is_valid(kind), graph.counts()
            if not is_valid:
                return self._run_dynamic(call, planner)
            if not plan.overflows(counts):
                break
        self._observe(call, planner, counts, overflowed=plan is not planner.plan)
        self.report.replayed += 1
        return graph.results(len(call.images))

    def _train(self, call: Call, kind: Kind, planner: Planner) -> Result:
        """Replay the forward pass of the plan. After an overflow, run the dynamic mode with the same random numbers."""
        last = self._last_trained()
        if last is not None and last.is_in_use:
            return self._run_dynamic(call, planner)  # passes that train share memory
        device = call.images.device
        plan, random_state = planner.plan, _random_state(device)
        graph = self._captured(call, kind, plan)
        _set_random_state(device, random_state)  # the passes before a capture draw numbers
        if graph is None:
            return self._run_dynamic(call, planner)
        graph.launch(call.images, GateNumbers.of(self._model(), call.gate_offset))
        is_valid, counts = self._is_valid(kind), graph.counts()
        overflowed = is_valid and plan.overflows(counts)
        if not is_valid or overflowed:
            _set_random_state(device, random_state)
            return self._run_dynamic(call, planner, overflowed)
        self._observe(call, planner, counts)
        self.report.replayed += 1
        self._last_trained = weakref.ref(graph)
        *logits, depth, ponder_cost, layer_scores = graph.outputs()
        return tuple(logits) if len(logits) > 1 else logits[0], Halting(depth, ponder_cost, layer_scores)

    def _observe(self, call: Call, planner: Planner, counts: list[int], overflowed: bool = False) -> None:
        """Pass the true counts of a batch to the planner, unless the batch is smaller than its plans or has none."""
        self.report.overflows += overflowed
        if counts and len(call.images) == planner.size[0]:
            before = planner.num_plans
            planner.observe(counts, overflowed)
            self.report.plans += planner.num_plans - before

    def _planner(self, kind: Kind, batch: int) -> Planner:
        """Return the planner of a batch size. In inference, a smaller batch runs by the plans of a larger one."""
        if (kind, batch) not in self._planners and not kind.training:
            larger = (size for known, size in self._planners if known == kind and batch < size <= 2 * batch)
            planned = [size for size in larger if self._planners[kind, size].plan is not None]
            batch = min(planned, default=batch)
        if (kind, batch) not in self._planners:
            size = (batch, kind.num_tokens)
            self._planners[kind, batch] = Planner(size, self._model().num_blocks, keep_all=kind.training)
        return self._planners[kind, batch]

    def _captured(self, call: Call, kind: Kind, plan: Plan) -> InferenceGraph | TrainingGraph | None:
        """Return the captured pass of a plan, capturing it first if needed. None if that is not possible."""
        if (kind, plan) not in self._graphs:
            if not (self._may_capture(kind) and self._make_room()):
                return None
            try:
                self._graphs[kind, plan] = self._capture(call, kind, plan)
            except Exception as error:  # drivers, kernels and compilers raise many types
                self._give_up(error)
                return None
            self.report.captures += 1
        self._graphs.move_to_end((kind, plan))
        return self._graphs[kind, plan]

    def _make_room(self) -> bool:
        """Evict the captured pass that was used least recently if there are too many. False if it is too early."""
        if len(self._graphs) >= MAX_CAPTURES:
            if self.report.batches < self._next_eviction:
                return False
            self._graphs.popitem(last=False)
            self._next_eviction = self.report.batches + EVICTION_GAP
        return True

    def _capture(self, call: Call, kind: Kind, plan: Plan) -> InferenceGraph | TrainingGraph:
        """Capture the pass of a plan, with this batch as its first input."""
        model = self._model()
        with torch.inference_mode(False), torch.set_grad_enabled(kind.training):
            pool, weights = self._shared(model, kind)
            inputs = StaticInputs(call.images, plan.size, model.num_prefix_tokens)
            inputs.write(call.images, GateNumbers.of(model, call.gate_offset))
            step = choose_step(model, model.compile_blocks)
            planned = PlannedPass(model, plan, inputs.tokens, inputs.gate, step, kind.return_halting, kind.early_exit)
            if kind.training:
                return TrainingGraph(inputs, planned, weights, pool)
            is_staged = kind.early_exit and plan.size[0] <= MAX_STAGED_IMAGES and step is fused_step
            return InferenceGraph(inputs, planned, weights, pool, STAGE if is_staged else None)

    def _shared(self, model: VisionTransformer, kind: Kind) -> tuple[object, CastWeights]:
        """Return the memory pool and the cast weights that all passes of the model have in common."""
        graphs = [graph for (other, _), graph in self._graphs.items() if other[:2] == kind[:2]]
        pool = graphs[0].pool if graphs else capture.new_pool()  # the memory of a pool goes with its last graph
        key = (kind.amp, kind.training)
        if key not in self._weights:
            self._weights[key] = CastWeights(model, *key)
        return pool, self._weights[key]

    def _give_up(self, error: Exception) -> None:
        """Use no graphs from here on, and free the captured ones."""
        self._has_failed = True
        self._drop_graphs()
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"CUDA graphs are disabled because a capture failed ({reason}). The model runs in the dynamic mode, "
            "which is slower for small batches. Set cuda_graphs=False to silence this warning.",
            stacklevel=2,
        )

    def _may_capture(self, kind: Kind) -> bool:
        """Return whether the passes of the model can be captured, see `ModelWatch.can_capture`.

        Drops the captured passes if the model has changed.
        """
        watch = self._watches.get(kind.training)
        if watch is not None and not watch.is_same():
            self._drop_graphs()
            watch = None
        if watch is None:
            self._watches[kind.training] = watch = ModelWatch(self._model())
        return watch.can_capture(kind.training)

    def _is_valid(self, kind: Kind) -> bool:
        """Return whether the model is still the captured one. Drops the captured passes if not."""
        watch = self._watches.get(kind.training)
        if watch is not None and watch.is_same() and watch.is_untouched():
            return True
        self._drop_graphs()
        self._watches.pop(kind.training, None)
        return False

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._weights.clear()


def _tf32_modes() -> tuple:
    """Return the precision of matrix products and convolutions. If one API has set it, the other one may raise."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision, cudnn.conv.fp32_precision
    return matmul.allow_tf32, cudnn.allow_tf32  # up to torch 2.8


@contextlib.contextmanager
def _autocast_without_cache(device: torch.device) -> Iterator[None]:
    """Disable autocast's cache inside the context: a cast made in a capture is memory of its pool."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
        yield


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
