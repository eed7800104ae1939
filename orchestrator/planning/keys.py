"""What a computation is named by: everything its bytes depend on, and nothing else.

key = sha256 of the kind, its version and (unless it is built in) its source, the params in full (floating values
pinned; without those that the kind says change nothing), `env`, the versions of the packages the kind names, its facts
about the machine, and the digests of its inputs per port. Not in it: launch (but for the number of ranks, where the
kind says that its result depends on it), resources, retries, timeout, gates, on_fail, needs, cache, when, secrets.

A field of the params that is marked `ContentField` enters by content: a renamed or moved file, or another checkout of
the same repository, gives the same key; a changed byte gives another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from bigpipe.errors import UsageError
from bigpipe.modules import foreign
from bigpipe.orchestrator.contract import Json, Machine, Params
from bigpipe.orchestrator.recipe import Node, is_built_in
from bigpipe.orchestrator.store import StatMemo, canonical, digest_of
from bigpipe.trust import Trust
from bigpipe.versions import package_version, planned_version

from .content import content_params, source_digest

ABSENT = "(absent)"
"""Stands in a `Difference` for a value that is not there on one side."""
SHOWN = 60
"""Characters of a value that are shown."""
MOST_ITEMS = 3
"""Items of a list that are named one by one where they differ."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that names a computation besides its inputs."""

    kind: str
    version: int
    code: str | None = None
    """Which Stage it is and the digest of its source, `module:NAME@sha256:…`, where it is not built in: its `version`
    alone need not say what it does."""
    params: Mapping[str, Json]
    env: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str | None] = field(default_factory=dict)
    facts: Mapping[str, Json] = field(default_factory=dict)

    def without(self, paths: Iterable[str]) -> Identity:
        """Return the same, as if it had no such params."""
        params = deepcopy(dict(self.params))
        for path in paths:
            _leave_out(params, path)
        return replace(self, params=params)

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
    """Of the value."""
    old: Json
    """Before."""
    new: Json
    """Now."""

    def __str__(self) -> str:
        old, new = self.old, self.new
        if isinstance(old, str) and isinstance(new, str):
            old, new = _around_the_first_difference(old, new)
        return f"{self.path} {shown(old)} → {shown(new)}"


def _around_the_first_difference(old: str, new: str) -> tuple[str, str]:
    """Of long texts that begin alike, what comes before they differ is left out but for some of it."""
    shorter, longer = sorted(map(len, (old, new)))
    same = next((index for index in range(shorter) if old[index] != new[index]), shorter)
    start = same - SHOWN // 4
    if longer <= SHOWN or same <= SHOWN // 2:
        return old, new
    return f"…{old[start:]}", f"…{new[start:]}"


def shown(value: Json) -> str:
    """Return a value as it is shown to people: of a digest the first 12 digits, of a long text the beginning."""
    text = "none" if value is None else str(value)
    named, marked, digest = text.rpartition("sha256:")
    if marked and " " not in named:
        return named + digest[:12]
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "…"


def identity(
    node: Node,
    *,
    base: Path,
    memo: StatMemo,
    machine: Machine,
    trust: Trust,
    pins: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    ranks: int | None = None,
    recorded: Mapping[str, str] = MappingProxyType({}),
) -> Identity:
    """Return the identity of a node on this machine.
    base: the manifest's directory. trust: what the manifest trusts. pins, only: what the kind's `pin` and `only` gave.
    ranks: how many will run, where it is not what the node's own `launch` says. recorded: versions of packages that it
    last ran with; they count where a package is not installed here.
    Raise UsageError where a file the params name is not there."""
    kind, facts, location = node.kind, node.kind.planning.facts, node.location
    params = content_params(node.params, base, memo)
    for path, value in (pins or {}).items():
        _pin(params, path, value)
    for path in kind.planning.apart(node.params) if kind.planning.apart else ():
        _leave_out(params, path)
    told = facts(node.params, machine) if facts else {}
    with foreign(f"kind {kind.kind}: `facts`", "give back plain values by their names"):
        canonical(dict(told))
    source = None if is_built_in(location) else source_digest(location, trust.home(location, base), memo)
    return Identity(
        kind=kind.kind,
        version=kind.version,
        code=source and f"{location}@{source}",
        params=params,
        env=dict(node.env),
        packages={name: package_version(name) or recorded.get(name) or planned_version(name) for name in kind.packages},
        facts={**told, **_facts_of(node, base, memo, trust, ranks, only)},
    )


def _facts_of(
    node: Node, base: Path, memo: StatMemo, trust: Trust, ranks: int | None, only: Sequence[str]
) -> dict[str, Json]:
    """What the contract itself asks a kind for: files that its content leads to, code that may run, the number of
    ranks, and what is taken where not all may be."""
    found: dict[str, Json] = {"only": sorted(only)} if only else {}
    if node.kind.planning.leads_to is not None and (paths := node.kind.planning.leads_to(node.params, base)):
        with foreign(f"kind {node.kind.kind}: `leads_to`", "give back files that are there, from the root"):
            found["files"] = digest_of("files", [memo.sha256(path) for path in paths])
    if node.kind.planning.heeds_code and trust.remote_code:
        found["remote_code"] = sorted(trust.remote_code)
    if node.kind.ranks.counted:
        found["ranks"] = node.launch.num_processes if ranks is None else ranks
    return found


def _pin(params: dict[str, Json], path: str, value: str) -> None:
    *parents, last = path.split(".")
    place: Json = params
    for name in parents:
        place = place.get(name) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise UsageError(f"a pin names the field {path}, which the params do not have", "correct the kind's `pin`")
    place[last] = value


def written_at(params: Params, paths: Sequence[str]) -> dict[str, Json]:
    """Return what these fields of the params say, path → value as it is written; all fields where there are no paths.
    Raise UsageError for a path that the params do not have."""
    written = params.model_dump(mode="json", by_alias=True)
    return {path: _field(written, path) for path in paths or written}


def _field(params: Mapping[str, Json], path: str) -> Json:
    place: Json = params
    for name in path.split("."):
        if not isinstance(place, Mapping) or name not in place:
            cure = "correct the kind's `pin_asks`"
            raise UsageError(f"`pin_asks` names the field {path}, which the params do not have", cure)
        place = place[name]
    return place


def _leave_out(params: dict[str, Json], path: str) -> None:
    *parents, last = path.split(".")
    place: Json = params
    for name in parents:
        place = place.get(name) if isinstance(place, dict) else None
    if isinstance(place, dict):
        place.pop(last, None)


def differences(
    old: Mapping[str, Json],
    new: Mapping[str, Json],
    old_inputs: Mapping[str, Sequence[str]],
    new_inputs: Mapping[str, Sequence[str] | None],
) -> list[Difference]:
    """Return what made the key change, for a reader: kind, version, code, params, inputs, env, packages, facts.
    `old` and `new` are as `Identity.as_json` has them. A port of `new_inputs` that is None is not known yet, and not
    compared."""
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
    elif isinstance(old, list) and isinstance(new, list) and 0 < len(apart := _items_apart(old, new)) <= MOST_ITEMS:
        for index in apart:
            yield from changed(f"{path}[{index}]", old[index], new[index])
    elif type(old) is not type(new) or old != new:
        yield Difference(path, old, new)


def _items_apart(old: Sequence[Json], new: Sequence[Json]) -> list[int]:
    """Where two lists of one length differ; nowhere where their lengths do."""
    pairs = enumerate(zip(old, new, strict=True)) if len(old) == len(new) else ()
    return [index for index, (before, after) in pairs if type(before) is not type(after) or before != after]
