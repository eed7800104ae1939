"""What comes from a remote store in a run, and what goes there.

What comes is brought under the key's lock, as work is done under it, and is in the store, recorded, before anything
stands on it. What goes there goes in a thread of its own, an artifact after the other, while the run goes on; the run
waits for it at its end. Nothing of this fails a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from bigpipe.errors import BigpipeError, DoesNotFit, Interrupted, StageFailed, Transient, UsageError, first_few
from bigpipe.orchestrator.contract import Event, LogLine, Progress
from bigpipe.orchestrator.planning import Action, Decision, Plan, PlannedNode, Session, find_claim, shares
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import Away, Claim, KeyRecord, Remote, Wrong, note_rate

POLL = 0.2
"""Seconds between two looks whether a run was interrupted."""
EVENT = 0.5
"""Seconds between two words about bytes."""
Report = Callable[[Event], None]


def fetch(
    session: Session, node: Node, decision: Decision, *, report: Report, cancelled: threading.Event
) -> KeyRecord | None:
    """Bring what the remote store has of a node, and record it here. None where it cannot be had, or is not what its
    record says: the remote is not asked for this key again. Raise Interrupted, and BigpipeErrors of the store here."""
    store, remote, record, wanted = session.store, session.remote, decision.record, decision.fetch
    if remote is None or record is None or wanted is None:
        return None

    def waiting(holder: str) -> None:
        report(LogLine(node.name, f"waiting for {holder}, which is making the same artifact"))

    meter = Meter(node.name, size_of(record), "fetching", report)
    try:
        with store.hold(record.key, cancelled=cancelled, waiting=waiting):
            made = store.find(record.key)
            if made is not None and store.intact(made):
                return made
            started = time.monotonic()
            found = store.receive(
                record, remote, kept=wanted.kept, cancelled=cancelled, waiting=waiting, moved=meter.moved
            )
            note_rate(store.layout, remote, wanted.bytes, time.monotonic() - started)
            return found
    except Away as error:
        remote.leave(error)
    except Wrong as error:
        remote.refuse(record.key, f"{node.name}: {error}")
    except DoesNotFit as error:
        remote.refuse(record.key, f"{node.name}: {error.cause}")
    return None


Became = Literal["sent", "there", "other", "fetched", "here", "absent", "refused", "own"]
"""sent, fetched: now it is there, or here. there, here: it was already. other: what somebody else made under this key
was there first. absent: there is nothing to send, or to fetch. refused: it could not be, or may not be. own: it acts
outside the store, so it is done by every run itself."""


def give(session: Session, node: Node, record: KeyRecord, report: Report) -> Became:
    """Offer a node's record, and its files where it keeps them, to the remote store. What is refused is told in a
    line. Raise UsageError for an address that cannot be opened."""
    remote = session.remote
    if remote is None or not shares(session, node):
        return "own"
    try:
        return _offer(session, remote, node, record, report)
    except Interrupted:
        pass  # what is not there then can be pushed
    except Away as error:
        remote.close(error)
    except UsageError:
        raise
    except (Wrong, BigpipeError, OSError) as error:
        remote.tell(f"what {node.name} gave is not shared: {error}")
    return "refused"


def _offer(session: Session, remote: Remote, node: Node, record: KeyRecord, report: Report) -> Became:
    """Raise what the store here and the one there do. What keeps the files replaces what was there without them."""
    store = session.store
    if (found := remote.find(record.key)) is not None and found.digest != record.digest:
        return "other"
    kept = node.cache and store.intact(record)
    if remote.closed or remote.away or (node.cache and not kept):
        return "refused"
    claim = Claim.of(record, kept=kept)
    folder = store.artifact_path(record.digest) if record.digest else Path()
    files = {str(file["sha256"]): folder / name for name, file in record.files.items()} if kept else {}
    meter = Meter("remote store", sum(path.stat().st_size for path in files.values()), f"sending {node.name}", report)
    more = found is not None and kept and not found.kept
    return "sent" if remote.offer(claim, files, store.temporary(), meter.moved, replaces=more) else "there"


@dataclass(slots=True)
class Meter:
    """Tells how many bytes of how many have moved, now and then; nothing of what is done at once."""

    node: str
    total: int
    task: str
    report: Report
    done: int = 0
    told: float = field(default_factory=time.monotonic)

    def moved(self, size: int) -> None:
        self.done += size
        if time.monotonic() - self.told >= EVENT:
            self.told = time.monotonic()
            self.report(Progress(self.node, min(self.done, self.total), self.total, "B", self.task))


class Offering:
    """What the nodes of a run made, on its way to the remote store."""

    def __init__(self, session: Session, remote: Remote, report: Report, cancelled: threading.Event) -> None:
        self._session, self._remote, self._report, self._cancelled = session, remote, report, cancelled
        self._waiting: SimpleQueue[tuple[Node, KeyRecord] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def offer(self, node: Node, record: KeyRecord | None) -> None:
        """Give it there when it has its turn. Nothing where the recipe only reads, or it came from there."""
        if not self._remote.publishes or record is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="to the remote store", daemon=True)
            self._thread.start()
        self._waiting.put((node, record))

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None and not self._cancelled.is_set():
            try:
                give(self._session, *item, self._report)
            except UsageError as error:
                self._remote.close(error)

    def finish(self) -> None:
        """Wait until everything is there, or the run is interrupted: what is not there then can be pushed."""
        self._waiting.put(None)
        while self._thread is not None and self._thread.is_alive() and not self._cancelled.is_set():
            self._thread.join(POLL)


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What `push` or `pull` did about a node."""

    status: Became
    bytes: int = 0
    """Of its files."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What `push` or `pull` did."""

    remote: str
    """The address, without passwords."""
    nodes: Mapping[str, Exchanged]
    errors: tuple[BigpipeError, ...]

    @classmethod
    def of(cls, remote: Remote, nodes: Mapping[str, Exchanged]) -> Exchange:
        return cls(remote.name, nodes, tuple(_errors(remote, nodes)))


def _errors(remote: Remote, nodes: Mapping[str, Exchanged]) -> Iterator[BigpipeError]:
    if why_not := remote.away or remote.closed:
        cure = "try again, or look at the address, the network and the credentials"
        yield Transient(f"the remote store {remote.name} cannot be used: {why_not}", cure)
    elif refused := [name for name, node in nodes.items() if node.status == "refused"]:
        cause = f"not everything could be shared, as was said: {first_few(refused)}"
        yield StageFailed(cause, "run these nodes here and `bigpipe push` what they give")


def require_remote(session: Session) -> Remote:
    """Return the remote store. Raise UsageError where none is named."""
    if session.remote is None and session.shared is not None:
        raise UsageError("a remote store is asked over the network", "leave out --offline")
    if session.remote is None:
        cure = "give --remote URL, set BIGPIPE_REMOTE, or write `remote: URL` in the recipe"
        raise UsageError("no remote store is named", cure)
    return session.remote


def _report(session: Session) -> Report:
    return session.reporter.report if session.reporter else lambda event: None


def push(session: Session, plan: Plan) -> Exchange:
    """Offer to the remote store what the store has of the nodes. plan: made without that."""
    found = {name: _push(session, item, _report(session)) for name, item in plan.nodes.items()}
    return Exchange.of(require_remote(session), found)


def _push(session: Session, item: PlannedNode, report: Report) -> Exchanged:
    record = item.decision.record
    if not shares(session, item.node):
        return Exchanged("own")
    if record is None or item.action is not Action.CACHED:
        return Exchanged("absent")
    return Exchanged(give(session, item.node, record, report), size_of(record))


def pull(session: Session, plan: Plan) -> Exchange:
    """Bring everything that the remote store has of the nodes. Raise UsageError where nothing is at its address."""
    remote = require_remote(session)
    if all(item.action not in (Action.CACHED, Action.REMOTE) for item in plan.nodes.values()) and remote.is_nowhere:
        cure = "look at the address; `bigpipe push`, and every run that names it, make one"
        raise UsageError(f"there is no store at {remote.name}", cure)
    _remember(session, plan)  # from now on what has come of a node is not garbage
    found = {name: _pull(session, item, _report(session)) for name, item in plan.nodes.items()}
    _remember(session, plan)
    return Exchange.of(remote, found)


def _remember(session: Session, plan: Plan) -> None:
    """Keep from `gc` what the nodes have here, or are about to have."""
    recipe = session.recipe
    shared = [item for item in plan.nodes.values() if shares(session, item.node)]
    here = [item for item in shared if item.action in (Action.CACHED, Action.REMOTE)]
    keys = {item.node.name: item.decision.key for item in here if item.decision.key}
    taken = {name for item in plan.nodes.values() for name in item.node.producers}
    lets_go = [name for name, item in plan.nodes.items() if not item.node.cache and name in taken]
    session.store.remember(recipe.path, session.lock, recipe.name, keys, session.variant, recipe.nodes, lets_go)


def _pull(session: Session, item: PlannedNode, report: Report) -> Exchanged:
    record = item.decision.record
    if not shares(session, item.node):
        return Exchanged("own")
    if item.action is Action.CACHED and record is not None:
        return Exchanged("here", size_of(record))
    if item.action is not Action.REMOTE or record is None:
        return Exchanged("absent")
    got = fetch(session, item.node, item.decision, report=report, cancelled=threading.Event())
    return Exchanged("refused" if got is None else "fetched", size_of(record))


def size_of(record: KeyRecord) -> int:
    """Return the bytes of the files that a record names."""
    return sum(int(file["size"]) for file in record.files.values())


def there(session: Session, plan: Plan) -> dict[str, bool | None]:
    """Return of each node whether the remote store has what a run would take; None: not known, or it is not shared.
    Raise UsageError where none is named."""
    remote = require_remote(session)

    def has(item: PlannedNode) -> bool | None:
        key = item.decision.key
        if key is None or not shares(session, item.node):
            return None
        found = item.action is Action.REMOTE or find_claim(remote, item.node, key) is not None
        return None if remote.away and not found else found  # it may have gone away when it was asked

    return {name: has(item) for name, item in plan.nodes.items()}
