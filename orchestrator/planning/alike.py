"""Nodes of one run that do the same work: an axis is declared above them, or two stages are written alike.

One of them does it, and the others wait for it and take what it gave. While the digests of their inputs are not known
they have no key; then they are known by who makes these.
"""

from __future__ import annotations

from bigpipe.orchestrator.contract import Status

from .decision import Action
from .states import NodeState, States


def note(states: States, state: NodeState) -> None:
    """It was looked up: count it among those that do its work."""
    partial = state.decision.partial if state.decision else ""
    if partial:
        made_by = sorted((port, *(each.alike[0].name for each in wired)) for port, wired in state.inputs.items())
        state.alike = states.of_work.setdefault((partial, *made_by), [])
        if state not in state.alike:
            state.alike.append(state)


def others(state: NodeState) -> list[NodeState]:
    """Return the other nodes that do its work."""
    return [each for each in state.alike if each is not state and each.alike is state.alike]


def at_work(state: NodeState) -> NodeState | None:
    """Return the one that is doing it now."""
    keys = (None, state.key) if state.key else ()
    running = (each for each in others(state) if each.status is Status.RUNNING)
    return next((each for each in running if not keys or each.key in keys), None)


def gave(states: States, state: NodeState, *, wants_bytes: bool) -> NodeState | None:
    """Return one that has done it in this run. wants_bytes: what it gave must be there. Foreseen: what only may run
    says nothing of what surely does."""
    for each in others(state):
        sure = not states.foreseen or not _may_run(each) or _may_run(state)
        done = each.status is Status.SUCCEEDED and each.key == state.key
        if done and sure and (each.bytes_here or not wants_bytes):
            return each
    return None


def _may_run(state: NodeState) -> bool:
    return state.decision is not None and state.decision.action is Action.MAYBE
