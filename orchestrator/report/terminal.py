"""Progress on a terminal: one bar per running node, and a line that stays for each that ended.

rich is imported at the first node that really runs: a run where everything is cached does without.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from bigpipe.orchestrator.contract import NodeFinished, NodeStarted, Progress

from .lines import LineReporter
from .progress import ProgressMeter

if TYPE_CHECKING:
    from rich.progress import Progress as Bars, TaskID

COLOURS = {"succeeded": "green", "cached": "dim", "failed": "red", "skipped": "yellow"}


class RichReporter(LineReporter):
    """Obeys NO_COLOR. Text of others is printed as it is: nothing in it is read as markup."""

    def __init__(
        self, stream: TextIO, *, environment: Mapping[str, str] | None = None, width: int | None = None
    ) -> None:
        super().__init__(stream)
        self._environment = os.environ if environment is None else environment
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
        task = self._bars.add_task(self.label(event.node), total=None, text=event.reason)
        self._running[event.node] = (task, ProgressMeter())

    def advance(self, event: Progress) -> None:
        if self._bars is None or event.node not in self._running:
            return
        task, meter = self._running[event.node]
        reading = meter.update(event)
        total = None if reading.share is None else 1.0
        self._bars.update(task, total=total, completed=reading.share, text=reading.text())

    def finish(self, event: NodeFinished, mark: str, text: str) -> None:
        task = self._running.pop(event.node, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task[0])
        self.print(f"{mark} {self.label(event.node)}: {text}", COLOURS.get(event.status))

    def print(self, line: str, colour: str | None = None) -> None:
        if self._bars is None:
            super().print(line)
        else:
            self._bars.console.print(line, style=colour, markup=False, highlight=False, soft_wrap=True)

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
