"""Consumers that start while their producer still runs, and take its files one by one.

    begin(producer)     a folder for the handover, where some consumer may use it
    look()              whose files can be taken from now on; who then takes them, the schedule says
    answer()            tells producers who takes their files, and whether those may go once taken
    ended(node)         confirms what a follower was made from, or calls it off

A follower works under a provisional key, because its own depends on a digest that nobody knows yet. It publishes once
its producer is recorded, under its true key, if it was given exactly the files that were recorded; else its work is
thrown away and the node takes its turn as if nothing had been.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field

from bigpipe.errors import Interrupted, first_few
from bigpipe.orchestrator.planning import GOOD, SETTLED, NodeState, Session, States, may_follow, passes_on
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord, digest_of, remove_tree
from bigpipe.passing import Handover

POLL = 0.05


@dataclass(slots=True)
class Stream:
    """The files of one running producer, and those that follow it."""

    handover: Handover
    producer: Node
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Ends the followers: the producer failed, or the run was interrupted."""
    published: KeyRecord | None = None
    """Of the producer, as soon as it is there; its gates are not judged yet."""
    settled: threading.Event = field(default_factory=threading.Event)
    record: KeyRecord | None = None
    """Of the producer, once it has one and its gates hold."""
    forgone: bool = False
    """Files were let go before the producer was recorded (`cache: false`)."""
    answered: tuple[list[str], bool] | None = None
    through: set[str] = field(default_factory=set)
    """Followers whose work is done: they need no file again, whether they have said so or not."""

    def confirmed(self) -> KeyRecord:
        """Waits for the producer's record. Raises Interrupted where there will be none."""
        while not self.settled.wait(POLL) and not self.cancelled.is_set():
            pass
        if self.record is None or self.cancelled.is_set():
            raise Interrupted(f"{self.producer.name} did not end well")
        return self.record

    def misled(self, record: KeyRecord) -> str:
        """The first names of the files that did not pass as they were recorded; "" where all did."""
        recorded = {name: (file["sha256"], file["size"]) for name, file in record.files.items()}
        return first_few(sorted({name for name, _ in recorded.items() ^ self.handover.arrived().items()}))


class Streams:
    """All handovers of one run. Used by the thread of the run's loop alone."""

    def __init__(self, session: Session, states: States) -> None:
        self._session, self._states = session, states
        self._open: dict[str, Stream] = {}

    def begin(self, producer: NodeState) -> Stream | None:
        """The stream of a producer that is about to run; None where nobody would follow it."""
        name = producer.name
        self._close(name)
        if not any(may_follow(self._states, consumer, producer) for consumer in producer.consumers):
            return None
        handover = Handover.make(self._session.store.temporary(), lets_go=not producer.node.cache)
        self._open[name] = Stream(handover, producer.node)
        return self._open[name]

    def followed(self, name: str) -> Stream | None:
        return self._open.get(name)

    def look(self) -> None:
        """Their files can be taken from the moment they have announced them."""
        for name, stream in self._open.items():
            self._states[name].passing = stream.handover.announced and not stream.settled.is_set()

    def answer(self) -> None:
        for name, stream in self._open.items():
            if not self._states[name].passing:
                continue
            following = [each for each in self._followers(name) if each not in stream.through]
            forgo = passes_on(self._states, self._states[name], gone=bool(stream.handover.gone()))
            if (following, forgo) != stream.answered:
                stream.answered = following, forgo
                stream.handover.answer(following, forgo=forgo)

    def _followers(self, name: str) -> list[str]:
        return [each.name for each in self._states[name].consumers if each.following == name]

    def ended(self, state: NodeState) -> None:
        """Confirms a producer's followers, or calls them off; forgets streams that nobody uses any more."""
        stream = self._open.get(state.name)
        if stream is not None and not stream.settled.is_set():
            if state.status in GOOD:
                stream.record = state.record
            else:
                stream.cancelled.set()
            stream.settled.set()
        for name in list(self._open):
            if self._states[name].status in SETTLED and not self._followers(name):
                self._close(name)

    def forgone(self, name: str) -> bool:
        """Were files of this node let go while it ran?"""
        stream = self._open.get(name)
        return stream is not None and stream.forgone

    def cancel(self) -> None:
        for stream in self._open.values():
            stream.cancelled.set()

    def _close(self, name: str) -> None:
        if (stream := self._open.pop(name, None)) is not None:
            with suppress(OSError):  # who comes next removes what is left
                remove_tree(stream.handover.folder)


def provisional_key(session: Session, node: Node) -> str:
    """Names the work of a follower: what its key depends on, with what makes its inputs in place of their digests."""
    known, waiting = session.provisional, [node]
    while waiting:
        each = waiting[-1]
        missing = [session.recipe.nodes[name] for name in each.producers if name not in known]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        inputs = {port: [known[name] for name in names] for port, names in each.inputs.items()}
        known[each.name] = digest_of("provisional", [session.identity(each).partial, inputs])
    return known[node.name]
