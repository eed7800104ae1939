"""The `-p` that makes a plan pass: the smallest change of a misfit or a gate, in the recipe's parameters, and tried."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator.contract.types import Json
from bigpipe.orchestrator.recipe.graph import Node, load_recipe

from .plan import GateVerdict, Plan, PlannedNode, failed, make_plan
from .session import Session

MOST_HALVINGS = 8
"""Plans that are made to find the largest number that passes."""
_REFERENCE = re.compile(r"""["']?\$\{params\.(\w+)\}""")


def with_parameters(plan: Plan) -> Plan:
    """The plan, with a `-p` in front of each cure where the recipe has parameters for it and the plan with them passes.

    One misfit's change is tried alone, then the changes of all together. Where all fits but a gate fails that a
    forecast decides, parameters of the stages it speaks of are tried: the largest smaller number, another choice.
    """
    if not plan.misfits:
        return _with_gate_cures(plan)
    changes = [dict(_arguments(plan.nodes[name].node, misfit.change)) for name, misfit in plan.misfits]
    together = {key: value for change in changes for key, value in change.items()}
    misfits = []
    for (name, misfit), change in zip(plan.misfits, changes, strict=True):
        fitting = next((each for each in (change, together) if change and _fits(plan.session, each)), None)
        misfits.append((name, replace(misfit, cure=f"{written(fitting)} fits ({misfit.cure})") if fitting else misfit))
    return replace(plan, misfits=tuple(misfits))


def _with_gate_cures(plan: Plan) -> Plan:
    if not any(failed(gate.verdict) for node in plan.nodes.values() for gate in node.gates):
        return plan
    nodes = {
        name: replace(node, gates=tuple(_with_cure(plan, node, gate) for gate in node.gates))
        for name, node in plan.nodes.items()
    }
    return replace(plan, nodes=nodes)


def _with_cure(plan: Plan, planned: PlannedNode, gate: GateVerdict) -> GateVerdict:
    if not failed(gate.verdict):
        return gate
    for node in _upstream(plan, {name or planned.node.name for name, _ in gate.gate.references}):
        for field in node.kind.params.model_fields:
            parameter = _parameter(node, f"params.{field}")
            found = _passing(plan.session, node, field, parameter) if parameter else None
            if found is not None:
                return replace(gate, cure=f"{written(found)} passes; or change the gate")
    return gate


def _upstream(plan: Plan, names: set[str]) -> list[Node]:
    """These nodes and what they stand on, the nearest first."""
    found: list[Node] = []
    for planned in reversed(list(plan.nodes.values())):
        if planned.node.name in names:
            found.append(planned.node)
            names |= {name for producers in planned.node.inputs.values() for name in producers}
    return found


def _passing(session: Session, node: Node, field: str, parameter: str) -> dict[str, str] | None:
    """A value of the parameter with which the plan is accepted: the largest smaller whole number, or another choice."""
    value = session.recipe.params.get(parameter)
    if isinstance(value, int) and not isinstance(value, bool):
        return _largest(session, parameter, value)
    choices = _choices(node.kind.params.model_fields[field].annotation)
    tried = ({parameter: choice} for choice in choices if choice != value)
    return next((each for each in tried if _fits(session, each)), None)


def _largest(session: Session, parameter: str, value: int) -> dict[str, str] | None:
    if value < 2 or not _fits(session, {parameter: "1"}):
        return None
    passes, fails = 1, value
    while fails - passes > max(1, value // 2**MOST_HALVINGS):
        middle = (passes + fails) // 2
        passes, fails = (middle, fails) if _fits(session, {parameter: str(middle)}) else (passes, middle)
    return {parameter: str(passes)}


def _choices(annotation: Any) -> list[str]:
    """The words of a `Literal`, alone or among other types."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def written(arguments: Mapping[str, str]) -> str:
    """Parameters as they are typed: `-p 'memory={cpu: 10GiB}'`."""
    return " ".join(f"-p {shlex.quote(f'{key}={value}')}" for key, value in arguments.items())


def _arguments(node: Node, change: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """Parameter → value as a command line would give it, for each changed field that is one whole `${params.x}`."""
    for path, value in change.items():
        if parameter := _parameter(node, f"params.{path}"):
            yield parameter, flow(value)
        elif isinstance(value, Mapping):
            yield from _arguments(node, {f"{path}.{key}": value.get(key, 0) for key in _written_keys(node, path)})


def _written_keys(node: Node, path: str) -> list[str]:
    prefix = f"params.{path}."
    return [name.removeprefix(prefix) for name in node.places if name.startswith(prefix)]


def _parameter(node: Node, path: str) -> str | None:
    place = node.places.get(path)
    match = _REFERENCE.match(place.text, place.column - 1) if place else None
    return match[1] if match else None


def flow(value: Json) -> str:
    """A value as YAML on one line: `{cpu: 48GiB, disk: 200GiB}`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return str(value)


def _fits(session: Session, arguments: Mapping[str, str]) -> bool:
    """Would a plan with these arguments be accepted?"""
    given = {**session.arguments, **arguments}
    try:
        recipe = load_recipe(session.recipe.path, given)
        return not make_plan(replace(session, recipe=recipe, arguments=given, _identities={}), preflight=False).errors()
    except BigpipeError:
        return False
