"""Consumers that start while their producer still runs, and take its files one by one.

    begin(producer)     a folder for the handover, where some consumer may use it
    ready()             consumers of what has been announced, that may start now
    answer()            tells producers who takes their files, and whether those may go once taken
    ended(node)         confirms what a follower was made from, or calls it off

A follower works under a provisional key, because its own depends on a digest that nobody knows yet. It publishes once
its producer is recorded, under its true key, if it was given exactly the files that were recorded; else its work is
thrown away and the node takes its turn as if nothing had been.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bigpipe.errors import Interrupted
from bigpipe.orchestrator.contract.passing import CONSUMERS, LETS_GO, Handover, write
from bigpipe.orchestrator.contract.types import Status
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.planning.decision import input_digests
from bigpipe.orchestrator.planning.session import Session
from bigpipe.orchestrator.recipe.graph import Node
from bigpipe.orchestrator.store.artifacts import remove_tree
from bigpipe.orchestrator.store.hashing import digest_of
from bigpipe.orchestrator.store.store import KeyRecord

from .result import GOOD, SETTLED, NodeState

POLL = 0.05


@dataclass(slots=True)
class Stream:
    """The files of one running producer, and those that follow it."""

    handover: Handover
    producer: Node
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Ends the followers: the producer failed, or the run was interrupted."""
    settled: threading.Event = field(default_factory=threading.Event)
    record: KeyRecord | None = None
    """Of the producer, once it has one and its gates hold."""
    forgone: bool = False
    """Files were let go before the producer was recorded (`cache: false`)."""
    told: Mapping[str, object] | None = None

    def confirmed(self) -> KeyRecord:
        """Waits for the producer's record. Raises Interrupted where there will be none."""
        while not self.settled.wait(POLL):
            if self.cancelled.is_set():
                break
        if self.record is None or self.cancelled.is_set():
            raise Interrupted(f"{self.producer.name} did not end well")
        return self.record

    def gave(self, record: KeyRecord) -> bool:
        """Is what has passed exactly what was recorded?"""
        return self.handover.arrived() == {
            name: (file["sha256"], file["size"]) for name, file in record.files.items()
        }  # fmt: skip


class Streams:
    """All handovers of one run. Used by the thread of the run's loop alone."""

    def __init__(self, session: Session, states: Mapping[str, NodeState]) -> None:
        self._session = session
        self._states = states
        self._open: dict[str, Stream] = {}

    def begin(self, producer: NodeState) -> Stream | None:
        """The stream of a producer that is about to run; None where nobody would follow it."""
        name = producer.node.name
        self._close(name)
        if not producer.node.kind.passing.streams or not any(
            self._may_follow(node, name) for node in self._consumers(name)
        ):
            return None
        folder = self._session.store.temporary()
        handover = Handover(folder)
        handover.files.mkdir(parents=True)
        if not producer.node.cache:
            (folder / LETS_GO).touch()
        self._open[name] = Stream(handover, producer.node)
        return self._open[name]

    def _consumers(self, name: str) -> list[Node]:
        return [node for node in self._session.consumers(name) if self._states[node.name].status is not Status.SKIPPED]

    def _may_follow(self, node: Node, producer: str) -> bool:
        """Does everything else it depends on stand, and could it need to run?"""
        state, kind = self._states[node.name], node.kind
        if state.status is not Status.PENDING or state.key is not None or node.when is not None:
            return False
        if node.timeout is not None:  # it is meant for the work, not for waiting
            return False
        if not executor(kind.runs_in).waits or tuple(node.inputs.get(kind.passing.follows, ())) != (producer,):
            return False
        others = [self._states[name] for name in node.predecessors if name != producer]
        ready = all(other.status in GOOD and other.bytes_here for other in others)
        return ready and not self._probably_cached(node, producer)

    def _probably_cached(self, node: Node, producer: str) -> bool:
        """Would it be a hit, should the producer give again what it gave before?"""
        key = self._states[producer].key
        before = self._session.store.find(key) if key and not self._states[producer].following else None
        if before is None or node.name in self._session.forced:
            return False
        digests = {name: state.digest for name, state in self._states.items()} | {producer: before.digest}
        inputs = input_digests(node, digests, frozenset())
        return inputs is not None and self._session.store.find(self._session.identity(node).key(inputs)) is not None

    def ready(self) -> Iterator[tuple[NodeState, Stream]]:
        for name, stream in list(self._open.items()):
            if not stream.settled.is_set() and stream.handover.announced:
                for node in self._consumers(name):
                    if self._may_follow(node, name):
                        yield self._states[node.name], stream

    def answer(self) -> None:
        for name, stream in self._open.items():
            if stream.settled.is_set() or not stream.handover.announced:
                continue
            consumers = [self._states[node.name] for node in self._consumers(name)]
            following = [state.node.name.replace("/", "\\") for state in consumers if state.following]
            # Whoever failed will want them again, unless some are gone anyhow.
            gone = bool(stream.handover.gone())
            forgo = not stream.producer.cache and all(
                state.following or (gone and state.status is Status.FAILED) for state in consumers
            )
            told = {"consumers": following, "forgo": forgo}
            if told != stream.told:
                stream.told = told
                write(stream.handover.folder / CONSUMERS, told)

    def ended(self, state: NodeState) -> None:
        """Confirms a producer's followers, or calls them off; forgets streams that nobody uses any more."""
        stream = self._open.get(state.node.name)
        if stream is not None and not stream.settled.is_set():
            if state.status in GOOD:
                stream.record = state.record
            else:
                stream.cancelled.set()
            stream.settled.set()
        for name in list(self._open):
            if self._states[name].status in SETTLED and not any(
                self._states[node.name].following for node in self._consumers(name)
            ):
                self._close(name)

    def forgone(self, state: NodeState) -> bool:
        """Were files of this node let go while it ran?"""
        stream = self._open.get(state.node.name)
        return stream is not None and stream.forgone

    def cancel(self) -> None:
        for stream in self._open.values():
            stream.cancelled.set()

    def _close(self, name: str) -> None:
        if (stream := self._open.pop(name, None)) is not None:
            remove_tree(stream.handover.folder)


def provisional_key(session: Session, node: Node, known: dict[str, str] | None = None) -> str:
    """Names the work of a follower: what its key depends on, with what makes its inputs in place of their digests."""
    known = {} if known is None else known
    for name in (name for names in node.inputs.values() for name in names):
        if name not in known:
            known[name] = provisional_key(session, session.recipe.nodes[name], known)
    inputs = {port: [known[name] for name in names] for port, names in node.inputs.items()}
    return digest_of("provisional", [session.identity(node).partial, inputs])
