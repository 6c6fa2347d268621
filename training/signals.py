"""Signals that ask a run to stop: it finishes its step, saves, and ends well."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is what Slurm's --signal=USR1@SECONDS sends; some systems lack it
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
_asked = RawValue("b", 0)  # shared with the loader processes: whether a signal has asked this process to stop


class Interrupted(Exception):
    """The run has been saved and stops here, because it was asked to."""


class StopRequest:
    """Whether a signal has asked this process to stop.

    The first signal is noted; a second one acts at once, as it would without us.
    """

    def __init__(self):
        self.signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted (in the main thread alone, where Python takes them)."""
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
        """Whether a signal has come to this process; see `utils.any_rank` for any of them."""
        return self.signal is not None


def ignore_signals_in_worker(_: int) -> None:
    """For a loader process: it gets the signals of its group too, but is needed until the step is done.

    SIGTERM without the main process having been asked comes from that, which wants no more batches.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "alarm"):
        return
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(1))  # in a second the main process has got its own
    signal.signal(signal.SIGALRM, lambda *_: _asked.value or os._exit(0))
