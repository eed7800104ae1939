"""What happens to a node next: one function over what is known of a run's nodes, and nothing else.

A plan drives it with what is foreseen (`rehearsal`), a run with what really came (`running.runner`). Nothing here asks
the store, the clock, the machine or another process; every rule has its row in `test_schedule`.

step(states, state)
    pending    let it wait until earlier variants are left (`fallback`), or take one; skip it; look it up; take it from
               the cache, or from a node that did the same work (`alike`); send for dropped bytes; bring it from the
               remote store, or start it, beside a producer whose files it takes or when there is room; or let it wait
    running    once its work is done: it succeeded, or a gate fails it
    ended      look it up again where an input came out different; drop bytes that nobody needs any more
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

from bigpipe.orchestrator.contract import Status
from bigpipe.orchestrator.launch import executor
from bigpipe.orchestrator.store import KeyRecord
from bigpipe.passing import AHEAD

from . import alike, fallback
from .decision import Action, Decision, GateVerdict, Inputs
from .fallback import Verdict
from .misfits import takes_any_gpus
from .states import GOOD, SETTLED, NodeState, States, judge_gates, lookup


class Do(StrEnum):
    WAIT = "wait"
    SKIP = "skip"
    LOOK = "look"
    """Ask the store whether it has what the node would give for these inputs."""
    CACHED = "cached"
    DEMAND = "demand"
    """Send producers whose bytes were dropped back to work."""
    FETCH = "fetch"
    """Bring what the remote store has of it."""
    SAME = "same"
    """Take what another node has given that did the same work in this run."""
    START = "start"
    SUCCEED = "succeed"
    TAKE = "take"
    """Let it take this variant of the axis along which it takes the first that passes."""
    FAIL = "fail"
    """A gate does not hold, or no variant passes."""
    DROP = "drop"
    """Let the bytes go."""
    STOP = "stop"
    """Not started, because the run ends."""


class Step(NamedTuple):
    do: Do
    why: str = ""
    """Why it is skipped, what it waits for, the producer whose files it takes as they are made, the node that it is the
    same as, or the variant."""
    producers: tuple[str, ...] = ()
    """Whose bytes it demands."""
    gate: GateVerdict | None = None
    """The one that does not hold: with CACHED, SUCCEED and SKIP, one whose node is left."""


def step(states: States, state: NodeState) -> Step:
    if state.status is Status.PENDING:
        return _pending(states, state)
    if state.status is Status.RUNNING and state.done:
        return _judged(states, state, Do.CACHED if state.remote else Do.SUCCEED)
    return _good(states, state) if state.status in GOOD else Step(Do.WAIT)


def _pending(states: States, state: NodeState) -> Step:
    if (chosen := _held_back(states, state) or _chooses(states, state)) is not None:
        return chosen
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
    if not state.remote:
        if (same := _same_work(states, state)) is not None:
            return same
        if dropped := tuple(each.name for each in state.producers if each.status in GOOD and not each.bytes_here):
            return Step(Do.DEMAND, producers=dropped)
        if foregone := _foregone(states, state):
            return foregone
    elif follows:
        return Step(Do.WAIT, follows)
    if states.stopped:
        return Step(Do.STOP)
    if lacking := _lacking(states, state, follows):
        return Step(Do.WAIT, lacking)
    return Step(Do.FETCH) if state.remote else Step(Do.START, follows)


def _held_back(states: States, state: NodeState) -> Step | None:
    """Variants after the first are not run while an earlier one may be taken."""
    found = fallback.turn(states, state)
    if found is None:
        return None
    status, why = found
    return Step(Do.WAIT if status is Status.PENDING else Do.SKIP, why)


def _chooses(states: States, state: NodeState) -> Step | None:
    """What a node does that takes the first variant that passes, until it has taken that one."""
    if (first := state.node.first) is None:
        return None
    choice, last = list(fallback.walk(states, first))[-1]
    if last is Verdict.AWAITED:
        return Step(Do.WAIT, choice.judge)
    if last is Verdict.FAILED:
        return Step(Do.SKIP, f"{fallback.broken_above(states[choice.judge])} failed")
    found = fallback.candidates(states, first)
    if not found:
        if not any(states[each.judge].left for each in first.choices):
            return Step(Do.SKIP, f"{choice.judge} is skipped")
        forgiven = state.node.on_fail in ("skip", "warn")
        return Step(Do.SKIP, fallback.none_passes(states, state).cause) if forgiven else Step(Do.FAIL)
    return None if state.choice is found[0][0] else Step(Do.TAKE, found[0][0].value)


def _same_work(states: States, state: NodeState) -> Step | None:
    """One of several nodes that do the same work does it; the others wait, and take what it gave."""
    if (worker := alike.at_work(state)) is not None:
        return Step(Do.WAIT, worker.name)
    gave = alike.gave(states, state, wants_bytes=wants_bytes(state))
    return Step(Do.SAME, gave.name) if gave else None


def _foregone(states: States, state: NodeState) -> Step | None:
    """What cannot pass, by what is forecast, is not run: a variant is left, else it fails at once."""
    if _minds_nothing(state) or state.demanded_by:
        return None
    bad = [gate for gate in judge_gates(states, state, state.forecast.metrics) if gate.failed]
    if not bad:
        return None
    if fallback.forgiven(state):
        return Step(Do.SKIP, fallback.left_text(bad), gate=bad[0])
    return None if states.foreseen else Step(Do.FAIL, gate=bad[0])


def _unsettled(state: NodeState) -> NodeState | None:
    for each in state.predecessors:
        if each.status not in SETTLED:
            return each
    return None


def _good(states: States, state: NodeState) -> Step:
    if not _up_to_date(states, state):
        return Step(Do.LOOK)
    if keeps(state) or not state.bytes_here:
        return Step(Do.WAIT)
    sharing = _sharing(states, state)
    consumers = (each for one in sharing for each in reversed(one.consumers))
    # One that failed will want its producers' bytes again, unless it has a record: then but a gate of it failed.
    taken = all(
        each.status is Status.SKIPPED
        or (each.status in GOOD and _up_to_date(states, each))
        or (each.status is Status.FAILED and each.record is not None)
        or not any(fallback.still_takes(states, each, one) for one in sharing if each in one.consumers)
        for each in consumers
    )
    return Step(Do.DROP if taken and not any(map(keeps, sharing)) else Do.WAIT)


def keeps(state: NodeState) -> bool:
    """Do its bytes stay? Those that nobody takes are what the run is for."""
    return state.node.cache or not state.consumers


def wants_bytes(state: NodeState) -> bool:
    """Does it need more than its record?"""
    return keeps(state) or bool(state.demanded_by)


def _sharing(states: States, state: NodeState) -> list[NodeState]:
    """It, and those whose bytes are the same because their key is."""
    key = state.key or ""
    return [state, *(each for each in states.of_key.get(key, ()) if each is not state and each.key == key)]


def _up_to_date(states: States, state: NodeState) -> bool:
    """Does what an ended node gave stand on what its producers have given? True while one of them is at work again."""
    found = fallback.candidates(states, state.node.first) if state.node.first else []
    if found and found[0][0] is not state.choice:
        return False
    if not all(each.status in GOOD or each.status is Status.SKIPPED for each in state.producers):
        return True
    return state.decision is None or state.decision.inputs == input_digests(state)


def _blocked(states: States, state: NodeState) -> str:
    """Why the node cannot run at all: a failed or skipped producer, or a `when` that does not hold."""
    bad = [each for each in state.predecessors if each.status not in GOOD]
    for each in bad:
        if each.status is Status.FAILED:
            return f"{each.name} failed"
    if missing := _missing_producer(states, state) if bad or any(each.left for each in state.predecessors) else "":
        return missing
    when = state.node.when
    if when is None:
        return ""
    verdict = when.evaluate(lookup(states, state))
    if verdict is None:
        return "" if states.foreseen else f"when {when.text}: not known"
    return "" if verdict.passed else f"when {when.text}: {verdict.left}"


def _missing_producer(states: States, state: NodeState) -> str:
    """The node that is not there and that this one cannot do without: one that was skipped, on a port that is not
    optional, or in `needs`; one that was left, but where it is gathered with others."""
    for port, wired in state.inputs.items():
        gone = [each.name for each in wired if each.status is Status.SKIPPED]
        if (spec := state.node.kind.port(port)) is None:
            continue
        if gone and not spec.optional and (not spec.many or len(gone) == len(wired)):
            return f"{gone[0]} is skipped"
        if not spec.many and (left := next((each for each in wired if each.left), None)):
            return f"{left.name} is left: {left.left}"
    needed = [states[name] for name in state.needs]
    skipped = (f"{each.name} is skipped" for each in needed if each.status is Status.SKIPPED)
    return next(chain(skipped, (f"{each.name} is left: {each.left}" for each in needed if each.left)), "")


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
        and fallback.turn(states, state) is None
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
    if state.remote:
        return {"jobs": 1}
    asked, forecast = state.node.resources, state.forecast
    cpus = asked.cpus or (0 if follows else state.processes)
    ram = forecast.ram or 0 if asked.ram is None else asked.ram
    foreseen = bool(forecast.vram) or takes_any_gpus(state.node, forecast)
    gpus = foreseen if asked.gpus is None else asked.gpus > 0
    return {"jobs": 0 if follows else 1, "CPUs": cpus, "RAM": ram, "GPUs": int(gpus)}


def _judged(states: States, state: NodeState, otherwise: Do) -> Step:
    """A run fails where a gate cannot be decided; what is only foreseen goes on, whatever its gates. Where that is
    forgiven, the node is left, or nobody minds."""
    bad = [gate for gate in judge_gates(states, state) if gate.failed or (gate.verdict is None and not states.foreseen)]
    if not bad:
        return Step(otherwise)
    if not fallback.forgiven(state):
        return Step(otherwise) if states.foreseen else Step(Do.FAIL, gate=bad[0])
    text = fallback.left_text(bad)
    return Step(otherwise, text, gate=None if _minds_nothing(state) else bad[0])


def _minds_nothing(state: NodeState) -> bool:
    return state.node.on_fail == "warn" and not state.judges


def input_digests(state: NodeState) -> Inputs | None:
    """Per port, the digests of what is wired there, skipped producers left out; None while one is not known.
    Of a producer that runs it is what it gave before under its key, should it give that again."""
    if state.awaits:
        return None
    found: dict[str, list[str]] = {}
    for port, wired in state.inputs.items():
        for each in wired:
            if each.status is not Status.SKIPPED:
                if (digest := _digest(each)) is None:
                    return None
                found.setdefault(port, []).append(digest)
    return found


def awaited(state: NodeState) -> list[str]:
    """The producers whose digests are not known, and the nodes that decide which variant it takes."""
    return state.awaits + [
        each.name for each in state.producers if each.status is not Status.SKIPPED and _digest(each) is None
    ]


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
    alike.note(states, state)


def same(states: States, state: NodeState, other: NodeState) -> None:
    """It takes what the other gave, which did the same work."""
    assert state.decision is not None  # noqa: S101  no other node is told to
    found = replace(
        state.decision, action=Action.CACHED, reason=f"the same as {other.name}", record=other.record,
        bytes_here=other.bytes_here, changes=(),
    )  # fmt: skip
    decided(states, state, found)
    state.metrics = other.metrics


def done(states: States, state: NodeState, record: KeyRecord) -> None:
    """Its work gave this."""
    state.record, state.metrics, state.done = record, record.metrics, True
    state.bytes_here = not (state.decision and state.decision.fetch and state.remote) or state.decision.fetch.kept
    if state.decision is not None:
        state.decision = replace(state.decision, inputs=record.inputs, key=record.key)
    _has_key(states, state)


def _has_key(states: States, state: NodeState) -> None:
    if state.key and state not in (known := states.of_key.setdefault(state.key, [])):
        known.append(state)


def take(states: States, state: NodeState, value: str) -> None:
    """It takes this variant of the axis; as far as is known."""
    first = state.node.first
    assert first is not None  # noqa: S101  no other node is told to take one
    state.choice = next(choice for choice in first.choices if choice.value == value)
    state.awaits = [each.judge for each, found in fallback.candidates(states, first) if found is Verdict.OPEN]
    asked = [name for name, _ in state.node.when.references if name is not None] if state.node.when else []
    own = [*chain.from_iterable(state.choice.inputs.values()), *state.choice.needs]
    states.wire(state, state.choice.inputs, state.choice.needs, list(dict.fromkeys([*own, *sorted(asked)])))


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


def end(states: States, state: NodeState, status: Status, reason: str, left: str = "") -> None:
    """It has come to `status`; PENDING where it followed a producer in vain. left: the gates that do not hold, where
    that is no failure."""
    state.left = left
    if left and status is Status.SKIPPED:
        state.metrics = state.forecast.metrics
    if state.status is Status.RUNNING:
        states.running.discard(state.name)
        for what, size in state.share.items():
            states.held[what] -= size
    state.status, state.reason, state.following, state.passing = status, reason, "", False
    if status is Status.FAILED and state.node.on_fail != "continue" and not states.keep_going:
        states.stopped = True
    if status in GOOD:
        state.demanded_by = ""


def drop(states: States, state: NodeState) -> None:
    for each in _sharing(states, state):
        each.bytes_here = False
        states.hold_disk(each, 0)


def passes_on(states: States, state: NodeState, *, gone: bool = False) -> bool:
    """Are its files let go while it runs, as they are taken? Where all who take them run beside it, or take what one
    of these gives.
    gone: some of them are. Then whoever failed will not find them all, and they are not kept for it. A `timeout` is
    meant for the work: who has one waits for nobody to take them."""
    if keeps(state) or state.node.timeout is not None or len(_sharing(states, state)) > 1:
        return False
    excused = {Status.SKIPPED, Status.FAILED} if gone else {Status.SKIPPED}
    return all(
        each.status in excused or any(other.following == state.name for other in (each, *alike.others(each)))
        for each in reversed(state.consumers)
    )


def _between(producer: NodeState) -> int:
    """Bytes between it and its consumers at a time: two files, or as many as one of them works on and one more. All of
    them where a consumer could not be sure to run beside it: something else it needs was at work in this run too."""
    others = [other for each in producer.consumers for other in each.predecessors if other is not producer]
    size = producer.forecast.file_bytes
    if not size or not all(other.status is Status.CACHED for other in others):
        return producer.writes
    window = max(each.forecast.works_on for each in producer.consumers)
    return max(AHEAD, math.ceil(window / size) + 1) * size
