"""What a run tells while it goes: typed events, and the one method that takes them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from bigpipe.redaction import redact_json


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run."""

    name: ClassVar[str] = "event"

    def as_json(self) -> dict[str, Any]:
        return {"event": self.name, **{item.name: getattr(self, item.name) for item in fields(self)}}

    def redacted(self) -> Self:
        """Return the event, all that is concealed masked in its texts."""
        told = {item.name: getattr(self, item.name) for item in fields(self)}
        masked = {name: shown for name, value in told.items() if (shown := redact_json(value)) != value}
        return replace(self, **masked) if masked else self


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run begins, with these nodes."""

    name: ClassVar[str] = "run_started"
    run: str
    manifest: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeStarted(Event):
    """A node's work begins."""

    name: ClassVar[str] = "node_started"
    node: str
    reason: str
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """`done` of `total` (None: unknown) `unit`s; unit `B` is bytes. `task` says what is being counted, `note` what else
    there is to say of it now: a loss."""

    name: ClassVar[str] = "progress"
    node: str
    done: int
    total: int | None
    unit: str = "B"
    task: str = ""
    rank: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class LogLine(Event):
    """One line a stage printed or logged. `detail` lines go to the log file only."""

    name: ClassVar[str] = "log"
    node: str
    line: str
    detail: bool = False
    rank: int = 0


@dataclass(frozen=True, slots=True)
class RankHello(Event):
    """A rank has come up."""

    name: ClassVar[str] = "rank_hello"
    node: str
    rank: int
    world_size: int
    pid: int


@dataclass(frozen=True, slots=True)
class Bounded(Event):
    """A worker begins what a model's own files may make endless; or, with `seconds` 0, has come to its end. Between
    these it may take that many `seconds`, and `memory` bytes more than it has."""

    name: ClassVar[str] = "bounded"
    node: str
    what: str
    pid: int
    number: int
    """Of this work in its process."""
    seconds: float = 0
    memory: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class NodeRetried(Event):
    """An attempt failed in a way that may pass, and another begins after `wait_seconds`."""

    name: ClassVar[str] = "node_retried"
    node: str
    attempt: int
    cause: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class NodeFinished(Event):
    """A node has come to its end, or was in the store."""

    name: ClassVar[str] = "node_finished"
    node: str
    status: str
    seconds: float
    peak_rss: int
    metrics: Mapping[str, Any]
    digest: str | None = None
    reason: str = ""
    error: str = ""
    verdict: str = ""
    """What its gates came to where they do not all hold and that is no failure; which variant it takes."""


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """A run is over."""

    name: ClassVar[str] = "run_finished"
    run: str
    status: str
    seconds: float


@runtime_checkable
class Reporter(Protocol):
    """Whoever wants to know: a terminal, a file, a test."""

    def report(self, event: Event) -> None: ...


class OneAtATime:
    """Events come from several threads; reporters see them one at a time, the run's own record first.
    No secret is in what they see."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters
        self._lock = threading.Lock()

    def report(self, event: Event) -> None:
        event = event.redacted()
        with self._lock:
            for reporter in self._reporters:
                reporter.report(event)


_ALL = (RunStarted, NodeStarted, Progress, LogLine, RankHello, Bounded, NodeRetried, NodeFinished, RunFinished)
EVENTS: dict[str, type[Event]] = {event.name: event for event in _ALL}


def event_from_json(data: Mapping[str, Any]) -> Event:
    """The inverse of `Event.as_json`."""
    given = dict(data)
    return EVENTS[given.pop("event")](**given)
