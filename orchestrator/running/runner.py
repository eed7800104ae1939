"""One run, from plan to record.

run_plan(session, plan)
    loop()          until nothing runs and nothing can start:
        advance()       each node's next steps, as the schedule says (`planning.schedule`)
            look()          cached or to run, now with true digests
            start()         in a thread, `execution.execute`: lock the key → launch, with retries → publish
            end()           events, record; dropped bytes, results that stand on other bytes now
        wait()          for a node's work to end, and for files that running nodes pass on (`streaming`); meanwhile the
                        next node's worker starts and imports what it will need (`warming`)
        finish()        what came of a node's work; then its gates
    finish_run()    run record, roots, status
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from bigpipe.errors import BigpipeError, GateFailed, Interrupted
from bigpipe.orchestrator.contract import (
    Forecast,
    LogLine,
    NodeFinished,
    NodeStarted,
    OneAtATime,
    Reporter,
    RunFinished,
    RunStarted,
    Status,
)
from bigpipe.orchestrator.planning import (
    GOOD,
    Action,
    Do,
    NodeState,
    Plan,
    Session,
    States,
    Step,
    clash_with,
    decide,
    fallback,
    judge_gates,
    node_folder,
    schedule,
    step,
)
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord

from .lineage import lineage
from .records import RunRecorder, latest_run, new_run_id
from .result import RunResult
from .signals import caught_once
from .streaming import Streams, provisional_key
from .timing import timed

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from .sharing import Offering
    from .warming import Warming


LOOK = 0.1
"""Seconds between two looks at what running nodes have announced."""
Accept: TypeAlias = Callable[[Node, KeyRecord], None]


@dataclass(slots=True)
class Run:
    """One run while it goes on."""

    session: Session
    plan: Plan
    id: str
    recorder: RunRecorder
    reporter: Reporter
    states: States
    streams: Streams
    accept: Accept
    cancelled: threading.Event = field(default_factory=threading.Event)
    signal: int = 0
    working: dict[Future[KeyRecord | None], NodeState] = field(default_factory=dict)
    pool: ThreadPoolExecutor | None = None
    """Where nodes work, once one does."""
    warming: Warming | None = None
    offering: Offering | None = None
    """Gives what nodes made to the remote store."""

    def interrupt(self, number: int) -> None:
        """Stops the children and lets the run end in order. number: of the signal."""
        self.signal = number
        self.states.stopped = True
        self.cancelled.set()

    def folder(self, node: Node) -> Path:
        """Logs and job files of a node's attempts."""
        return node_folder(self.session.store.runs / self.id, node.name)


def run_plan(
    session: Session, plan: Plan, reporter: Reporter, *, jobs: int | None = None, keep_going: bool = False,
    accept: Accept = lambda node, record: None,
) -> RunResult:  # fmt: skip
    """Run what the plan says, deciding each node again with true digests.
    accept: called with what a node gave, or the store has of it, before anybody takes it; the node fails with the
    BigpipeError that it raises. A node that fails is in the result, not raised. SIGINT, SIGTERM and SIGHUP stop the
    children and leave everything resumable."""
    started = time.monotonic()
    run_id = new_run_id(after=latest_run(session.store.runs))
    recorder = RunRecorder(session.store.runs / run_id, run_id, session.recipe, session.checkout)
    jobs = jobs or session.jobs if plan.to_run else 1
    states = States(
        nodes={
            name: NodeState(one.node, one.forecast or Forecast(), one.processes) for name, one in plan.nodes.items()
        },
        room=session.room(jobs),
        side_by_side=session.side_by_side,
        keep_going=keep_going,
    )
    run = Run(
        session=session,
        plan=plan,
        id=run_id,
        recorder=recorder,
        reporter=OneAtATime(reporter, recorder),
        states=states,
        streams=Streams(session, states),
        accept=accept,
    )
    if session.remote is not None:
        from .sharing import Offering

        session.remote.stopped = run.cancelled
        session.remote.tell = lambda line: run.reporter.report(LogLine("remote store", line))
        run.offering = Offering(session, session.remote, run.reporter.report, run.cancelled)
    with closing(recorder), caught_once(run.interrupt):
        run.reporter.report(RunStarted(run_id, str(session.recipe.path), tuple(plan.nodes)))
        _loop(run)
        return _finish_run(run, time.monotonic() - started)


def _loop(run: Run) -> None:
    try:
        while _advance(run):
            _wait(run)
    except BaseException:
        run.cancelled.set()  # the pool waits for what runs, and nobody is left to answer it
        raise
    finally:
        run.streams.cancel()  # nobody waits for files of a run that is over
        if run.warming is not None:
            run.warming.close()
        if run.pool is not None:
            run.pool.shutdown()


def _advance(run: Run) -> bool:
    """Let the nodes take all steps that are possible now. True where something runs."""
    changed = True
    while changed:
        waiting = [state for state in run.states.nodes.values() if state.status is Status.PENDING]
        changed = any([_take(run, state) for state in waiting])
    return bool(run.working)


def _wait(run: Run) -> None:
    from concurrent.futures import FIRST_COMPLETED, wait

    run.streams.answer()
    if run.warming is not None and not run.states.stopped:
        run.warming.begin()
    run.recorder.flush()
    done, _ = wait(run.working, timeout=LOOK, return_when=FIRST_COMPLETED)
    for future in done:
        _finish(run, run.working.pop(future), future)
    run.streams.look()
    if run.cancelled.is_set():
        run.streams.cancel()


def _take(run: Run, state: NodeState) -> bool:
    """Do what comes next for a node. True where that changed anything."""
    next_step = step(run.states, state)
    if next_step.do in (Do.CACHED, Do.START) and (error := _clash(run, state)) is not None:
        state.error = error
        _end(run, state, Status.FAILED, error.cause)
        return True
    match next_step.do:
        case Do.LOOK:
            return _look(run, state)
        case Do.SKIP:
            _end(run, state, Status.SKIPPED, next_step.why, next_step)
        case Do.CACHED:
            _take_cached(run, state, next_step)
        case Do.SAME:
            schedule.same(run.states, state, run.states[next_step.why])
        case Do.TAKE:
            schedule.take(run.states, state, next_step.why)
        case Do.DEMAND:
            if not _outwaits(run, state):
                schedule.demand(run.states, state, next_step.producers)
        case Do.START:
            _start(run, state, next_step.why)
        case Do.FETCH:
            _fetch(run, state)
        case Do.SUCCEED:
            _end(run, state, Status.SUCCEEDED, state.reason, next_step)
        case Do.FAIL:
            gate, none = next_step.gate, fallback.none_passes
            state.error = gate.error(state.node) if gate is not None else none(run.states, state)
            _end(run, state, Status.FAILED, state.reason or state.error.cause)
        case Do.DROP:
            if state.digest is not None and state.key is not None:
                run.session.store.drop(state.digest, state.key)
            schedule.drop(run.states, state)
        case _:
            return False
    return True


def _clash(run: Run, state: NodeState) -> BigpipeError | None:
    """Another node writes, in this run, to where this one would: of two that may be skipped neither was."""
    if state.node.kind.planning.writes is None:
        return None
    others = [
        each for each in run.states.nodes.values() if each.status in {Status.RUNNING, *GOOD} and each is not state
    ]
    return clash_with(run.session, state.node, [each.node for each in others])


def _take_cached(run: Run, state: NodeState, told: Step) -> None:
    session, node, record = run.session, state.node, state.record
    try:
        if record is not None:
            run.accept(node, record)
            if record.digest and state.bytes_here and schedule.keeps(state):
                session.store.keep(record.digest, record.key)
            if record.pins and (asked := session.asked(node)) not in record.asked:
                session.store.note_asked(record, asked)
    except BigpipeError as error:
        state.error = error
        _end(run, state, Status.FAILED, error.cause)
        return
    _end(run, state, Status.CACHED, state.reason, told)


def _look(run: Run, state: NodeState) -> bool:
    """With true digests. What the plan found cached on the same inputs is not looked at twice. False: interrupted."""
    node, decision = state.node, run.plan.nodes[state.name].decision
    inputs = schedule.input_digests(state)
    known = decision.action is Action.CACHED and decision.bytes_here and decision.inputs == inputs
    try:
        if not known or state.demanded_by:
            decision = decide(run.session, node, inputs, schedule.awaited(state))
    except Interrupted:
        return False
    except BigpipeError as error:
        state.error = error
        _end(run, state, Status.FAILED, str(error))
    else:
        schedule.decided(run.states, state, decision)
    return True


def _start(run: Run, state: NodeState, follows: str) -> None:
    from .execution import Attempt, execute_once  # what launches workers is not imported where nothing runs
    from .warming import Warming

    session, node, jobs = run.session, state.node, run.states.room["jobs"]
    if run.warming is None and jobs > 1:
        run.warming = Warming(session, run.plan, run.states, run.folder)
    if follows:
        state.reason += f"; takes the files of {follows} as they are made"
    stream, followed = run.streams.begin(state), run.streams.followed(follows)
    schedule.start(run.states, state, follows)
    run.reporter.report(NodeStarted(state.name, state.reason))
    key = provisional_key(session, node) if follows else state.key or ""
    _remember(run, {state.name: key})  # from now on its unfinished work is not garbage
    attempt = Attempt(
        session=session,
        node=node,
        key=key,
        inputs={
            port: tuple(digest for each in wired if (digest := each.digest)) for port, wired in state.inputs.items()
        },
        lineage=lineage(session, run.states, node),
        refused=state.decision.record if state.decision else None,
        run=run.id,
        folder=run.folder(node),
        report=run.reporter.report,
        cancelled=followed.cancelled if followed else run.cancelled,
        stream=stream,
        bytes_may_go=not schedule.wants_bytes(state),
        warm=run.warming.take(node) if run.warming else None,
        needs=session.needs(node, state.forecast),
        follows=followed,
    )
    run.working[_pool(run).submit(timed, state, partial(execute_once, attempt))] = state


def _outwaits(run: Run, state: NodeState) -> bool:
    """Where another run has the bytes that this node would send for, and makes of them what it is to make: wait."""
    key = provisional_key(run.session, state.node) if state.node.kind.passing.follows else ""
    if not key or not run.session.store.held(key):
        return False

    from .execution import outwait

    schedule.start(run.states, state)
    work = partial(outwait, run.session, state.name, key, report=run.reporter.report, cancelled=run.cancelled)
    run.working[_pool(run).submit(timed, state, work)] = state
    return True


def _pool(run: Run) -> ThreadPoolExecutor:
    if run.pool is None:
        from concurrent.futures import ThreadPoolExecutor

        workers = run.states.room["jobs"] + len(run.plan.nodes)
        run.pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="node")
    return run.pool


def _fetch(run: Run, state: NodeState) -> None:
    from .sharing import fetch  # of what has a remote store

    decision = state.decision
    assert decision is not None  # noqa: S101  the schedule has looked at it
    schedule.start(run.states, state)
    state.reason = "from the remote store"
    run.reporter.report(NodeStarted(state.name, state.reason))
    _remember(run, {state.name: state.key or ""})
    work = partial(fetch, run.session, state.node, decision, report=run.reporter.report, cancelled=run.cancelled)
    run.working[_pool(run).submit(timed, state, work)] = state


def _finish(run: Run, state: NodeState, future: Future[KeyRecord | None]) -> None:
    try:
        record = future.result()
        if record is not None:
            run.accept(state.node, record)
    except BigpipeError as error:
        state.error = error
        if error.field:
            error.place = error.place or state.node.places.of(error.field)
        _end(run, state, Status.FAILED, error.cause)
        return
    if record is None:  # it followed, was fetched or waited in vain: as if nothing had been
        state.seconds = 0.0
        state.decision = None
        schedule.end(run.states, state, Status.PENDING, "")
        run.streams.ended(state)
        return
    forgone = run.streams.forgone(state.name)
    schedule.done(run.states, state, record)
    if forgone or (not schedule.keeps(state) and run.session.store.let_go(record.digest or "")):
        schedule.drop(run.states, state)
    _take(run, state)


def _end(run: Run, state: NodeState, status: Status, reason: str, told: Step | None = None) -> None:
    """told: what the schedule says of its gates."""
    schedule.end(run.states, state, status, reason, left=told.why if told and told.gate else "")
    if state.left or status in GOOD:
        state.verdict = fallback.told(run.states, state) or (told.why if told else "")
    _report(run, state)
    run.streams.ended(state)
    if status is Status.SUCCEEDED and run.offering is not None:
        run.offering.offer(state.node, state.record)
    for each in (*state.producers, *state.consumers):
        if each.status in GOOD:
            _take(run, each)


def _report(run: Run, state: NodeState) -> None:
    record = state.record
    run.reporter.report(
        NodeFinished(
            node=state.name,
            status=str(state.status),
            seconds=state.seconds,
            peak_rss=record.peak_rss if record and state.done else 0,
            metrics=record.metrics if record else {},
            digest=state.digest,
            reason=state.reason,
            error=str(state.error) if state.error else "",
            verdict=state.verdict,
            key=state.key,
            gates=tuple(gate.as_json() for gate in judge_gates(run.states, state)) if state.node.gates else (),
        )
    )


def _finish_run(run: Run, seconds: float) -> RunResult:
    states = run.states.nodes
    if run.offering is not None:
        run.offering.finish()
    # Before what is pending ends as skipped: a variant whose turn did not come was not left
    tried = {name: fallback.tried(run.states, state) for name, state in states.items() if state.node.first}
    for state in states.values():
        if state.status is Status.PENDING:
            schedule.end(run.states, state, Status.SKIPPED, "the run stopped before its turn")
            _report(run, state)
    # Failures in topological order, gates last: what they cost in exit codes
    for state in states.values():
        if state.error is not None:
            state.error.node = state.name
    errors = sorted(filter(None, (state.error for state in states.values())), key=lambda e: isinstance(e, GateFailed))
    status = "failed" if errors else "succeeded"
    if run.cancelled.is_set():
        cure = "what was finished is kept: the same command goes on from there"
        errors = [Interrupted.by(run.signal or signal.SIGINT, cure)]
        status = "interrupted"
    run.reporter.report(RunFinished(run.id, status, seconds))
    result = RunResult(
        run=run.id, status=status, nodes=states, session=run.session, seconds=seconds, errors=tuple(errors),
        gates={name: judge_gates(run.states, state) for name, state in states.items() if state.node.gates},
        tried=tried,
    )  # fmt: skip
    run.recorder.finish(status, result.ran(), seconds)
    _remember(run, {name: state.key for name, state in states.items() if state.key and state.status in GOOD})
    return result


def _remember(run: Run, keys: Mapping[str, str]) -> None:
    """Keep what these nodes have, or are about to have, from `gc`, and from others that let go of the same bytes."""
    session, recipe = run.session, run.session.recipe
    lets_go = [name for name in keys if not schedule.keeps(run.states[name])]
    session.store.remember(recipe.path, session.lock, recipe.name, keys, session.variant, recipe.nodes, lets_go)
