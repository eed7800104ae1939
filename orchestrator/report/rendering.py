"""Reasons, graphs and results as text for people; plans for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import Plan, PlannedNode, difference_json, shown
from bigpipe.sizes import counted, format_size, format_transfer
from bigpipe.tables import PLAIN, Screen, columns

if TYPE_CHECKING:
    from bigpipe.orchestrator.planning import Fetch
    from bigpipe.orchestrator.running import RunResult
    from bigpipe.orchestrator.running.sharing import Exchange
    from bigpipe.orchestrator.store import Remote


def plan_json(plan: Plan) -> dict[str, Json]:
    """Return `bigpipe.plan/1`."""
    sums = {"download_bytes": plan.downloads, "write_bytes": plan.writes, "peak_disk_bytes": plan.peak}
    return {
        "schema": "bigpipe.plan/1",
        "manifest": str(plan.session.recipe.path),
        "machine": asdict(plan.session.machine),
        "fits": not plan.misfits,
        "remote": remote_json(plan.session.remote),
        "fetch_bytes": plan.fetch_bytes,
        **{name: total.exact for name, total in sums.items()},
        "at_least": {name: total.known for name, total in sums.items()},
        "misfits": [{"node": name, "cause": m.cause, "cure": str(m.cure)} for name, m in plan.misfits],
        "not_installed": plan.not_installed,
        "nodes": {name: _planned_json(node) for name, node in plan.nodes.items()},
    }


FORESEEN = ("download_bytes", "write_bytes", "ram", "vram", "seconds", "metrics", "unknown", "details")
"""What of a forecast programs read."""


def _planned_json(planned: PlannedNode) -> dict[str, Json]:
    forecast, refusal = planned.forecast, planned.refusal
    foreseen = {name: getattr(forecast, name) for name in FORESEEN} if forecast else None
    if forecast and foreseen and forecast.vram is not None:
        foreseen["vram"] = {str(index): size for index, size in forecast.vram.items()}
    return {
        "kind": planned.node.kind.kind,
        "action": str(planned.action),
        "reason": planned.decision.reason,
        "key": planned.decision.key,
        "pins": dict(planned.pinned.values),
        "changes": [difference_json(change, planned.node) for change in planned.decision.changes],
        "gates": [gate.as_json() for gate in planned.gates],
        "tried": [dict(row) for row in planned.tried],
        "problem": refusal.cause if refusal else None,
        "fetch": fetch_json(planned.decision.fetch),
        "forecast": foreseen,
    }


def fetch_json(fetch: Fetch | None) -> dict[str, Json] | None:
    """Return what comes from the remote store; None: nothing does."""
    return {"bytes": fetch.bytes, "seconds": fetch.seconds} if fetch else None


def remote_json(remote: Remote | None) -> dict[str, Json] | None:
    """Return which remote store is used, and why it is not any more; None: there is none."""
    return {"address": remote.name, "away": remote.away or None} if remote else None


def exchange_json(schema: str, done: Exchange) -> dict[str, Json]:
    """Return `bigpipe.push/1` or `bigpipe.pull/1`."""
    return {"schema": schema, "remote": done.remote, "nodes": {name: asdict(node) for name, node in done.nodes.items()}}


def exchange_text(done: Exchange, screen: Screen = PLAIN) -> str:
    """Return what `push` and `pull` print: a row per node, and how many bytes moved."""
    rows = [(name, node.status, format_transfer(node.bytes) if node.bytes else "") for name, node in done.nodes.items()]
    moved = [node.bytes for node in done.nodes.values() if node.status in ("sent", "fetched")]
    total = f"{counted(len(moved), 'artifact')} moved, {format_transfer(sum(moved))}; remote store: {done.remote}"
    return "\n".join([columns(rows, screen), "", total])


def why_text(answers: Mapping[str, Mapping[str, Json]]) -> str:
    """Return per node, each change as `params.batch 4 → 3   (opt.yaml:6:28)`."""
    blocks = []
    for name, answer in answers.items():
        lines = [f"{name}: {answer['action']}" + (f" ({answer['reason']})" if answer["reason"] else "")]
        for change in answer["changes"]:
            place = f"   ({change['place'].rpartition('/')[2]})" if change["place"] else ""
            lines.append(f"  {change['path']} {shown(change['old'])} → {shown(change['new'])}{place}")
        lines += [_tried_line(row) for row in answer["tried"]]
        lines += [f"  {other}: {reason}" for other, reason in answer["because_of"].items()]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _tried_line(row: Mapping[str, Json]) -> str:
    return f"  {row['value']}: {row['came_to']} ({row['judge']}{': ' + row['why'] if row['why'] else ''})"


def nodes_table(nodes: Iterable[tuple[str, str, float, int | None, str]], screen: Screen = PLAIN) -> str:
    """Return the table of a run. nodes: name, status, seconds, peak memory in bytes if known, what came out."""
    rows = [("node", "status", "seconds", "peak RAM", "result")]
    for name, status, seconds, peak, result in nodes:
        ran = status == "succeeded"
        rows.append((name, status, f"{seconds:.1f}" * ran, format_size(peak) if ran and peak else "", result))
    return columns(rows, screen)


def result_table(result: RunResult, screen: Screen = PLAIN) -> str:
    """Return the table at the end of a run."""
    rows = []
    for name, state in result.nodes.items():
        record, in_words = state.record, state.node.kind.result_line or metrics_line
        text = outcome_line(in_words(record.metrics) if record else state.reason, state.verdict)
        rows.append((name, str(state.status), state.seconds, record.peak_rss if record else 0, text))
    return nodes_table(rows, screen)


def outcome_line(result: str, verdict: str) -> str:
    """Return what came of a node in one line: of its gates first."""
    return "; ".join(filter(None, [verdict, result if result not in verdict else ""]))


def results_text(result: RunResult, limit: int = 5, *, screen: Screen = PLAIN) -> str:
    """Return what a run made, for the eye: the first lines of every `results` artifact, then the table of nodes."""
    parts = []
    for name, state in result.nodes.items():
        path = result.path(name) if state.node.kind.output == "results" else None
        if path is None:
            continue
        from .firstrows import first_results  # most runs that have nothing to do have no results either

        if rows := list(first_results(path, limit)):
            parts.append("\n".join([f"{name}:", *(f"  {_flat(prompt)} → {_flat(text)}" for prompt, text in rows)]))
    return "\n\n".join([*parts, result_table(result, screen)])


def _flat(text: str, limit: int = 100) -> str:
    return _shortened(" ".join(text.split()), limit)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def metrics_line(metrics: Mapping[str, Json], limit: int = 72) -> str:
    """Return the scalar metrics as `shards 3, bytes 25.7 GB`."""
    parts = []
    for key, value in metrics.items():
        if isinstance(value, bool | str) or value is None or isinstance(value, Mapping | list):
            continue
        shown = format_transfer(value) if "bytes" in key else f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{key} {shown}")
    return _shortened(", ".join(parts), limit)
