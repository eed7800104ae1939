"""What a run would do, before it does it: which nodes run, why, what they cost, and whether that fits.

make_plan(session)
    Rehearsal       the schedule, driven with forecasts: cached, maybe or run, who follows whom, the most on the disk
    judge_gates()   early, where a recorded or forecast metric can decide
    _planned()      token, licence, prompts, destination
    find_misfits()  RAM, GPU memory, disk, devices
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bigpipe.errors import BigpipeError, DoesNotFit
from bigpipe.orchestrator.contract import Forecast, Machine, Misfit, Pinned
from bigpipe.orchestrator.recipe import Node
from bigpipe.sizes import format_size

from . import fallback
from .decision import Action, Decision, GateVerdict
from .fit import find_misfits
from .rehearsal import Rehearsal
from .session import NOTHING_PINNED, Session
from .states import NOTHING_FORESEEN, NodeState, judge_gates


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedNode:
    """What a run would do with a node now."""

    node: Node
    decision: Decision
    forecast: Forecast | None = None
    """None for cached nodes that nothing running stands on, and for skipped ones."""
    processes: int = 1
    gates: tuple[GateVerdict, ...] = ()
    refusal: BigpipeError | None = None
    """What its preflight found, or that no variant passes."""
    forgiven: bool = False
    """A gate that does not hold is no failure of the run."""
    tried: tuple[Mapping[str, str], ...] = ()
    """What is known of the variants, of a node that takes the first that passes; see `fallback.tried`."""
    pinned: Pinned = NOTHING_PINNED

    @property
    def action(self) -> Action:
        return self.decision.action


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do now, what it costs, and what does not fit."""

    session: Session
    nodes: Mapping[str, PlannedNode]
    misfits: tuple[tuple[str, Misfit], ...] = ()
    """Node name and what does not fit."""
    peak_disk: int = 0
    """The most bytes that the run adds to the disk of the store at any time."""
    followed: Mapping[str, str] = field(default_factory=dict)
    """Node name → the producer whose files it takes one by one as they are made."""

    @cached_property
    def to_run(self) -> list[PlannedNode]:
        return [node for node in self.nodes.values() if node.action.works]

    @property
    def download_bytes(self) -> int:
        return sum(p.forecast.download_bytes or 0 for p in self.to_run if p.forecast)

    @property
    def write_bytes(self) -> int:
        return sum(p.forecast.write_bytes or 0 for p in self.to_run if p.forecast)

    def errors(self) -> list[BigpipeError]:
        """Why a run would be refused now, the most fundamental first."""
        found: list[BigpipeError] = [node.refusal for node in self.nodes.values() if node.refusal]
        for name, misfit in self.misfits:
            place = self.nodes[name].node.places.of(misfit.about)
            found.append(DoesNotFit(f"{name}: {misfit.cause}", str(misfit.cure), place=place))
            found[-1].node = name
        return found + [
            gate.error(each.node)
            for each in self.nodes.values()
            for gate in each.gates
            if gate.failed and not each.forgiven
        ]


def make_plan(session: Session, *, preflight: bool = True) -> Plan:
    """Decide every selected node with what is known now.
    preflight: also ask each running kind's `check`, which may use the network for metadata.
    Raises UsageError for inputs that are not there; what does not fit is in the plan, not raised."""
    rehearsal = Rehearsal(session)
    return Plan(
        session=session,
        nodes={state.name: _planned(rehearsal, state, preflight) for state in rehearsal.states.nodes.values()},
        misfits=find_misfits(rehearsal),
        peak_disk=rehearsal.peak,
        followed=rehearsal.followed,
    )


def _planned(rehearsal: Rehearsal, state: NodeState, preflight: bool) -> PlannedNode:
    session, node = rehearsal.session, state.node
    decision, check, refusal = rehearsal.decisions[node.name], node.kind.planning.check, state.error
    if preflight and decision.action.works:
        from .effects import refuse_clash  # of what runs alone

        try:
            refuse_clash(session, node)
            if check is not None:
                session.ask(node, check, rehearsal.contexts[node.name])
        except BigpipeError as error:
            error.place = error.place or node.places.of(error.field)
            refusal, error.node = error, node.name
    return PlannedNode(
        node=node,
        decision=decision,
        forecast=None if state.forecast is NOTHING_FORESEEN else state.forecast,
        processes=state.processes,
        gates=judge_gates(rehearsal.states, state) if node.gates else (),
        refusal=refusal,
        forgiven=fallback.forgiven(state),
        tried=tuple(fallback.tried(rehearsal.states, state)),
        pinned=session.known_pins(node),
    )


def machine_line(machine: Machine) -> str:
    gpus = ", ".join(f"{gpu.name} {format_size(gpu.memory)}" for gpu in machine.gpus) or "no GPU"
    return f"{machine.cpus} CPUs, {format_size(machine.memory)} RAM, {gpus}, {format_size(machine.disk_free)} disk free"
