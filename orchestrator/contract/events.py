"""What a run tells while it goes: typed events, and the one method that takes them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from bigpipe.redaction import redact_fields


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run."""

    name: ClassVar[str] = "event"

    def as_json(self) -> dict[str, Any]:
        return {"event": self.name, **{item.name: getattr(self, item.name) for item in fields(self)}}

    def redacted(self) -> Self:
        """Return the event, all that is concealed masked in its texts and values."""
        told = {item.name: getattr(self, item.name) for item in fields(self)}
        masked = {name: shown for name, shown in redact_fields(told).items() if shown != told[name]}
        return replace(self, **masked) if masked else self


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run begins, with these nodes."""

    name: ClassVar[str] = "run_started"
    run: str
    """The run's id."""
    manifest: str
    """The recipe's file."""
    nodes: tuple[str, ...]
    """Those that are part of the run, each after what it takes."""


@dataclass(frozen=True, slots=True)
class NodeStarted(Event):
    """A node's work begins."""

    name: ClassVar[str] = "node_started"
    node: str
    """The node it is about."""
    reason: str
    """Why it is not taken from the store."""
    attempt: int = 1
    """Which attempt it is, from 1."""


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """So much of a node's work is done."""

    name: ClassVar[str] = "progress"
    node: str
    """The node it is about."""
    done: int
    """How many units are done."""
    total: int | None
    """How many there are; null: unknown."""
    unit: str = "B"
    """What is counted; `B` is bytes."""
    task: str = ""
    """What is being done, where a node does several things."""
    rank: int = 0
    """Which rank; 0 also where there is but one process."""
    note: str = ""
    """What else there is to say of it now: a loss, a speed."""
    tokens: int | None = None
    """Tokens made so far, or read where none are made; null: none are counted."""
    busy: float | None = None
    """Seconds in which this rank computed so far; null: it does not say."""
    whole: int | None = None
    """How many there are for all ranks together, where `total` is what this one expects; null: the sum of theirs."""


@dataclass(frozen=True, slots=True)
class LogLine(Event):
    """One line a stage printed or logged. `detail` lines go to the log file only."""

    name: ClassVar[str] = "log"
    node: str
    """The node it is about."""
    line: str
    """The line, without its end."""
    detail: bool = False
    """For the log file only."""
    rank: int = 0
    """Which rank; 0 also where there is but one process."""


@dataclass(frozen=True, slots=True)
class RankHello(Event):
    """A rank, or a worker that is none, has come up, and begins; also in place of one that died."""

    name: ClassVar[str] = "rank_hello"
    node: str
    """The node it is about."""
    rank: int
    """Which rank."""
    world_size: int
    """How many ranks it sees."""
    pid: int
    """Of its process."""


@dataclass(frozen=True, slots=True)
class Bounded(Event):
    """A worker begins what a model's own files may make endless; or, with `seconds` 0, has come to its end. Between
    these it may take that many `seconds`, and `memory` bytes more than it has."""

    name: ClassVar[str] = "bounded"
    node: str
    """The node it is about."""
    what: str
    """What is being done, in words."""
    pid: int
    """Of the process that does it."""
    number: int
    """Of this work in its process."""
    seconds: float = 0
    """How long it may take; 0: it is over."""
    memory: int = 0
    """Bytes that it may take beyond what the process has."""
    rank: int = 0
    """Which rank; 0 also where there is but one process."""


@dataclass(frozen=True, slots=True)
class NodeRetried(Event):
    """An attempt failed in a way that may pass, and another begins after `wait_seconds`."""

    name: ClassVar[str] = "node_retried"
    node: str
    """The node it is about."""
    attempt: int
    """Which attempt begins, from 2."""
    cause: str
    """Why the one before it failed."""
    wait_seconds: float
    """How long until the next."""


@dataclass(frozen=True, slots=True)
class NodeFinished(Event):
    """A node has come to its end, or was in the store."""

    name: ClassVar[str] = "node_finished"
    node: str
    """The node it is about."""
    status: str
    """cached, succeeded, failed or skipped."""
    seconds: float
    """How long it took."""
    peak_rss: int
    """Bytes of resident memory at most, of all its processes."""
    metrics: Mapping[str, Any]
    """What it measured, by the names that gates use."""
    digest: str | None = None
    """Of its artifact."""
    reason: str = ""
    """Why it is as it is."""
    error: str = ""
    """The cause, where it failed."""
    verdict: str = ""
    """What its gates came to where they do not all hold and that is no failure; which variant it takes."""
    key: str | None = None
    """Of the computation; null: it never came to it."""
    gates: tuple[Mapping[str, Any], ...] = ()
    """In their order: what each asks, what was measured, whether it holds; as in `bigpipe.run/1`."""


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """A run is over."""

    name: ClassVar[str] = "run_finished"
    run: str
    """The run's id."""
    status: str
    """succeeded, failed or interrupted."""
    seconds: float
    """How long it took."""


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
