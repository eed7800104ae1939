"""Who a run talks to: a terminal, a plain stream, a file of JSON lines. All of them write to what they are given and
close what they opened; use them in a `with`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from bigpipe.errors import BigpipeError, ManifestError, Place
from bigpipe.files import LogFile
from bigpipe.orchestrator.contract import Event, NodeFinished, NodeStarted, Progress, Reporter
from bigpipe.orchestrator.launch import Redactor

from .lines import BaseReporter, LineReporter
from .progress import ProgressMeter

LINE_SHARE = 0.1
LINE_SECONDS = 30.0
"""A plain line whenever progress has gone this share further, or this long after the last."""


class PlainReporter(LineReporter):
    """Lines for logs and pipes: a node's start and end, and now and then how far it is."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._meters: dict[str, ProgressMeter] = {}
        self._said: dict[str, tuple[float, str, int]] = {}
        """Node → when its last line was, of which task, at how many tenths."""

    def start(self, event: NodeStarted) -> None:
        self._meters[event.node] = ProgressMeter(self._clock)
        self._said[event.node] = (self._clock(), "", 0)
        self.say(event.node, "started" + (f" ({event.reason})" if event.reason else ""))

    def advance(self, event: Progress) -> None:
        reading = self._meters.setdefault(event.node, ProgressMeter(self._clock)).update(event)
        now = self._clock()
        since, task, before = self._said.get(event.node, (now, "", 0))
        # The small term: 0.3 / 0.1 is below 3.
        step = int((reading.share or 0.0) / LINE_SHARE + 1e-9)
        if step > (before if task == reading.task else 0) or now - since >= LINE_SECONDS:
            self._said[event.node] = (now, reading.task, step)
            self.say(event.node, reading.text())

    def finish(self, event: NodeFinished, mark: str, text: str) -> None:
        self.say(event.node, f"{mark} {text}")


class JsonlReporter(BaseReporter):
    """Appends every event as one JSON line with its time (ISO 8601, UTC)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = LogFile(path)

    def report(self, event: Event) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **event.as_json()}, default=str, ensure_ascii=False)
        self._file.append(line.encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class Tee(BaseReporter):
    """Passes every event on to all, with the given secrets masked. A run goes on when nobody reads what it says."""

    def __init__(self, *reporters: Reporter, secrets: Iterable[str] = ()) -> None:
        self._reporters = list(reporters)
        self._redactor = Redactor(secrets)

    def report(self, event: Event) -> None:
        event = self._redactor.event(event)
        for reporter in tuple(self._reporters):
            try:
                reporter.report(event)
            except BrokenPipeError:
                self._reporters.remove(reporter)

    def close(self) -> None:
        for reporter in self._reporters:
            if isinstance(reporter, BaseReporter):
                with suppress(BrokenPipeError):
                    reporter.close()


def choose_reporter(
    stream: TextIO,
    *,
    events: Path | None = None,
    environment: Mapping[str, str] | None = None,
    secrets: Iterable[str] = (),
) -> Tee:
    """Return bars where `stream` is a terminal that can draw them, else plain lines; with `events`, also a file."""
    environment = os.environ if environment is None else environment
    reporters: list[Reporter] = []
    if stream.isatty() and environment.get("TERM", "") not in ("dumb", "unknown"):
        from .terminal import RichReporter

        reporters.append(RichReporter(stream, environment=environment))
    else:
        reporters.append(PlainReporter(stream))
    if events is not None:
        reporters.append(JsonlReporter(events))
    return Tee(*reporters, secrets=secrets)


def error_text(error: BigpipeError, environment: Mapping[str, str]) -> str:
    """Return an error as a command prints it; under GITHUB_ACTIONS each placed one is an annotation of its line too."""
    if isinstance(error, ManifestError):
        lines = [str(error)]
        places = [(problem.place, f"{problem.cause}; {problem.cure}".rstrip("; ")) for problem in error.problems]
    else:
        lines = [f"error: {error}"]
        places = [(error.place, f"{error.cause}\n{error.cure}".rstrip())] if error.place else []
    if environment.get("GITHUB_ACTIONS") == "true":
        lines += [annotation(place, message) for place, message in places]
    return "\n".join(lines)


def annotation(place: Place, message: str) -> str:
    """Return GitHub's workflow command for an error at a place, newlines and separators escaped as it undoes them."""
    file = _escape(place.file).replace(":", "%3A").replace(",", "%2C")
    return f"::error file={file},line={place.line},col={place.column}::{_escape(message)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
