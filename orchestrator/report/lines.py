"""What every reporter says alike: a node's number, and the line at its end."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

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
from bigpipe.sizes import format_size

from .progress import elapsed

_MARKS = {"succeeded": "✓", "cached": "·", "failed": "✗", "skipped": "-"}


class BaseReporter:
    """A reporter that closes with its `with`."""

    def report(self, event: Event) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LineReporter(BaseReporter):
    """Writes a line for each thing that happens to a node; how progress looks is left to those that extend it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._places: dict[str, int] = {}

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
                text = f"attempt {event.attempt} in {event.wait_seconds:.1f} s: {event.cause}"
                self.say(event.node, text, "yellow")
            case NodeFinished():
                self.finish(event, _MARKS.get(event.status, " "), finished_text(event))
            case RunFinished():
                self.close()
                self.print(f"run {event.run} {event.status} in {elapsed(event.seconds)}")

    def start(self, event: NodeStarted) -> None:
        raise NotImplementedError

    def advance(self, event: Progress) -> None:
        raise NotImplementedError

    def finish(self, event: NodeFinished, mark: str, text: str) -> None:
        raise NotImplementedError

    def label(self, node: str) -> str:
        """Return `[1/5] shard`: the node's place among the nodes of the run, and its name."""
        number = self._places.get(node)
        if number is None:
            return node
        width = len(str(len(self._places)))
        return f"[{number:{width}d}/{len(self._places)}] {node}"

    def say(self, node: str, text: str, colour: str | None = None) -> None:
        self.print(f"{self.label(node)}: {text}", colour)

    def print(self, line: str, colour: str | None = None) -> None:
        """Write one line; a plain stream has no colours."""
        self._stream.write(line + "\n")
        self._stream.flush()


def finished_text(event: NodeFinished) -> str:
    """Return `succeeded in 12.3 s, peak 240.0 MiB`; what went wrong is on further lines."""
    text = event.status
    if event.status == "succeeded" or event.seconds >= 0.01:
        text += f" in {elapsed(event.seconds)}"
    if event.status == "succeeded" and event.peak_rss:
        text += f", peak {format_size(event.peak_rss)}"
    if event.status == "failed" and event.error:
        text += f": {event.error}"
    elif event.status == "skipped" and event.reason:
        text += f" ({event.reason})"
    return text
