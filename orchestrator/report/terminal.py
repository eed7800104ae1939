"""Progress on a terminal: one bar per running node, and a line that stays for each that ended.

rich is imported at the first node that really runs: a run where everything is cached does without.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

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

from .lines import MARKS, BaseReporter, NodeCounter, finished_text, retried_text
from .progress import ProgressMeter, elapsed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars, TaskID

COLOURS = {"succeeded": "green", "cached": "dim", "failed": "red", "skipped": "yellow"}


class RichReporter(BaseReporter):
    """Obeys NO_COLOR. Text of others is printed as it is: nothing in it is read as markup."""

    def __init__(
        self, stream: TextIO, *, environment: Mapping[str, str] | None = None, width: int | None = None
    ) -> None:
        self._stream = stream
        self._environment = os.environ if environment is None else environment
        self._width = width
        self._counter = NodeCounter()
        self._bars: Bars | None = None
        self._running: dict[str, tuple[TaskID, ProgressMeter]] = {}

    def report(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._counter.start(event.nodes)
            case NodeStarted():
                self._start(event)
            case Progress():
                self._advance(event)
            case LogLine(detail=False):
                self._line(f"{self._counter.label(event.node)}: {event.line}")
            case NodeRetried():
                self._line(f"{self._counter.label(event.node)}: {retried_text(event)}", "yellow")
            case NodeFinished():
                self._finish(event)
            case RunFinished():
                self.close()
                self._line(f"run {event.run} {event.status} in {elapsed(event.seconds)}")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._running.clear()

    def _start(self, event: NodeStarted) -> None:
        if event.node in self._running:
            return
        self._bars = self._bars or _make_bars(self._make_console())
        self._bars.start()
        task = self._bars.add_task(self._counter.label(event.node), total=None, text=event.reason)
        self._running[event.node] = (task, ProgressMeter())

    def _advance(self, event: Progress) -> None:
        if self._bars is None or event.node not in self._running:
            return
        task, meter = self._running[event.node]
        reading = meter.update(event)
        if reading.share is None:
            self._bars.update(task, text=reading.text())
        else:
            self._bars.update(task, total=1.0, completed=reading.share, text=reading.text())

    def _finish(self, event: NodeFinished) -> None:
        task = self._running.pop(event.node, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task[0])
        text = finished_text(event).removeprefix(MARKS.get(event.status, " ")).strip()
        self._line(
            f"{MARKS.get(event.status, ' ')} {self._counter.label(event.node)}: {text}", COLOURS.get(event.status)
        )

    def _line(self, text: str, colour: str | None = None) -> None:
        if self._bars is None:
            self._stream.write(text + "\n")
            self._stream.flush()
            return
        self._bars.console.print(text, style=colour, markup=False, highlight=False, soft_wrap=True)

    def _make_console(self) -> Console:
        from rich.console import Console

        return Console(file=self._stream, width=self._width, _environ=self._environment)


def _make_bars(console: Console) -> Bars:
    from rich.progress import BarColumn, Progress as Bars, TextColumn, TimeElapsedColumn

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
    ]
    return Bars(*columns, console=console, transient=True, refresh_per_second=8, redirect_stdout=False)
