"""One node's work: lock its key, run it with retries, publish what it made."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bigpipe.errors import Interrupted, Transient

from .events import Event, LogLine, NodeRetried
from .launch.launcher import Job, Outcome, launch
from .recipe.graph import Node
from .registry import locate
from .session import Session
from .store.store import KeyRecord, Work
from .types import Lineage

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between attempts: doubled each time, with up to a quarter of jitter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """All that is needed to run one node once its inputs are known."""

    session: Session
    node: Node
    key: str
    inputs: Mapping[str, tuple[str, ...]]
    """Port → digests."""
    lineage: tuple[Lineage, ...]
    forced: bool
    run: str
    folder: Path
    """Logs and job files of this node in the run's record."""
    report: Callable[[Event], None]
    cancelled: threading.Event


def execute(attempt: Attempt) -> KeyRecord:
    """Do the work, unless another process holding the key's lock has done it meanwhile.

    Raises the stage's own BigpipeError, StageFailed for crashes, Interrupted when cancelled.
    """
    session, node = attempt.session, attempt.node

    def waiting(holder: str) -> None:
        attempt.report(LogLine(node.name, f"waiting for {holder}, which is making the same artifact"))

    before = session.store.find(attempt.key)
    with session.store.lock(attempt.key, cancelled=attempt.cancelled, waiting=waiting) as work:
        made = session.store.find(attempt.key)
        fresh = made is not None and (before is None or made.run != before.run or not attempt.forced)
        if made is not None and fresh and session.store.intact(made):
            return made
        outcome = _with_retries(attempt, work)
        record = session.store.publish(_record(attempt, outcome), work.out, outcome.files)
        work.done()
        return record


def _with_retries(attempt: Attempt, work: Work) -> Outcome:
    wait, number = FIRST_WAIT, 1
    while True:
        try:
            return launch(
                _job(attempt, work, number),
                attempt.node.kind,
                timeout=attempt.node.timeout,
                cancelled=attempt.cancelled,
                report=attempt.report,
                secrets=attempt.session.secret_values(attempt.node),
            )
        except Transient as error:
            if number > attempt.node.retries:
                raise
            pause = wait * random.uniform(1.0, 1.25)  # noqa: S311 (jitter, not a secret)
            attempt.report(NodeRetried(attempt.node.name, number + 1, error.cause, pause))
            if attempt.cancelled.wait(pause):
                raise Interrupted("interrupted while waiting to try again") from error
            wait, number = min(wait * 2, LONGEST_WAIT), number + 1


def _job(attempt: Attempt, work: Work, number: int) -> Job:
    session, node = attempt.session, attempt.node
    return Job(
        node=node.name,
        kind=node.kind.kind,
        module=locate(node.kind.kind),
        # As they were written: validators may ask which fields were given, and by what name.
        params=node.params.model_dump(mode="json", exclude_unset=True, by_alias=True),
        inputs={
            port: tuple(str(session.store.artifact_path(digest)) for digest in digests)
            for port, digests in attempt.inputs.items()
            if digests
        },
        out=work.out,
        scratch=work.scratch,
        parts=session.store.parts,
        memo=session.store.memo,
        base=session.base,
        launch=node.launch,
        trust=session.recipe.trust,
        machine=session.machine,
        lineage=attempt.lineage,
        recipe=session.recipe.text,
        recipe_name=session.recipe.name,
        pins=session.pinned(node).values,
        offline=session.offline,
        environment=node.env,
        attempt_dir=attempt.folder / str(number),
    )


def _record(attempt: Attempt, outcome: Outcome) -> KeyRecord:
    session, node = attempt.session, attempt.node
    identity = session.identity(node)
    pinned = session.pinned(node)
    return KeyRecord(
        key=attempt.key,
        partial=identity.partial,
        identity=identity.as_json,
        inputs={port: list(digests) for port, digests in attempt.inputs.items() if digests},
        kind=node.kind.kind,
        node=node.name,
        manifest=str(session.recipe.path),
        digest=None,
        artifact_type=node.kind.output or "",
        metrics=outcome.metrics,
        files={},
        pins=dict(pinned.values),
        pin_source=pinned.source,
        seconds=outcome.seconds,
        peak_rss=outcome.peak_rss,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=attempt.run,
        tools=tool_versions(node),
    )


def tool_versions(node: Node) -> dict[str, str]:
    """The versions of bigpipe and of what the kind's bytes depend on, for the record."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("bigpipe-ml", *node.kind.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
