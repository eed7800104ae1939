"""What a run did, as a value: for Python, for notebooks, and as `run --json` prints it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import BigpipeError
from bigpipe.files import without_detours
from bigpipe.orchestrator.contract import Forecast, Json, Stage
from bigpipe.orchestrator.planning import GateVerdict, NodeState, Plan, PlannedNode, Session
from bigpipe.orchestrator.store import KeyRecord
from bigpipe.tables import html_table

from .nodes import HEADS, Gate, NodeRun, node_rows, run_line
from .records import meant, place_of

if TYPE_CHECKING:
    from bigpipe.orchestrator.planning import Smoke

FORESEEN = ("seconds", "ram", "download_bytes", "write_bytes")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunResult:
    """What a run did. `nodes` has one NodeState per selected node."""

    run: str
    status: str
    """succeeded, failed or interrupted."""
    nodes: Mapping[str, NodeState]
    session: Session
    seconds: float
    errors: tuple[BigpipeError, ...] = ()
    gates: Mapping[str, tuple[GateVerdict, ...]] = field(default_factory=dict)
    tried: Mapping[str, list[dict[str, str]]] = field(default_factory=dict)
    """Of nodes that take the first variant that passes: what became of each; see `NodeRun.tried`."""
    smoke: Smoke | None = None
    """Of a smoke run: what it is of. `gates` then has every condition of the recipe, of which none failed the run."""

    def __getitem__(self, node: str) -> NodeRun:
        """Return what a node did, or the only variant of a stage: `result["quantize"].metrics["ratio"]`. Raise
        UsageError for any other name."""
        return self.ran()[meant(self.run, self.nodes, node)[0]]

    def __repr__(self) -> str:
        return run_line("RunResult", self.run, self.status, self.seconds, self.ran())

    def _repr_html_(self) -> str:
        return html_table(repr(self), HEADS, node_rows(self.ran()), "\n".join(map(str, self.errors)))

    @property
    def exit_code(self) -> int:
        return self.errors[0].status if self.errors else 0

    @property
    def records(self) -> dict[str, KeyRecord]:
        """Node → the record of what it gave, of those that have one."""
        return {name: state.record for name, state in self.nodes.items() if state.record is not None}

    def path(self, node: str) -> Path | None:
        """Return the artifact's directory, readable as it is; None where there is none or its bytes were dropped.
        node: a name, or a stage of one variant. Raise UsageError for any other."""
        state = self.nodes[meant(self.run, self.nodes, node)[0]]
        gone = self.smoke is not None and self.smoke.kept is None
        return (
            self.session.store.artifact_path(state.digest) if state.digest and state.bytes_here and not gone else None
        )

    def ran(self) -> dict[str, NodeRun]:
        return {name: self._ran(state) for name, state in self.nodes.items()}

    def _ran(self, state: NodeState) -> NodeRun:
        record, path = state.record, self.path(state.name)
        return NodeRun(
            status=str(state.status),
            **place_of(state.node),
            key=state.key,
            digest=state.digest,
            path=str(path) if path else None,
            seconds=round(state.seconds, 3),
            peak_rss=record.peak_rss if record else None,
            metrics=dict(record.metrics) if record else {},
            result=_in_words(state.node.kind, record.metrics) if record else "",
            gates=[Gate(**gate.as_json()) for gate in self.gates.get(state.name, ())],
            foreseen=_foreseen(state.forecast),
            reason=state.reason,
            verdict=state.verdict,
            tried=self.tried.get(state.name, []),
            error=str(state.error) if state.error else "",
        )

    def as_json(self) -> dict[str, Json]:
        """`bigpipe.run/1`."""
        return run_json(
            self.session.recipe.path, self.session.recipe.params, self.errors, run=self.run, status=self.status,
            git=self.session.checkout.state, seconds=round(self.seconds, 3),
            nodes={name: node.model_dump() for name, node in self.ran().items()},
            smoke=self.smoke.as_json() if self.smoke else None,
        )  # fmt: skip


def _in_words(kind: Stage[Any], metrics: Mapping[str, Json]) -> str:
    """What came of a node; "" where its kind does not say, or fails to: that is not worth a run."""
    with suppress(Exception):
        return str(kind.result_line(metrics) or "") if kind.result_line else ""
    return ""


def _foreseen(forecast: Forecast | None) -> dict[str, Json]:
    return {name: value for name in FORESEEN if (value := getattr(forecast, name, None))}


def refused_json(error: BigpipeError, plan: Plan) -> dict[str, Json]:
    """Return `bigpipe.run/1` of a run that was refused for what its plan says: nothing ran, and each node has what was
    foreseen of it."""
    nodes = {name: _not_run(planned).model_dump() for name, planned in plan.nodes.items()}
    recipe, git = plan.session.recipe, plan.session.checkout.state
    return run_json(recipe.path, recipe.params, [error], git=git, nodes=nodes)


def _not_run(planned: PlannedNode) -> NodeRun:
    return NodeRun(
        **place_of(planned.node),
        key=planned.decision.key,
        gates=[Gate(**gate.as_json()) for gate in planned.gates],
        foreseen=_foreseen(planned.forecast),
        reason=planned.decision.reason,
        tried=[dict(each) for each in planned.tried],
        error=str(planned.refusal) if planned.refusal else "",
    )


def run_json(
    manifest: Path, params: Mapping[str, Json], errors: Sequence[BigpipeError], **found: Json
) -> dict[str, Json]:
    """Return `bigpipe.run/1`, by default that of a run which was refused before it began."""
    return {
        "schema": "bigpipe.run/1",
        "run": None,
        "status": "refused",
        "exit_code": errors[0].status if errors else 0,
        "manifest": str(without_detours(manifest)),
        "params": json.loads(json.dumps(dict(params), default=str)),
        "git": None,
        "seconds": 0.0,
        "errors": [each for error in errors for each in error.as_json()],
        "nodes": {},
        "smoke": None,
        **found,
    }
