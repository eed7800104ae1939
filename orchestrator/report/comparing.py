"""Several runs beside each other, and what differs between each one and the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.running import Gate, NodeRun, RunRecord, sentence
from bigpipe.sizes import format_duration, format_figure, format_size

from .drawing import Bar, bars
from .inspection import diff_runs
from .sections import Table, short, shown


def compared(found: Sequence[RunRecord], store: str | Path | None) -> list[Table]:
    """Return tables with a column per run, and one for each step from a run to the next."""
    tables = [
        _beside(found),
        gates_of(found),
        _measured("Time by node", found, lambda node: node.seconds, format_duration),
        _measured("Peak RAM by node", found, lambda node: node.peak_rss or 0, format_size),
        *(_changes(one, two, store) for one, two in pairwise(found)),
    ]
    return [table for table in tables if table.rows]


def _by_node(found: Sequence[RunRecord]) -> Mapping[str, list[NodeRun | None]]:
    names = dict.fromkeys(name for record in found for name in record.nodes)
    return {name: [record.nodes.get(name) for record in found] for name in names}


def _beside(found: Sequence[RunRecord]) -> Table:
    names = dict.fromkeys(name for record in found for name in record.params)
    rows = [
        ("status", *(record.status for record in found)),
        ("started", *(f"{record.started[:19].replace('T', ' ')} UTC" for record in found)),
        ("time", *(format_duration(record.seconds) for record in found)),
        *((name, *(shown(record.params.get(name)) for record in found)) for name in names),
        *((name, *(_told(node) for node in nodes)) for name, nodes in _by_node(found).items()),
    ]
    return Table("Runs side by side", ("", *(record.run for record in found)), rows)


def _told(node: NodeRun | None) -> str:
    return f"{node.status}: {sentence(node)}".strip(": ") if node else ""


def gates_of(found: Sequence[RunRecord]) -> Table:
    """Return what each run measured for each gate that one of them has."""
    judged = [{(name, gate.text): gate for name, node in run.nodes.items() for gate in node.gates} for run in found]
    keys = dict.fromkeys(key for one in judged for key in one)
    rows = [(*key, *(_verdict(one.get(key)) for one in judged)) for key in keys]
    return Table("Gates", ("node", "gate", *(record.run for record in found)), rows, 2)


def _verdict(gate: Gate | None) -> str:
    marks = {True: "✓", False: "✗", None: ""}
    return f"{marks[gate.passed]} {gate.measured or ''}".strip() if gate else ""


def _measured(
    title: str, found: Sequence[RunRecord], value: Callable[[NodeRun], float], text: Callable[[float], str]
) -> Table:
    """A row for each node that ran, a column and a bar for each run."""
    rows, drawn, most = [], [], 0.0
    for name, nodes in _by_node(found).items():
        values = [value(node) if node and node.status == "succeeded" else 0 for node in nodes]
        if any(values):
            rows.append((name, *(text(each) if each else "" for each in values)))
            drawn.append((name, [_bar(name, record, each, text) for record, each in zip(found, values, strict=True)]))
            most = max(most, *values)
    heads = ("node", *(record.run for record in found))
    return Table(title, heads, rows, 1, bars(f"{title}, the runs from top to bottom", drawn, most) if rows else "")


def _bar(name: str, record: RunRecord, value: float, text: Callable[[float], str]) -> Bar:
    return Bar(0, value, "measured", f"{name}, run {record.run}: {text(value)}")


def _changes(one: RunRecord, two: RunRecord, store: str | Path | None) -> Table:
    data = diff_runs(one.run, two.run, store=store).data
    changes = [("run", change) for change in data["changes"]]
    changes += [(name, change) for name, each in data["nodes"].items() for change in each]
    rows = [(name, str(change["path"]), *told_apart(change["old"], change["new"])) for name, change in changes]
    return Table(f"From {one.run} to {two.run}", ("node", "what", "before", "after"), rows)


def told_apart(old: Json, new: Json) -> tuple[str, str]:
    """Return two values that differ, so that this can be seen."""
    one, other = _value(old), _value(new)
    return (one, other) if one != other else (short(shown(old)), short(shown(new)))


def _value(value: Json) -> str:
    """A value as it is compared by eye: of digests the beginning, numbers to four digits."""
    if isinstance(value, float):
        return format_figure(value)
    return re.sub(r"\b(sha256:[0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", short(shown(value)))
