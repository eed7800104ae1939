"""Limits of what a model's own files set going in a worker: its tokenizer, its chat template.

They are watched from outside: nothing in a process stops a loop in C, a regular expression or a product of large
numbers, whoever holds the interpreter's lock.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from bigpipe.orchestrator.contract import Bounded, Event
from bigpipe.programs import busy
from bigpipe.sizes import format_size
from bigpipe.trust import Limits, took_too_long

from .processes import resident


class Bounds:
    def __init__(self, limits: Limits, here: Collection[int] | None = None) -> None:
        """here: the ranks on this machine; None: all. The processes of others are other machines' to look at."""
        self._limits, self._here = limits, here
        self._open: dict[tuple[int, int], tuple[Bounded, float, float, int]] = {}
        """Process and number → what it does, since when (of the monotonic clock), the seconds in which the process had
        had a processor then, and its resident bytes."""

    def take(self, event: Event) -> bool:
        """Return whether this event is about a limit; it is then noted, where its process is on this machine."""
        if not isinstance(event, Bounded):
            return False
        if self._here is not None and event.rank not in self._here:
            return True
        if event.seconds:
            self._open[event.pid, event.number] = event, time.monotonic(), busy(event.pid), resident(event.pid)
        else:
            self._open.pop((event.pid, event.number), None)
        return True

    def check(self) -> None:
        """Raise InvalidCheckpoint where a worker takes more than it may."""
        for (process, _), (event, since, worked, before) in self._open.items():
            if took_too_long(time.monotonic() - since, busy(process) - worked, event.seconds):
                raise self._limits.exceeded("seconds", f"{event.what} takes more than {event.seconds:g} s")
            if resident(process) - before > event.memory:
                raise self._limits.exceeded("memory", f"{event.what} takes more than {format_size(event.memory)}")
