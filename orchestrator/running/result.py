"""What is known of a run when it is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigpipe.errors import BigpipeError, Interrupted
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import NodeState, Session
from bigpipe.orchestrator.store import KeyRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run did. `nodes` has one NodeState per selected node."""

    run: str
    status: str
    """succeeded, failed or interrupted."""
    nodes: Mapping[str, NodeState]
    session: Session
    seconds: float
    errors: tuple[BigpipeError, ...] = ()

    @property
    def exit_code(self) -> int:
        if not self.errors:
            return 0
        first = self.errors[0]
        return first.status if isinstance(first, Interrupted) else first.exit_code

    @property
    def records(self) -> dict[str, KeyRecord]:
        """Node → the record of what it gave, of those that have one."""
        return {name: state.record for name, state in self.nodes.items() if state.record is not None}

    def path(self, node: str) -> Path | None:
        """The artifact's directory, readable as it is; None where there is none or its bytes were dropped."""
        state = self.nodes[node]
        if state.digest is None or not state.bytes_here:
            return None
        return self.session.store.artifact_path(state.digest)

    def as_json(self) -> dict[str, Json]:
        """`bigpipe.run/1`."""
        return {
            "schema": "bigpipe.run/1",
            "run": self.run,
            "status": self.status,
            "nodes": {name: self._node_json(state) for name, state in self.nodes.items()},
        }

    def _node_json(self, state: NodeState) -> dict[str, Json]:
        record = state.record
        path = self.path(state.name)
        return {
            "status": str(state.status),
            "key": state.key,
            "digest": state.digest,
            "path": str(path) if path else None,
            "seconds": round(state.seconds, 3),
            "peak_rss": record.peak_rss if record else None,
            "metrics": dict(record.metrics) if record else {},
            "reason": state.reason,
        }
