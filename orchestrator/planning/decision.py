"""Whether a node has to run, and why. The plan asks with what is known now, the runner with what has become known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from bigpipe.errors import GateFailed
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.recipe import Comparison, Condition, Node
from bigpipe.orchestrator.store import KeyRecord

from .keys import Difference, Identity, differences
from .session import Session

if TYPE_CHECKING:
    from .sharing import Fetch


class Action(StrEnum):
    """run: no record shares this key with input digests left out. maybe: one does, but an input isn't known yet.
    remote: the remote store has it, and it is brought from there."""

    RUN = "run"
    CACHED = "cached"
    REMOTE = "remote"
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
    """What to do about a node on these inputs, and why."""

    action: Action
    reason: str
    inputs: Inputs | None = None
    """What it was decided on; None while an input's digest is not known."""
    partial: str = ""
    """What the key depends on besides the inputs; "" where that is not known."""
    key: str | None = None
    record: KeyRecord | None = None
    """Of this key. Where the node has to run all the same, this record was refused."""
    changes: tuple[Difference, ...] = ()
    """Against the last record of the node."""
    bytes_here: bool = True
    """False for a `cache: false` node whose digest is recorded and whose bytes were dropped."""
    fetch: Fetch | None = None
    """What comes from the remote store, where it is taken from there; the record says what that is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """A gate, and what it came to."""

    gate: Condition
    verdict: Comparison | None
    """None: not known before the node has run."""
    cure: str = ""
    """A change of the recipe's parameters under which it holds, where one was tried."""

    @property
    def failed(self) -> bool:
        return self.verdict is not None and not self.verdict.passed

    def as_json(self) -> dict[str, Json]:
        """All but `text` is None where it is not decided; `measured` is the value as people read it."""
        found = self.verdict
        return {
            "text": self.gate.text,
            "measured": found and found.left,
            "value": found and found.value,
            "passed": found and found.passed,
        }

    def error(self, node: Node) -> GateFailed:
        measured = self.verdict.left if self.verdict else "unknown"
        error = GateFailed(
            f"{node.name}: gate {self.gate.text}: {measured}",
            self.cure or "change the recipe so that the gate holds, or the gate",
            place=self.gate.place,
        )
        error.node = node.name
        return error


def decide(session: Session, node: Node, inputs: Inputs | None, awaited: Sequence[str] = ()) -> Decision:
    """Whether the node has to run on these inputs. None: the digests of `awaited` producers are not known."""
    identity = session.identity(node)
    return replace(_decide(session, node, identity, inputs, awaited), partial=identity.partial)


def _decide(
    session: Session, node: Node, identity: Identity, inputs: Inputs | None, awaited: Sequence[str]
) -> Decision:
    forced = node.name in session.forced
    key = None if inputs is None else identity.key(inputs)
    known = None
    if key is not None and (record := session.store.find(key)) is not None:
        action, reason, here = _judged(session, node, record)
        known = Decision(action=action, reason=reason, inputs=inputs, key=key, record=record, bytes_here=here)
    if session.remote is not None and not forced and (known is None or known.action.works):
        known = _remote(session, node, inputs, key) or known
    if known is not None:
        return known
    last = session.last(node.name)
    changes = _changes_since(last, identity, inputs) if last else ()
    if inputs is None and not forced and session.store.with_partial(identity.partial):
        reason = f"known once {' and '.join(awaited)} {'is' if len(awaited) == 1 else 'are'}"
        return Decision(action=Action.MAYBE, reason=reason, changes=changes)
    text = "; ".join(difference_text(node, each) for each in changes) or "no record of this key"
    reason = "forced" if forced else text if last else "first run"
    return Decision(action=Action.RUN, reason=reason, inputs=inputs, key=key, changes=changes)


def _remote(session: Session, node: Node, inputs: Inputs | None, key: str | None) -> Decision | None:
    from .sharing import look_there  # of what has a remote store

    found = look_there(session, node, key, inputs) if key is not None and inputs is not None else None
    if found is None:
        return None
    record, fetch = found
    return Decision(action=Action.REMOTE, reason="", inputs=inputs, key=key, record=record, fetch=fetch)


def _judged(session: Session, node: Node, record: KeyRecord) -> tuple[Action, str, bool]:
    """What to do about a record of this very key, why, and whether its bytes are there."""
    if node.name in session.forced:
        return Action.RUN, "forced", True
    if record.digest is None:
        return Action.CACHED, "", True
    if not session.store.intact(record):
        dropped = "its bytes were dropped (cache: false)"
        if not node.cache:
            return Action.CACHED, dropped, False
        gone = f"{dropped}, and are to be kept now"
        gone = gone if session.store.let_go(record.digest) else "its bytes are gone from the store, or damaged"
        return Action.RUN, gone, False
    present = node.kind.planning.present
    if present is None:
        return Action.CACHED, "", True
    if session.ask(node, present, session.store.artifact_path(record.digest), session.check_context(node)):
        return Action.CACHED, "", True
    return Action.RUN, "what it wrote outside the store is gone or changed", True


def _changes_since(last: KeyRecord, identity: Identity, inputs: Inputs | None) -> tuple[Difference, ...]:
    """What differs from the node's last record under this manifest; inputs None: not known yet, not compared."""
    known = inputs if inputs is not None else dict.fromkeys(last.inputs)
    return tuple(differences(last.identity, identity.as_json, last.inputs, known))


def difference_text(node: Node, difference: Difference) -> str:
    """Return `params.scheme int8 → nf4 (opt.yaml:21:14)`."""
    place = node.places.get(difference.path)
    return str(difference) + (f" ({place.short})" if place else "")


def difference_json(difference: Difference, node: Node) -> dict[str, Json]:
    place = node.places.get(difference.path)
    return {**asdict(difference), "place": str(place) if place else None}
