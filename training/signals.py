"""Signals. They stop a training run after its step, with a checkpoint and status 0, and any other work immediately."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # SIGUSR1: Slurm's --signal=USR1@SECONDS; not on all systems
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
_asked = RawValue("b", 0)  # shared with the data-loader workers: 1 if a signal has asked this process to stop


class Interrupted(Exception):
    """Raised when a signal has stopped a run. If it has an output folder, it has saved a checkpoint before."""


class StoppedBySignal(KeyboardInterrupt):
    """Raised in the main thread by SIGINT or SIGTERM outside of training."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raise StoppedBySignal for the first SIGINT or SIGTERM inside the context, and ignore later ones.

    A launcher repeats the signal that its processes receive from the terminal. Handlers of a calling program stay, and
    signals that are ignored (nohup) stay ignored.
    """
    replaced = {}

    def stop(number: int, _) -> None:
        for each in replaced:
            signal.signal(each, signal.SIG_IGN)
        raise StoppedBySignal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                replaced[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


class StopRequest:
    """A signal that has asked this process to stop, if any.

    The first signal is recorded. A second one takes effect immediately, as it does by default.
    """

    def __init__(self):
        self.signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals inside the context. Does nothing outside the main thread, where Python handles no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        _asked.value = 0
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            _asked.value = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number).name
        _asked.value = 1

    def asked(self) -> bool:
        """Return whether this process received a signal; see `utils.any_rank` for all processes."""
        return self.signal is not None


def ignore_signals_in_worker(_: int) -> None:
    """Ignore stop signals in a data-loader worker, because its process still needs batches to finish the step.

    A worker receives the signals of its process group too. If the main process was not asked to stop, SIGTERM comes
    from the main process itself, which needs no more batches: then the worker exits.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "alarm"):
        return
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(1))  # by then the main process has received its own signal
    signal.signal(signal.SIGALRM, lambda *_: _asked.value or os._exit(0))
