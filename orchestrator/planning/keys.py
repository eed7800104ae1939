"""What a computation is named by: everything its bytes depend on, and nothing else.

key = sha256 of the kind, its version and (unless it is built in) its source, the params in full (paths by content,
floating values pinned), `env`, the versions of the packages the kind names, its facts about the machine, and the
digests of its inputs per port.
Not in it: launch, resources, retries, timeout, gates, on_fail, needs, cache, when, secrets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import Json, Machine
from bigpipe.orchestrator.recipe import Node, is_built_in
from bigpipe.orchestrator.store import StatMemo, digest_of
from bigpipe.trust import Trust
from bigpipe.versions import package_version

from .content import content_params, source_digest

ABSENT = "(absent)"
"""Stands in a `Difference` for a value that is not there on one side."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that names a computation besides its inputs."""

    kind: str
    version: int
    code: str | None = None
    """The digest of the kind's source, where it is not built in: its `version` alone need not say what it does."""
    params: Mapping[str, Json]
    env: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str | None] = field(default_factory=dict)
    facts: Mapping[str, Json] = field(default_factory=dict)

    @cached_property
    def as_json(self) -> dict[str, Json]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def partial(self) -> str:
        """The digest of everything but the inputs."""
        return digest_of("computation", self.as_json)

    def key(self, inputs: Mapping[str, Sequence[str]]) -> str:
        """Return the name of this computation over inputs with these digests, per port in the order they are wired."""
        return digest_of("key", [self.partial, {port: list(digests) for port, digests in inputs.items() if digests}])


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs: its path (`params.scheme`, `inputs.model`, `packages.torch`), before and now."""

    path: str
    old: Json
    new: Json

    def __str__(self) -> str:
        return f"{self.path} {shown(self.old)} → {shown(self.new)}"


def shown(value: Json) -> str:
    """Return a value as it is shown to people: of a digest the first 12 digits, of a long text the beginning."""
    text = "none" if value is None else str(value)
    if text.startswith("sha256:"):
        return text[7:19]
    return text if len(text) <= 60 else text[:57] + "…"


def identity(
    node: Node, *, base: Path, memo: StatMemo, machine: Machine, trust: Trust, pins: Mapping[str, str] | None = None
) -> Identity:
    """Return the identity of a node on this machine.

    base: the manifest's directory. trust: what the manifest trusts. pins: what the kind's `pin` gave.
    Raise UsageError where a file the params name is not there.
    """
    kind, facts = node.kind, node.kind.planning.facts
    params = content_params(node.params, base, memo)
    for path, value in (pins or {}).items():
        _pin(params, path, value)
    return Identity(
        kind=kind.kind,
        version=kind.version,
        code=None
        if is_built_in(node.location)
        else source_digest(node.location, trust.home(node.location, base), memo),
        params=params,
        env=dict(node.env),
        packages={name: package_version(name) for name in kind.packages},
        facts=dict(facts(node.params, machine)) if facts else {},
    )


def _pin(params: dict[str, Json], path: str, value: str) -> None:
    *parents, last = path.split(".")
    place: Json = params
    for name in parents:
        place = place.get(name) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise UsageError(f"a pin names the field {path}, which the params do not have", "correct the kind's `pin`")
    place[last] = value


def differences(
    old: Mapping[str, Json],
    new: Mapping[str, Json],
    old_inputs: Mapping[str, Sequence[str]],
    new_inputs: Mapping[str, Sequence[str] | None],
) -> list[Difference]:
    """Return what made the key change, for a reader: kind, version, code, params, inputs, env, packages, facts.

    `old` and `new` are as `Identity.as_json` has them. A port of `new_inputs` that is None is not known yet, and not
    compared.
    """
    changes: list[Difference] = []
    for name in ("kind", "version", "code", "params"):
        changes += changed(name, old.get(name), new.get(name))
    for port in sorted(old_inputs.keys() | new_inputs.keys()):
        before, after = old_inputs.get(port, ()), new_inputs.get(port, ())
        if after is not None:
            changes += _changed_input(f"inputs.{port}", list(before), list(after))
    for name in ("env", "packages", "facts"):
        changes += changed(name, old.get(name, {}), new.get(name, {}))
    return changes


def _changed_input(path: str, old: list[str], new: list[str]) -> Iterator[Difference]:
    if len(old) <= 1 and len(new) <= 1:
        yield from changed(path, old[0] if old else ABSENT, new[0] if new else ABSENT)
    elif len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changed(f"{path}[{index}]", before, after)
    else:
        yield Difference(path, old, new)


def changed(path: str, old: Json, new: Json) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted(old.keys() | new.keys()):
            yield from changed(f"{path}.{name}", old.get(name, ABSENT), new.get(name, ABSENT))
    elif type(old) is not type(new) or old != new:
        yield Difference(path, old, new)
