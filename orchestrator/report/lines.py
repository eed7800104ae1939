"""What every reporter says alike: a node's number, and the line at its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from bigpipe.orchestrator.contract import Event, NodeFinished, NodeRetried
from bigpipe.sizes import format_size

from .progress import elapsed

MARKS = {"succeeded": "✓", "cached": "·", "failed": "✗", "skipped": "-"}


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


@dataclass(slots=True)
class NodeCounter:
    """`[1/5]`: a node's place among the nodes of the run."""

    places: dict[str, int] = field(default_factory=dict)

    def start(self, nodes: Iterable[str]) -> None:
        self.places = {node: number for number, node in enumerate(nodes, 1)}

    def label(self, node: str) -> str:
        number = self.places.get(node)
        if number is None:
            return node
        width = len(str(len(self.places)))
        return f"[{number:{width}d}/{len(self.places)}] {node}"


def finished_text(event: NodeFinished) -> str:
    """Return `✓ succeeded in 12.3 s, peak 240.0 MiB`; what went wrong is on further lines."""
    text = f"{MARKS.get(event.status, ' ')} {event.status}"
    if event.status == "succeeded" or event.seconds >= 0.01:
        text += f" in {elapsed(event.seconds)}"
    if event.status == "succeeded" and event.peak_rss:
        text += f", peak {format_size(event.peak_rss)}"
    if event.status == "failed" and event.error:
        text += f": {event.error}"
    elif event.status == "skipped" and event.reason:
        text += f" ({event.reason})"
    return text


def retried_text(event: NodeRetried) -> str:
    return f"attempt {event.attempt} in {event.wait_seconds:.1f} s: {event.cause}"
