"""What a node did in a run, and how people read it: the same at a run's end, in `show`, in reports, on the page, in
notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import shown
from bigpipe.sizes import format_duration, format_figure, format_size, format_transfer
from bigpipe.tables import html_table, shortened

HEADS = ("node", "status", "time", "peak RAM", "result")
LONGEST = 72
"""Characters of a line of metrics."""


class Gate(BaseModel):
    """A gate of a node, and what it came to."""

    text: str
    """What is asked, as it is written."""
    measured: str | None = None
    """What stands at its left, as people read it: `21.3 GiB`; None: not known yet."""
    value: Any = None
    """The same as a number; None: not known yet, or no number."""
    passed: bool | None = None
    """None: not decided yet."""


class NodeRun(BaseModel):
    """One node in a run. Seconds, bytes."""

    status: str = "pending"
    """cached, succeeded, failed or skipped once it is over."""
    kind: str = ""
    """What it uses."""
    after: list[str] = Field(default_factory=list)
    """The nodes that it takes something from, or waits for."""
    key: str | None = None
    """Of the computation; None: it never came to it."""
    digest: str | None = None
    """Of its artifact; None: there is none."""
    path: str | None = None
    """The artifact's directory, readable as it is."""
    seconds: float = 0.0
    """How long its work took."""
    peak_rss: int | None = None
    """The most memory it held; None: not known."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """As its kind says."""
    result: str = ""
    """What came of it, in its kind's words; empty where the kind has none of its own."""
    gates: list[Gate] = Field(default_factory=list)
    """In their order: what each asks, and what was measured."""
    foreseen: dict[str, Any] = Field(default_factory=dict)
    """What the plan said, where it said it: `seconds`; bytes of `ram`, `download_bytes` and `write_bytes`."""
    reason: str = ""
    """Why it ran, or did not."""
    verdict: str = ""
    """What its gates came to where they do not all hold and that is no failure; which variant it takes, and why others
    were left."""
    tried: list[dict[str, str]] = Field(default_factory=list)
    """Of a node that takes the first variant that passes: `value`, the node that is its `judge`, what it `came_to`
    (`taken`, `left`, `failed` or `not run`) and `why`."""
    error: str = ""
    """Why it failed."""

    def __repr__(self) -> str:
        return f"<NodeRun of {self.kind or 'a node'}, {': '.join(filter(None, [self.status, sentence(self)]))}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [("status", self.status), *zip(HEADS[2:4], _spent(self), strict=True), ("result", sentence(self))]
        rows += [(f"gate {gate.text}", gate.measured or "not known") for gate in self.gates]
        rows += [(name, shown(value)) for name, value in self.metrics.items()]
        return html_table(self.kind, ("", ""), [row for row in rows if row[1]])


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
    return shortened(", ".join(parts), LONGEST)


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
