"""Whether a node has to run, and why. The plan asks with what is known now, the runner with what has become known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord

from .keys import Change, differences
from .session import Session


class Action(StrEnum):
    """run: no record shares this key with input digests left out. maybe: one does, but an input isn't known yet."""

    RUN = "run"
    CACHED = "cached"
    MAYBE = "maybe"
    SKIPPED = "skipped"

    @property
    def works(self) -> bool:
        """Will, or may, its work be done?"""
        return self in (Action.RUN, Action.MAYBE)


Inputs: TypeAlias = Mapping[str, Sequence[str]]
"""Per port, the digests of what is wired there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    action: Action
    reason: str
    inputs: Inputs | None = None
    """What it was decided on; None while an input's digest is not known."""
    key: str | None = None
    record: KeyRecord | None = None
    """Of this key. Where the node has to run all the same, this record was refused."""
    changes: tuple[Change, ...] = ()
    bytes_here: bool = True
    """False for a `cache: false` node whose digest is recorded and whose bytes were dropped."""


def decide(session: Session, node: Node, inputs: Inputs | None, awaited: Sequence[str] = ()) -> Decision:
    """Whether the node has to run on these inputs. None: the digests of `awaited` producers are not known."""
    identity = session.identity(node)
    if inputs is None:
        if node.name in session.forced:
            return Decision(action=Action.RUN, reason="forced")
        changes = changes_since(session, node, None)
        if session.store.with_partial(identity.partial):
            reason = f"known once {' and '.join(awaited)} {'is' if len(awaited) == 1 else 'are'}"
            return Decision(action=Action.MAYBE, reason=reason, changes=changes)
        return Decision(
            action=Action.RUN, reason=describe(session, node, changes) or "an input changes", changes=changes
        )
    key = identity.key(inputs)
    record = session.store.find(key)
    if record is not None:
        action, reason, here = _judged(session, node, record)
        return Decision(action=action, reason=reason, inputs=inputs, key=key, record=record, bytes_here=here)
    changes = changes_since(session, node, inputs)
    reason = "forced" if node.name in session.forced else describe(session, node, changes)
    return Decision(action=Action.RUN, reason=reason, inputs=inputs, key=key, changes=changes)


def _judged(session: Session, node: Node, record: KeyRecord) -> tuple[Action, str, bool]:
    """What to do about a record of this very key, why, and whether its bytes are there."""
    if node.name in session.forced:
        return Action.RUN, "forced", True
    if record.digest is None:
        return Action.CACHED, "", True
    if not session.store.intact(record):
        if not node.cache:
            return Action.CACHED, "its bytes were dropped (cache: false)", False
        return Action.RUN, "its bytes are gone from the store, or damaged", False
    if node.kind.planning.present is not None:
        artifact = session.store.artifact_path(record.digest)
        if not node.kind.planning.present(node.params, artifact, session.check_context(node)):
            return Action.RUN, "what it wrote outside the store is gone or changed", True
    return Action.CACHED, "", True


def changes_since(session: Session, node: Node, inputs: Inputs | None) -> tuple[Change, ...]:
    """What differs from the node's last record under this manifest; inputs None: not known yet, not compared."""
    last = session.last(node.name)
    if last is None:
        return ()
    known = inputs if inputs is not None else dict.fromkeys(last.inputs)
    return tuple(differences(last.identity, session.identity(node).as_json, last.inputs, known))


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
