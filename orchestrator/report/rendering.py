"""Reasons, graphs and results as text for people; plans for programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import Plan, PlannedNode, difference_json, shown
from bigpipe.orchestrator.running import HEADS, node_rows
from bigpipe.sizes import counted, format_size, format_transfer
from bigpipe.tables import PLAIN, Screen, columns, shortened

if TYPE_CHECKING:
    from bigpipe.orchestrator.launch import Cluster
    from bigpipe.orchestrator.planning import Fetch, Smoke
    from bigpipe.orchestrator.running import Held, NodeRun, RunResult
    from bigpipe.orchestrator.running.sharing import Exchange
    from bigpipe.orchestrator.store import Remote


def plan_json(plan: Plan, probed: Sequence[Held] | None = None) -> dict[str, Json]:
    """Return `bigpipe.plan/1`. probed: what could be had of what it foresees, where that was tried."""
    sums = {"download_bytes": plan.downloads, "write_bytes": plan.writes, "peak_disk_bytes": plan.peak}
    return {
        "schema": "bigpipe.plan/1",
        "manifest": str(plan.session.recipe.path),
        "machine": asdict(plan.session.machine),
        "cluster": _cluster_json(plan.session.cluster),
        "fits": not plan.misfits,
        "remote": remote_json(plan.session.remote),
        "fetch_bytes": plan.fetch_bytes,
        **{name: total.exact for name, total in sums.items()},
        "at_least": {name: total.known for name, total in sums.items()},
        "misfits": [{"node": name, "cause": m.cause, "cure": str(m.cure)} for name, m in plan.misfits],
        "not_installed": plan.not_installed,
        "smoke": plan.smoke.as_json() if plan.smoke else None,
        "probe": None if probed is None else probe_json(probed),
        "nodes": {name: _planned_json(node) for name, node in plan.nodes.items()},
    }


def _cluster_json(cluster: Cluster | None) -> dict[str, Json] | None:
    if cluster is None:
        return None
    return {"name": cluster.name, "machines": [asdict(host.machine) for host in cluster.hosts]}


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


def probe_json(rows: Sequence[Held]) -> list[dict[str, Json]]:
    """Return what was tried, as `plan --probe --json` has it."""
    return [{**asdict(row), "ok": not row.short} for row in rows]


PROBED = """\
Nodes that take each other's files as they are made were tried together, all others one at a time: a run starts nodes
beside each other only while what is foreseen of them fits."""


def probe_text(rows: Sequence[Held], screen: Screen = PLAIN) -> str:
    """Return what `plan --probe` prints: a row per node and device."""
    if not rows:
        return "nothing to probe: no node that would run is known to take RAM, GPU memory or disk"
    return columns([PROBE_HEADS, *probe_rows(rows)], screen) + "\n\n" + PROBED


PROBE_HEADS = ("node", "device", "foreseen", "had", "verdict")


def probe_rows(rows: Sequence[Held]) -> list[tuple[str, str, str, str, str]]:
    """Return a row per node and device, under PROBE_HEADS."""
    return [(row.node, row.device, format_size(row.predicted), *_had(row)) for row in rows]


def _had(row: Held) -> tuple[str, str]:
    verdict = f"✗ short: {row.why}" if row.short else "✓ ok" if row.held is not None else "not tried"
    return "" if row.held is None else format_size(row.held), verdict


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


def nodes_table(nodes: Mapping[str, NodeRun], screen: Screen = PLAIN) -> str:
    """Return what became of nodes: at the end of a run, and looking back."""
    return columns([HEADS, *node_rows(nodes)], screen)


GATE_HEADS = ("node", "gate", "measured", "verdict")
VERDICTS = {True: "✓ holds", False: "✗ fails", None: "not decided"}


TOLD_ANYWAY = {VERDICTS[True]: "holds", VERDICTS[False]: "does not hold", VERDICTS[None]: "not measured"}


def gate_rows(nodes: Mapping[str, NodeRun]) -> list[tuple[str, str, str, str]]:
    """Return a row per gate, under GATE_HEADS: what is asked, and what was measured."""
    return [
        (name, gate.text, gate.measured or "", VERDICTS[gate.passed])
        for name, node in nodes.items()
        for gate in node.gates
    ]


FIRST_ROWS, LONGEST_TEXT = 5, 100
"""Of results that are shown: rows, and characters of a prompt or an answer."""


def results_text(result: RunResult, *, screen: Screen = PLAIN) -> str:
    """Return what a run made, for the eye: the first lines of every `results` artifact, then the table of nodes."""
    parts = []
    for name, state in result.nodes.items():
        path = result.path(name) if state.node.kind.output == "results" else None
        if path is None:
            continue
        from .firstrows import first_results  # most runs that have nothing to do have no results either

        if rows := list(first_results(path, FIRST_ROWS)):
            parts.append("\n".join([f"{name}:", *(f"  {_flat(prompt)} → {_flat(text)}" for prompt, text in rows)]))
    parts.append(nodes_table(result.ran(), screen))
    return "\n\n".join([*parts, *(_smoke_text(result, result.smoke, screen) if result.smoke else ())])


def _smoke_text(result: RunResult, smoke: Smoke, screen: Screen) -> list[str]:
    """What a smoke run was, what the recipe's conditions came to in it, and what it did not show."""
    rows = [(name, gate, measured, TOLD_ANYWAY[verdict]) for name, gate, measured, verdict in gate_rows(result.ran())]
    gates = ["conditions, of made-up models:\n" + columns(rows, screen)] if rows else []
    ended = "the whole recipe ran small" if result.status == "succeeded" else "the recipe did not run through"
    told = [f"smoke run: {ended}. It does not show:", *smoke.not_shown()]
    if smoke.kept is not None:
        told.append(f"its logs stay: bigpipe log --store {shlex.quote(str(smoke.kept))}")
    return [*gates, "\n".join(told)]


def _flat(text: str) -> str:
    return shortened(" ".join(text.split()), LONGEST_TEXT)
