"""A run over several machines: those of a cluster, or those that a scheduler started; which of these drives, and what
the others do meanwhile.

`bigpipe run` is started on each of them, over one store. Machine 0 runs the recipe as ever; the others start ranks of
the nodes whose `launch.num_machines` is more than 1, when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.redaction import conceal_environment

from .contract import LogLine
from .launch import Meeting, attend as attend_meeting, meeting_place, open_cluster, start_here
from .planning import Session


def _shared(session: Session) -> tuple[int, float]:
    """How many machines the nodes are to run on that run on several, and the seconds in which they must come; 1 where
    there are none. Raise UsageError where nodes differ, or the scheduler started another number."""
    several = [node for node in session.nodes if node.launch.num_machines > 1 or node.launch.config_file]
    launches = [session.surroundings(node).launch for node in several]
    counts = sorted({launch.num_machines for launch in launches if launch.num_machines > 1})
    if len(counts) > 1 and session.place is not None:
        cause = f"nodes are to run on {' and on '.join(map(str, counts))} machines, which were started together"
        raise UsageError(cause, "write the same launch.num_machines everywhere, or 1")
    return (counts[0] if counts else 1), max((launch.join_seconds for launch in launches), default=0)


def meeting_place_of(session: Session) -> Path:
    """Return where the machines of a session meet. It has a place among several."""
    assert session.place is not None  # noqa: S101  there are several machines
    run = [session.recipe.path.name, sorted(session.selected), dict(session.arguments)]
    return meeting_place(session.store.layout.meetings, session.place, run)


def _say(session: Session, line: str) -> None:
    if session.reporter is not None:
        session.reporter.report(LogLine(session.recipe.name, line))


@contextmanager
def several(session: Session, executor: str | None) -> Iterator[None]:
    """While it is open, the machines of a cluster run the nodes, if one is named; else those that a scheduler started
    wait to be called, if there are any. Raise what both of them do."""
    with on_cluster(session, executor) if executor else driving(session):
        yield


@contextmanager
def on_cluster(session: Session, executor: str) -> Iterator[None]:
    """While it is open, nodes run on a cluster, as `--executor` names it. Files do not pass from node to node there as
    they are made: both would have to be at work. Raise what connecting does."""
    session.cluster = open_cluster(executor, session.store.root)
    session.side_by_side = False
    with closing(session.cluster):
        yield


@contextmanager
def driving(session: Session) -> Iterator[None]:
    """While it is open the other machines wait to be called, if there are any. Raise UsageError on one of those."""
    count, limit = _shared(session)
    if count == 1 or session.place is None:
        yield
        return
    if session.place.rank != 0:
        cause = f"a run is driven from machine 0, and this is {session.place.name(session.place.rank)}"
        raise UsageError(cause, "call `bigpipe run` here, which attends")
    session.meeting = Meeting(meeting_place_of(session), session.place, count, limit)
    with session.meeting.held(partial(_say, session)):
        yield


def attend(session: Session) -> int | None:
    """Start ranks when called; return the status of the run, None where this is not a machine that attends."""
    count, limit = _shared(session)
    if count == 1 or session.place is None or session.place.rank == 0:
        return None

    say = partial(_say, session)

    def start(job_file: Path, node: str, over: Callable[[], None]) -> int:
        called = session.recipe.nodes[node]
        around = session.surroundings(called)
        conceal_environment({**session.environment, **around.environment}, session.secrets(called))
        say(f"{node}: its ranks start here")
        return start_here(called.kind, around, session.environment, job_file, over)

    return attend_meeting(meeting_place_of(session), session.place, limit, start, say)
