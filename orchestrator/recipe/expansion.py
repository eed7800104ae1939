"""From wired stages to nodes: one per combination of axis values, each with its validated parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, product
from math import prod
from typing import Any, NamedTuple

from bigpipe.errors import ManifestError, StageFailed, UsageError
from bigpipe.modules import foreign
from bigpipe.names import did_you_mean, listed
from bigpipe.orchestrator.contract import Json, Params, Stage
from bigpipe.orchestrator.launch import executor

from .conditions import Condition, Measure, parse_condition
from .interpolation import Scope, as_text, check_passwords, contains_reference, interpolate
from .manifest import NodeSettings, refused_variable
from .node import Choice, First, Node, Places
from .problems import Fault, Problems
from .registry import is_built_in
from .validation import Target, measure_of, validate, wrong_metric
from .wiring import Axes, StageReference, Wired, check_wired, read_picks
from .yamlsource import Document, Key

MAX_NODES = 50_000
MAX_EDGES = 1_000_000

_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


def node_name(stage: str, variant: Mapping[str, str]) -> str:
    """`variant` maps axes to the texts of their values."""
    return f"{stage}@{','.join(f'{axis}={text}' for axis, text in variant.items())}" if variant else stage


def variants(axes: Axes) -> Iterable[dict[str, str]]:
    """Return every combination of the axes' value texts, the last axis fastest."""
    names = list(axes)
    for values in product(*axes.values()):
        yield dict(zip(names, values, strict=True))


def _written_out(written: Json, read: Json) -> Json:
    """The environment as it was read, with the numbers and switches that references brought as texts."""
    if not isinstance(written, dict) or not isinstance(read, dict):
        return read
    brought = {name: value for name, value in read.items() if value is not written.get(name)}
    texts = {name: as_text(value) for name, value in brought.items() if isinstance(value, bool | int | float)}
    return {**read, **texts}


def _joined(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(groups)))


class Reading(NamedTuple):
    """What the settings of a stage give, before it is wired to others."""

    settings: NodeSettings
    kind: Stage[Any]
    """As its params make it."""
    params: Params
    when: Condition | None
    gates: list[Condition]


class Expansion:
    def __init__(self, document: Document, stages: Mapping[str, Wired], scope: Scope, problems: Problems) -> None:
        self.document, self.stages, self.scope, self.problems = document, stages, scope, problems
        self._parsed: dict[tuple[str, tuple[Key, ...]], Condition | None] = {}
        self._gathered: dict[tuple[str, str], tuple[str, ...]] = {}

    def nodes(self) -> dict[str, Node]:
        """Return every node, stages in file order. Problems are added; nodes that have some are left out."""
        self._count()
        for stage in self.stages.values():
            self._check_names(stage)
        nodes = {node.name: node for stage in self.stages.values() for node in self._expand(stage)}
        for node in nodes.values():
            self._check_measured(node, nodes)
        return nodes

    def _check_names(self, stage: Wired) -> None:
        """Values with commas in them can give two variants one name."""
        if not any("," in text for values in stage.axes.values() for text in values):
            return
        names = Counter(node_name(stage.name, texts) for texts in variants(stage.axes))
        if twice := [name for name, count in names.items() if count > 1]:
            path, cause = (*stage.path, "matrix"), f"two variants are called {twice[0]}"
            self.problems.add(Fault.BAD_MATRIX, path, cause, "use values without commas", key=True)

    def _count(self) -> None:
        sizes = {name: prod(len(values) for values in stage.axes.values()) for name, stage in self.stages.items()}
        total = sum(sizes.values())
        if total > MAX_NODES:
            largest = max(sizes, key=lambda name: sizes[name])
            cause = f"the recipe has {total:,} nodes, {sizes[largest]:,} of them {largest}; the limit is {MAX_NODES:,}"
            cure = "shorten or drop an axis, or split the recipe"
            self.problems.fail(Fault.TOO_MANY_NODES, ("stages", largest, "matrix"), cause, cure, key=True)
        edges = sum(
            sizes[stage.name] * (sizes[source.stage] if source.gathers else max(1, len(stage.tried)))
            for stage in self.stages.values()
            for source in stage.sources()
        )
        if edges > MAX_EDGES:
            cause = f"the recipe has {edges:,} edges; the limit is {MAX_EDGES:,}"
            cure = "gather a matrix in one stage without a matrix"
            self.problems.fail(Fault.TOO_MANY_NODES, ("stages",), cause, cure, key=True)

    def _expand(self, stage: Wired) -> Iterable[Node]:
        varies = bool(stage.axes) and contains_reference(stage.settings, "matrix")
        places = Places(self.document, stage.path)
        reading: Reading | None = None
        for index, texts in enumerate(variants(stage.axes)):
            variant = {axis: stage.axes[axis][text] for axis, text in texts.items()}
            if varies or index == 0:
                reading = self._read(stage, variant)
            if reading is not None and not stage.broken:
                yield self._node(stage, reading, texts, variant, places)

    def _read(self, stage: Wired, variant: Mapping[str, Json]) -> Reading | None:
        before = len(self.problems)
        values = stage.settings
        if contains_reference(values):
            scope = replace(self.scope, matrix=variant, open_matrix=stage.broken)
            own = replace(scope, placeholders=stage.kind.placeholders if stage.kind else ())
            scopes = {"when": replace(scope, stages=True), "gates": replace(scope, stages=True), "with": own}
            values = {
                key: interpolate(value, scopes.get(key, scope), self.problems, (*stage.path, key))
                for key, value in values.items()
            }
            if "env" in values:
                values["env"] = _written_out(stage.settings["env"], values["env"])
        check_passwords(values, self.problems, stage.path)
        unresolved = stage.broken or bool(self.scope.open_params) or len(self.problems) > before
        target = Target(self.document, stage.path, stage.name, unresolved)
        settings = validate(NodeSettings, values, target, self.problems)
        given = values.get("with", {})
        kind, params = stage.kind, None
        if kind is not None and isinstance(given, dict):
            target = Target(self.document, (*stage.path, "with"), kind.kind, unresolved)
            theirs = foreign(f"{stage.name}: a validator of kind {kind.kind}", "mend the kind", StageFailed)
            with nullcontext() if is_built_in(stage.location) else theirs:
                params = validate(kind.params, given, target, self.problems)
        if kind is not None and params is not None:
            kind = kind.with_params(params)
            check_wired(stage, kind, self.stages.values(), self.problems)
        self._check_launch(stage, kind, settings)
        self._check_environment(stage, values.get("env"))
        when = self._condition(stage, values.get("when"), ("when",), unresolved)
        gates = values.get("gates")
        read = [
            self._condition(stage, text, ("gates", index), unresolved)
            for index, text in enumerate(gates if isinstance(gates, list) else [])
        ]
        if settings is None or kind is None or params is None or unresolved:
            return None
        return Reading(settings, kind, params, when, [gate for gate in read if gate is not None])

    def _node(
        self, stage: Wired, reading: Reading, texts: Mapping[str, str], variant: Mapping[str, Json], places: Places
    ) -> Node:
        settings, kind, params, when, gates = reading
        first = self._first(stage, texts)
        ways = [(choice.inputs, choice.needs) for choice in first.choices] if first else [self._wires(stage, texts)]
        return Node(
            name=node_name(stage.name, texts),
            stage=stage.name,
            kind=kind,
            location=stage.location,
            params=params,
            variant=variant,
            inputs={port: _joined(inputs[port] for inputs, _ in ways) for port in stage.inputs},
            needs=_joined(needs for _, needs in ways),
            first=first,
            when=self._bound(stage, when, texts) if when else None,
            gates=tuple(bound for gate in gates if (bound := self._bound(stage, gate, texts)) is not None),
            launch=settings.launch,
            resources=settings.resources,
            retries=settings.retries,
            timeout=settings.timeout,
            on_fail=settings.on_fail,
            cache=settings.cache,
            env={name: str(value) for name, value in settings.env.items()},
            secrets=tuple(dict.fromkeys([*kind.secrets, *stage.structure.secrets])),
            places=places,
        )

    def _first(self, stage: Wired, texts: Mapping[str, str]) -> First | None:
        if stage.first is None or stage.structure.first is None:
            return None
        axis, judge = stage.structure.first.axis, stage.first
        tried = [{**texts, axis: value} for value in stage.tried]
        choices = tuple(self._choice(stage, judge, each[axis], each) for each in tried)
        return First(axis=axis, of=judge.stage, choices=choices)

    def _choice(self, stage: Wired, judge: StageReference, value: str, texts: Mapping[str, str]) -> Choice:
        inputs, needs = self._wires(stage, texts)
        sources = chain(*stage.inputs.values(), stage.needs)
        return Choice(
            value=value,
            judge=self._variant(judge.stage, judge.picks, texts),
            inputs=inputs,
            needs=needs,
            own=self._targets(tuple(source for source in sources if not source.gathers), texts),
        )

    def _wires(self, stage: Wired, texts: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
        """What a node takes, and what it needs, with these values of the axes."""
        inputs = {port: self._targets(sources, texts) for port, sources in stage.inputs.items()}
        return inputs, self._targets(stage.needs, texts)

    def _targets(self, sources: tuple[StageReference, ...], texts: Mapping[str, str]) -> tuple[str, ...]:
        result: dict[str, None] = {}
        for source in sources:
            if source.gathers:
                result.update(dict.fromkeys(self._all_variants(source)))
            else:
                result[self._variant(source.stage, source.picks, texts)] = None
        return tuple(result)

    def _variant(self, stage: str, picks: Mapping[str, str], texts: Mapping[str, str]) -> str:
        return node_name(stage, {axis: picks.get(axis) or texts[axis] for axis in self.stages[stage].axes})

    def _all_variants(self, source: StageReference) -> tuple[str, ...]:
        key = (source.stage, source.text)
        if key not in self._gathered:
            axes = {
                axis: {source.picks[axis]: None} if axis in source.picks else values
                for axis, values in self.stages[source.stage].axes.items()
            }
            self._gathered[key] = tuple(node_name(source.stage, texts) for texts in variants(axes))
        return self._gathered[key]

    def _check_launch(self, stage: Wired, kind: Stage[Any] | None, settings: NodeSettings | None) -> None:
        if kind is not None and settings is not None and settings.launch.mixed_precision is not None:
            from bigpipe.orchestrator.launch import require_heeded

            try:
                require_heeded(settings.launch, kind)
            except UsageError as error:
                path = (*stage.path, "launch", "mixed_precision")
                self.problems.add(Fault.BAD_VALUE, path, error.cause, error.cure)
        if kind is not None and "launch" in stage.settings and not executor(kind.runs_in).takes_launch:
            these = " with these fields under `with`" if kind is not stage.kind else ""
            cause = f"{kind.kind} does not run as ranks{these} and takes no 'launch'"
            self.problems.add(Fault.NO_RANKS, (*stage.path, "launch"), cause, "remove it", key=True)

    def _check_environment(self, stage: Wired, env: Json) -> None:
        for name in env if isinstance(env, dict) else ():
            path = (*stage.path, "env", name)
            if not isinstance(name, str):
                continue
            if not re.fullmatch(_VARIABLE, name):
                cause, cure = f"{name!r} cannot name a variable", "use A-Z, 0-9 and _"
                self.problems.add(Fault.BAD_NAME, path, cause, cure, key=True)
            elif name in self.scope.secrets:
                cause = f"{name} is a secret and is never written out"
                cure = f"list it under the stage's `secrets: [{name}]`; its value stays in your environment"
                self.problems.add(Fault.SECRET_REFERENCE, path, cause, cure, key=True)
            elif refused_variable(name):
                cause = f"`env` may not set {name}, which changes what code runs or how it is launched"
                cure = "set it in the shell that starts bigpipe"
                self.problems.add(Fault.REFUSED_VARIABLE, path, cause, cure, key=True)

    def _condition(self, stage: Wired, text: Json, path: tuple[Key, ...], unresolved: bool) -> Condition | None:
        """unresolved: a reference of the stage is, and was reported."""
        if not isinstance(text, str) or not text:
            return None  # nothing there, or reported already
        if unresolved and contains_reference(text.replace("${stages.", "")):
            return None
        path = (*stage.path, *path)
        if (text, path) not in self._parsed:
            self._parsed[text, path] = self._parse(stage, text, path)
        return self._parsed[text, path]

    def _parse(self, stage: Wired, text: str, path: tuple[Key, ...]) -> Condition | None:
        try:
            condition = parse_condition(text, self.document.place_at(path))
        except ManifestError as error:
            for problem in error.problems:
                self.problems.add(Fault(problem.code), problem.place, problem.cause, problem.cure)
            return None
        fine = True
        for node, metric in sorted(condition.references, key=str):
            fine = self._check_metric(stage, node, metric, path) and fine
        if fine and (odd := condition.odd_units(partial(self._measure, stage))):
            self.problems.add(Fault.BAD_UNIT, path, *odd)
            return None
        return condition if fine else None

    def _measure(self, stage: Wired, node: str | None, metric: str) -> Measure:
        kind = self.stages[stage.name if node is None else node.partition("@")[0]].kind
        return measure_of(kind.metrics, metric) if kind is not None else None

    def _check_metric(self, stage: Wired, node: str | None, metric: str, path: tuple[Key, ...]) -> bool:
        if node is None and "when" in path[2:3]:
            cure = "compare another stage's: ${stages.NODE.metrics." + metric + "}"
            cause = "`when` is decided before the stage runs and has no metrics of its own"
            self.problems.add(Fault.NOT_UPSTREAM, path, cause, cure, part=metric)
            return False
        name = stage.name if node is None else node.partition("@")[0]
        if name not in self.stages:
            if path[2] != "when":  # there it was reported as an edge
                cure = did_you_mean(name, self.stages, otherwise="there are")
                self.problems.add(Fault.UNKNOWN_STAGE, path, f"no stage {name!r}", cure, part=metric)
            return False
        kind = self.stages[name].kind
        if kind is None:
            return False
        wrong = wrong_metric(kind.metrics, metric)
        if wrong is None:
            return True
        cause, cure = wrong
        self.problems.add(Fault.UNKNOWN_METRIC, path, f"{cause} in {kind.kind}", cure, part=metric)
        return False

    def _check_measured(self, node: Node, nodes: Mapping[str, Node]) -> None:
        """What its conditions read must be measured with the params and inputs that those nodes have."""
        for condition in (*([node.when] if node.when else []), *node.gates):
            for name, metric in sorted(condition.references, key=str):
                read = node if name is None else nodes.get(name)
                if read is None or read.kind.unmeasured is None:
                    continue
                wired = [port for port, sources in read.inputs.items() if sources]
                if (lack := read.kind.unmeasured(read.params, wired, metric)) is not None:
                    missing, cure = lack
                    cause = f"no metric {metric!r} without {missing} in {read.kind.kind}"
                    self.problems.add(Fault.UNKNOWN_METRIC, condition.place.narrowed(metric), cause, cure)

    def _bound(self, stage: Wired, condition: Condition, texts: Mapping[str, str]) -> Condition | None:
        own = node_name(stage.name, texts)
        nodes: dict[str, str | None] = {}
        for node, _ in condition.references:
            if node is not None:
                found = self._find(stage, node, texts, condition)
                if found is None:
                    return None
                nodes[node] = None if found == own else found
        return condition.bind(nodes)

    def _find(self, stage: Wired, text: str, texts: Mapping[str, str], condition: Condition) -> str | None:
        name, _, rest = text.partition("@")
        other = self.stages[name]
        picks = read_picks(rest, other.axes)
        place = condition.place
        if isinstance(picks, str):
            self.problems.add(Fault.NO_VARIANT, place, f"{name} has no variant {rest!r}", picks)
            return None
        missing = [axis for axis in other.axes if axis not in picks and axis not in texts]
        shared = [axis for axis in other.axes if axis in texts and axis not in picks]
        wrong = missing or [axis for axis in shared if texts[axis] not in other.axes[axis]]
        if wrong:
            cause = f"{name} has variants over {listed(wrong)}, which {stage.name} does not share"
            example = node_name(name, next(iter(variants(other.axes))))
            self.problems.add(Fault.NO_VARIANT, place, cause, f"pick one, such as ${{stages.{example}.metrics.…}}")
            return None
        return self._variant(name, picks, texts)
