"""What came of nodes, as people read it: the same at a run's end, in `show`, in reports, on the page, in notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bigpipe.orchestrator.contract import Json
from bigpipe.sizes import format_duration, format_figure, format_size, format_transfer

if TYPE_CHECKING:
    from .records import NodeRun

HEADS = ("node", "status", "time", "peak RAM", "result")
LONGEST = 72
"""Characters of a line of metrics."""


def sentence(node: NodeRun) -> str:
    """Return in one line what came of a node: its error, or its gates and what it gave, or why it did not run."""
    if node.error:
        return node.error.partition("\n")[0]
    came = node.result or metrics_line(node.metrics) or node.reason
    return "; ".join(filter(None, [node.verdict, came if came not in node.verdict else ""]))


def metrics_line(metrics: Mapping[str, Json]) -> str:
    """Return the numbers among the metrics as `shards 3, bytes 25.7 GB`."""
    parts = [
        f"{name} {format_transfer(value) if 'bytes' in name else format_figure(value)}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    text = ", ".join(parts)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def node_rows(nodes: Mapping[str, NodeRun]) -> list[tuple[str, ...]]:
    """Return a row per node, under HEADS. Of a node that did not run, the time and the memory of whoever did are not
    its own."""
    return [(name, node.status, *_spent(node), sentence(node)) for name, node in nodes.items()]


def _spent(node: NodeRun) -> tuple[str, str]:
    if node.status != "succeeded":
        return "", ""
    return format_duration(node.seconds), format_size(node.peak_rss) if node.peak_rss else ""


def run_line(name: str, run: str, status: str, seconds: float, nodes: Mapping[str, NodeRun]) -> str:
    """Return `<RunResult 20260103-174500-1f43f9a2c succeeded in 12.3 s: 3 cached, 2 succeeded>`."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(node.status for node in nodes.values()).items())
    return f"<{name} {run} {status} in {format_duration(seconds)}: {counts or 'no nodes'}>"
