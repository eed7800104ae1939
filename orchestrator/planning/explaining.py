"""Why a node would run, or ran last, as `bigpipe why` says it."""

from __future__ import annotations

from bigpipe.orchestrator.contract import Json

from .decision import Action, difference_json
from .keys import Difference, differences
from .plan import Plan
from .session import Session


def explain(planned: Plan, name: str) -> dict[str, Json]:
    """Return what a plan does with a node, the reason, every change old → new with its place, and the producers whose
    changes reach it."""
    session, item = planned.session, planned.nodes[name]
    decision = item.decision
    last = session.last(name)
    changes = decision.changes or _latest_changes(session, name, decision.key)
    return {
        "action": str(decision.action),
        "reason": decision.reason,
        "key": decision.key,
        "changes": [difference_json(change, item.node) for change in changes],
        "because_of": {
            other: planned.nodes[other].decision.reason
            for other in session.recipe.ancestors(name)
            if planned.nodes[other].action in (Action.RUN, Action.MAYBE)
        },
        "tried": [dict(row) for row in item.tried],
        "last": {"run": last.run, "created": last.created, "seconds": last.seconds} if last else None,
    }


def _latest_changes(session: Session, name: str, key: str | None) -> tuple[Difference, ...]:
    """For a cached node: what its last record, where that is the one it has, changed against the one before, so that
    `why` answers after a run too."""
    records = session.store.history(session.recipe.path, session.recipe.own_name, name)
    if len(records) < 2 or records[-1].key != key:
        return ()
    before, after = records[-2], records[-1]
    return tuple(differences(before.identity, after.identity, before.inputs, after.inputs))
