"""A rank that is told to end, as a launcher tells all where one died and the system where the launcher did: what is
under way is finished, if it soon is."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

FINISH_SECONDS = 4.0
"""After SIGTERM. Whoever ends a worker gives it a second more before it is killed."""


@contextmanager
def finishing() -> Iterator[threading.Event]:
    """Inside, SIGTERM sets the event that is given; the process ends of it on leaving, after `FINISH_SECONDS` at the
    latest. Several may say so: the system, a launcher, the command. Nothing changes in other threads than the main one,
    and where somebody else listens to the signal."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield told
        return

    def listen(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            return
        told.set()
        late = threading.Timer(FINISH_SECONDS, _end)
        late.daemon = True
        late.start()

    signal.signal(signal.SIGTERM, listen)
    try:
        yield told
    finally:
        if told.is_set():
            _end()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end() -> None:
    """End of SIGTERM now, in any thread and whatever the main one does, in which alone `signal.signal` works."""
    set_handler = ctypes.pythonapi.PyOS_setsig
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_handler(signal.SIGTERM, int(signal.SIG_DFL))
    os.kill(os.getpid(), signal.SIGTERM)


def until(told: threading.Event, chunks: Iterable[int]) -> Iterator[int]:
    """Yield chunks, each taken when it is asked for, until the event is set."""
    left = iter(chunks)
    while not told.is_set() and (chunk := next(left, None)) is not None:
        yield chunk
