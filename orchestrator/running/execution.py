"""One node's work: lock its key, run it with retries, publish what it made.

A follower works on files of a producer that still runs: under a provisional key, until that one is recorded. Whoever
works under the true key of a node that may follow holds the provisional one too, so that no run does what another does.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from bigpipe.errors import Interrupted, StageFailed, Transient
from bigpipe.orchestrator.contract import Event, Lineage, LogLine, NodeRetried
from bigpipe.orchestrator.launch import AttemptFolder, Job, Needs, Outcome, WarmWorker
from bigpipe.orchestrator.planning import Session
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord, Work
from bigpipe.versions import package_version

from .staying import files_stay
from .streaming import Stream, provisional_key

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between attempts: doubled each time, with up to a quarter of jitter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """All that is needed to run one node once its inputs are known."""

    session: Session
    node: Node
    key: str
    """Provisional for a follower."""
    inputs: Mapping[str, tuple[str, ...]]
    """Port → digests."""
    lineage: tuple[Lineage, ...]
    refused: KeyRecord | None
    """The record of this key that was known when it was decided that the node must run."""
    run: str
    folder: Path
    """Logs and job files of this node in the run's record."""
    report: Callable[[Event], None]
    cancelled: threading.Event
    stream: Stream | None = None
    """Where its files go to, one by one, if somebody may follow."""
    needs: Needs
    """What it takes of a cluster's machines."""
    bytes_may_go: bool = False
    """Nobody asks for more than its record: it is `cache: false`, and who takes its bytes may have them already."""
    warm: WarmWorker | None = None
    """Waits for the first try."""
    follows: Stream | None = None
    """Where the files of one input come from, one by one, as they are made."""

    def waiting(self, holder: str) -> None:
        self.report(_waits(self.node.name, holder))

    def say(self, text: str) -> None:
        self.report(LogLine(self.node.name, text))


def _waits(node: str, holder: str) -> LogLine:
    return LogLine(node, f"waiting for {holder}, which is making the same artifact")


def outwait(
    session: Session, node: str, key: str, *, report: Callable[[Event], None], cancelled: threading.Event
) -> None:
    """Return once nobody holds the key."""
    with session.store.hold(key, cancelled=cancelled, waiting=lambda holder: report(_waits(node, holder))):
        pass


def execute(attempt: Attempt) -> KeyRecord | None:
    """Do the work, unless another process holding the key's lock has done it meanwhile.
    None: the node followed a producer that failed or gave other files than it announced; nothing came of it.
    Raises the stage's own BigpipeError, StageFailed for crashes, Interrupted when cancelled."""
    if attempt.follows is not None:
        return _follow(attempt, attempt.follows)
    with _work(attempt) as work:
        if (made := _made_meanwhile(attempt)) is not None:
            work.done()
            return made
        outcome = _with_retries(attempt, work)
        record = _publish(attempt, outcome, work)
        work.done()
        return record


def execute_once(attempt: Attempt) -> KeyRecord | None:
    """`execute`, after which the worker that waited for it is gone."""
    try:
        return execute(attempt)
    finally:
        if attempt.warm is not None:
            attempt.warm.end()  # unless it was taken


@contextmanager
def _work(attempt: Attempt) -> Iterator[Work]:
    """Hold what only one may do at a time: always the provisional key first, then the true one."""
    store, provisional = attempt.session.store, None
    with ExitStack() as held:
        if attempt.node.kind.passing.follows:
            provisional = provisional_key(attempt.session, attempt.node)
            held.enter_context(store.hold(provisional, cancelled=attempt.cancelled, waiting=attempt.waiting))
        work = held.enter_context(store.lock(attempt.key, cancelled=attempt.cancelled, waiting=attempt.waiting))
        if provisional is not None:
            store.resume_work(provisional, work)
        if (resumed := attempt.node.kind.planning.resumed) is not None:
            alike = attempt.session.identity(attempt.node).without(resumed(attempt.node.params))
            store.resume_alike(alike.key(attempt.inputs), attempt.key, work)
        yield work


def _made_meanwhile(attempt: Attempt) -> KeyRecord | None:
    """What another process has recorded since it was decided that the node must run, with its bytes, unless these were
    let go as they were made and may be. That the pins of a record answer one question more is noted in it by those who
    only found it."""
    store = attempt.session.store
    made, refused = store.find(attempt.key), attempt.refused
    if made is None or (refused is not None and _unasked(made) == _unasked(refused)):
        return None
    gone = attempt.bytes_may_go and made.digest is not None and store.let_go(made.digest)
    return made if gone or store.intact(made) else None


def _unasked(record: KeyRecord) -> KeyRecord:
    return record.model_copy(update={"asked": []})


def _follow(attempt: Attempt, stream: Stream) -> KeyRecord | None:
    """The work first, its true key and the publishing once the producer is recorded."""
    store = attempt.session.store
    try:
        with store.lock(attempt.key, cancelled=attempt.cancelled, waiting=attempt.waiting) as work:
            # While this run waited for the lock, another may have done the work under the true key.
            if stream.published is not None and (made := _made_already(_true(attempt, stream.published))) is not None:
                stream.confirmed()
                work.done()
                return made
            outcome = _with_retries(attempt, work)
            stream.through.add(attempt.node.name)
            source = stream.confirmed()
            if source.digest is None:
                return None
            if misled := stream.misled(source):
                attempt.say(f"starts anew: {stream.producer.name} gave other files than it passed on ({misled})")
                work.done()
                return None
            return _settle(_true(attempt, source), outcome, work)
    except Interrupted:
        if stream.settled.is_set() and stream.record is None:
            return None
        raise


def _true(attempt: Attempt, source: KeyRecord) -> Attempt:
    """A follower's attempt under its true key, now that its producer has a record."""
    inputs = {**attempt.inputs, attempt.node.kind.passing.follows: (source.digest or "",)}
    return replace(attempt, key=attempt.session.identity(attempt.node).key(inputs), inputs=inputs)


def _made_already(attempt: Attempt) -> KeyRecord | None:
    return None if attempt.node.name in attempt.session.forced else _made_meanwhile(attempt)


def _settle(attempt: Attempt, outcome: Outcome, work: Work) -> KeyRecord:
    """Publish a follower's work under its true key, unless that is known already."""
    store = attempt.session.store
    with store.lock(attempt.key, cancelled=attempt.cancelled, waiting=attempt.waiting) as final:
        record = _made_already(attempt)
        if record is not None:
            _lead(attempt.stream, attempt.session, record)
        else:
            # Not moved to the folder of its true key first: those who follow this one read it where it is.
            record = _publish(attempt, outcome, work)
        final.done()
    work.done()
    return record


def _publish(attempt: Attempt, outcome: Outcome, work: Work) -> KeyRecord:
    store, stream, record = attempt.session.store, attempt.stream, _record(attempt, outcome)
    if stream is None or not stream.handover.gone():
        record = store.publish(record, work.out, outcome.files)
        _lead(stream, attempt.session, record)
        return record
    # Some files were taken by all who needed them and are gone; the others wait for that in the handover's folder.
    files = stream.handover.arrived()
    if not outcome.files.items() <= files.items():
        raise StageFailed(f"{attempt.node.name} reported other files than it passed on", "this is a fault of its kind")
    for name in stream.handover.contents.keys() - stream.handover.gone():
        stream.handover.keep(name, work.out / name)
    stream.forgone = True
    stream.published = store.publish_forgone(record, files)
    return stream.published


def _lead(stream: Stream | None, session: Session, record: KeyRecord) -> None:
    """Followers find from now on in the artifact what was in the work folder."""
    if stream is not None:
        stream.published = record
    if stream is not None and stream.handover.announced and record.digest is not None:
        for name in stream.handover.contents.keys() & record.files.keys():
            stream.handover.lead(name, session.store.artifact_path(record.digest) / name)


def _with_retries(attempt: Attempt, work: Work) -> Outcome:
    wait, number = FIRST_WAIT, 1
    while True:
        with files_stay(attempt.session, attempt.node, work.done) as hear:
            outcome = _tried(attempt, _job(attempt, work, number, hear), wait, number)
        if outcome is not None:
            return outcome
        wait, number = min(wait * 2, LONGEST_WAIT), number + 1


def _tried(attempt: Attempt, job: Job, wait: float, number: int) -> Outcome | None:
    """What one attempt gave; None where another one is due, `wait` seconds or a little more after it."""
    try:
        return attempt.session.executor(attempt.node.kind).start(job)
    except Transient as error:
        if number > attempt.node.retries:
            raise
        pause = wait * random.uniform(1.0, 1.25)  # noqa: S311 (jitter, not a secret)
        attempt.report(NodeRetried(attempt.node.name, number + 1, error.cause, pause))
        if attempt.cancelled.wait(pause):
            raise Interrupted("interrupted while waiting to try again") from error
    return None


def _job(attempt: Attempt, work: Work, number: int, hear: Callable[[Event], None]) -> Job:
    def report(event: Event) -> None:
        hear(event)
        attempt.report(event)

    session, node, kind = attempt.session, attempt.node, attempt.node.kind
    inputs = {
        port: tuple(session.store.artifact_path(digest) for digest in digests)
        for port, digests in attempt.inputs.items()
        if digests
    }
    arriving = {}
    if attempt.follows is not None:
        inputs[kind.passing.follows] = (attempt.follows.handover.files,)
        arriving[kind.passing.follows] = attempt.follows.handover.folder
    return Job(
        surroundings=session.surroundings(node),
        node=node.name,
        inputs=inputs,
        out=work.out,
        scratch=work.scratch,
        parts=session.store.parts,
        lineage=attempt.lineage,
        recipe=session.recipe.text,
        recipe_name=session.recipe.name,
        recipe_params=session.recipe.params,
        git=session.checkout.state,
        pins=session.pinned(node).values,
        passes_on=attempt.stream.handover.folder if attempt.stream else None,
        arriving=arriving,
        stage=kind,
        module=node.location,
        params=node.params,
        folder=AttemptFolder(attempt.folder / str(number)),
        secrets=frozenset(session.secrets(node)),
        parent_environment=session.environment,
        timeout=node.timeout,
        cancelled=attempt.cancelled,
        report=report,
        needs=attempt.needs,
        meeting=session.meeting,
        warm=attempt.warm if number == 1 else None,
    )


def _record(attempt: Attempt, outcome: Outcome) -> KeyRecord:
    session, node = attempt.session, attempt.node
    identity, pinned = session.identity(node), session.pinned(node)
    packages = ("bigpipe-ml", *node.kind.packages)
    return KeyRecord(
        key=attempt.key,
        partial=identity.partial,
        identity=identity.as_json,
        inputs={port: list(digests) for port, digests in attempt.inputs.items() if digests},
        kind=node.kind.kind,
        node=node.name,
        manifest=str(session.recipe.path),
        artifact_type=outcome.type or node.kind.output or "",
        metrics=outcome.metrics,
        pins=dict(pinned.values),
        asked=[session.asked(node)] if pinned.values else [],
        pin_source=pinned.source,
        seconds=outcome.seconds,
        peak_rss=outcome.peak_rss,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=attempt.run,
        tools={package: version for package in packages if (version := package_version(package))},
    )
