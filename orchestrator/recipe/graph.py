"""From a manifest to a recipe: validated nodes in an order in which they can run.

    load_recipe
      read_document          strict YAML, every value with its place
      read_manifest          the top level
      Wiring.resolve         stages to each other: ports, cycles, axes
      Expansion.nodes        a node per combination of axis values: parameters, conditions, environment
      _ordered               the order, and what only the whole graph can tell

Every step adds to one list of problems and goes on as far as sense allows; the list is raised at the end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bigpipe.environment import Environment
from bigpipe.errors import ManifestError, Place, UsageError
from bigpipe.files import read_file
from bigpipe.names import closest, did_you_mean, listed
from bigpipe.orchestrator.contract import Json, Stage, Trust
from bigpipe.orchestrator.launch import executor
from bigpipe.redaction import conceal_environment
from bigpipe.tables import html_table

from .expansion import Expansion
from .interpolation import (
    WELL_KNOWN_SECRETS,
    Scope,
    as_text,
    check_passwords,
    contains_reference,
    interpolate,
    read_argument,
)
from .manifest import ManifestSpec, Shared, Structure, named, read_manifest, split_stage
from .node import Node
from .problems import Fault, Keys, Problems
from .registry import Offer, load_stage, locate
from .spelling import plain
from .validation import SWITCHES, Target, validate
from .wiring import Wired, Wiring, is_meant
from .yamlsource import Document, Key, read_document

if TYPE_CHECKING:
    import networkx as nx

LARGEST = 64 * 2**20
"""Bytes of a file that is looked at; a manifest holds fewer, which is said at its place."""
NEAR = 200
"""Files that are looked at for recipes, where one that was named is not there."""
SHOWN = 20
"""Recipes that are named then, at the most."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
    """A manifest, checked and expanded into its graph of nodes."""

    path: Path
    name: str
    """What it is called: as the manifest says, else as its file."""
    own_name: str
    """What the manifest says it is called, by which it is known at another path too; empty: nothing."""
    text: str = field(repr=False)
    nodes: Mapping[str, Node] = field(repr=False)
    """In topological order, ties in file order."""
    trust: Trust
    params: Mapping[str, Json]
    unread: Mapping[str, Place]
    """The parameters that no stage reads, and where they are declared."""
    remote: Shared | None
    """The remote store that it names."""
    sinks: Mapping[str, Place]
    """The systems that are told of its runs, and where it names them."""
    with_arguments: Callable[[Mapping[str, str]], Recipe] = field(repr=False, compare=False)
    """The recipe with other `-p`, from the document as it was read. Raises ManifestError."""

    def __repr__(self) -> str:
        return f"<Recipe {self.name}: {', '.join(self.nodes)}>"

    def _repr_html_(self) -> str:
        rows = [(name, node.kind.kind, ", ".join(node.predecessors)) for name, node in self.nodes.items()]
        return html_table(str(self.path), ("node", "kind", "after"), rows)

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """Node names; an edge from each node to those that take it as input, need it or ask for its metrics in `when`.
        Built when first asked: importing networkx takes as long as everything else a cached run does."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from((source, node.name) for node in self.nodes.values() for source in node.predecessors)
        return graph

    def ancestors(self, name: str) -> list[str]:
        """Return the nodes that `name` stands on, in topological order."""
        above = _with_ancestors(self.nodes, self.nodes[name].predecessors)
        return [other for other in self.nodes if other in above]

    def select(self, names: Sequence[str]) -> frozenset[str]:
        """Return the named nodes and all their ancestors; a stage's name means every variant, `x@a=1` those with a=1.
        Raise UsageError for a name that is none."""
        return frozenset(_with_ancestors(self.nodes, {node for name in names for node in self.meant(name)}))

    def meant(self, name: str) -> frozenset[str]:
        """Return the nodes that a name means, as `select` has it, without their ancestors. Raise UsageError where it
        means none."""
        found = frozenset(node.name for node in self.nodes.values() if _matches(node, name))
        if not found:
            known = list(dict.fromkeys([*(node.stage for node in self.nodes.values()), *self.nodes]))
            cure = did_you_mean(name, known, otherwise="there are")
            raise UsageError(f"no node {name!r} in {self.path}", cure)
        return found


def _matches(node: Node, name: str) -> bool:
    variant = {axis: as_text(value) for axis, value in node.variant.items()}
    return name == node.name or is_meant(name, node.stage, variant)


def _with_ancestors(nodes: Mapping[str, Node], names: Iterable[str]) -> set[str]:
    found = set(names)
    waiting = list(found)
    while waiting:
        more = set(nodes[waiting.pop()].predecessors) - found
        found |= more
        waiting.extend(more)
    return found


def load_recipe(
    path: Path,
    params: Mapping[str, str] = MappingProxyType({}),
    *,
    environment: Mapping[str, str] | None = None,
    stages: Mapping[str, Stage[Any]] | None = None,
    text: str | None = None,
    arguments: Mapping[Keys, str] = MappingProxyType({}),
) -> Recipe:
    """Read and check a manifest. Return its recipe.

    params: what `-p name=value` said, values as typed. environment: what `${env.X}` reads; by default the process's.
    stages: the kinds to know, by name; by default the registered ones. text: the manifest, where no file holds it:
    `path` then says what it is called, and what paths in it start from. arguments: path in it → what was typed on a
    command line to make that part.

    Raise ManifestError with every problem at once, or UsageError where there is no such file.
    """
    document = read_document(str(path), _read(path) if text is None else text.encode(), arguments)
    environment = Environment() if environment is None else environment

    def resolve(arguments: Mapping[str, str]) -> Recipe:
        base, problems = path.absolute().parent, Problems(document.place_at)
        return _Loading(document, arguments, environment, stages, base, problems).recipe(path, resolve)

    return resolve(params)


def declared_parameters(path: Path) -> frozenset[str]:
    """Return the names of a manifest's parameters; none where it cannot be read that far. Raise UsageError where there
    is no such file."""
    try:
        document = read_document(str(path), _read(path))
    except ManifestError:
        return frozenset()
    manifest = read_manifest(document, Problems(document.place_at))
    return frozenset(named(manifest.params)) if manifest else frozenset()


def _fitting(name: str, text: str, default: Json) -> str:
    """How an argument is written that was probably meant by one of another type than the default; empty: who knows."""
    if isinstance(default, bool):
        switch = SWITCHES.get(text.lower())
        return f"write -p {name}={switch}" if switch else ""
    if isinstance(default, list):
        return f"write -p '{name}=[{text}]'"
    fraction = isinstance(default, int) and re.fullmatch(r"-?\d*\.\d+", text)
    return f"where it may be a fraction, write the default as {float(default)}" if fraction else ""


def _read(path: Path) -> bytes:
    try:
        return read_file(path, LARGEST)
    except FileNotFoundError:
        cure = _near(path) or "`bigpipe init FILE --model REPO` writes one"
        raise UsageError(f"there is no manifest {path}", cure) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a manifest file") from None


def _near(path: Path) -> str:
    """What was probably meant by a file that is not there: one that is called so but for a slip, or ends otherwise; or
    what recipes there are."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    named = {other.stem: other.name for other in sorted(path.parent.glob("*.y*ml"))}
    if meant := closest(path.stem, list(named)):
        return f"did you mean {named[meant]!r}?"
    found = _recipes(path.parent)
    return f"recipes here: {listed(found)}" if 0 < len(found) <= SHOWN else ""


def _recipes(folder: Path) -> list[str]:
    """The recipes in a folder, and in the folders in it, as far as a look at a few files goes."""
    found = itertools.chain(folder.glob("*.y*ml"), folder.glob("*/*.y*ml"))
    some = [path for path in itertools.islice(found, NEAR) if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in some if _is_recipe(path))


def _is_recipe(path: Path) -> bool:
    try:
        return re.search(rb"(?:\A\xef\xbb\xbf|^)stages:", read_file(path, LARGEST), re.MULTILINE) is not None
    except OSError:
        return False


@dataclass(slots=True)
class _Loading:
    """One reading of a document with given parameters."""

    document: Document
    arguments: Mapping[str, str]
    environment: Mapping[str, str] = field(repr=False)
    known: Mapping[str, Stage[Any]] | None
    base: Path
    problems: Problems
    secrets: frozenset[str] = WELL_KNOWN_SECRETS

    def recipe(self, path: Path, resolve: Callable[[Mapping[str, str]], Recipe]) -> Recipe:
        manifest = read_manifest(self.document, self.problems)
        if manifest is None:
            raise self.problems.error()
        kinds = self._kinds(named(manifest.stages), manifest.trust.value())
        self.secrets = self.secrets.union(manifest.secrets, *(kind.stage.secrets for kind in kinds.values()))
        conceal_environment(self.environment, self.secrets)
        scope, unread = self._params(named(manifest.params)), self._unread(manifest)
        stages = self._stages(manifest, kinds, scope)
        Wiring(self.document, stages, self.problems).resolve()
        nodes = Expansion(self.document, stages, scope, self.problems).nodes()
        self.problems.raise_if_any()
        ordered = self._ordered(nodes)
        self.problems.raise_if_any()
        return Recipe(
            path=path,
            name=manifest.name or path.stem,
            own_name=manifest.name or "",
            text=self.document.text,
            nodes=ordered,
            trust=manifest.trust.value(),
            params=plain(dict(scope.params or {})),
            unread=unread,
            remote=manifest.shared(),
            sinks={name: self.document.place_at(("sinks", index)) for index, name in enumerate(manifest.sinks)},
            with_arguments=resolve,
        )

    def _kinds(self, stages: Mapping[str, Json], trust: Trust) -> dict[str, Offer]:
        loaded: dict[str, Offer | None] = {}
        names = {name: raw["uses"] for name, raw in stages.items() if isinstance(raw, dict) and "uses" in raw}
        for name, uses in names.items():
            if isinstance(uses, str) and uses not in loaded:
                loaded[uses] = self._kind(uses, trust, ("stages", name, "uses"))
        return {name: kind for name, uses in names.items() if isinstance(uses, str) and (kind := loaded[uses])}

    def _kind(self, uses: str, trust: Trust, path: tuple[Key, ...]) -> Offer | None:
        if "${" in uses:
            cure = "write the kind out; what a stage is cannot depend on a parameter"
            self.problems.add(Fault.MISPLACED_REFERENCE, path, "`uses` cannot hold a reference", cure)
            return None
        if self.known is not None:
            if uses not in self.known:
                cure = did_you_mean(uses, self.known, otherwise="there are")
                self.problems.add(Fault.UNKNOWN_KIND, path, f"unknown stage kind {uses!r}", cure)
            return Offer(self.known[uses], "") if uses in self.known else None
        code = Fault.UNTRUSTED_KIND if ":" in uses else Fault.UNKNOWN_KIND
        try:
            location = locate(uses, trust)
            code = Fault.BROKEN_KIND
            stage = load_stage(uses, trust, self.base)
            executor(stage.runs_in)
            return Offer(stage, location)
        except UsageError as error:
            self.problems.add(code, path, error.cause, error.cure)
            return None

    def _params(self, defaults: Mapping[str, Json]) -> Scope:
        scope = Scope(params=None, environment=self.environment, secrets=self.secrets)
        values: dict[str, Json] = {}
        for name, default in defaults.items():
            path = ("params", name)
            given = name in self.arguments
            value = self._argument(name, default) if given else interpolate(default, scope, self.problems, path)
            if value is not None:
                values[name] = value
                check_passwords(value, self.problems, path)
            elif not given:
                cause, cure = f"the parameter {name!r} has no default", f"give it one, or pass -p {name}=…"
                self.problems.add(Fault.PARAMETER_REQUIRED, path, cause, cure, key=True)
        for name in self.arguments:
            if name not in defaults:
                cure = did_you_mean(name, defaults, otherwise="there are")
                cure = cure or f"declare it: `params: {{{name}: …}}`"
                cause = f"-p {name}=…: no parameter {name!r}"
                self.problems.add(Fault.BAD_ARGUMENT, ("params",), cause, cure, key=True)
        return replace(scope, params=values, open_params=frozenset(defaults.keys() - values))

    def _unread(self, manifest: ManifestSpec) -> dict[str, Place]:
        """The parameters that no stage reads; what is given for one would be recorded and change nothing."""
        unread = [
            name for name in named(manifest.params) if not contains_reference(manifest.stages, f"params.{name}}}")
        ]
        for name in self.arguments.keys() & set(unread):
            cause, cure = f"-p {name}=…: no stage reads {name!r}", f"write ${{params.{name}}} where it belongs"
            self.problems.add(Fault.BAD_ARGUMENT, ("params", name), cause, cure, key=True)
        return {name: self.document.place_at(("params", name), key=True) for name in unread}

    def _argument(self, name: str, default: Json) -> Json:
        text = self.arguments[name]
        try:
            return read_argument(text, default)
        except ValueError as error:
            cure = _fitting(name, text, default) or "it is read as the type of the default"
            self.problems.add(Fault.BAD_ARGUMENT, ("params", name), f"-p {name}=…: {error}", cure)
            return None

    def _stages(self, manifest: ManifestSpec, kinds: Mapping[str, Offer], scope: Scope) -> dict[str, Wired]:
        result: dict[str, Wired] = {}
        for index, (name, raw) in enumerate(named(manifest.stages).items()):
            path: tuple[Key, ...] = ("stages", name)
            before = len(self.problems)
            if not isinstance(raw, dict):
                cause, cure = f"{name}: a stage is a map", f"write `{name}: {{uses: KIND}}`"
                self.problems.add(Fault.WRONG_TYPE, path, cause, cure)
                raw = {"uses": "unknown"}
            offer = kinds.get(name)
            shape, settings = split_stage(raw, name, self.problems, offer.stage.params if offer else None)
            known = len(self.problems)
            shape = {
                key: value if key == "uses" else interpolate(value, scope, self.problems, (*path, key))
                for key, value in shape.items()
            }
            awaited = bool(scope.open_params) and contains_reference(shape)
            target = Target(self.document, path, name, lenient=awaited or len(self.problems) > known)
            structure = validate(Structure, shape, target, self.problems, salvage=True) or Structure(uses="unknown")
            broken = awaited or len(self.problems) > before
            unread = "inputs" in shape and "inputs" not in structure.model_fields_set
            kind, location = kinds.get(name) or (None, "")
            condition = self._condition(settings, scope)
            result[name] = Wired(
                name, index, kind, structure, settings, condition, location, broken=broken, unread=unread
            )
            if structure.secrets:
                self._check_secrets(name, structure.secrets, {*manifest.secrets, *(kind.secrets if kind else ())})
        return result

    def _condition(self, settings: Mapping[str, Json], scope: Scope) -> str:
        """The text of `when` as far as it is known before the matrix; what is wrong with it is reported later."""
        when = settings.get("when")
        if not isinstance(when, str):
            return ""
        scope = replace(scope, matrix={}, open_matrix=True, stages=True)
        return str(interpolate(when, scope, Problems(self.document.place_at)))

    def _check_secrets(self, name: str, secrets: Sequence[str], allowed: set[str]) -> None:
        for index, secret in enumerate(secrets):
            if secret not in allowed:
                declare = f"declare it at the top: `secrets: [{secret}]`"
                near = "" if secret in WELL_KNOWN_SECRETS else did_you_mean(secret, allowed | WELL_KNOWN_SECRETS)
                cure = f"{near} Else {declare}" if near else declare
                path, cause = ("stages", name, "secrets", index), f"{secret!r} is not a declared secret"
                self.problems.add(Fault.UNDECLARED_SECRET, path, cause, cure)

    def _ordered(self, nodes: Mapping[str, Node]) -> dict[str, Node]:
        sorter = TopologicalSorter({node.name: node.predecessors for node in nodes.values()})
        sorter.prepare()
        position = {name: index for index, name in enumerate(nodes)}
        ordered: dict[str, Node] = {}
        ready: list[tuple[int, str]] = []
        while sorter.is_active():
            for name in sorter.get_ready():
                heappush(ready, (position[name], name))
            _, name = heappop(ready)
            ordered[name] = nodes[name]
            sorter.done(name)
        for node in ordered.values():
            self._check_upstream(node, nodes)
        return ordered

    def _check_upstream(self, node: Node, nodes: Mapping[str, Node]) -> None:
        for gate in node.gates:
            named = {source for source, _ in gate.references if source is not None}
            late = named - set(node.predecessors)
            for source in sorted(late - _with_ancestors(nodes, node.predecessors) if late else ()):
                cause = f"{source} need not have run when this gate of {node.name} is checked"
                stage = nodes[source].stage
                cure = f"add it to the stage's `needs: [{stage}]`"
                self.problems.add(Fault.NOT_UPSTREAM, gate.place, cause, cure)
