"""What a run would do, before it does it: which nodes run, why, what they cost, and whether that fits.

make_plan(session)
    decide()        cached, maybe or run, in topological order
    demand()        dropped bytes that a consumer needs are made again
    forecast()      carried from node to node, only where something runs
    judge_gates()   early, where a recorded or forecast metric can decide
    preflight()     token, licence, prompts, destination
    find_misfits()  RAM, GPU memory, disk, devices
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from bigpipe.errors import BigpipeError, DoesNotFit, GateFailed, Offline
from bigpipe.orchestrator.contract.contexts import ForecastContext
from bigpipe.orchestrator.contract.forecast import Forecast, Misfit
from bigpipe.orchestrator.contract.stage import Pinned
from bigpipe.orchestrator.contract.types import Json, Machine
from bigpipe.orchestrator.recipe.conditions import UNKNOWN, Condition, Lookup, Verdict
from bigpipe.orchestrator.recipe.graph import Node

from .decision import Action, Decision, decide
from .fit import find_misfits
from .session import NOTHING_PINNED, Session, metric
from .sidebyside import Disk, followed

COMPARABLE_WITHIN = 3
"""The factor within which a recorded run counts as comparable: seconds then go in proportion to what is written. Beyond
it the start of a process weighs otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    gate: Condition
    verdict: Verdict | None
    """None: not known before the node has run."""
    cure: str = ""
    """A change of the recipe's parameters under which it holds, where one was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedNode:
    node: Node
    decision: Decision
    forecast: Forecast | None = None
    """None for cached nodes that nothing running stands on, and for skipped ones."""
    gates: tuple[GateVerdict, ...] = ()
    problem: BigpipeError | None = None
    """What its preflight, or the look for its inputs, found."""
    pinned: Pinned = NOTHING_PINNED

    @property
    def action(self) -> Action:
        return self.decision.action


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    session: Session
    nodes: Mapping[str, PlannedNode]
    misfits: tuple[tuple[str, Misfit], ...] = ()
    """Node name and what does not fit."""
    peak_disk: int = 0
    """The most bytes that the run adds to the disk of the store at any time."""
    followed: Mapping[str, str] = field(default_factory=dict)
    """Node name → the producer whose files it takes one by one as they are made."""

    @property
    def to_run(self) -> list[PlannedNode]:
        return [node for node in self.nodes.values() if node.action in (Action.RUN, Action.MAYBE)]

    @property
    def download_bytes(self) -> int:
        return sum(p.forecast.download_bytes or 0 for p in self.to_run if p.forecast)

    @property
    def write_bytes(self) -> int:
        return sum(p.forecast.write_bytes or 0 for p in self.to_run if p.forecast)

    def errors(self) -> list[BigpipeError]:
        """Why a run would be refused now, the most fundamental first."""
        found: list[BigpipeError] = [node.problem for node in self.nodes.values() if node.problem]
        found += [
            DoesNotFit(f"{name}: {misfit.cause}", str(misfit.cure), place=self.nodes[name].node.places.get(""))
            for name, misfit in self.misfits
        ]
        for planned in self.nodes.values():
            found += [gate_error(planned.node, g.gate, g.verdict, g.cure) for g in planned.gates if failed(g.verdict)]
        return found


def make_plan(session: Session, *, preflight: bool = True) -> Plan:
    """Decide every selected node with what is known now.

    preflight: also ask each running kind's `check`, which may use the network for metadata.
    Raises UsageError for inputs that are not there; what does not fit is in the plan, not raised.
    """
    decisions = demand(session, _decide_all(session))
    forecasts = _forecast_all(session, decisions)
    planned: dict[str, PlannedNode] = {}
    for node in session.nodes:
        decision, forecast = decisions[node.name], forecasts.get(node.name)
        planned[node.name] = PlannedNode(
            node=node,
            decision=decision,
            forecast=forecast,
            gates=judge_gates(node, _lookup(decisions, forecasts, node)),
            problem=_preflight(session, node, decision, forecasts) if preflight else None,
            pinned=session.known_pins(node),
        )
    disk = Disk(session, decisions, forecasts)
    return Plan(
        session=session,
        nodes=planned,
        misfits=find_misfits(session, decisions, forecasts, disk),
        peak_disk=disk.peak,
        followed={node.name: name for node in session.nodes if (name := followed(session, decisions, node))},
    )


def _decide_all(session: Session) -> dict[str, Decision]:
    decisions: dict[str, Decision] = {}
    digests: dict[str, str | None] = {}
    absent: set[str] = set()
    for node in session.nodes:
        decision = _decide(session, node, decisions, digests, absent)
        decisions[node.name] = decision
        if decision.action is Action.SKIPPED:
            absent.add(node.name)
        known = decision.action is Action.CACHED and decision.record is not None
        digests[node.name] = decision.record.digest if known and decision.record else None
    return decisions


def _decide(
    session: Session,
    node: Node,
    decisions: Mapping[str, Decision],
    digests: Mapping[str, str | None],
    absent: Collection[str],
) -> Decision:
    if missing := missing_producer(node, absent):
        return Decision(action=Action.SKIPPED, reason=f"{missing} is skipped")
    doubtful = False
    if node.when is not None:
        verdict = node.when.evaluate(_recorded_lookup(decisions))
        if verdict is not None and not verdict.passed:
            return Decision(action=Action.SKIPPED, reason=when_text(node.when, verdict))
        doubtful = verdict is None
    try:
        decision = decide(session, node, digests, absent)
    except Offline as error:
        return Decision(action=Action.RUN, reason=f"not known offline: {error.cause}")
    if doubtful and decision.action is Action.RUN and node.when is not None:
        return replace(decision, action=Action.MAYBE, reason=f"when {node.when.text} holds; {decision.reason}")
    return decision


def missing_producer(node: Node, absent: Collection[str]) -> str | None:
    """The skipped node this one cannot do without: on a port that is not optional, or in `needs`."""
    for port, names in node.inputs.items():
        gone = [name for name in names if name in absent]
        spec = node.kind.inputs[port]
        if gone and not spec.optional and (not spec.many or len(gone) == len(names)):
            return gone[0]
    return next((name for name in node.needs if name in absent), None)


def when_text(condition: Condition, verdict: Verdict) -> str:
    return f"when {condition.text}: {verdict.left}"


def demand(session: Session, decisions: dict[str, Decision]) -> dict[str, Decision]:
    """A `cache: false` node whose bytes were dropped runs again only if a consumer must."""
    result = dict(decisions)
    for node in reversed(session.nodes):
        decision = result[node.name]
        if decision.action is not Action.CACHED or decision.bytes_here:
            continue
        needing = [c for c in session.consumers(node.name) if result[c.name].action in (Action.RUN, Action.MAYBE)]
        if needing:
            sure = any(result[consumer.name].action is Action.RUN for consumer in needing)
            names = " and ".join(consumer.name for consumer in needing)
            result[node.name] = replace(
                decision,
                action=Action.RUN if sure else Action.MAYBE,
                reason=f"its bytes were dropped (cache: false) and {names} needs them",
            )
    return result


def _forecast_all(session: Session, decisions: Mapping[str, Decision]) -> dict[str, Forecast]:
    """Forecasts of what runs, and of the cached nodes it stands on."""
    wanted: set[str] = set()
    for node in reversed(session.nodes):
        runs = decisions[node.name].action in (Action.RUN, Action.MAYBE)
        if runs or node.name in wanted:
            wanted.add(node.name)
            wanted.update(name for names in node.inputs.values() for name in names)
    forecasts: dict[str, Forecast] = {}
    for node in session.nodes:
        if node.name in wanted and decisions[node.name].action is not Action.SKIPPED:
            forecasts[node.name] = _forecast(session, node, decisions[node.name], forecasts)
    return forecasts


def _inputs(node: Node, forecasts: Mapping[str, Forecast]) -> dict[str, tuple[Forecast, ...]]:
    found = {port: tuple(forecasts[name] for name in names if name in forecasts) for port, names in node.inputs.items()}
    return {port: values for port, values in found.items() if values}


def _forecast(session: Session, node: Node, decision: Decision, forecasts: Mapping[str, Forecast]) -> Forecast:
    cached = decision.action is Action.CACHED
    record = decision.record if cached else None
    artifact = session.store.artifact_path(record.digest) if record and record.digest and decision.bytes_here else None
    context = ForecastContext(
        surroundings=session.surroundings(node),
        inputs=_inputs(node, forecasts),
        artifact=artifact,
        pins=session.known_pins(node).values,
    )
    try:
        forecast = node.kind.forecast(node.params, context)
    except Offline as error:
        forecast = Forecast(unknown=(error.cause,))
    if cached:
        metrics = record.metrics if record else forecast.metrics
        return replace(
            forecast, download_bytes=0, write_bytes=0, ram=0, vram={}, seconds=0, metrics=metrics, misfits=()
        )
    seconds = _seconds(session, node, forecast)
    return forecast if seconds == forecast.seconds else replace(forecast, seconds=seconds)


def _seconds(session: Session, node: Node, forecast: Forecast) -> float | None:
    """What the same params took the last time for about as much, in proportion; else what the kind reckons; else what
    the node took the last time, whatever that was."""
    last = session.last(node.name)
    if last is None:
        return forecast.seconds
    written = sum(int(file["size"]) for file in last.files.values())
    ratio = forecast.write_bytes / written if written and forecast.write_bytes else 1.0
    alike = last.partial == session.identity(node).partial and 1 / COMPARABLE_WITHIN <= ratio <= COMPARABLE_WITHIN
    if alike:
        return last.seconds * ratio
    return last.seconds if forecast.seconds is None else forecast.seconds


def _recorded_lookup(decisions: Mapping[str, Decision]) -> Lookup:
    def lookup(name: str | None, path: str) -> Json:
        decision = decisions.get(name or "")
        if decision is None or decision.action is not Action.CACHED or decision.record is None:
            return UNKNOWN
        return _value(decision.record.metrics, path)

    return lookup


def _lookup(decisions: Mapping[str, Decision], forecasts: Mapping[str, Forecast], own: Node) -> Lookup:
    recorded = _recorded_lookup(decisions)

    def lookup(name: str | None, path: str) -> Json:
        name = name or own.name
        if name in forecasts:
            return _value(forecasts[name].metrics, path)
        return recorded(name, path)

    return lookup


def _value(metrics: Mapping[str, Json], path: str) -> Json:
    try:
        return metric(metrics, path)
    except KeyError:
        return UNKNOWN


def judge_gates(node: Node, lookup: Lookup) -> tuple[GateVerdict, ...]:
    return tuple(GateVerdict(gate=gate, verdict=gate.evaluate(lookup)) for gate in node.gates)


def failed(verdict: Verdict | None) -> bool:
    return verdict is not None and not verdict.passed


def gate_error(node: Node, gate: Condition, verdict: Verdict | None, cure: str = "") -> GateFailed:
    measured = verdict.left if verdict else "unknown"
    return GateFailed(
        f"{node.name}: gate {gate.text}: {measured}",
        cure or "change the recipe so that the gate holds, or the gate",
        place=gate.place,
    )


def _preflight(
    session: Session, node: Node, decision: Decision, forecasts: Mapping[str, Forecast]
) -> BigpipeError | None:
    if node.kind.planning.check is None or decision.action not in (Action.RUN, Action.MAYBE):
        return None
    try:
        node.kind.planning.check(node.params, session.check_context(node, _inputs(node, forecasts)))
    except BigpipeError as error:
        error.place = error.place or node.places.get("")
        return error
    return None


def machine_line(machine: Machine) -> str:
    from bigpipe.sizes import format_size

    gpus = ", ".join(f"{gpu.name} {format_size(gpu.memory)}" for gpu in machine.gpus) or "no GPU"
    return f"{machine.cpus} CPUs, {format_size(machine.memory)} RAM, {gpus}, {format_size(machine.disk_free)} disk free"
