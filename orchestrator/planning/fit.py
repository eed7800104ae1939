"""Does what will run fit the machine: RAM, GPU memory, devices, disk; and which change that was tried makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, dropwhile, islice, takewhile
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from bigpipe.errors import BigpipeError
from bigpipe.fit import Cure, Misfit, fits, nearest
from bigpipe.orchestrator.contract import OneOf
from bigpipe.sizes import counted, format_transfer

from .misfits import asked_misfits, foreseen_misfits
from .rehearsal import Rehearsal
from .session import Session
from .states import NodeState

MOST_HALVINGS = 8
"""Values that are tried to find the largest number that passes."""
MOST_DOUBLINGS = 24
"""Values that are tried where a field has none."""
MOST_DROPPED = 8
"""Artifacts of which it is tried not to keep the bytes."""


def find_misfits(rehearsal: Rehearsal) -> tuple[tuple[str, Misfit], ...]:
    """Everything that will not fit, as (node name, misfit), in topological order; the disk last."""
    found: list[tuple[str, Misfit]] = []
    for state in rehearsal.states.nodes.values():
        if rehearsal.decisions[state.name].action.works:
            machine, asked = rehearsal.session.machine_of(state.node), state.node.resources
            foreseen = list(foreseen_misfits(machine, asked, state.forecast))
            if foreseen and _held_elsewhere(rehearsal.session, state):
                foreseen = []
            cure = _smaller(rehearsal, state) if foreseen else ""
            own = [
                *(Misfit(cause, cure) for cause in foreseen),
                *(asked_misfits(machine, asked) if asked.model_fields_set else ()),
                *_too_few(rehearsal.session, state),
            ]
            found += [(state.name, misfit) for misfit in (*state.forecast.misfits, *own)]
    return (*found, *_disk(rehearsal))


def _held_elsewhere(session: Session, state: NodeState) -> bool:
    """Does another machine of a cluster than the one that it is planned for hold it?"""
    if session.cluster is None or state.node.kind.runs_in == "inline":
        return False
    from .spreading import able  # of what has a cluster

    return bool(able(session.cluster, session.asking(state.node), state.forecast))


def _too_few(session: Session, state: NodeState) -> Iterator[Misfit]:
    """A cluster has fewer machines than ranks are to run on."""
    if session.cluster is None or (asked := session.surroundings(state.node).launch.num_machines) == 1:
        return
    from .spreading import able

    if not fits(asked, there := len(able(session.cluster, session.asking(state.node), state.forecast))):
        cause = f"asks for {counted(asked, 'machine')}; {session.cluster.name} has {there} that may take it"
        yield Misfit(cause, Cure({"launch.num_machines": there}) if there else "")


def _smaller(rehearsal: Rehearsal, state: NodeState) -> Cure | str:
    """The change of one field of the node's own under which its forecast fits: of those that its kind names, each
    forecast anew. A forecast that knows less does not fit better."""
    node, machine, context = state.node, rehearsal.session.machine_of(state.node), rehearsal.contexts[state.name]

    def changed(name: str, value: Any) -> Any:
        return type(node.params).model_validate({**node.params.model_dump(exclude_unset=True), name: value})

    def valid(name: str, value: Any) -> bool:
        try:
            changed(name, value)
        except ValueError:
            return False
        return True

    def holds(name: str, value: Any) -> bool:
        try:
            forecast = node.kind.forecast(changed(name, value), context)
        except (BigpipeError, ValueError):
            return False
        knows = set(forecast.unknown) <= set(state.forecast.unknown) and not forecast.misfits
        return knows and not any(foreseen_misfits(machine, node.resources, forecast))

    fields, named = type(node.params).model_fields, node.kind.planning.smaller
    for name in fields if named is None else named:
        written, value = fields[name].alias or name, getattr(node.params, name)
        found = another(fields[name], value, partial(valid, written), partial(holds, written))
        if found is not None:
            return Cure({written: found})
    return "none of its fields alone makes it fit: plan for another --machine"


def another(field: FieldInfo, value: Any, valid: Callable[[Any], bool], passes: Callable[[Any], bool]) -> Any:
    """Return a value of a field that passes: the largest smaller whole number, to a 256th of what it is; where there is
    none, as many as a power of two; or another choice. None where none does. valid: may it stand there at all?"""
    if isinstance(value, int) and not isinstance(value, bool):
        least = nearest(value, 0, valid)
        return (
            nearest(least, value, passes, step=max(1, value // 2**MOST_HALVINGS)) if least and least < value else None
        )
    if value is None and int in get_args(field.annotation):
        numbers = dropwhile(lambda number: not valid(number), (2**power for power in range(MOST_DOUBLINGS)))
        return max(takewhile(passes, numbers), default=None)
    tables = (mark.names() for mark in field.metadata if isinstance(mark, OneOf))
    choices = (choice for choice in chain(_choices(field.annotation), *tables) if choice != value)
    return next(filter(passes, choices), None)


def _choices(annotation: Any) -> list[str]:
    """The words of a `Literal`, alone or among other types."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def _disk(rehearsal: Rehearsal) -> list[tuple[str, Misfit]]:
    peak, free = rehearsal.peak, rehearsal.session.machine.disk_free
    if fits(peak, free):
        return []
    cures = [f"free {format_transfer(peak - free)}", *islice(_disk_changes(rehearsal), 1)]
    cause = f"needs {format_transfer(peak)} of disk; {format_transfer(free)} are free"
    return [(rehearsal.where, Misfit(cause, ", or ".join(cures)))]


def _disk_changes(rehearsal: Rehearsal) -> Iterator[str]:
    """The ways to run it under which it fits: side by side or not, without the bytes of one artifact of which others
    are made, or without those of all. Each is rehearsed."""
    session, states = rehearsal.session, rehearsal.states.nodes.values()

    def needs(session: Session, dropped: Sequence[str]) -> int:
        nodes = (replace(each.node, cache=False) if each.name in dropped else each.node for each in states)
        known = zip(nodes, states, strict=True)
        return Rehearsal(session, [NodeState(node, each.forecast, each.processes) for node, each in known]).peak

    kept = sorted((each for each in states if each.node.cache and each.consumers), key=lambda each: -each.writes)
    names = [each.name for each in kept if each.writes][:MOST_DROPPED]
    tries: list[tuple[str, Session, Sequence[str]]] = []
    if session.cluster is None:  # there, files do not pass from node to node while they are made
        other = replace(session, side_by_side=not session.side_by_side)
        tries = [(f"run {'with' if session.side_by_side else 'without'} `--jobs 1`", other, names[:0])]
    tries += [
        (f"`cache: false` on {' and '.join(each)}", session, each) for each in (*([name] for name in names), names)
    ]
    for text, way, dropped in tries:
        if fits(peak := needs(way, dropped), session.machine.disk_free):
            yield f"{text}: that needs {format_transfer(peak)}"
