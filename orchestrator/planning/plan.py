"""What a run would do, before it does it: which nodes run, why, what they cost, and whether that fits.

make_plan(session)
    Rehearsal       the schedule, driven with forecasts: cached, maybe or run, who follows whom, the most on the disk
    judge_gates()   early, where a recorded or forecast metric can decide
    _planned()      token, licence, prompts, destination
    find_misfits()  RAM, GPU memory, disk, devices
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from bigpipe.environment import says_offline
from bigpipe.errors import BigpipeError, DoesNotFit, NotAuthorised, Offline
from bigpipe.names import listed
from bigpipe.orchestrator.contract import Forecast, Json, Machine, Misfit, Pinned
from bigpipe.orchestrator.recipe import Node
from bigpipe.redaction import HUB_TOKENS
from bigpipe.sizes import Total, counted, format_duration, format_free, format_size, format_transfer
from bigpipe.tables import PLAIN, Screen, columns, html_table
from bigpipe.versions import INSTALL_RUN, bars

from . import fallback
from .decision import Action, Decision, GateVerdict
from .fit import find_misfits
from .rehearsal import Rehearsal
from .session import NOTHING_PINNED, Session
from .states import NOTHING_FORESEEN, NodeState, judge_gates

if TYPE_CHECKING:
    from .smoke import Smoke


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        why = self.decision.reason.partition("\n")[0]
        return f"<PlannedNode {self.node.name}: {self.action}{f', {why}' * bool(why)}>"

    @property
    def action(self) -> Action:
        return self.decision.action


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """What a run would do now, what it costs, and what does not fit."""

    session: Session
    nodes: Mapping[str, PlannedNode]
    misfits: tuple[tuple[str, Misfit], ...] = ()
    """Node name and what does not fit."""
    peak: Total = field(default_factory=Total)
    """The most bytes that the run adds to the disk of the store at any time."""
    followed: Mapping[str, str] = field(default_factory=dict)
    """Node name → the producer whose files it takes one by one as they are made."""
    smoke: Smoke | None = None
    """Of a smoke run: what it is of."""

    @cached_property
    def to_run(self) -> list[PlannedNode]:
        return [node for node in self.nodes.values() if node.action.works]

    @cached_property
    def not_installed(self) -> dict[str, list[str]]:
        """Node that may run and cannot run here → the packages that it lacks."""
        lacking = {each.node.name: bars(each.node.kind.packages) for each in self.to_run}
        return {name: packages for name, packages in lacking.items() if packages}

    @property
    def downloads(self) -> Total:
        """Bytes that nodes which run bring from elsewhere."""
        return Total.of(each.forecast.download_bytes for each in self.to_run if each.forecast)

    @property
    def writes(self) -> Total:
        """Bytes that nodes which run write."""
        return Total.of(each.forecast.write_bytes for each in self.to_run if each.forecast)

    @property
    def download_bytes(self) -> int | None:
        """`downloads`; None where some are not known."""
        return self.downloads.exact

    @property
    def write_bytes(self) -> int | None:
        """`writes`; None where some are not known."""
        return self.writes.exact

    @property
    def peak_disk(self) -> int | None:
        """`peak`; None where some of what is written is not known."""
        return self.peak.exact

    @property
    def fetch_bytes(self) -> int:
        """Bytes that come from the remote store."""
        return sum(node.decision.fetch.bytes for node in self.nodes.values() if node.decision.fetch)

    def render(self, *, width: int | None = None, explain: bool = False) -> str:
        """Return what `bigpipe plan` prints. width: of lines, in characters; None: without end. explain: keys, every
        change and every forecast metric too."""
        return plan_text(self, explain=explain, screen=Screen(width))

    def __repr__(self) -> str:
        misfits = f"; {counted(len(self.misfits), 'misfit')}" if self.misfits else ""
        return f"<Plan of {self.session.recipe.name}: {totals(self)}{misfits}>"

    def _repr_html_(self) -> str:
        errors = "\n".join(map(str, self.errors()))
        return html_table(repr(self), ("node", "action", "why"), plan_rows(self), errors)

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
        peak=Total(rehearsal.peak, rehearsal.sized),
        followed=rehearsal.followed,
    )


def _planned(rehearsal: Rehearsal, state: NodeState, preflight: bool) -> PlannedNode:
    session, node = rehearsal.session, state.node
    decision, check, refusal = rehearsal.decisions[node.name], node.kind.planning.check, state.error
    if preflight and (session.offline or says_offline(node.env)) and decision.action is Action.RUN:
        refusal = refusal or rehearsal.unanswered.get(node.name)
    if preflight and decision.action.works:
        from .effects import refuse_clash  # of what runs alone

        try:
            refuse_clash(session, node)
            _refuse_unset(session, node)
            if check is not None:
                session.ask(node, check, rehearsal.contexts[node.name])
        except BigpipeError as error:
            error.place, error.node = error.place or node.places.of(error.field), node.name
            if decision.action is Action.RUN or not isinstance(error, Offline):  # else it may never be asked
                refusal = error
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


def _refuse_unset(session: Session, node: Node) -> None:
    """Raise NotAuthorised where a secret that the stage itself lists is not set, or is empty, as a CI system hands over
    one that it does not have. A Hub token may lie in a file; what another machine has set is not known here."""
    found = session.secrets(node)
    unset = [name for name in node.secrets if not found.get(name) and name not in (*node.kind.secrets, *HUB_TOKENS)]
    if unset and session.given_machine is None:
        cause = f"secrets that {node.name} lists are not set: {listed(unset)}"
        raise NotAuthorised(cause, f"export {unset[0]}=…, or take it out of the stage's `secrets`", field="secrets")


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Return per node its name, what a run would do with it, and why."""
    return [(name, str(node.action), node_line(node, plan.followed.get(name, ""))) for name, node in plan.nodes.items()]


def plan_text(plan: Plan, *, explain: bool = False, screen: Screen = PLAIN) -> str:
    """Return what `bigpipe plan` prints: a row per node, the totals, what is not known, the machine."""
    lines = [columns(plan_rows(plan), screen), "", *(_explanations(plan) if explain else ()), totals(plan)]
    for name, planned in plan.nodes.items():
        if planned.forecast and planned.forecast.unknown:
            lines += [f"not known: {name}: {fact}" for fact in planned.forecast.unknown]
        if planned.pinned.source:
            pins = ", ".join(f"{field} = {value[:12]}" for field, value in planned.pinned.values.items())
            lines.append(f"{name}: {pins} from {planned.pinned.source}")
    lines += _not_installed(plan)
    if remote := plan.session.remote:
        lines.append(f"remote store: {remote.name}" + (f", which is not used: {remote.away}" if remote.away else ""))
    if plan.to_run:
        lines += machine_lines(plan.session)
    elif not any(each.action is Action.REMOTE for each in plan.nodes.values()):
        lines.append("nothing to do")
    return "\n".join([*lines, *(plan.smoke.told() if plan.smoke else ())])


def _not_installed(plan: Plan) -> list[str]:
    counted_with: dict[str, Json] = {}
    for name, packages in plan.not_installed.items():
        versions = plan.session.identity(plan.nodes[name].node).packages
        counted_with |= {package: versions[package] for package in packages}
    told = ", ".join(f"{package} {version}" for package, version in sorted(counted_with.items()))
    nodes = ", ".join(plan.not_installed)
    return [f"not installed here: {told}, counted with for {nodes}; to run: {INSTALL_RUN}"] if told else []


def totals(plan: Plan) -> str:
    counts = Counter(node.action for node in plan.nodes.values())
    text = ", ".join(f"{counts[action]} {action}" for action in Action if counts[action])
    if plan.fetch_bytes:
        text += f"; {format_transfer(plan.fetch_bytes)} from the remote store"
    if plan.to_run:
        text += f"; {plan.downloads} down, {plan.writes} written"
        if plan.peak.known and plan.peak.known != plan.writes.known:
            text += f", {'at most ' * plan.peak.whole}{plan.peak} of disk at a time"
        seconds = [p.forecast.seconds for p in plan.to_run if p.forecast]
        if seconds and all(value is not None for value in seconds):
            total = sum(value or 0 for value in seconds)
            text += f", about {format_duration(total, whole=True)}" if total >= 1 else ", under a second"
    return text


def node_line(planned: PlannedNode, follows: str = "") -> str:
    """Return one line: the reason, what it costs, whose files it takes as they are made, its gates."""
    if planned.action in (Action.CACHED, Action.SKIPPED):
        return "; ".join(filter(None, [planned.decision.reason, *gate_lines(planned)]))
    if fetch := planned.decision.fetch:
        came = f"{format_transfer(fetch.bytes)} to fetch" if fetch.bytes else "nothing to fetch"
        seconds = fetch.seconds or 0
        time = f", about {format_duration(seconds, whole=True)}" if seconds >= 1 else ""
        return "; ".join([came + time, *gate_lines(planned)])
    parts = [planned.decision.reason]
    if forecast := planned.forecast:
        costs = [
            f"{format_transfer(forecast.download_bytes)} down" if forecast.download_bytes else "",
            f"{format_transfer(forecast.write_bytes)} written" if forecast.write_bytes and not forecast.summary else "",
            f"{format_size(forecast.ram)} RAM" if forecast.ram else "",
            *(f"{format_size(size)} on GPU {index}" for index, size in (forecast.vram or {}).items()),
        ]
        parts += [forecast.summary, ", ".join(filter(None, costs))]
    if follows:
        parts.append(f"beside {follows}, file by file")
    return "; ".join(filter(None, [*parts, *gate_lines(planned)]))


def gate_lines(planned: PlannedNode) -> list[str]:
    fails = " does not hold" if planned.forgiven else " FAILS"
    return [
        f"gate {gate.gate.text}: {gate.verdict.left if gate.verdict else 'decided by the run'}{fails * gate.failed}"
        for gate in planned.gates
        if gate.verdict or planned.action is not Action.SKIPPED
    ]


def _explanations(plan: Plan) -> list[str]:
    lines = []
    for name, planned in plan.nodes.items():
        lines.append(f"{name}: key {planned.decision.key or 'not known yet'}")
        for change in planned.decision.changes:
            place = planned.node.places.get(change.path)
            lines.append(f"    {change.path} {change.old} → {change.new}" + (f"   ({place})" if place else ""))
        if planned.forecast:
            lines += [f"    {key} = {value}" for key, value in sorted(planned.forecast.metrics.items())]
            lines += [f"    {line}" for line in planned.forecast.details]
    return [*lines, ""]


def machine_lines(session: Session) -> list[str]:
    """Return the machines that are planned for: this one, or a cluster's, those that are alike in one line."""
    if session.cluster is None:
        return [f"machine: {machine_line(session.machine)}"]
    kinds = Counter(_computes_with(host.machine) for host in session.cluster.hosts)
    there = [f"    {count} × {kind}" if count > 1 else f"    {kind}" for kind, count in kinds.items()]
    return [f"machines of {session.cluster.name}:", *there]


def machine_line(machine: Machine) -> str:
    """Return what a machine has: GPUs of a kind together."""
    return f"{_computes_with(machine)}, {format_free(machine.disk_free, 'disk')}"


def _computes_with(machine: Machine) -> str:
    kinds = Counter(f"{gpu.name} {format_size(gpu.memory)}" for gpu in machine.gpus)
    gpus = ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items()) or "no GPU"
    return f"{machine.cpus} CPUs, {format_size(machine.memory)} RAM, {gpus}"
