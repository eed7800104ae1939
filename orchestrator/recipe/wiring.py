"""Stages wired to each other: references resolved, ports typed, cycles found, and the axes each stage inherits.

All of this happens per stage, before a matrix is expanded: a stage's variants are always the full product of its axes,
because axes that meet in one stage join by the values they share.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from bigpipe.names import did_you_mean, listed
from bigpipe.orchestrator.contract import ANY, Json, Port, Stage

from .interpolation import as_text, contains_reference
from .manifest import NAME, Structure, check_name
from .problems import Fault, Problems
from .yamlsource import Document, Key

if TYPE_CHECKING:
    import networkx as nx

DEFAULT_PORT = "model"
MAX_AXIS_TEXT = 100

_STAGE_METRIC = re.compile(r"\$\{stages\.([^{}]+?)\.metrics\.")

Axes = dict[str, dict[str, Json]]
"""Axis → text of a value → the value."""


@dataclass(frozen=True, slots=True)
class StageReference:
    """A stage as another one names it: `quantize` or `quantize@scheme=int8`."""

    text: str
    path: tuple[Key, ...]
    """Where it is written."""
    label: str
    """What it is written under, for messages: `inputs.model`."""
    gathers: bool = False
    picks: dict[str, str] = field(default_factory=dict)
    """Axis → text of the picked value; filled in once the axes of that stage are known."""

    @property
    def stage(self) -> str:
        return self.text.partition("@")[0]


@dataclass(slots=True)
class Wired:
    """One stage of the manifest with its edges."""

    name: str
    index: int
    kind: Stage[Any] | None
    structure: Structure
    """What could be read of it."""
    settings: dict[str, Json]
    condition: str = ""
    """The text of `when`, its matrix references still standing."""
    location: str = ""
    """`module:attribute` of the kind."""
    inputs: dict[str, tuple[StageReference, ...]] = field(default_factory=dict)
    needs: tuple[StageReference, ...] = ()
    when: tuple[StageReference, ...] = ()
    first: StageReference | None = None
    """The stage whose gates decide which variant it takes."""
    tried: dict[str, Json] = field(default_factory=dict)
    """Text → value of the axis along which it takes the `first` that passes."""
    axes: Axes = field(default_factory=dict)
    broken: bool = False
    """Some axes may be missing because of a reported problem."""
    unread: bool = False
    """What stands under `inputs` is none, which was reported."""

    @property
    def path(self) -> tuple[Key, ...]:
        return ("stages", self.name)

    def sources(self) -> Iterator[StageReference]:
        yield from chain(*self.inputs.values(), self.needs, self.when, (self.first,) if self.first else ())


def check_wired(stage: Wired, kind: Stage[Any], stages: Collection[Wired], problems: Problems) -> None:
    """Report ports that a stage of this kind does not have, and those that must be wired and are not. kind: also what
    its params make of it."""
    ports, path = kind.inputs, (*stage.path, "inputs")
    for name in stage.inputs:
        if kind.port(name) is None:
            _unknown_port(stage, kind, name, problems)
    if kind.needs_input and not stage.inputs and not stage.unread:
        cause = f"{kind.kind} needs one of its ports {listed(list(ports), 'or')}"
        problems.add(Fault.MISSING_PORT, path, cause, f"add `inputs: {{{next(iter(ports))}: STAGE}}`", key=True)
    for name, port in ports.items() if kind.open_ports is None else ():  # such a kind says itself what it lacks
        if not port.optional and name not in stage.inputs and not stage.unread and stage.inputs.keys() <= ports.keys():
            short = f"inputs: {{{name}: STAGE}}" if name != DEFAULT_PORT else "inputs: STAGE"
            cause = f"{kind.kind} needs {_a(port.told)} on its port {name!r}"
            problems.add(Fault.MISSING_PORT, path, cause, f"add `{short}`{_candidates(stage, port, stages)}", key=True)


def _candidates(stage: Wired, port: Port, stages: Collection[Wired]) -> str:
    fitting = [other.name for other in stages if other.kind and other.kind.may_fill(port)]
    wired = {source.stage for sources in stage.inputs.values() for source in sources}
    fitting = [name for name in fitting if name != stage.name and name not in wired]
    return f"; {listed(fitting, 'or')} would fit" if 0 < len(fitting) <= 5 else ""


def _a(noun: str) -> str:
    """`a report`, `an adapter`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _unknown_port(stage: Wired, kind: Stage[Any], name: str, problems: Problems) -> None:
    written = stage.structure.inputs
    short = isinstance(written, str)
    path = (*stage.path, "inputs") if short else (*stage.path, "inputs", name)
    cure = did_you_mean(name, kind.inputs, otherwise="it has") if kind.inputs else "it takes no inputs: remove them"
    if short and kind.inputs:
        cure = f"name the port: inputs: {{{next(iter(kind.inputs))}: {written}}}"
    these = " with these fields under `with`" if stage.kind and stage.kind.port(name) else ""
    problems.add(Fault.UNKNOWN_PORT, path, f"{kind.kind} has no port {name!r}{these}", cure, key=not short)


class Wiring:
    """Resolves the edges between `stages`, in place, and reports what is wrong with them."""

    def __init__(self, document: Document, stages: Mapping[str, Wired], problems: Problems) -> None:
        self.document, self.stages, self.problems = document, stages, problems

    def resolve(self) -> None:
        for stage in self.stages.values():
            stage.inputs = self._inputs(stage)
            stage.needs = self._known(
                stage,
                (
                    StageReference(text, (*stage.path, "needs", index), "needs")
                    for index, text in enumerate(stage.structure.needs)
                ),
            )
            stage.when = self._known(
                stage,
                (
                    StageReference(name, (*stage.path, "when"), "when")
                    for name in dict.fromkeys(_STAGE_METRIC.findall(stage.condition))
                ),
            )
            if (first := stage.structure.first) is not None:
                stage.first = next(
                    iter(self._known(stage, [StageReference(first.of, (*stage.path, "first", "of"), "first")])), None
                )
            self._check_ports(stage)
        axis_order = dict.fromkeys(axis for stage in self.stages.values() for axis in stage.structure.matrix)
        for name in self._order():
            self._resolve_axes(self.stages[name], list(axis_order))
        for stage in self.stages.values():
            self._check_used(stage)

    def _inputs(self, stage: Wired) -> dict[str, tuple[StageReference, ...]]:
        base = (*stage.path, "inputs")
        if isinstance(stage.structure.inputs, str):
            return {DEFAULT_PORT: self._known(stage, [StageReference(stage.structure.inputs, base, "inputs")])}
        result: dict[str, tuple[StageReference, ...]] = {}
        for port, written in stage.structure.inputs.items():
            path, label = (*base, port), f"inputs.{port}"
            if isinstance(written, str):
                result[port] = self._known(stage, [StageReference(written, path, label)])
            elif written:
                each = enumerate(written)
                gathered = (StageReference(text, (*path, at), label, gathers=True) for at, text in each)
                result[port] = self._known(stage, gathered)
        return result

    def _known(self, stage: Wired, sources: Iterable[StageReference]) -> tuple[StageReference, ...]:
        known = []
        for source in sources:
            if stage.broken and "${" in source.text:
                continue  # it was reported when it was interpolated
            if source.stage in self.stages:
                known.append(source)
            else:
                cure = did_you_mean(source.stage, self.stages, otherwise="there are")
                cause = f"no stage {source.stage!r}"
                self.problems.add(Fault.UNKNOWN_STAGE, source.path, cause, cure, part=source.stage)
        return tuple(known)

    def _check_ports(self, stage: Wired) -> None:
        if stage.kind is None:
            return
        for name, sources in stage.inputs.items():
            if (port := stage.kind.port(name)) is not None:
                for source in sources:
                    self._check_type(stage, name, port, source)
        check_wired(stage, stage.kind, self.stages.values(), self.problems)

    def _written_output(self, stage: Wired) -> str:
        """The type of its artifact where a field says so; "" where none does, or says no type that it can give."""
        given = stage.settings.get("with")
        name = stage.kind.output_field if stage.kind else ""
        written = given.get(name) if name and isinstance(given, dict) else None
        return written if isinstance(written, str) and stage.kind and stage.kind.may_give(written) else ""

    def _check_type(self, stage: Wired, name: str, port: Port, source: StageReference) -> None:
        if source.gathers and not port.many:
            cause = f"the port {name!r} of {stage.name} takes one {port.told}, not a list"
            cure = f"write `{name}: {source.text}`, or pick a variant: `{source.stage}@axis=value`"
            self.problems.add(Fault.NOT_MANY, source.path[:-1], cause, cure)
        producer, written = self.stages[source.stage].kind, self._written_output(self.stages[source.stage])
        if producer is None or (producer.output and port.type == ANY):
            return
        if written in port.types if written else producer.may_fill(port):
            return
        gives = _a(written or producer.output) if producer.output else "no artifact"
        named = source.stage if source.stage == producer.kind else f"{source.stage} ({producer.kind})"
        cause = f"{named} gives {gives}, but port {name!r} of {stage.name} takes {_a(port.told)}"
        cure = (
            _candidates(stage, port, self.stages.values()).removeprefix("; ")
            or f"wire a stage that gives {_a(port.told)}"
        )
        self.problems.add(Fault.WRONG_ARTIFACT, source.path, cause, cure)

    def _order(self) -> list[str]:
        before = {stage.name: {source.stage for source in stage.sources()} for stage in self.stages.values()}
        try:
            return list(TopologicalSorter(before).static_order())
        except CycleError:
            return self._order_without_cycles(before)

    def _order_without_cycles(self, before: Mapping[str, set[str]]) -> list[str]:
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(before)
        graph.add_edges_from((source, name) for name, sources in before.items() for source in sources)
        loops = set(nx.nodes_with_selfloops(graph))
        knots = [knot for knot in nx.strongly_connected_components(graph) if len(knot) > 1 or knot <= loops]
        for knot in sorted(knots, key=lambda knot: min(self.stages[name].index for name in knot)):
            self._report_cycle(graph, knot)
            for name in knot:
                self.stages[name].broken = True
            graph.remove_edges_from([(a, b) for a, b in graph.edges(knot) if b in knot])
        return list(nx.topological_sort(graph))

    def _report_cycle(self, graph: nx.DiGraph[str], knot: set[str]) -> None:
        import networkx as nx

        first = min(knot, key=lambda name: self.stages[name].index)
        inside = graph.subgraph(knot)
        back = min(
            (nx.shortest_path(inside, follower, first) for follower in sorted(inside.successors(first))), key=len
        )
        cycle = [first, *back]
        written = []
        for before, after in pairwise(cycle):
            source = next(source for source in self.stages[after].sources() if source.stage == before)
            place = self.document.place_at(source.path, part=source.text)
            written.append(f"{after}.{source.label} (line {place.line})")
        cure = f"remove one of {listed(written, 'or')}" if len(written) > 1 else "remove it"
        self.problems.add(Fault.CYCLE, place, f"the stages form a cycle: {' → '.join(cycle)}", cure)

    def _resolve_axes(self, stage: Wired, order: Sequence[str]) -> None:
        axes: Axes = {}
        for source in stage.sources():
            producer = self.stages[source.stage]
            picks = self._picks(source, producer)
            if picks is None:
                stage.broken = True
                continue
            source.picks.update(picks)
            if source.gathers or source.label == "when":
                continue
            stage.broken = stage.broken or producer.broken
            inherited = {axis: values for axis, values in producer.axes.items() if axis not in picks}
            self._join(stage, axes, inherited, source.path)
        own = {axis: self._axis(stage, axis, values) for axis, values in stage.structure.matrix.items()}
        self._join(stage, axes, own, (*stage.path, "matrix"))
        if stage.first is not None and stage.structure.first is not None:
            stage.tried = axes.pop(stage.structure.first.axis, {})
            if not stage.broken:
                self._check_first(stage, stage.first, stage.structure.first.axis)
        stage.axes = {axis: axes[axis] for axis in order if axis in axes}

    def _check_used(self, stage: Wired) -> None:
        """Of an axis that nothing reads, all variants would be the same."""
        for axis, values in () if stage.broken else stage.structure.matrix.items():
            on_it = (each for each in self.stages.values() if axis in each.axes)
            read = any(contains_reference(each.settings, f"matrix.{axis}}}") for each in (stage, *on_it))
            if len(values) > 1 and not read:
                cause = f"nothing reads the axis {axis!r}, so that its variants would all be the same"
                cure = f"write ${{matrix.{axis}}} where its values belong, or remove it"
                self.problems.add(Fault.BAD_MATRIX, (*stage.path, "matrix", axis), cause, cure, key=True)

    def _check_first(self, stage: Wired, judge: StageReference, axis: str) -> None:
        """What `first` says must make sense; the first thing that does not is reported."""
        path, of = (*stage.path, "first"), self.stages[judge.stage]
        varied = [source for source in stage.sources() if axis in self.stages[source.stage].axes]
        on = [each for each in varied if not each.gathers and each.label != "when" and axis not in each.picks]
        taken = [source for source in on if source is not judge]
        near = dict.fromkeys(axis for source in stage.sources() for axis in self.stages[source.stage].axes)
        inner = next((name for each in on if (name := self._first_above(each.stage, axis))), "")
        if axis in stage.structure.matrix:
            cause = f"{stage.name} has the axis {axis!r} in its own matrix, and takes one variant of it"
            self._bad_first(stage, (*path, "axis"), cause, "take the axis out of its matrix, or remove `first`")
        elif not varied:
            cure = (
                did_you_mean(axis, near, otherwise="there are") or "give a stage that it takes something from a matrix"
            )
            self._bad_first(stage, (*path, "axis"), f"nothing that {stage.name} takes has an axis {axis!r}", cure)
        elif judge not in on:
            fitting = [name for name, each in self.stages.items() if axis in each.axes and each.settings.get("gates")]
            cure = f"{listed(fitting, 'or')} would fit" if fitting else f"name a stage that has gates for each {axis}"
            self._bad_first(stage, judge.path, f"{judge.text} has no variants over {axis!r}", cure)
        elif not of.settings.get("gates"):
            cause, cure = f"{judge.stage} has no gates: its first variant always passes", f"give {judge.stage} `gates`"
            self._bad_first(stage, judge.path, cause, cure)
        elif not taken:
            cause = f"{stage.name} takes nothing that has variants over {axis!r}"
            self._bad_first(stage, (*path, "axis"), cause, "wire a stage on that axis to it, or remove `first`")
        elif inner:
            cause = f"{inner} takes the first variant of an axis itself, for each {axis}"
            cure = f"let {inner} come before the axis {axis!r}, or give it a recipe of its own"
            self._bad_first(stage, path, cause, cure)

    def _bad_first(self, stage: Wired, path: tuple[Key, ...], cause: str, cure: str) -> None:
        stage.broken = True
        self.problems.add(Fault.BAD_FIRST, path, cause, cure)

    def _first_above(self, name: str, axis: str) -> str:
        """A stage on the axis, this one or one that it stands on, that has a `first` itself; "" where none does."""
        waiting = [name]
        for each in waiting:
            stage = self.stages[each]
            if stage.first is not None and axis in stage.axes:
                return each
            waiting += [source.stage for source in stage.sources() if source.stage not in waiting]
        return ""

    def _join(self, stage: Wired, axes: Axes, more: Axes, path: tuple[Key, ...]) -> None:
        for axis, values in more.items():
            if axis not in axes:
                axes[axis] = values
                continue
            shared = {text: value for text, value in axes[axis].items() if text in values}
            if not shared and axes[axis] and values:
                cause = f"axis {axis!r} reaches {stage.name} as {listed(axes[axis])} and as {listed(values)}"
                cure = f"give both the same values, rename one axis, or pick a variant: `STAGE@{axis}=…`"
                self.problems.add(Fault.NO_VARIANT, path, f"{cause}, which share no value", cure)
                stage.broken = True
            axes[axis] = shared

    def _axis(self, stage: Wired, axis: str, values: Sequence[Json]) -> dict[str, Json]:
        path = (*stage.path, "matrix", axis)
        check_name(axis, path, "an axis", self.problems)
        if not values:
            stage.broken = True
            self.problems.add(Fault.BAD_MATRIX, path, f"the axis {axis!r} has no values", "list at least one")
        result: dict[str, Json] = {}
        for index, value in enumerate(values):
            text = as_text(value)
            if not text.isprintable() or not 0 < len(text) <= MAX_AXIS_TEXT:
                cure = f"use a short name of at most {MAX_AXIS_TEXT} printable characters"
                self.problems.add(Fault.BAD_MATRIX, (*path, index), "this value cannot be part of a node's name", cure)
            elif text in result:
                self.problems.add(Fault.BAD_MATRIX, (*path, index), f"{text} stands twice in {axis!r}", "remove one")
            result[text] = value
        return result

    def _picks(self, source: StageReference, producer: Wired) -> dict[str, str] | None:
        _, at, rest = source.text.partition("@")
        if not at:
            return {}
        found = read_picks(rest, producer.axes)
        if isinstance(found, dict):
            return found
        if not producer.broken:
            cause = f"{producer.name} has no variant {rest!r}"
            self.problems.add(Fault.NO_VARIANT, source.path, cause, found, part=source.text)
        return None


def is_meant(text: str, stage: str, variant: Mapping[str, str]) -> bool:
    """Return whether a node is one of those that `text` means: `x`, all variants of a stage, or `x@a=1`, those with
    a=1. variant: axis → the text of its value."""
    name, at, picks = text.partition("@")
    if name != stage or not at:
        return name == stage
    return bool(picks) and isinstance(
        read_picks(picks, {axis: {value: value} for axis, value in variant.items()}), dict
    )


def parts_of(node: str) -> tuple[str, dict[str, str]]:
    """Return a node's stage and variant, from its name alone."""
    stage, _, rest = node.partition("@")
    picks = re.split(rf",(?={NAME.pattern}=)", rest) if rest else []
    return stage, {axis: value for axis, _, value in (pick.partition("=") for pick in picks)}


def read_picks(text: str, axes: Axes) -> dict[str, str] | str:
    """Return `a=1,b=2` → {"a": "1", "b": "2"} where the axes have these values; else the cure."""
    picks: dict[str, str] = {}
    while text:
        axis, _, rest = text.partition("=")
        if axis not in axes:
            none = "it has no matrix; write its name alone"
            return (did_you_mean(axis, axes, otherwise="its axes are") if axes else none) or none
        # A value may hold a comma itself.
        fitting = [known for known in axes[axis] if rest == known or rest.startswith(f"{known},")]
        if not fitting:
            return did_you_mean(rest.partition(",")[0], axes[axis], otherwise=f"{axis} is one of")
        picks[axis] = value = max(fitting, key=len)
        text = rest[len(value) + 1 :]
    return picks
