"""Who a run talks to: a terminal, a plain stream, a file of JSON lines. All of them write to what they are given and
close what they opened; use them in a `closing`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bigpipe.errors import UsageError
from bigpipe.files import LogFile, explain, explained, make_directory
from bigpipe.orchestrator.contract import (
    Event,
    LogLine,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    Progress,
    RunFinished,
    RunStarted,
)
from bigpipe.sizes import format_duration, format_size

from .progress import ProgressMeter
from .shown import clean, json_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bars, TaskID

LINE_SHARE = 0.1
LINE_SECONDS = 30.0
"""A plain line whenever progress has gone this share further, or this long after the last."""
COLOURS = {"succeeded": "green", "cached": "dim", "failed": "red", "skipped": "yellow"}
BEGINNING = b'{"time": '
"""Of a file of events."""
MARKS = {"succeeded": "✓", "cached": "·", "failed": "✗", "skipped": "-"}


class PlainReporter:
    """Lines for logs and pipes: a node's start and end, and now and then how far it is."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._places: dict[str, int] = {}
        self._meters: dict[str, ProgressMeter] = {}
        self._said: dict[str, tuple[float, str, int]] = {}
        """Node → when its last line was, of which task, at how many tenths."""

    def report(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._places = {node: number for number, node in enumerate(event.nodes, 1)}
            case NodeStarted():
                self.start(event)
            case Progress():
                self.advance(event)
            case LogLine(detail=False):
                self.say(event.node, event.line)
            case NodeRetried():
                text = f"attempt {event.attempt} in {format_duration(event.wait_seconds)}: {event.cause}"
                self.say(event.node, text, "yellow")
            case NodeFinished():
                self.finish(event, f"{MARKS.get(event.status, ' ')} ", finished_text(event))
            case RunFinished():
                self.close()
                self.print(f"run {event.run} {event.status} in {format_duration(event.seconds)}")

    def close(self) -> None:
        """End what is drawn."""

    def start(self, event: NodeStarted) -> None:
        self._meters[event.node] = ProgressMeter(self._clock)
        self._said[event.node] = (self._clock(), "", 0)
        self.say(event.node, "started" + (f" ({event.reason})" if event.reason else ""))

    def advance(self, event: Progress) -> None:
        reading = self._meters.setdefault(event.node, ProgressMeter(self._clock)).update(event)
        now = self._clock()
        since, task, before = self._said.get(event.node, (now, "", 0))
        # The small term: 0.3 / 0.1 is below 3.
        tenths = int((reading.share or 0.0) / LINE_SHARE + 1e-9)
        if tenths > (before if task == reading.task else 0) or now - since >= LINE_SECONDS:
            self._said[event.node] = (now, reading.task, tenths)
            self.say(event.node, reading.text())

    def finish(self, event: NodeFinished, mark: str, text: str) -> None:
        self.say(event.node, mark + text)

    def label(self, node: str) -> str:
        """Return `[1/5] shard`: the node's place among the nodes of the run, and its name."""
        number = self._places.get(node)
        width = len(str(len(self._places)))
        return node if number is None else f"[{number:{width}d}/{len(self._places)}] {node}"

    def say(self, node: str, text: str, colour: str | None = None) -> None:
        self.print(f"{self.label(node)}: {text}", colour)

    def print(self, line: str, colour: str | None = None) -> None:
        """Write one line; a plain stream has no colours."""
        self._stream.write(f"{clean(line)}\n")
        self._stream.flush()


class RichReporter(PlainReporter):
    """One bar per running node, and a line that stays for each that ended. Obeys NO_COLOR. Text of others is printed as
    it is: nothing in it is read as markup. rich is imported at the first node that really runs."""

    def __init__(
        self, stream: TextIO, *, environment: Mapping[str, str] = os.environ, width: int | None = None
    ) -> None:
        super().__init__(stream)
        self._environment = environment
        self._width = width
        self._bars: Bars | None = None
        self._running: dict[str, tuple[TaskID, ProgressMeter]] = {}

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._running.clear()

    def start(self, event: NodeStarted) -> None:
        if event.node in self._running:
            return
        self._bars = self._bars or self._make_bars()
        self._bars.start()
        task = self._bars.add_task(self.label(event.node), total=None, text=clean(event.reason))
        self._running[event.node] = (task, ProgressMeter())

    def advance(self, event: Progress) -> None:
        if self._bars is None or event.node not in self._running:
            return
        task, meter = self._running[event.node]
        reading = meter.update(event)
        total = None if reading.share is None else 1.0
        self._bars.update(task, total=total, completed=reading.share, text=clean(reading.text()))

    def finish(self, event: NodeFinished, mark: str, text: str) -> None:
        task = self._running.pop(event.node, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task[0])
        self.print(f"{mark}{self.label(event.node)}: {text}", COLOURS.get(event.status))

    def print(self, line: str, colour: str | None = None) -> None:
        if self._bars is None:
            super().print(line)
        else:
            self._bars.console.print(clean(line), style=colour, markup=False, highlight=False, soft_wrap=True)

    def _make_bars(self) -> Bars:
        from rich.console import Console
        from rich.progress import BarColumn, Progress as Bars, TextColumn, TimeElapsedColumn

        columns: list[Any] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
        ]
        console = Console(file=self._stream, width=self._width, _environ=self._environment)
        return Bars(*columns, console=console, transient=True, refresh_per_second=8, redirect_stdout=False)


def finished_text(event: NodeFinished) -> str:
    """Return `succeeded in 12.3 s, peak 240.0 MiB`; what went wrong is on further lines."""
    text = event.status
    if event.status == "succeeded" or event.seconds >= 0.01:
        text += f" in {format_duration(event.seconds)}"
    if event.status == "succeeded" and event.peak_rss:
        text += f", peak {format_size(event.peak_rss)}"
    if event.status == "failed" and event.error:
        text += f": {event.error}"
    elif event.status == "skipped" and event.reason:
        text += f" ({event.verdict or event.reason})"
        return text
    return f"{text}; {event.verdict}" if event.verdict else text


class JsonlReporter:
    """Appends every event as one JSON line with its time (ISO 8601, UTC)."""

    def __init__(self, path: Path) -> None:
        other = "name another file with --events"
        if os.path.isdir(path):
            raise UsageError(f"{path} is a directory", other)
        with explained(path, other=other):
            make_directory(path.parent, durable=False)
            torn = _ends_within_an_event(path, other)
            self._file = LogFile(path)
            if torn:
                self._file.append(b"\n")

    def report(self, event: Event) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.append(json_text({"time": now, **event.as_json()}).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


@contextmanager
def following(stream: TextIO, what: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """Give who is told (bytes done, of all, task) of work that is no run, while it goes on. what: its name."""
    with closing(choose_reporter(stream)) as reporter:
        reporter.report(NodeStarted(what, ""))
        yield lambda done, total, task: reporter.report(Progress(what, done, total, task=task))


def _ends_within_an_event(path: Path, other: str) -> bool:
    """Return whether what wrote there before was cut short. Raise UsageError for a file of something else."""
    if not path.is_file() or not (size := path.stat().st_size):
        return False
    with path.open("rb") as file:
        if not BEGINNING.startswith(file.read(len(BEGINNING))[:size]):
            raise UsageError(f"{path} holds something else than events, which would be appended to it", other)
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class Tee:
    """Passes every event on, to people and perhaps to a file. A run goes on when nobody reads what it says, or when it
    cannot be written: events that are missing in the file are announced once."""

    def __init__(self, talk: PlainReporter, record: JsonlReporter | None = None) -> None:
        self._talk: PlainReporter | None = talk
        self._record = record
        self._missing = False

    def report(self, event: Event) -> None:
        self._tell(lambda talk: talk.report(event))
        if self._record is not None:
            try:
                self._record.report(event)
            except OSError as error:
                self._warn(error)

    def _tell(self, say: Callable[[PlainReporter], None]) -> None:
        if self._talk is not None:
            try:
                say(self._talk)
            except OSError:
                self._talk = None

    def _warn(self, error: OSError) -> None:
        fault = explain(error, Path())
        if not self._missing:
            self._tell(lambda talk: talk.print(f"events are lost: {fault.cause}; {fault.cure}", "yellow"))
        self._missing = True

    def close(self) -> None:
        self._tell(lambda talk: talk.close())
        if self._record is not None:
            with suppress(OSError):
                self._record.close()


def choose_reporter(stream: TextIO, *, events: Path | None = None, environment: Mapping[str, str] = os.environ) -> Tee:
    """Return bars where `stream` is a terminal that can draw them, else plain lines; with `events`, also a file."""
    reporter = PlainReporter(stream)
    if stream.isatty() and environment.get("TERM", "") not in ("dumb", "unknown"):
        reporter = RichReporter(stream, environment=environment)
    return Tee(reporter, JsonlReporter(events) if events is not None else None)
