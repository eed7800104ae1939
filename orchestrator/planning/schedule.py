"""What happens to a node next: one function over what is known of a run's nodes, and nothing else.

A plan drives it with what is foreseen (`rehearsal`), a run with what really came (`running.runner`). Nothing here asks
the store, the clock, the machine or another process; every rule has its row in `test_schedule`.

step(states, facts, name)
    pending    skip it; look it up; take it from the cache; send for dropped bytes; start it, beside a producer whose
               files it takes or when there is room; or let it wait
    running    once its work is done: it succeeded, or a gate fails it
    ended      look it up again where an input came out different; drop bytes that nobody needs any more
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from bigpipe.errors import BigpipeError, GateFailed
from bigpipe.orchestrator.contract import Forecast, Json, Status
from bigpipe.orchestrator.launch import executor
from bigpipe.orchestrator.recipe import UNKNOWN, Comparison, Condition, Lookup, Node, metric
from bigpipe.orchestrator.store import KeyRecord
from bigpipe.passing import AHEAD

from .decision import Action, Decision, Inputs

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    gate: Condition
    verdict: Comparison | None
    """None: not known before the node has run."""
    cure: str = ""
    """A change of the recipe's parameters under which it holds, where one was tried."""

    @property
    def failed(self) -> bool:
        return self.verdict is not None and not self.verdict.passed

    def error(self, node: Node) -> GateFailed:
        measured = self.verdict.left if self.verdict else "unknown"
        return GateFailed(
            f"{node.name}: gate {self.gate.text}: {measured}",
            self.cure or "change the recipe so that the gate holds, or the gate",
            place=self.gate.place,
        )


class Step(NamedTuple):
    do: Do
    why: str = ""
    """Why it is skipped, what it waits for, or the producer whose files it takes as they are made."""
    producers: tuple[str, ...] = ()
    """Whose bytes it demands."""
    gate: GateVerdict | None = None
    """The one that does not hold."""


NOTHING_FORESEEN = Forecast()


@dataclass(slots=True)
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
    seconds: float = 0.0
    error: BigpipeError | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def key(self) -> str | None:
        return self.record.key if self.record else self.decision.key if self.decision else None

    @property
    def digest(self) -> str | None:
        return self.record.digest if self.record else None

    @property
    def ram(self) -> int:
        """Bytes it holds while it runs: what the recipe says, else what was forecast."""
        asked = self.node.resources.ram
        return asked if asked is not None else self.forecast.ram or 0

    @property
    def gpus(self) -> int:
        asked = self.node.resources.gpus
        return asked if asked is not None else len(self.forecast.vram)

    @property
    def writes(self) -> int:
        """Bytes it adds to the store."""
        return self.forecast.write_bytes or 0

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What does not change while a run goes."""

    consumers: Mapping[str, Sequence[Node]]
    """Node name → those that take its artifact."""
    room: Mapping[str, int]
    """The most that all running nodes together may hold: jobs, CPUs, RAM and disk in bytes, and who holds GPUs. Two
    nodes that place themselves would both start at GPU 0, so one at a time does."""
    side_by_side: bool = True
    """May consumers take a producer's files as they are made?"""
    keep_going: bool = False
    foreseen: bool = False
    """What is not known yet is left open: it will be known when the run gets there."""


@dataclass(slots=True)
class States:
    """All nodes of a run, in topological order, and what those that run hold together."""

    nodes: Mapping[str, NodeState]
    held: dict[str, int] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    interrupted: bool = False

    def __getitem__(self, name: str) -> NodeState:
        return self.nodes[name]

    def hold(self, share: Mapping[str, int], sign: int = 1) -> None:
        for what, size in share.items():
            self.held[what] = self.held.get(what, 0) + sign * size

    def hold_disk(self, state: NodeState, size: int) -> None:
        self.hold({"disk": size - state.disk})
        state.disk = size


def step(states: States, facts: Facts, name: str) -> Step:
    state = states[name]
    if state.status is Status.PENDING:
        return _pending(states, facts, state)
    if state.status is Status.RUNNING and state.done:
        return _judged(states, facts, state, Do.SUCCEED)
    return _good(states, facts, state) if state.status in GOOD else Step(Do.WAIT)


def _pending(states: States, facts: Facts, state: NodeState) -> Step:
    node, nodes = state.node, states.nodes
    unsettled = next((name for name in node.predecessors if nodes[name].status not in SETTLED), "")
    if unsettled and not (nodes[unsettled].passing and may_follow(states, facts, node, unsettled)):
        return Step(Do.WAIT, unsettled)
    if not unsettled and (reason := _blocked(states, facts, node)):
        return Step(Do.SKIP, reason)
    if state.decision is None or state.decision.inputs != input_digests(states, node):
        return Step(Do.LOOK)
    if state.hit:
        return Step(Do.WAIT, unsettled) if unsettled else _judged(states, facts, state, Do.CACHED)
    if dropped := tuple(name for name in node.producers if _dropped(nodes[name])):
        return Step(Do.DEMAND, producers=dropped)
    if stopping(states, facts):
        return Step(Do.STOP)
    if lacking := _lacking(states, facts, state, unsettled):
        return Step(Do.WAIT, lacking)
    return Step(Do.START, unsettled)


def _good(states: States, facts: Facts, state: NodeState) -> Step:
    if not _up_to_date(states, state):
        return Step(Do.LOOK)
    consumers = facts.consumers.get(state.node.name, ())
    if state.node.cache or not state.bytes_here or not consumers:
        return Step(Do.WAIT)
    taken = all(_has_taken(states, states[each.name]) for each in reversed(consumers))
    return Step(Do.DROP if taken else Do.WAIT)


def _has_taken(states: States, consumer: NodeState) -> bool:
    """Does it not need its producers' bytes any more? One that failed will want them again."""
    return consumer.status is Status.SKIPPED or (consumer.status in GOOD and _up_to_date(states, consumer))


def _up_to_date(states: States, state: NodeState) -> bool:
    """Does what an ended node gave stand on what its producers have given? True while one of them is at work again."""
    if not all(states[name].status in GOOD or states[name].status is Status.SKIPPED for name in state.node.producers):
        return True
    return state.decision is None or state.decision.inputs == input_digests(states, state.node)


def _blocked(states: States, facts: Facts, node: Node) -> str:
    """Why the node cannot run at all: a failed or skipped producer, or a `when` that does not hold."""
    bad = [name for name in node.predecessors if states.nodes[name].status not in GOOD]
    for name in bad:
        if states[name].status is Status.FAILED:
            return f"{name} failed"
    if bad and (missing := _missing_producer(states, node)):
        return f"{missing} is skipped"
    if node.when is None:
        return ""
    verdict = node.when.evaluate(lookup(states, node))
    if verdict is None:
        return "" if facts.foreseen else f"when {node.when.text}: not known"
    return "" if verdict.passed else f"when {node.when.text}: {verdict.left}"


def _missing_producer(states: States, node: Node) -> str | None:
    """The skipped node this one cannot do without: on a port that is not optional, or in `needs`."""
    for port, names in node.inputs.items():
        gone = [name for name in names if states[name].status is Status.SKIPPED]
        spec = node.kind.inputs[port]
        if gone and not spec.optional and (not spec.many or len(gone) == len(names)):
            return gone[0]
    return next((name for name in node.needs if states[name].status is Status.SKIPPED), None)


def may_follow(states: States, facts: Facts, node: Node, producer: str) -> bool:
    """Could the node take the files of this producer as they are made? All else it depends on must stand.

    A `timeout` is meant for the work, not for waiting; a `when` may be waiting for anything.
    """
    kind, nodes = node.kind, states.nodes
    others = (nodes[name] for name in node.predecessors if name != producer)
    return (
        facts.side_by_side
        and states[producer].node.kind.passing.streams
        and executor(kind.runs_in).waits
        and node.when is None
        and node.timeout is None
        and tuple(node.inputs.get(kind.passing.follows, ())) == (producer,)
        and nodes[node.name].status is Status.PENDING
        and all(other.status in GOOD and other.bytes_here for other in others)
    )


def _lacking(states: States, facts: Facts, state: NodeState, follows: str) -> str:
    """What there is no room for; "" where there is. A node that would not fit beside others runs alone."""
    if not states.running:
        return ""
    share = _share(state, follows)
    if not follows:
        share["disk"] = state.writes + state.fetches
    return next((what for what, size in share.items() if states.held.get(what, 0) + size > facts.room[what]), "")


def _share(state: NodeState, follows: str) -> dict[str, int]:
    """Of what running nodes hold together. A follower shares its producer's turn: it counts as a job and a CPU only if
    its `resources` say so."""
    cpus = state.node.resources.cpus or (0 if follows else state.processes)
    return {"jobs": 0 if follows else 1, "CPUs": cpus, "RAM": state.ram, "GPUs": int(state.gpus > 0)}


def stopping(states: States, facts: Facts) -> bool:
    """No new node starts: interrupted, or a node failed that does not let the others go on."""
    stopped = not facts.keep_going and any(states[name].node.on_fail == "stop" for name in states.failed)
    return states.interrupted or stopped


def _judged(states: States, facts: Facts, state: NodeState, otherwise: Do) -> Step:
    """A run fails where a gate cannot be decided; what is only foreseen goes on, whatever its gates."""
    gates = () if facts.foreseen else judge_gates(states, state.node)
    bad = next((gate for gate in gates if gate.failed or gate.verdict is None), None)
    return Step(Do.FAIL, gate=bad) if bad else Step(otherwise)


def judge_gates(states: States, node: Node) -> tuple[GateVerdict, ...]:
    if not node.gates:
        return ()
    look = lookup(states, node)
    return tuple(GateVerdict(gate=gate, verdict=gate.evaluate(look)) for gate in node.gates)


def lookup(states: States, own: Node) -> Lookup:
    """Metrics of the nodes, UNKNOWN where a node has none yet."""

    def look(name: str | None, path: str) -> Json:
        state = states.nodes.get(name or own.name)
        return metric(state.metrics, path) if state else UNKNOWN

    return look


def _dropped(state: NodeState) -> bool:
    return state.status in GOOD and not state.bytes_here


def input_digests(states: States, node: Node) -> Inputs | None:
    """Per port, the digests of what is wired there, skipped producers left out; None while one is not known.

    Of a producer that runs it is what it gave before under its key, should it give that again.
    """
    found: dict[str, list[str]] = {}
    nodes = states.nodes
    for port, names in node.inputs.items():
        digests = [_digest(nodes[name]) for name in names if nodes[name].status is not Status.SKIPPED]
        if None in digests:
            return None
        if digests:
            found[port] = [digest for digest in digests if digest]
    return found


def awaited(states: States, node: Node) -> list[str]:
    """The producers whose digests are not known."""
    return [n for n in node.producers if states[n].status is not Status.SKIPPED and _digest(states[n]) is None]


def _digest(state: NodeState) -> str | None:
    if state.status in GOOD:
        return state.digest
    before = state.decision.record if state.decision and state.status is Status.RUNNING else None
    return before.digest if before else None


def decided(state: NodeState, decision: Decision) -> None:
    """It was looked up."""
    state.status, state.decision, state.bytes_here, state.done = Status.PENDING, decision, decision.bytes_here, False
    state.reason = demanded(state.demanded_by) if state.demanded_by and not state.hit else decision.reason
    state.record = decision.record if decision.action is Action.CACHED else None
    state.metrics = state.record.metrics if state.record else {}


def done(state: NodeState, record: KeyRecord) -> None:
    """Its work gave this."""
    state.record, state.metrics, state.done, state.bytes_here = record, record.metrics, True, True
    if state.decision is not None:
        state.decision = replace(state.decision, inputs=record.inputs, key=record.key)


def demand(states: States, by: str, producers: Sequence[str]) -> None:
    for name in producers:
        state = states[name]
        state.status, state.decision, state.demanded_by = Status.PENDING, None, by


def demanded(by: str) -> str:
    return f"its bytes were dropped (cache: false) and {by} needs them"


def start(states: States, facts: Facts, name: str, follows: str = "") -> None:
    """It runs from now on, on the files of a running producer where it `follows` one."""
    state = states[name]
    state.status, state.following, state.done = Status.RUNNING, follows, False
    states.running.add(name)
    states.hold({**_share(state, follows), "disk": state.fetches})
    states.hold_disk(state, state.writes)
    if follows and passes_on(states, facts, follows):
        states.hold_disk(states[follows], min(states[follows].disk, _between(states, facts, follows)))


def end(states: States, name: str, status: Status, reason: str) -> None:
    """It has come to `status`; PENDING where it followed a producer in vain."""
    state = states[name]
    if state.status is Status.RUNNING:
        states.running.discard(name)
        states.hold(_share(state, state.following), -1)
    state.status, state.reason, state.following, state.passing = status, reason, "", False
    if status is Status.FAILED:
        states.failed.add(name)
    if status in GOOD:
        state.demanded_by = ""


def drop(states: States, name: str) -> None:
    states[name].bytes_here = False
    states.hold_disk(states[name], 0)


def passes_on(states: States, facts: Facts, name: str, *, gone: bool = False) -> bool:
    """Are its files let go while it runs, as they are taken? Where all who take them run beside it.

    gone: some of them are. Then whoever failed will not find them all, and they are not kept for it.
    """
    consumers = (states[each.name] for each in reversed(facts.consumers.get(name, ())))
    excused = {Status.SKIPPED, Status.FAILED} if gone else {Status.SKIPPED}
    return not states[name].node.cache and all(each.following == name or each.status in excused for each in consumers)


def _between(states: States, facts: Facts, name: str) -> int:
    """Bytes between it and its consumers at a time: two files, or as many as one of them works on and one more. All of
    them where a consumer could not be sure to run beside it: something else it needs was at work in this run too."""
    consumers = [states[each.name] for each in facts.consumers[name]]
    others = [states[other] for each in consumers for other in each.node.predecessors if other != name]
    size = states[name].forecast.file_bytes
    if not size or not all(other.status is Status.CACHED for other in others):
        return states[name].writes
    window = max(each.forecast.works_on for each in consumers)
    return max(AHEAD, math.ceil(window / size) + 1) * size
