"""One run, from plan to record.

run_plan(session, plan)
    settle_ready()      nodes whose producers are settled, in topological order:
        decide()            cached or to run, now with true digests
        demand_inputs()     dropped bytes a consumer needs are made again first
        admit()             within CPUs, memory and GPUs; independent nodes run side by side
    begin()             the next node's worker starts and imports what it will need (`warming`)
    follow()            consumers of a running producer that passes its files on one by one (`streaming`)
    execute()           in a thread: lock the key → launch, with retries → publish
    finish_node()       gates, events, record; bytes nobody needs any more are dropped
    finish_run()        run record, roots, status
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import BigpipeError, GateFailed, Interrupted
from bigpipe.orchestrator.contract.events import (
    NodeFinished,
    NodeStarted,
    OneAtATime,
    Reporter,
    RunFinished,
    RunStarted,
)
from bigpipe.orchestrator.contract.forecast import Forecast
from bigpipe.orchestrator.contract.types import Json, Lineage, Status
from bigpipe.orchestrator.planning.decision import Action, Decision, decide, input_digests
from bigpipe.orchestrator.planning.fit import needs_gpus, needs_ram
from bigpipe.orchestrator.planning.plan import Plan, failed, gate_error, judge_gates, missing_producer, when_text
from bigpipe.orchestrator.planning.session import Session, metric
from bigpipe.orchestrator.recipe.conditions import UNKNOWN, Lookup
from bigpipe.orchestrator.recipe.graph import Node
from bigpipe.orchestrator.store.store import KeyRecord

from .interruption import caught_once
from .records import RunRecorder, new_run_id
from .result import GOOD, SETTLED, NodeState, RunResult

if TYPE_CHECKING:
    from .execution import Attempt
    from .streaming import Stream, Streams
    from .warming import Warming


LOOK = 0.1
"""Seconds between two looks at what running nodes have announced."""


@dataclass(slots=True)
class Run:
    session: Session
    plan: Plan
    id: str
    reporter: Reporter
    states: dict[str, NodeState]
    jobs: int
    keep_going: bool
    cancelled: threading.Event = field(default_factory=threading.Event)
    signal: int = 0
    absent: set[str] = field(default_factory=set)
    """Nodes that were skipped."""
    running: dict[Future[KeyRecord | None], NodeState] = field(default_factory=dict)
    streams: Streams | None = None
    """None where one node runs at a time."""
    warming: Warming | None = None

    def interrupt(self, number: int) -> None:
        """Stops the children and lets the run end in order. number: of the signal."""
        self.signal = number
        self.cancelled.set()

    def folder(self, node: Node) -> Path:
        """Logs and job files of a node's attempts."""
        return self.session.store.runs / self.id / "nodes" / node.name.replace("/", "_")

    @property
    def stopping(self) -> bool:
        """No new node starts: interrupted, or a node failed that does not let the others go on."""
        return self.cancelled.is_set() or any(
            state.status is Status.FAILED and state.node.on_fail == "stop" and not self.keep_going
            for state in self.states.values()
        )


def run_plan(
    session: Session, plan: Plan, reporter: Reporter, *, jobs: int | None = None, keep_going: bool = False
) -> RunResult:
    """Run what the plan says, deciding each node again with true digests.

    A node that fails is in the result, not raised. SIGINT and SIGTERM stop the children and leave everything
    resumable.
    """
    started = time.monotonic()
    run_id = new_run_id()
    recorder = RunRecorder(session.store.runs / run_id, run_id, session.recipe)
    run = Run(
        session=session,
        plan=plan,
        id=run_id,
        reporter=OneAtATime(reporter, recorder),
        states={node.name: NodeState(node) for node in session.nodes},
        jobs=jobs or max(2, session.machine.cpus) if plan.to_run else 1,
        keep_going=keep_going,
    )
    with closing(recorder):
        run.reporter.report(RunStarted(run_id, str(session.recipe.path), tuple(run.states)))
        with caught_once(run.interrupt):
            _loop(run)
        return _finish_run(run, recorder, time.monotonic() - started)


def _loop(run: Run) -> None:
    if not _settle_ready(run):
        return
    from .streaming import Streams  # not needed where nothing runs
    from .warming import Warming

    run.warming = Warming(run.session, run.plan, run.states, run.folder) if run.jobs > 1 else None
    run.streams = Streams(run.session, run.states) if run.session.side_by_side else None
    with ThreadPoolExecutor(max_workers=run.jobs + len(run.states), thread_name_prefix="node") as pool:
        try:
            _turn(run, pool)
        except BaseException:
            run.cancelled.set()  # the pool waits for what runs, and nobody is left to answer it
            raise
        finally:
            if run.streams is not None:
                run.streams.cancel()  # nobody waits for files of a run that is over
            if run.warming is not None:
                run.warming.close()


def _turn(run: Run, pool: ThreadPoolExecutor) -> None:
    while True:
        for state in _admissible(run):
            _start(run, state, pool)
        _follow(run, pool)
        if not run.running:
            break
        if run.warming is not None and not run.stopping:
            run.warming.begin()
        done, _ = wait(run.running, timeout=LOOK, return_when=FIRST_COMPLETED)
        for future in done:
            _finish_node(run, run.running.pop(future), future)
        if done:
            _settle_ready(run)


def _follow(run: Run, pool: ThreadPoolExecutor) -> None:
    """Start consumers on what running producers have announced."""
    if run.streams is None:
        return
    if run.cancelled.is_set():
        run.streams.cancel()
    for state, stream in run.streams.ready():
        if not run.stopping and _room(run, state, following=True):
            _start(run, state, pool, stream)
    run.streams.answer()


def _settle_ready(run: Run) -> bool:
    """Settle every node that needs no work. True: some node waits for its turn to run."""
    changed = True
    while changed:
        changed = False
        for state in run.states.values():
            if state.status is Status.PENDING and _producers_settled(run, state):
                changed = _settle(run, state) or changed
    return any(state.status is Status.PENDING for state in run.states.values()) and not run.stopping


def _producers_settled(run: Run, state: NodeState) -> bool:
    return all(run.states[name].status in SETTLED for name in state.node.predecessors)


def _settle(run: Run, state: NodeState) -> bool:
    """Skip, or take from the cache, or leave to run. True where the state changed."""
    if blocked := _blocked(run, state):
        _end(run, state, Status.SKIPPED, blocked)
        return True
    if state.key is not None and not state.demanded_by:
        return False  # decided already: it waits for room, or for bytes it demanded
    try:
        decision = _decide(run, state)
    except BigpipeError as error:
        state.error = error
        _end(run, state, Status.FAILED, str(error))
        return True
    state.key = decision.key
    if decision.action is Action.CACHED and not (state.demanded_by and not decision.bytes_here):
        state.record, state.bytes_here = decision.record, decision.bytes_here
        _end(run, state, Status.CACHED, decision.reason)
        return True
    state.reason = (
        f"its bytes were dropped and {state.demanded_by} needs them" if state.demanded_by else decision.reason
    )
    return _demand_inputs(run, state)


def _blocked(run: Run, state: NodeState) -> str:
    """Why the node cannot run at all: a failed or skipped producer, or a `when` that does not hold."""
    node = state.node
    for name in node.predecessors:
        if run.states[name].status is Status.FAILED:
            return f"{name} failed"
    if missing := missing_producer(node, run.absent):
        return f"{missing} is skipped"
    if node.when is not None:
        verdict = node.when.evaluate(_lookup(run, node))
        if verdict is None:
            return f"when {node.when.text}: not known"
        if not verdict.passed:
            return when_text(node.when, verdict)
    return ""


def _decide(run: Run, state: NodeState) -> Decision:
    """With true digests. What the plan found cached a moment ago under the same key is not looked at twice."""
    node = state.node
    producers = {name: run.states[name] for names in node.inputs.values() for name in names}
    digests = {name: producer.digest if producer.status in GOOD else None for name, producer in producers.items()}
    planned = run.plan.nodes[node.name].decision
    if planned.action is Action.CACHED and planned.bytes_here and not state.demanded_by:
        inputs = input_digests(node, digests, run.absent)
        if inputs is not None and run.session.identity(node).key(inputs) == planned.key:
            return planned
    return decide(run.session, node, digests, run.absent)


def _lookup(run: Run, own: Node) -> Lookup:
    def lookup(name: str | None, path: str) -> Json:
        state = run.states.get(name or own.name)
        if state is None or state.record is None:
            return UNKNOWN
        try:
            return metric(state.record.metrics, path)
        except KeyError:
            return UNKNOWN

    return lookup


def _demand_inputs(run: Run, state: NodeState) -> bool:
    """Send producers whose bytes were dropped back to work. True where one was sent."""
    sent = False
    for names in state.node.inputs.values():
        for name in names:
            producer = run.states[name]
            if producer.status in GOOD and not producer.bytes_here:
                producer.status, producer.demanded_by = Status.PENDING, state.node.name
                state.key = None  # its digests may come out different
                sent = True
    return sent


def _admissible(run: Run) -> Iterator[NodeState]:
    """Nodes decided to run for which there is room now. A node that would not fit beside others runs alone."""
    for state in run.states.values():
        if run.stopping:
            return
        decided = state.status is Status.PENDING and state.key is not None
        if decided and _producers_settled(run, state) and _room(run, state):
            yield state


def _room(run: Run, state: NodeState, *, following: bool = False) -> bool:
    """A follower shares its producer's turn: it counts as a job and a CPU only if its `resources` say so."""
    if not run.running:
        return True
    if not following and sum(not other.following for other in run.running.values()) >= run.jobs:
        return False
    machine = run.session.machine
    everyone = [*run.running.values(), state]
    ram = sum(needs_ram(s.node, _forecast(run, s)) for s in everyone)
    cpus = sum(
        s.node.resources.cpus
        or (0 if s.following or (following and s is state) else run.session.surroundings(s.node).launch.num_processes)
        for s in everyone
    )
    # Two nodes that place themselves on GPUs would both start at GPU 0, so one at a time holds the GPUs.
    gpu_nodes = sum(1 for s in everyone if needs_gpus(s.node, _forecast(run, s)))
    return ram <= machine.memory_available and cpus <= max(machine.cpus, 1) and gpu_nodes <= 1


def _forecast(run: Run, state: NodeState) -> Forecast | None:
    planned = run.plan.nodes.get(state.node.name)
    return planned.forecast if planned else None


def _start(run: Run, state: NodeState, pool: ThreadPoolExecutor, follows: Stream | None = None) -> None:
    from .execution import Attempt  # what launches workers is not imported where nothing runs
    from .streaming import provisional_key

    state.status = Status.RUNNING
    key = state.key or provisional_key(run.session, state.node)
    if follows is not None:
        state.following = True
        state.reason = f"{_decide(run, state).reason}; takes the files of {follows.producer.name} as they are made"
    run.reporter.report(NodeStarted(state.node.name, state.reason))
    _remember(run, {state.node.name: key})  # from now on its unfinished work is not garbage
    attempt = Attempt(
        session=run.session,
        node=state.node,
        key=key,
        inputs={
            port: tuple(digest for name in names if (digest := run.states[name].digest) and name not in run.absent)
            for port, names in state.node.inputs.items()
        },
        lineage=_lineage(run, state.node),
        forced=state.node.name in run.session.forced or bool(state.demanded_by),
        run=run.id,
        folder=run.folder(state.node),
        report=run.reporter.report,
        cancelled=follows.cancelled if follows else run.cancelled,
        stream=run.streams.begin(state) if run.streams else None,
        warm=run.warming.take(state.node) if run.warming else None,
        follows=follows,
    )
    run.running[pool.submit(_timed, state, attempt)] = state


def _timed(state: NodeState, attempt: Attempt) -> KeyRecord | None:
    from .execution import execute

    started = time.monotonic()
    try:
        return execute(attempt)
    finally:
        if attempt.warm is not None:
            attempt.warm.end()  # unless it was taken
        state.seconds = time.monotonic() - started


def _lineage(run: Run, node: Node) -> tuple[Lineage, ...]:
    above = [run.states[name] for name in run.session.recipe.ancestors(node.name)]
    return tuple(
        Lineage(
            node=state.node.name,
            kind=state.node.kind.kind,
            key=state.key or "",
            digest=state.digest,
            params=state.node.params.model_dump(mode="json", by_alias=True),
            metrics=state.record.metrics if state.record else {},
        )
        for state in above
    )


def _finish_node(run: Run, state: NodeState, future: Future[KeyRecord | None]) -> None:
    forgone = run.streams.forgone(state) if run.streams else False
    state.following = False
    try:
        record = future.result()
    except BigpipeError as error:
        state.error = error
        _end(run, state, Status.FAILED, error.cause)
        return
    if record is None:  # it followed in vain: as if nothing had been
        state.status, state.reason, state.seconds = Status.PENDING, "", 0.0
        if run.streams is not None:
            run.streams.ended(state)
        return
    state.record, state.key = record, record.key
    state.bytes_here, state.demanded_by = not forgone, ""
    _end(run, state, Status.SUCCEEDED, state.reason)


def _end(run: Run, state: NodeState, status: Status, reason: str) -> None:
    """The node has reached `status`; gates may still fail it."""
    state.status, state.reason = status, reason
    if status is Status.SKIPPED:
        run.absent.add(state.node.name)
    if status in GOOD:
        lookup = _lookup(run, state.node)
        for gate in judge_gates(state.node, lookup):
            if failed(gate.verdict) or gate.verdict is None:
                state.error = gate_error(state.node, gate.gate, gate.verdict)
                state.status = Status.FAILED
                break
    record = state.record
    run.reporter.report(
        NodeFinished(
            node=state.node.name,
            status=str(state.status),
            seconds=state.seconds,
            peak_rss=record.peak_rss if record and status is Status.SUCCEEDED else 0,
            metrics=record.metrics if record else {},
            digest=state.digest,
            reason=state.reason,
            error=str(state.error) if state.error else "",
        )
    )
    if run.streams is not None:
        run.streams.ended(state)
    _drop_unneeded(run, state)


def _drop_unneeded(run: Run, ended: NodeState) -> None:
    """Bytes of `cache: false` producers go once their last consumer is done. A failed consumer will want them again."""
    for name in {name for names in ended.node.inputs.values() for name in names}:
        producer = run.states[name]
        if producer.node.cache or not producer.bytes_here or producer.digest is None:
            continue
        consumers = run.session.consumers(name)
        states = [run.states[consumer.name].status for consumer in consumers]
        if all(status in GOOD or status is Status.SKIPPED for status in states):
            run.session.store.drop(producer.digest, producer.key)
            producer.bytes_here = False


def _finish_run(run: Run, recorder: RunRecorder, seconds: float) -> RunResult:
    for state in run.states.values():
        if state.status is Status.PENDING:
            _end(run, state, Status.SKIPPED, "the run stopped before its turn")
    errors = _errors(run)
    interrupted = any(isinstance(error, Interrupted) for error in errors)
    status = "interrupted" if interrupted else "failed" if errors else "succeeded"
    run.reporter.report(RunFinished(run.id, status, seconds))
    result = RunResult(
        run=run.id, status=status, nodes=run.states, session=run.session, seconds=seconds, errors=tuple(errors)
    )
    recorder.finish(result.as_json(), seconds)
    _remember(run, {name: state.key for name, state in run.states.items() if state.key and state.status in GOOD})
    return result


def _remember(run: Run, keys: Mapping[str, str]) -> None:
    """Keeps from `gc` what these nodes have, or are about to have, as long as the manifest or its lock exists."""
    session, recipe = run.session, run.session.recipe
    session.store.remember(recipe.path, session.lock, recipe.name, keys)


def _errors(run: Run) -> list[BigpipeError]:
    """The interruption first, then failures in topological order, gates last: what they cost in exit codes."""
    if run.cancelled.is_set():
        cure = "what was finished is kept: the same command goes on from there"
        return [Interrupted("interrupted", cure, signal=run.signal or signal.SIGINT)]
    errors = [state.error for state in run.states.values() if state.error is not None]
    return sorted(errors, key=lambda error: isinstance(error, GateFailed))
