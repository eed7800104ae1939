"""What happens to a node next: one function over what is known of a run's nodes, and nothing else.

A plan drives it with what is foreseen (`rehearsal`), a run with what really came (`running.runner`). Nothing here asks
the store, the clock, the machine or another process; every rule has its row in `test_schedule`.

step(states, state)
    pending    skip it; look it up; take it from the cache; send for dropped bytes; start it, beside a producer whose
               files it takes or when there is room; or let it wait
    running    once its work is done: it succeeded, or a gate fails it
    ended      look it up again where an input came out different; drop bytes that nobody needs any more
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator.contract import Forecast, Json, Status
from bigpipe.orchestrator.launch import executor
from bigpipe.orchestrator.recipe import UNKNOWN, Lookup, Node, metric
from bigpipe.orchestrator.store import KeyRecord
from bigpipe.passing import AHEAD

from .decision import Action, Decision, GateVerdict, Inputs

GOOD = frozenset({Status.CACHED, Status.SUCCEEDED})
SETTLED = GOOD | {Status.FAILED, Status.SKIPPED}


class Do(StrEnum):
    WAIT = "wait"
    SKIP = "skip"
    LOOK = "look"
    """Ask the store whether it has what the node would give for these inputs."""
    CACHED = "cached"
    DEMAND = "demand"
    """Send producers whose bytes were dropped back to work."""
    START = "start"
    SUCCEED = "succeed"
    FAIL = "fail"
    """A gate does not hold."""
    DROP = "drop"
    """Let the bytes go."""
    STOP = "stop"
    """Not started, because the run ends."""


class Step(NamedTuple):
    do: Do
    why: str = ""
    """Why it is skipped, what it waits for, or the producer whose files it takes as they are made."""
    producers: tuple[str, ...] = ()
    """Whose bytes it demands."""
    gate: GateVerdict | None = None
    """The one that does not hold."""


NOTHING_FORESEEN = Forecast()


@dataclass(slots=True, eq=False)
class NodeState:
    """What is known of a node."""

    node: Node
    forecast: Forecast = NOTHING_FORESEEN
    processes: int = 1
    """How many it starts; each holds a CPU, unless its `resources` say otherwise."""
    status: Status = Status.PENDING
    reason: str = ""
    decision: Decision | None = None
    record: KeyRecord | None = None
    """Of what it gave."""
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """Recorded or foreseen."""
    bytes_here: bool = True
    demanded_by: str = ""
    """The consumer that needs dropped bytes again."""
    following: str = ""
    """The running producer whose files it takes as they are made."""
    passing: bool = False
    """It runs, and its files can be taken as they are made."""
    done: bool = False
    """Its work is done; its gates are not judged yet."""
    disk: int = 0
    """Bytes it has in the store, or is about to write there, by the forecast."""
    share: Mapping[str, int] = field(default_factory=dict)
    """What it holds besides while it runs."""
    seconds: float = 0.0
    error: BigpipeError | None = None
    inputs: dict[str, list[NodeState]] = field(default_factory=dict)
    """Port → what is wired there."""
    producers: list[NodeState] = field(default_factory=list)
    predecessors: list[NodeState] = field(default_factory=list)
    consumers: list[NodeState] = field(default_factory=list)
    """Those that take its artifact."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.node.name

    @property
    def key(self) -> str | None:
        return self.record.key if self.record else self.decision.key if self.decision else None

    @property
    def digest(self) -> str | None:
        return self.record.digest if self.record else None

    @property
    def writes(self) -> int:
        """Bytes it adds to the store."""
        asked = self.node.resources.disk
        return asked if asked is not None else self.forecast.write_bytes or 0

    @property
    def fetches(self) -> int:
        """Bytes it adds to the disk of the store in a cache of somebody else's, where they stay."""
        return (self.forecast.download_bytes or 0) if self.forecast.fetches_to else 0

    @property
    def hit(self) -> bool:
        """Is what the store has of it all that is needed?"""
        if self.decision is None or self.decision.action is not Action.CACHED:
            return False
        return self.decision.bytes_here or not self.demanded_by


@dataclass(slots=True, kw_only=True)
class States:
    """All nodes of a run, in topological order, what those that run hold together, and the rules of the run."""

    nodes: Mapping[str, NodeState]
    room: Mapping[str, int]
    """The most that all running nodes together may hold: jobs, CPUs, RAM and disk in bytes, and who holds GPUs. Two
    nodes that place themselves would both start at GPU 0, so one at a time does."""
    side_by_side: bool = True
    """May consumers take a producer's files as they are made?"""
    keep_going: bool = False
    foreseen: bool = False
    """What is not known yet is left open: it will be known when the run gets there."""
    held: Counter[str] = field(default_factory=Counter)
    running: set[str] = field(default_factory=set)
    stopped: bool = False
    """No new node starts: interrupted, or a node failed that does not let the others go on."""
    of_key: dict[str, list[NodeState]] = field(default_factory=dict)
    """Key → those that have had it; while they do they share their bytes."""

    def __post_init__(self) -> None:
        for state in self.nodes.values():
            state.inputs = {port: [self.nodes[name] for name in names] for port, names in state.node.inputs.items()}
            state.producers = [self.nodes[name] for name in state.node.producers]
            state.predecessors = [self.nodes[name] for name in state.node.predecessors]
            for producer in state.producers:
                producer.consumers.append(state)

    def __getitem__(self, name: str) -> NodeState:
        return self.nodes[name]

    def hold_disk(self, state: NodeState, size: int) -> None:
        self.held["disk"] += size - state.disk
        state.disk = size


def step(states: States, state: NodeState) -> Step:
    if state.status is Status.PENDING:
        return _pending(states, state)
    if state.status is Status.RUNNING and state.done:
        return _judged(states, state, Do.SUCCEED)
    return _good(states, state) if state.status in GOOD else Step(Do.WAIT)


def _pending(states: States, state: NodeState) -> Step:
    unsettled = _unsettled(state)
    if unsettled is None:
        if reason := _blocked(states, state):
            return Step(Do.SKIP, reason)
    elif not (unsettled.passing and may_follow(states, state, unsettled)):
        return Step(Do.WAIT, unsettled.name)
    if state.decision is None or state.decision.inputs != input_digests(state):
        return Step(Do.LOOK)
    follows = unsettled.name if unsettled else ""
    if state.hit:
        return Step(Do.WAIT, follows) if follows else _judged(states, state, Do.CACHED)
    if dropped := tuple(each.name for each in state.producers if each.status in GOOD and not each.bytes_here):
        return Step(Do.DEMAND, producers=dropped)
    if states.stopped:
        return Step(Do.STOP)
    if lacking := _lacking(states, state, follows):
        return Step(Do.WAIT, lacking)
    return Step(Do.START, follows)


def _unsettled(state: NodeState) -> NodeState | None:
    for each in state.predecessors:
        if each.status not in SETTLED:
            return each
    return None


def _good(states: States, state: NodeState) -> Step:
    if not _up_to_date(state):
        return Step(Do.LOOK)
    if _keeps(state) or not state.bytes_here:
        return Step(Do.WAIT)
    sharing = _sharing(states, state)
    consumers = (each for one in sharing for each in reversed(one.consumers))
    # One that failed will want its producers' bytes again.
    taken = all(each.status is Status.SKIPPED or (each.status in GOOD and _up_to_date(each)) for each in consumers)
    return Step(Do.DROP if taken and not any(map(_keeps, sharing)) else Do.WAIT)


def _keeps(state: NodeState) -> bool:
    """Do its bytes stay? Those that nobody takes are what the run is for."""
    return state.node.cache or not state.consumers


def _sharing(states: States, state: NodeState) -> list[NodeState]:
    """It, and those whose bytes are the same because their key is."""
    key = state.key or ""
    return [state, *(each for each in states.of_key.get(key, ()) if each is not state and each.key == key)]


def _up_to_date(state: NodeState) -> bool:
    """Does what an ended node gave stand on what its producers have given? True while one of them is at work again."""
    if not all(each.status in GOOD or each.status is Status.SKIPPED for each in state.producers):
        return True
    return state.decision is None or state.decision.inputs == input_digests(state)


def _blocked(states: States, state: NodeState) -> str:
    """Why the node cannot run at all: a failed or skipped producer, or a `when` that does not hold."""
    bad = [each for each in state.predecessors if each.status not in GOOD]
    for each in bad:
        if each.status is Status.FAILED:
            return f"{each.name} failed"
    if bad and (missing := _missing_producer(states, state)):
        return f"{missing} is skipped"
    when = state.node.when
    if when is None:
        return ""
    verdict = when.evaluate(lookup(states, state))
    if verdict is None:
        return "" if states.foreseen else f"when {when.text}: not known"
    return "" if verdict.passed else f"when {when.text}: {verdict.left}"


def _missing_producer(states: States, state: NodeState) -> str | None:
    """The skipped node this one cannot do without: on a port that is not optional, or in `needs`."""
    for port, wired in state.inputs.items():
        gone = [each.name for each in wired if each.status is Status.SKIPPED]
        spec = state.node.kind.inputs[port]
        if gone and not spec.optional and (not spec.many or len(gone) == len(wired)):
            return gone[0]
    return next((name for name in state.node.needs if states[name].status is Status.SKIPPED), None)


def may_follow(states: States, state: NodeState, producer: NodeState) -> bool:
    """Could the node take the files of this producer as they are made? All else it depends on must stand.
    A `timeout` is meant for the work, not for waiting; a `when` may be waiting for anything."""
    node, kind = state.node, state.node.kind
    return (
        states.side_by_side
        and producer.node.kind.passing.streams
        and executor(kind.runs_in).waits
        and node.when is None
        and node.timeout is None
        and node.inputs.get(kind.passing.follows) == (producer.name,)
        and state.status is Status.PENDING
        and all(other.status in GOOD and other.bytes_here for other in state.predecessors if other is not producer)
    )


def _lacking(states: States, state: NodeState, follows: str) -> str:
    """What there is no room for; "" where there is. A node that would not fit beside others runs alone."""
    if not states.running:
        return ""
    share = _share(state, follows)
    if not follows:
        share["disk"] = state.writes + state.fetches
    return next((what for what, size in share.items() if states.held[what] + size > states.room[what]), "")


def _share(state: NodeState, follows: str) -> dict[str, int]:
    """Of what running nodes hold together: what the recipe says, else what was forecast. A follower shares its
    producer's turn: it counts as a job and a CPU only if its `resources` say so."""
    asked, forecast = state.node.resources, state.forecast
    cpus = asked.cpus or (0 if follows else state.processes)
    ram = forecast.ram or 0 if asked.ram is None else asked.ram
    gpus = len(forecast.vram) if asked.gpus is None else asked.gpus
    return {"jobs": 0 if follows else 1, "CPUs": cpus, "RAM": ram, "GPUs": int(gpus > 0)}


def _judged(states: States, state: NodeState, otherwise: Do) -> Step:
    """A run fails where a gate cannot be decided; what is only foreseen goes on, whatever its gates."""
    gates = () if states.foreseen else judge_gates(states, state)
    bad = next((gate for gate in gates if gate.failed or gate.verdict is None), None)
    return Step(Do.FAIL, gate=bad) if bad else Step(otherwise)


def judge_gates(states: States, state: NodeState) -> tuple[GateVerdict, ...]:
    look = lookup(states, state)
    return tuple(GateVerdict(gate=gate, verdict=gate.evaluate(look)) for gate in state.node.gates)


def lookup(states: States, own: NodeState) -> Lookup:
    """Metrics of the nodes, UNKNOWN where a node has none yet."""

    def look(name: str | None, path: str) -> Json:
        state = states.nodes.get(name) if name else own
        return metric(state.metrics, path) if state else UNKNOWN

    return look


def input_digests(state: NodeState) -> Inputs | None:
    """Per port, the digests of what is wired there, skipped producers left out; None while one is not known.
    Of a producer that runs it is what it gave before under its key, should it give that again."""
    found: dict[str, list[str]] = {}
    for port, wired in state.inputs.items():
        for each in wired:
            if each.status is not Status.SKIPPED:
                if (digest := _digest(each)) is None:
                    return None
                found.setdefault(port, []).append(digest)
    return found


def awaited(state: NodeState) -> list[str]:
    """The producers whose digests are not known."""
    return [each.name for each in state.producers if each.status is not Status.SKIPPED and _digest(each) is None]


def _digest(state: NodeState) -> str | None:
    if state.status in GOOD:
        return state.digest
    before = state.decision.record if state.decision and state.status is Status.RUNNING else None
    return before.digest if before else None


def decided(states: States, state: NodeState, decision: Decision) -> None:
    """It was looked up."""
    state.status, state.decision, state.bytes_here, state.done = Status.PENDING, decision, decision.bytes_here, False
    state.reason = demanded(state.demanded_by) if state.demanded_by and not state.hit else decision.reason
    state.record = decision.record if decision.action is Action.CACHED else None
    state.metrics = state.record.metrics if state.record else {}
    _has_key(states, state)


def done(states: States, state: NodeState, record: KeyRecord) -> None:
    """Its work gave this."""
    state.record, state.metrics, state.done, state.bytes_here = record, record.metrics, True, True
    if state.decision is not None:
        state.decision = replace(state.decision, inputs=record.inputs, key=record.key)
    _has_key(states, state)


def _has_key(states: States, state: NodeState) -> None:
    if state.key and state not in (known := states.of_key.setdefault(state.key, [])):
        known.append(state)


def demand(states: States, by: NodeState, producers: Sequence[str]) -> None:
    for name in producers:
        state = states[name]
        state.status, state.decision, state.demanded_by = Status.PENDING, None, by.name


def demanded(by: str) -> str:
    return f"its bytes were dropped (cache: false) and {by} needs them"


def start(states: States, state: NodeState, follows: str = "") -> None:
    """It runs from now on, on the files of a running producer where it `follows` one."""
    state.status, state.following, state.done = Status.RUNNING, follows, False
    state.share = _share(state, follows)
    states.running.add(state.name)
    for what, size in state.share.items():
        states.held[what] += size
    states.held["disk"] += state.fetches
    if not any(each.disk for each in _sharing(states, state)[1:]):
        states.hold_disk(state, state.writes)
    if follows and passes_on(states, producer := states[follows]):
        states.hold_disk(producer, min(producer.disk, _between(producer)))


def end(states: States, state: NodeState, status: Status, reason: str) -> None:
    """It has come to `status`; PENDING where it followed a producer in vain."""
    if state.status is Status.RUNNING:
        states.running.discard(state.name)
        for what, size in state.share.items():
            states.held[what] -= size
    state.status, state.reason, state.following, state.passing = status, reason, "", False
    if status is Status.FAILED and state.node.on_fail == "stop" and not states.keep_going:
        states.stopped = True
    if status in GOOD:
        state.demanded_by = ""


def drop(states: States, state: NodeState) -> None:
    for each in _sharing(states, state):
        each.bytes_here = False
        states.hold_disk(each, 0)


def passes_on(states: States, state: NodeState, *, gone: bool = False) -> bool:
    """Are its files let go while it runs, as they are taken? Where all who take them run beside it.
    gone: some of them are. Then whoever failed will not find them all, and they are not kept for it."""
    if _keeps(state) or len(_sharing(states, state)) > 1:
        return False
    excused = {Status.SKIPPED, Status.FAILED} if gone else {Status.SKIPPED}
    return all(each.following == state.name or each.status in excused for each in reversed(state.consumers))


def _between(producer: NodeState) -> int:
    """Bytes between it and its consumers at a time: two files, or as many as one of them works on and one more. All of
    them where a consumer could not be sure to run beside it: something else it needs was at work in this run too."""
    others = [other for each in producer.consumers for other in each.predecessors if other is not producer]
    size = producer.forecast.file_bytes
    if not size or not all(other.status is Status.CACHED for other in others):
        return producer.writes
    window = max(each.forecast.works_on for each in producer.consumers)
    return max(AHEAD, math.ceil(window / size) + 1) * size
