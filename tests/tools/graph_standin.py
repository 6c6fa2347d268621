"""Stand-in for CUDA graphs on the CPU: a tape of operations that runs again on the same memory.

`capture`, `warm_up` and `new_pool` replace the functions of these names in `zipping.planned.capture`.
As on CUDA, a capture computes nothing that its caller can read: until the first replay, memory that
it allocated holds NaN (-1 in integers), other memory is unchanged, and so is the random generator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
POISON = 255  # as every byte of a number: NaN in each floating dtype, -1 in signed integers


class Tape(TorchDispatchMode):
    """Record of a function's operations and Triton launches: `with Tape() as tape: function()`, then `tape.replay()`.

    steps: what a replay runs; views and allocations are not in it.
    shapes: name, shapes of the tensor arguments and of the results of each operation, views included.
    Raises AssertionError if an operation reads numbers on the host or copies a list of numbers to the device.
    """

    def __init__(self):
        super().__init__()
        self.steps: list[Callable[[], object]] = []
        self.shapes: list[tuple] = []
        self._new: dict[int, UntypedStorage] = {}  # memory that was allocated while recording, by address
        self._contents: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # written memory, and its other contents
        self._in_operation = False

    def __enter__(self) -> Tape:
        kernels = import_module("zipping.planned.kernels")
        self._patches = ExitStack()
        self._patches.enter_context(patch.object(kernels, "launch", partial(self._launch, kernels.launch)))
        for name in ("tolist", "numpy"):  # on the CPU, they are no operations
            self._patches.enter_context(patch.object(Tensor, name, self._refuse(name, getattr(Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.rpartition("::")[2], kwargs or {}
        assert not _reads_on_host(function, args, kwargs), f"{name} reads numbers on the host"
        assert name != "lift_fresh" or args[0].dim() == 0, "a list of numbers is copied to the device"
        if function._schema.is_mutable:
            self._save(args, kwargs)
        with self._operation():
            out = function(*args, **kwargs)
        self.shapes.append((name, _shapes((args, kwargs)), _shapes(out)))
        own = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}  # a result on it is a view
        new = {i: x for i, x in enumerate(_tensors(out)) if x.untyped_storage().data_ptr() not in own}
        self._new |= {x.untyped_storage().data_ptr(): x.untyped_storage() for x in new.values()}
        if name not in ALLOCATIONS and (new or function._schema.is_mutable):
            self.steps.append(partial(_run_again, function, *_detached((args, kwargs, new))))
        return out

    def _launch(self, launch: Callable, kernel, programs: int, *args, **options) -> None:
        if self._in_operation:  # the operation itself is recorded
            return launch(kernel, programs, *args, **options)
        with _disable_current_modes():  # Triton's interpreter uses operations
            self._save(args, options)
            args, options = _detached((args, options))
            self.shapes.append((kernel.__name__, programs, _shapes((args, options))))
            self.steps.append(partial(launch, kernel, programs, *args, **options))
            return launch(kernel, programs, *args, **options)

    def _refuse(self, name: str, function: Callable) -> Callable:
        def refuse(tensor: Tensor, *args, **kwargs):
            assert self._in_operation, f"{name} reads numbers on the host"
            return function(tensor, *args, **kwargs)

        return refuse

    @contextmanager
    def _operation(self) -> Iterator[None]:
        self._in_operation = True
        try:
            yield
        finally:
            self._in_operation = False

    def _save(self, *arguments) -> None:
        """Save the contents of all memory that existed before and that may be written now."""
        for storage in (x.untyped_storage() for x in _tensors(arguments)):
            if (address := storage.data_ptr()) not in self._new and address not in self._contents:
                self._contents[address] = storage, storage.clone()

    def hide(self) -> None:
        """Undo what recording has written: poison new memory, and restore the contents of the other."""
        self._contents |= {address: (x, x.clone().fill_(POISON)) for address, x in self._new.items()}
        self.exchange()

    def exchange(self) -> None:
        """Exchange the contents of all written memory: as recording left it, or as if nothing had been recorded."""
        for storage, other in self._contents.values():
            contents = storage.clone()
            storage.copy_(other)
            other.copy_(contents)

    def replay(self) -> None:
        """Run everything again. Autograd notices nothing, tensor versions included."""
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            for step in self.steps:
                step()


class Pool(list):
    """Weak references to the tapes of one memory pool, in the order of their captures."""

    @contextmanager
    def as_recorded(self) -> Iterator[None]:
        """Let memory hold what recording computed: a later capture reads it here, where on CUDA it reads nothing."""
        tapes = [tape for reference in self if (tape := reference()) is not None]
        for tape in tapes:
            tape.exchange()
        try:
            yield
        finally:
            for tape in reversed(tapes):
                tape.exchange()


def capture(function: Callable[[], object], pool: Pool) -> tuple[object, Callable[[], None]]:
    """Record a function. Return its results, which hold nothing yet, and the function that computes them."""
    tape, random_state = Tape(), torch.get_rng_state()
    with pool.as_recorded():
        try:
            with tape:
                results = function()
        finally:
            tape.hide()
            torch.set_rng_state(random_state)
    pool.append(weakref.ref(tape))
    return results, tape.replay


def warm_up(function: Callable[[], object]) -> None:
    function()


def new_pool() -> Pool:
    return Pool()


def _tensors(tree) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _shapes(tree) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in _tensors(tree))


def _detached(tree):
    """Replace tensors by ones of the same memory without a gradient graph, which a tape must not keep alive."""
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _run_again(function: Callable, args: tuple, kwargs: dict, results: dict[int, Tensor]) -> None:
    """Run an operation. results: its new tensors of the first time by position, which get the new numbers."""
    again = _tensors(function(*args, **kwargs))
    for position, result in results.items():
        result.copy_(again[position])


def _reads_on_host(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Determine whether CUDA's version of an operation waits for numbers of the device."""
    aten = torch.ops.aten
    packet = function.overloadpacket
    if packet in (aten.index, aten.index_put, aten.index_put_):
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and (packet is aten.index or args[2].numel() > 1)  # one value fills by a mask
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return not DEPENDS_ON_DATA.isdisjoint(function.tags)
