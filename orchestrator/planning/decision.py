"""Whether a node has to run, and why. The plan asks with what is known now, the runner with what has become known."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from bigpipe.orchestrator.contract.types import Json
from bigpipe.orchestrator.recipe.graph import Node
from bigpipe.orchestrator.store.store import KeyRecord

from .keys import Change, differences
from .session import Session


class Action(StrEnum):
    """run: no record shares this key with input digests left out. maybe: one does, but an input isn't known yet."""

    RUN = "run"
    CACHED = "cached"
    MAYBE = "maybe"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    action: Action
    reason: str
    key: str | None = None
    """None while an input's digest is not known."""
    record: KeyRecord | None = None
    """Where cached; also where only the bytes are gone."""
    changes: tuple[Change, ...] = ()
    bytes_here: bool = True
    """False for a `cache: false` node whose digest is recorded and whose bytes were dropped."""


def input_digests(
    node: Node, digests: Mapping[str, str | None], absent: Collection[str]
) -> dict[str, list[str]] | None:
    """Per port, the digests of what is wired there, skipped producers left out; None while one is not known."""
    found: dict[str, list[str]] = {}
    for port, names in node.inputs.items():
        values = [digests.get(name) for name in names if name not in absent]
        if any(value is None for value in values):
            return None
        if values:
            found[port] = [value for value in values if value is not None]
    return found


def decide(
    session: Session, node: Node, digests: Mapping[str, str | None], absent: Collection[str] = frozenset()
) -> Decision:
    """digests: node name → digest of its artifact, None while unknown. absent: names of skipped producers."""
    inputs = input_digests(node, digests, absent)
    identity = session.identity(node)
    if inputs is None:
        if node.name in session.forced:
            return Decision(action=Action.RUN, reason="forced")
        known = session.store.with_partial(identity.partial)
        changes = changes_since(session, node, None)
        if known:
            waiting = [n for names in node.inputs.values() for n in names if n not in absent and digests.get(n) is None]
            names = list(dict.fromkeys(waiting))
            reason = f"known once {' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
        else:
            reason = describe(session, node, changes) or "an input changes"
        return Decision(action=Action.MAYBE if known else Action.RUN, reason=reason, changes=changes)
    key = identity.key(inputs)
    record = session.store.find(key)
    if node.name in session.forced:
        return Decision(action=Action.RUN, reason="forced", key=key)
    if record is not None:
        return _known(session, node, key, record)
    changes = changes_since(session, node, inputs)
    return Decision(action=Action.RUN, reason=describe(session, node, changes), key=key, changes=changes)


def _known(session: Session, node: Node, key: str, record: KeyRecord) -> Decision:
    if record.digest is not None and not session.store.intact(record):
        if not node.cache:
            reason = "its bytes were dropped (cache: false)"
            return Decision(action=Action.CACHED, reason=reason, key=key, record=record, bytes_here=False)
        return Decision(action=Action.RUN, reason="its bytes are gone from the store, or damaged", key=key)
    if node.kind.planning.present is not None and record.digest is not None:
        here = node.kind.planning.present(
            node.params, session.store.artifact_path(record.digest), session.check_context(node)
        )
        if not here:
            return Decision(action=Action.RUN, reason="what it wrote outside the store is gone or changed", key=key)
    return Decision(action=Action.CACHED, reason="", key=key, record=record)


def changes_since(session: Session, node: Node, inputs: Mapping[str, list[str]] | None) -> tuple[Change, ...]:
    """What differs from the node's last record under this manifest; inputs None: not known yet, not compared."""
    last = session.last(node.name)
    if last is None:
        return ()
    known = inputs if inputs is not None else dict.fromkeys(last.inputs)
    return tuple(differences(last.identity, session.identity(node), last.inputs, known))


def describe(session: Session, node: Node, changes: tuple[Change, ...]) -> str:
    """`params.scheme int8 → nf4 (opt.yaml:21:14)`, several joined by `; `."""
    if not changes:
        last = session.last(node.name)
        return "first run" if last is None else "no record of this key"
    return "; ".join(change_text(node, change) for change in changes)


def change_text(node: Node, change: Change) -> str:
    place = node.places.get(change.path)
    return str(change) + (f" ({place.short})" if place else "")


def change_json(change: Change, node: Node) -> dict[str, Json]:
    place = node.places.get(change.path)
    return {"path": change.path, "old": change.old, "new": change.new, "place": str(place) if place else None}
