"""The `-p` that makes a plan pass: the smallest change of a misfit or a gate, in the recipe's parameters, and tried."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from bigpipe.errors import BigpipeError
from bigpipe.fit import Cure, as_parameters, flow
from bigpipe.orchestrator.recipe import Node

from .decision import GateVerdict
from .fit import another
from .plan import Plan, PlannedNode, make_plan

_REFERENCE = re.compile(r"""["']?\$\{params\.(\w+)\}""")
Arguments = Mapping[str, str]
"""Parameter → value, as a command line gives it."""


def with_parameters(plan: Plan) -> Plan:
    """The plan, with a `-p` in front of each cure where the recipe has parameters for it and the plan with them passes.
    One misfit's change is tried alone, then the changes of all together. Where all fits but a gate fails that a
    forecast decides, parameters of the stages it speaks of are tried: the largest smaller number, another choice,
    under which a forecast decides it still."""
    if not plan.misfits:
        return _with_gate_cures(plan)
    changes = [_arguments(plan, plan.nodes[name].node, misfit.change) for name, misfit in plan.misfits]
    together = {parameter: value for change in changes for parameter, value in change.items()}
    misfits = []
    for (name, misfit), change in zip(plan.misfits, changes, strict=True):
        found = next((each for each in (change, together) if each and _accepted(plan, each)), None) if change else None
        cure = Cure(misfit.change, f"{as_parameters(found)} fits ({misfit.cure})") if found else misfit.cure
        misfits.append((name, replace(misfit, cure=cure)))
    return replace(plan, misfits=tuple(misfits))


def _passes(plan: Plan, node: str, gate: int, parameter: str, value: Any) -> bool:
    """gate: which of the node's."""
    tried = _accepted(plan, {parameter: str(value)})
    return tried is not None and node in tried.nodes and tried.nodes[node].gates[gate].verdict is not None


def _valid(plan: Plan, parameter: str, value: Any) -> bool:
    try:
        plan.session.recipe.with_arguments({**plan.session.arguments, parameter: str(value)})
    except BigpipeError:
        return False
    return True


def _accepted(plan: Plan, arguments: Arguments) -> Plan | None:
    """Return the plan with these arguments; None where it is not accepted. The recipe is resolved again from the
    document as it was read."""
    session = plan.session
    given = {**session.arguments, **arguments}
    try:
        recipe = replace(session.recipe.with_arguments(given), path=session.recipe.path)
        tried = replace(
            session, recipe=recipe, arguments=given, given_machine=session.machine, _identities={}, _surroundings={},
            remote=None,
        )  # fmt: skip
        found = make_plan(tried, preflight=False)
    except BigpipeError:
        return None
    return None if found.errors() else found


def _arguments(plan: Plan, node: Node, change: Mapping[str, Any]) -> dict[str, str]:
    """Parameter → value for each changed field that is one whole `${params.x}`, or an entry of a map that is one."""
    found: dict[str, Any] = {}
    for option, value in change.items():
        parent, _, key = option.rpartition(".")
        if parameter := _parameter(node, option):
            found[parameter] = value
        elif parameter := _parameter(node, parent):
            entries = found.get(parameter) or plan.session.recipe.params[parameter]
            entries = {**{str(name): size for name, size in entries.items()}, key: value}
            found[parameter] = {name: size for name, size in entries.items() if size}
    return {parameter: flow(value) for parameter, value in found.items()}


def _parameter(node: Node, option: str) -> str | None:
    """The parameter that a field of `with:` (or of the stage: `launch.num_processes`) is written as."""
    place = node.places.get(f"params.{option}") or node.places.get(option)
    match = _REFERENCE.match(place.text, place.column - 1) if place and option else None
    return match[1] if match else None


def _with_gate_cures(plan: Plan) -> Plan:
    if not any(gate.failed and not node.forgiven for node in plan.nodes.values() for gate in node.gates):
        return plan
    nodes = {
        name: replace(node, gates=tuple(_with_cure(plan, node, gate) if gate.failed else gate for gate in node.gates))
        for name, node in plan.nodes.items()
    }
    return replace(plan, nodes=nodes)


def _with_cure(plan: Plan, planned: PlannedNode, gate: GateVerdict) -> GateVerdict:
    at = planned.gates.index(gate)
    spoken_of = {name or planned.node.name for name, _ in gate.gate.references}
    for node in _upstream(plan, spoken_of):
        for name, field in node.kind.params.model_fields.items():
            if parameter := _parameter(node, name):
                value = plan.session.recipe.params.get(parameter)
                passes = partial(_passes, plan, planned.node.name, at, parameter)
                found = another(field, value, partial(_valid, plan, parameter), passes)
                if found is not None:
                    return replace(gate, cure=f"{as_parameters({parameter: str(found)})} passes; or change the gate")
    return gate


def _upstream(plan: Plan, names: set[str]) -> Iterator[Node]:
    """These nodes and what they stand on, the nearest first."""
    for planned in reversed(list(plan.nodes.values())):
        if planned.node.name in names:
            yield planned.node
            names.update(planned.node.producers)
