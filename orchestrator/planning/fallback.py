"""Which variant of an axis a node takes: the first whose gates hold. Those after it are not run.

    walk(first)         the choices in order, each with what is known of it, up to the first that decides
    candidates(first)   the choices that may be taken: in a run one at most, in a plan also those that are not decided
    turn(node)          a node that only some choices need: is it its turn?

All of it follows from what the judges, the nodes whose gates decide, have come to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum

from bigpipe.errors import GateFailed
from bigpipe.names import listed
from bigpipe.orchestrator.contract import Status
from bigpipe.orchestrator.recipe import Choice, First

from .decision import GateVerdict
from .states import GOOD, NodeState, States, Trial, judge_gates


class Verdict(StrEnum):
    """What is known of a choice."""

    PASSED = "passed"
    LEFT = "left"
    OPEN = "open"
    """Only foreseen: the run will decide."""
    AWAITED = "awaited"
    FAILED = "failed"
    """What it stands on broke: that is no verdict of a gate, and nothing else is tried."""


def verdict(states: States, choice: Choice) -> Verdict:
    judge = states[choice.judge]
    again = bool(judge.demanded_by) and judge.record is not None and judge.status is not Status.FAILED
    if (judge.status in GOOD or again) and not judge.left:  # bytes that are made again: its gates are judged
        undecided = states.foreseen and any(gate.verdict is None for gate in judge_gates(states, judge))
        return Verdict.OPEN if undecided else Verdict.PASSED
    if judge.status is Status.FAILED or (judge.status is Status.SKIPPED and broken_above(judge)):
        return Verdict.FAILED
    return Verdict.LEFT if judge.left or judge.status is Status.SKIPPED else Verdict.AWAITED


def broken_above(state: NodeState) -> str:
    """The failed node that this one stands on, itself too; "" where there is none."""
    waiting = [state]
    for each in waiting:
        if each.status is Status.FAILED:
            return each.name
        waiting += [one for one in each.predecessors if one not in waiting]
    return ""


def walk(states: States, first: First) -> Iterator[tuple[Choice, Verdict]]:
    for choice in first.choices:
        found = verdict(states, choice)
        yield choice, found
        if found not in (Verdict.LEFT, Verdict.OPEN):
            return


def candidates(states: States, first: First) -> list[tuple[Choice, Verdict]]:
    return [each for each in walk(states, first) if each[1] in (Verdict.PASSED, Verdict.OPEN)]


def still_takes(states: States, consumer: NodeState, producer: NodeState) -> bool:
    """May it still take what the producer gave? Not where that belongs to choices that were left alone."""
    first = consumer.node.first
    if first is None:
        return True
    known = dict(zip((choice.value for choice in first.choices), walk(states, first), strict=False))
    wanted = [choice for choice in first.choices if known.get(choice.value, (choice, None))[1] is not Verdict.LEFT]
    wanted = [consumer.choice] if consumer.choice in wanted else wanted
    return any(producer.name in names for choice in wanted if choice for names in choice.inputs.values())


def turn(states: States, state: NodeState) -> tuple[Status, str] | None:
    """None: it goes on. Else PENDING and the judge it waits for, or SKIPPED and why."""
    turns = [_turn(states, trial) for trial in state.trials]
    if not turns or None in turns:
        return None
    return next((each for each in turns if each and each[0] is Status.PENDING), turns[0])


def _turn(states: States, trial: Trial) -> tuple[Status, str] | None:
    first = trial.first
    for number, (choice, found) in enumerate(walk(states, first)):
        own = number == trial.index
        if own and (not trial.after or found in (Verdict.PASSED, Verdict.OPEN)):
            return None
        if found is Verdict.AWAITED:
            return Status.PENDING, choice.judge
        if found is Verdict.FAILED:
            return Status.SKIPPED, f"{broken_above(states[choice.judge])} failed"
        if found is Verdict.PASSED:
            return Status.SKIPPED, f"{first.axis} {choice.value} is taken"
        if own:
            return Status.SKIPPED, f"{first.axis} {choice.value} is left: {_why(states[choice.judge])}"
    raise AssertionError("a walk ends at the choice that is asked for, or at one that decides")


def conditional(states: States, state: NodeState) -> str:
    """Under which condition a node on trial will run, where that is not decided yet; "" where it will."""
    texts = []
    for trial in state.trials:
        tried = list(walk(states, trial.first))[: trial.index + 1]
        before = [choice.value for choice, found in tried[: trial.index] if found is Verdict.OPEN]
        own = [choice.value for choice, found in tried[trial.index :] if found is Verdict.OPEN and trial.after]
        parts = [f"{trial.first.axis} {listed(before)} {'does' if len(before) == 1 else 'do'} not pass"] * bool(before)
        parts += [f"{trial.first.axis} {value} passes" for value in own]
        if not parts:
            return ""
        texts.append(f"if {' and '.join(parts)}")
    return " or ".join(dict.fromkeys(texts))


def forgiven(state: NodeState) -> bool:
    """Is a gate of the node that does not hold no failure: because another variant is tried, or nobody minds?"""
    return state.judges or state.node.on_fail in ("skip", "warn")


def left_text(gates: Iterable[GateVerdict]) -> str:
    """Return `gate ratio >= 3: 1.9`, for each of the gates that do not hold."""
    return "; ".join(f"gate {each.gate.text}: {each.verdict.left if each.verdict else 'unknown'}" for each in gates)


def _why(judge: NodeState) -> str:
    return judge.left or judge.reason


def tried(states: States, state: NodeState) -> list[dict[str, str]]:
    """Return per choice, in order: its `value`, the node that `judge`s it, what it came to (`taken`, `left`, `may`: not
    decided yet, `not run`: its turn has not come), and `why`."""
    first = state.node.first
    if first is None:
        return []
    seen = {choice.value: found for choice, found in walk(states, first)}
    words = {Verdict.PASSED: "taken", Verdict.LEFT: "left", Verdict.OPEN: "may", Verdict.FAILED: "failed"}
    rows = []
    for choice in first.choices:
        found = seen.get(choice.value)
        came_to = words.get(found, "not run") if found else "not run"
        why = _why(states[choice.judge]) * (found is Verdict.LEFT)
        rows.append({"value": choice.value, "judge": choice.judge, "came_to": came_to, "why": why})
    may = [row for row in rows if row["came_to"] in ("may", "taken")]
    if len(may) > 1:
        may[-1]["came_to"] = "may"
    return rows


def tried_text(axis: str, rows: Iterable[dict[str, str]]) -> str:
    """Return `takes scheme int8; nf4 is left: gate ratio >= 3: 1.9`, or which one may be taken."""
    rows = list(rows)
    values = {word: [row["value"] for row in rows if row["came_to"] == word] for word in ("taken", "may")}
    parts = [f"takes {axis} {value}" for value in values["taken"]]
    if values["may"]:
        parts.append(f"takes the first {axis} that passes: {listed(values['may'], 'or')}")
    return "; ".join(parts + [f"{row['value']} is left: {row['why']}" for row in rows if row["came_to"] == "left"])


def told(states: States, state: NodeState) -> str:
    """Return what to tell of a node that has ended well: that it is left, or which variant it takes."""
    if state.left:
        return f"left: {state.left}"
    first = state.node.first
    return tried_text(first.axis, tried(states, state)) if first is not None else ""


def leads_on(states: States, state: NodeState) -> str | None:
    """Is the node a part of what led to those that depend on it? "" where it is; None where its variant was not taken;
    of the judge of one that was left, why."""
    found = [
        dict(enumerate(verdict for _, verdict in walk(states, each.first))).get(each.index) for each in state.trials
    ]
    if not found or Verdict.PASSED in found:
        return ""
    return _why(state) if state.judges and Verdict.LEFT in found else None


def none_passes(states: States, state: NodeState) -> GateFailed:
    """The error of a node that none of its choices was left for, with every variant's numbers."""
    first = state.node.first
    assert first is not None  # noqa: S101  it is asked of no other
    said = "; ".join(f"{row['value']}: {row['why']}" for row in tried(states, state))
    cure = f"loosen a gate of {first.of}, or add to the axis a value that passes"
    error = GateFailed(f"{state.name}: no {first.axis} passes: {said}", cure, place=state.node.places.get("first"))
    error.node = state.name
    return error
