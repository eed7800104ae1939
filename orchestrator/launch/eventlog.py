"""Events over a process border: a worker appends JSON lines to a file, the command reads what is new."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bigpipe.files import LogFile
from bigpipe.orchestrator.contract import Event, Progress, event_from_json

from .redaction import Redactor

PROGRESS_SECONDS = 0.1
"""At most one Progress per task in this time; the first and the last always pass."""


class EventWriter:
    """A Reporter for workers. Safe for threads. What it writes is redacted."""

    def __init__(self, path: Path, redactor: Redactor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log: LogFile | None = LogFile(path)
        self._redactor = redactor
        self._lock = threading.Lock()
        self._shown: dict[str, float] = {}
        self._held: dict[str, Progress] = {}

    def report(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Progress) and not self._due(event):
                self._held[event.task] = event
                return
            self._write(event)

    def close(self) -> None:
        """Write what was held back. Events that come later (from a stage's own threads) are dropped."""
        with self._lock:
            if self._log is not None:
                for event in self._held.values():
                    self._write(event)
                self._log.close()
                self._log = None

    def _due(self, event: Progress) -> bool:
        now = time.monotonic()
        last = self._shown.get(event.task)
        if last is not None and now - last < PROGRESS_SECONDS and event.done != event.total:
            return False
        self._shown[event.task] = now
        self._held.pop(event.task, None)
        return True

    def _write(self, event: Event) -> None:
        if self._log is not None:
            self._log.append(json.dumps(self._redactor.event(event).as_json(), default=str).encode() + b"\n")


class EventTail:
    """Reads the events that the workers of one attempt have appended since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def new(self) -> Iterator[Event]:
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path, 0)
            if path.stat().st_size == offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = offset + len(whole)
            for line in whole.splitlines():
                # A stage's own Event class or a line torn by a killed worker is not worth failing a stage for.
                with suppress(ValueError, KeyError, TypeError):
                    yield event_from_json(json.loads(line))
