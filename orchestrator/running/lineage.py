"""What a node is told of all that it stands on: keys, digests, params, metrics and pins, for cards and provenance."""

from __future__ import annotations

from bigpipe.orchestrator.contract import Lineage
from bigpipe.orchestrator.planning import Session, States, fallback
from bigpipe.orchestrator.recipe import Node


def lineage(session: Session, states: States, node: Node) -> tuple[Lineage, ...]:
    """Return the ancestors of a node in topological order, without those whose variant was not taken."""
    above = map(states.__getitem__, session.recipe.ancestors(node.name))
    known = ((state, fallback.leads_on(states, state)) for state in above)
    return tuple(
        Lineage(
            node=state.node.name,
            kind=state.node.kind.kind,
            key=state.key or "",
            digest=state.digest,
            params=state.node.params.model_dump(mode="json", by_alias=True),
            metrics=state.record.metrics if state.record else {},
            left=left,
            inputs=state.node.inputs,
            pins=session.known_pins(state.node).values,
        )
        for state, left in known
        if left is not None
    )
