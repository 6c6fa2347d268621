"""Passes captured as CUDA graphs, which replay them for other images.

`capture`, `warm_up` and `new_pool` are the only functions here that need CUDA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.autograd.function import once_differentiable

from zipping.outputs import Halting
from zipping.planned.passes import PassState, PlannedPass, begin, finish, run_blocks
from zipping.planned.tokens import PlannedGate, PlannedTokens
from zipping.planned.weights import CastWeights

WARM_UPS = 3  # calls before a capture: they compile kernels, and libraries create their handles


def new_pool() -> object:
    """Return a pool of device memory that captures share. Its passes must not run at the same time."""
    return torch.cuda.graph_pool_handle()


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def warm_up(function: Callable[[], object]) -> None:
    """Call the function a few times before its capture, on the stream of captures."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)


def capture(function: Callable[[], object], pool: object) -> tuple[object, Callable[[], None]]:
    """Capture what the function does on the device.

    Returns its results, whose memory is undefined before the first replay, and the function that replays it.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    # The default mode fails if another thread calls CUDA, as the threads of data loaders do to pin memory.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        results = function()
    return results, graph.replay


class HostCounts:
    """Counts of live rows, copied from the device to the host.

    `copy` starts the copy, which a capture may contain. `mark` is called after it, and `read` waits for it.
    """

    def __init__(self, length: int, device: torch.device):
        is_cuda = device.type == "cuda"
        self._numbers = torch.zeros(length, dtype=torch.int32, pin_memory=is_cuda)
        self._event = torch.cuda.Event() if is_cuda else None

    def copy(self, counts: Tensor) -> None:
        """Start to copy the counts of the first decisions. counts: int32, on the device."""
        self._numbers[: len(counts)].copy_(counts, non_blocking=True)

    def mark(self) -> None:
        """Mark the point in the stream that `read` waits for. Not allowed in a capture."""
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait for the mark. Returns the counts of all decisions, zero where none was copied."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


class GateNumbers(NamedTuple):
    """The gate of a call. limit: 1 - halt_eps; offset: [B], added to the center of each image, or None."""

    scale: float
    center: float
    limit: float
    offset: Tensor | None = None

    @classmethod
    def of(cls, model: VisionTransformer, offset: Tensor | None = None) -> GateNumbers:
        """Return the current gate of a model."""
        return cls(model.gate_scale, model.gate_center, 1 - model.halt_eps, offset)


class StaticInputs:
    """Inputs of a captured pass, at fixed addresses: the images, the store of the first block and the gate.

    A smaller batch fills the first places. The other images have no tokens, so they add nothing to the counts.
    """

    def __init__(self, images: Tensor, size: tuple[int, int], num_prefix_tokens: int):
        """Allocate the inputs. images: any of their shape, dtype and device; size: B, N."""
        self.images = images.new_zeros(size[0], *images.shape[1:])
        self.tokens = PlannedTokens.all_live(size, num_prefix_tokens, images.device)
        zeros = partial(torch.zeros, dtype=torch.float32, device=images.device)
        self.gate = PlannedGate(zeros(2), zeros(size[0]))
        self._all_tokens = self.tokens.token.clone()
        self._num_images = size[0]
        self._gate: GateNumbers | None = None  # as written last

    def write(self, images: Tensor, gate: GateNumbers) -> None:
        """Write a batch and its gate. images: as many as in the capture or fewer."""
        self.images[: len(images)].copy_(images)
        if len(images) != self._num_images:
            self._num_images = len(images)
            self._write_tokens()
        self._write_gate(gate)

    def _write_tokens(self) -> None:
        """Let the first images have all of their tokens, and the others none."""
        batch, length = self.tokens.size
        self.tokens.token.copy_(self._all_tokens)
        self.tokens.token[self._num_images * length :] = batch * length

    def _write_gate(self, gate: GateNumbers) -> None:
        """Write the numbers that have changed since the last call."""
        last, self._gate = self._gate, gate
        if gate.offset is not None:
            torch.sub(-gate.center, gate.offset, out=self.gate.minus_center[: self._num_images])
        elif last is None or last.offset is not None or last.center != gate.center:
            self.gate.minus_center.fill_(-gate.center)
        if last is None or (last.scale, last.limit) != (gate.scale, gate.limit):
            self.gate.scale_and_limit[0].fill_(gate.scale)
            self.gate.scale_and_limit[1].fill_(gate.limit)


# Inference ---------------------------------------------------------------------------------------


class InferenceGraph:
    """The forward pass of one plan, in several graphs: one or more stages of blocks, the last block, the head.

    The host reads the counts of a graph while the device runs the next one, so it waits little. With several stages,
    a batch without live tokens needs none of the later ones.
    """

    def __init__(
        self, inputs: StaticInputs, planned: PlannedPass, weights: CastWeights, pool: object, stage: int | None
    ):
        """Capture the pass. stage: number of blocks of each stage, None for one stage."""
        self.inputs, self.pool, self._size = inputs, pool, planned.plan.size
        last, device = planned.model.num_blocks - 1, inputs.images.device
        parts = [
            (numbers, HostCounts(numbers[-1] + 1, device) if numbers[0] < last else None)
            for numbers in _parts(planned, stage)
        ]

        def run(state: PassState | None, numbers: range, counts: HostCounts | None) -> PassState:
            if state is None:
                weights.cast()
                state = begin(planned, inputs.images)
            state = run_blocks(planned, state, numbers)
            if counts is not None:
                counts.copy(state.counts)
            return state

        def run_all() -> None:
            state = None
            for numbers, counts in parts:
                state = run(state, numbers, counts)
            finish(planned, state)

        with weights.in_place(planned.model):
            warm_up(run_all)
            self._graphs: list[tuple[Callable[[], None], HostCounts | None]] = []
            state = None
            for numbers, counts in parts:
                state, replay = capture(partial(run, state, numbers, counts), pool)
                self._graphs.append((replay, counts))
            self._results, self._replay_end = capture(partial(finish, planned, state), pool)
        self._kept = state, weights  # memory that the graphs read, which other captures must not use

    def launch(self, images: Tensor, gate: GateNumbers) -> None:
        """Replay the pass for a batch. Its results stay until the pool's next pass."""
        self.inputs.write(images, gate)
        has_stages = len(self._graphs) > 2
        self._last: HostCounts | None = None
        for replay, counts in self._graphs:
            replay()
            if counts is not None:
                counts.mark()
            if has_stages and self._last is not None and self._last.read()[-1] == 0:
                break  # no token was live before this stage
            self._last = counts or self._last
        self._replay_end()

    def counts(self) -> list[int]:
        """Wait for the last decision. Returns the live rows before each block that ran, and after a plan that ends."""
        return [self._size[0] * self._size[1], *(self._last.read() if self._last is not None else [])]

    def results(self, num_images: int) -> tuple[Tensor, Halting | None]:
        """Return copies of the logits of the first images, and of their `Halting` if the pass computes it."""
        logits, halting = self._results
        if halting is not None:
            depth, ponder_cost, layer_scores = halting
            share = self._size[0] / num_images  # layer scores are means over the images of the plan
            layer_scores = layer_scores.clone() if share == 1 else layer_scores * share
            halting = Halting(depth[:num_images].clone(), ponder_cost[:num_images].clone(), layer_scores)
        return logits[:num_images].clone(), halting


def _parts(planned: PlannedPass, stage: int | None) -> list[range]:
    """Return the blocks of each graph. The network's last block, which decides nothing, has one of its own."""
    num_blocks = len(planned.plan.capacities)
    num_deciding = min(num_blocks, planned.model.num_blocks - 1)
    step = stage or max(num_deciding, 1)
    parts = [range(start, min(start + step, num_deciding)) for start in range(0, num_deciding, step)]
    return parts if num_deciding == num_blocks else [*parts, range(num_deciding, num_blocks)]


# Training ----------------------------------------------------------------------------------------


class BackwardGraph:
    """Backward pass of captured outputs, which autograd replays. One is possible after each forward pass.

    Gradients are copied out of the graph. `torch.cuda.make_graphed_callables` returns its own memory instead, so that
    accumulated gradients are wrong (pytorch/pytorch#181723).
    """

    def __init__(self, outputs: list[Tensor], weights: CastWeights, pool: object):
        """Capture the backward pass. outputs: captured in the same pool, with the graph of autograd."""
        self._weights, self._outputs = weights, [x.detach() for x in outputs]
        self.needs_grad = [x.requires_grad for x in outputs]
        wanted = [x for x in outputs if x.requires_grad]
        self._output_grads = [torch.zeros_like(x) for x in wanted]
        gradients = partial(weights.gradients, wanted, self._output_grads)
        self._gradients, self._replay_backward = capture(gradients, pool)
        self._user: Callable[[], object] = lambda: None

    @property
    def is_in_use(self) -> bool:
        """True while gradients of the last pass may still be requested, whose memory another pass would overwrite."""
        return self._user() is not None

    def outputs(self) -> tuple[Tensor, ...]:
        """Return copies of the outputs, differentiable in the parameters. Call it once after each forward pass."""
        user = _User()
        self._user = weakref.ref(user)
        return _Replay.apply(self, user, *(self._weights.parameters[number] for number in self._weights.trained))

    def backward(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Replay the backward pass. grads: of the outputs that need one. Returns those of the trained parameters."""
        for static, grad in zip(self._output_grads, grads):
            static.zero_() if grad is None else static.copy_(grad)
        self._replay_backward()
        found: dict[int, Tensor] = {}
        for flat, numbers in self._gradients:
            parameters = [self._weights.parameters[number] for number in numbers]
            parts = flat.clone().split([parameter.numel() for parameter in parameters])
            found |= {n: part.view_as(p) for n, p, part in zip(numbers, parameters, parts)}
        return [found.get(number) for number in self._weights.trained]


def warm_up_training(forward: Callable[[], list[Tensor]], weights: CastWeights) -> None:
    """Call the forward pass and compute gradients of its outputs before their capture."""

    def run() -> None:
        outputs = [x for x in forward() if x.requires_grad]
        weights.gradients(outputs, [torch.zeros_like(x) for x in outputs])

    warm_up(run)


class TrainingGraph(BackwardGraph):
    """The forward and the backward pass of one plan, which has all blocks, in three graphs.

    The first graph ends at the last decision. The host reads its counts while the device runs the second one, the rest
    of the forward pass. Loss, gradient scaling and optimizer stay outside.
    Outputs: logits (two of them in distilled training), depth, ponder cost, layer scores.
    """

    def __init__(self, inputs: StaticInputs, planned: PlannedPass, weights: CastWeights, pool: object):
        """Capture the passes."""
        self.inputs, self.pool, last = inputs, pool, planned.model.num_blocks - 1
        self._counts = HostCounts(last, inputs.images.device)

        def decide() -> PassState:
            weights.cast()
            state = run_blocks(planned, begin(planned, inputs.images), range(last))
            if last > 0:
                self._counts.copy(state.counts)
            return state

        def end(state: PassState) -> list[Tensor]:
            logits, halting = finish(planned, run_blocks(planned, state, range(last, last + 1)))
            return [*(logits if isinstance(logits, tuple) else (logits,)), *halting]

        with weights.in_place(planned.model):
            warm_up_training(lambda: end(decide()), weights)
            state, self._replay_decisions = capture(decide, pool)
            outputs, self._replay_end = capture(partial(end, state), pool)
            super().__init__(outputs, weights, pool)

    def launch(self, images: Tensor, gate: GateNumbers) -> None:
        """Replay the forward pass for a batch of the size of the capture."""
        self.inputs.write(images, gate)
        self._replay_decisions()
        self._counts.mark()
        self._replay_end()

    def counts(self) -> list[int]:
        """Wait for the last decision. Returns the live rows before each block."""
        batch, length = self.inputs.tokens.size
        return [batch * length, *self._counts.read()]


class _User:
    """Lives as long as gradients of a pass can be requested."""


class _Replay(torch.autograd.Function):
    """Outputs of a replayed forward pass, whose backward pass is a replay too."""

    @staticmethod
    def forward(ctx, graph: BackwardGraph, user: _User, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graph, ctx.user = graph, user
        ctx.set_materialize_grads(False)
        outputs = tuple(x.clone() for x in graph._outputs)
        ctx.mark_non_differentiable(*(x for x, needed in zip(outputs, graph.needs_grad) if not needed))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graph, user = ctx.graph, ctx.user
        if user is None or graph._user() is not user:
            raise RuntimeError(
                "the backward pass needs memory that was overwritten by an earlier backward pass or another forward "
                "pass. CUDA graphs support one backward pass for each forward pass. Set model.cuda_graphs = False."
            )
        found = graph.backward([grad for grad, needed in zip(grads, graph.needs_grad) if needed])
        ctx.user = None
        return None, None, *found
