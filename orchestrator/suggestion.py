"""The `-p` that makes a plan fit: a misfit's smallest change, said in the recipe's own parameters, and tried."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bigpipe.errors import BigpipeError

from .plan import Plan, make_plan
from .recipe.graph import Node, load_recipe
from .session import Session
from .types import Json

_REFERENCE = re.compile(r"""["']?\$\{params\.(\w+)\}""")


def with_parameters(plan: Plan) -> Plan:
    """The plan, with a `-p` in front of each cure where the recipe has parameters for it and the plan with them fits.

    One misfit's change is tried alone, then the changes of all together.
    """
    changes = [dict(_arguments(plan.nodes[name].node, misfit.change)) for name, misfit in plan.misfits]
    together = {key: value for change in changes for key, value in change.items()}
    misfits = []
    for (name, misfit), change in zip(plan.misfits, changes, strict=True):
        fitting = next((each for each in (change, together) if change and _fits(plan.session, each)), None)
        misfits.append((name, replace(misfit, cure=f"{written(fitting)} fits ({misfit.cure})") if fitting else misfit))
    return replace(plan, misfits=tuple(misfits))


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
