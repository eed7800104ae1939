"""What is taken from the remote store, and what may be given to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import Claim, KeyRecord, Remote, Wrong, known_rate, lacking
from bigpipe.sizes import format_transfer

from .session import Session


@dataclass(frozen=True, slots=True)
class Fetch:
    """What is brought from a remote store."""

    bytes: int
    seconds: float | None
    """None: how fast they come is not known."""
    kept: bool
    """The files come too, not the record alone (`cache: false`)."""


def shares(session: Session, node: Node) -> bool:
    """Is what the node gives looked for in the remote store, and offered there? Not what acts outside the store: that
    it was done elsewhere does not help here."""
    return session.remote is not None and node.kind.planning.present is None


def look_there(
    session: Session, node: Node, key: str, inputs: Mapping[str, Sequence[str]]
) -> tuple[KeyRecord, Fetch] | None:
    """Return what the remote store has under this key, and what of it is to come. None where it has nothing, or what
    cannot be what this node gives. inputs: port → digests."""
    remote = session.remote
    if remote is None or not shares(session, node):
        return None
    if (claim := find_claim(remote, node, key)) is None:
        return None
    record = claim.recorded(asked(session, node, key, inputs))
    size = lacking(session.store.layout, record) if node.cache else 0
    if size > session.machine.disk_free:
        remote.refuse(key, f"what {node.name} gave has {format_transfer(size)}, more than is free here")
        return None
    rate = known_rate(session.store.layout, remote)
    return record, Fetch(size, size / rate if rate else None, node.cache)


def find_claim(remote: Remote, node: Node, key: str) -> Claim | None:
    """Return what the remote store has under a key. None where it has nothing, or what this node does not take: what
    its kind cannot give, which is refused in a line, and a record without the files that the node keeps."""
    if (claim := remote.find(key)) is None:
        return None
    try:
        require_possible(node, claim)
    except Wrong as error:
        remote.refuse(key, f"the record of {node.name}: {error}")
        return None
    return None if node.cache and claim.files and not claim.kept else claim


def require_possible(node: Node, claim: Claim) -> None:
    """Raise Wrong where this cannot be what the node's kind gives."""
    if claim.kind != node.kind.kind:
        raise Wrong(f"it is of the kind {claim.kind}")
    if node.kind.output and not claim.artifact_type:
        raise Wrong("it gave nothing")
    if claim.artifact_type and not node.kind.may_give(claim.artifact_type):
        raise Wrong(f"it gave a {claim.artifact_type}")
    try:
        node.kind.metrics.model_validate(claim.metrics)
    except ValidationError:
        raise Wrong("its metrics are not those of its kind") from None


def asked(session: Session, node: Node, key: str, inputs: Mapping[str, Sequence[str]]) -> KeyRecord:
    """Return the record of what a node is about to do, without what came out."""
    identity, pinned = session.identity(node), session.pinned(node)
    return KeyRecord(
        key=key,
        partial=identity.partial,
        identity=identity.as_json,
        inputs={port: list(digests) for port, digests in inputs.items() if digests},
        kind=node.kind.kind,
        node=node.name,
        manifest=str(session.recipe.path),
        pins=dict(pinned.values),
        asked=[session.asked(node)] if pinned.values else [],
        pin_source=pinned.source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
