"""What is known of a run and its nodes: what the schedule's rules look at, and what changes as steps are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from bigpipe.errors import BigpipeError
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.contract import Forecast, Json, Status
from bigpipe.orchestrator.recipe import UNKNOWN, Choice, Condition, First, Lookup, Node, metric
from bigpipe.orchestrator.store import KeyRecord

from .decision import Action, Decision, GateVerdict

GOOD = frozenset({Status.CACHED, Status.SUCCEEDED})
SETTLED = GOOD | {Status.FAILED, Status.SKIPPED}


NOTHING_FORESEEN = Forecast()


@dataclass(frozen=True, slots=True)
class Trial:
    """A node is needed by one of the choices that another node has."""

    first: First
    index: int
    """Of the choice."""
    after: bool
    """Its judge does not stand on it: the node has its turn once the choice is taken."""


@dataclass(slots=True, eq=False, repr=False)
class NodeState:
    """What is known of a node."""

    node: Node
    forecast: Forecast = NOTHING_FORESEEN
    processes: int = 1
    """How many it starts; each holds a CPU, unless its `resources` say otherwise."""
    status: Status = Status.PENDING
    reason: str = ""
    decision: Decision | None = None
    record: KeyRecord | None = None
    """Of what it gave."""
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """Recorded or foreseen."""
    bytes_here: bool = True
    demanded_by: str = ""
    """The consumer that needs dropped bytes again."""
    following: str = ""
    """The running producer whose files it takes as they are made."""
    passing: bool = False
    """It runs, and its files can be taken as they are made."""
    done: bool = False
    """Its work is done; its gates are not judged yet."""
    disk: int = 0
    """Bytes it has in the store, or is about to write there, by the forecast."""
    share: Mapping[str, int] = field(default_factory=dict)
    """What it holds besides while it runs."""
    seconds: float = 0.0
    error: BigpipeError | None = None
    left: str = ""
    """The gates that do not hold, where that is no failure: who depends on it is skipped, or takes another variant."""
    judges: bool = False
    """Its gates decide which variant another node takes."""
    verdict: str = ""
    """What its gates came to where they do not all hold, or which variant it takes and why others were left."""
    trials: list[Trial] = field(default_factory=list)
    """The choices that need it, where not all do."""
    choice: Choice | None = None
    """The variant it takes, of a node that takes the first that passes."""
    awaits: list[str] = field(default_factory=list)
    """The judges that have not decided yet whether it takes that one; only foreseen."""
    inputs: dict[str, list[NodeState]] = field(default_factory=dict)
    """Port → what is wired there; of one that takes the first variant that passes, once that is known, of this one."""
    needs: tuple[str, ...] = ()
    producers: list[NodeState] = field(default_factory=list)
    predecessors: list[NodeState] = field(default_factory=list)
    consumers: list[NodeState] = field(default_factory=list)
    """Those that take its artifact."""
    alike: list[NodeState] = field(default_factory=list)
    """Those that do the same work, itself among them: of one key, whatever the digests of their inputs turn out."""
    name: str = field(init=False)

    def __repr__(self) -> str:
        return f"<NodeState {self.name}: {self.status}>"

    def __post_init__(self) -> None:
        self.name = self.node.name
        self.alike = [self]

    @property
    def key(self) -> str | None:
        return self.record.key if self.record else self.decision.key if self.decision else None

    @property
    def digest(self) -> str | None:
        return self.record.digest if self.record else None

    @property
    def remote(self) -> bool:
        """Is what is needed of it brought from the remote store?"""
        fetch = self.decision.fetch if self.decision else None
        return fetch is not None and (fetch.kept or not self.demanded_by)

    @property
    def writes(self) -> int:
        """Bytes it adds to the store."""
        if self.remote and self.decision and self.decision.fetch:
            return self.decision.fetch.bytes
        asked = self.node.resources.disk
        return asked if asked is not None else self.forecast.write_bytes or 0

    @property
    def sized(self) -> bool:
        """Is it known how many bytes it adds to the disk of the store?"""
        forecast, asked = self.forecast, self.node.resources.disk
        fetched = forecast.fetches_to is None or forecast.download_bytes is not None
        return self.remote or (fetched and not (asked is None and forecast.write_bytes is None))

    @property
    def fetches(self) -> int:
        """Bytes it adds to the disk of the store in a cache of somebody else's, where they stay."""
        return (self.forecast.download_bytes or 0) if self.forecast.fetches_to and not self.remote else 0

    @property
    def hit(self) -> bool:
        """Is what the store has of it all that is needed?"""
        if self.decision is None or self.decision.action is not Action.CACHED:
            return False
        return self.decision.bytes_here or not self.demanded_by


@dataclass(slots=True, kw_only=True)
class States:
    """All nodes of a run, in topological order, what those that run hold together, and the rules of the run."""

    nodes: Mapping[str, NodeState]
    room: Mapping[str, int]
    """The most that all running nodes together may hold: jobs, CPUs, RAM and disk in bytes, and who holds GPUs. Two
    nodes that place themselves would both start at GPU 0, so one at a time does; so does one of which nobody knows what
    it takes of them."""
    side_by_side: bool = True
    """May consumers take a producer's files as they are made?"""
    keep_going: bool = False
    foreseen: bool = False
    """What is not known yet is left open: it will be known when the run gets there."""
    held: Counter[str] = field(default_factory=Counter)
    running: set[str] = field(default_factory=set)
    stopped: bool = False
    """No new node starts: interrupted, or a node failed that does not let the others go on."""
    of_key: dict[str, list[NodeState]] = field(default_factory=dict)
    """Key → those that have had it; while they do they share their bytes."""
    of_work: dict[tuple[Any, ...], list[NodeState]] = field(default_factory=dict)
    """What a key depends on besides the inputs, and who makes these → those that do this work."""

    def __post_init__(self) -> None:
        for state in self.nodes.values():
            self.wire(state, state.node.inputs, state.node.needs, state.node.predecessors)
            for producer in state.producers:
                producer.consumers.append(state)
            if state.node.first is not None:
                self._try(state.node.first)

    def wire(
        self, state: NodeState, inputs: Mapping[str, Sequence[str]], needs: Sequence[str], before: Sequence[str]
    ) -> None:
        """Let a node take these inputs. before: all that must have ended."""
        state.inputs = {port: [self.nodes[name] for name in names] for port, names in inputs.items()}
        state.producers = [self.nodes[name] for name in dict.fromkeys(chain.from_iterable(inputs.values()))]
        state.predecessors = [self.nodes[name] for name in before]
        state.needs = tuple(needs)

    def _try(self, first: First) -> None:
        """Note which nodes only some of the choices need. Nodes before the axis begins are needed by all."""
        for index, choice in enumerate(first.choices):
            self.nodes[choice.judge].judges = True
            below = self._on_axis([choice.judge], first.axis)
            for name in below | self._on_axis(choice.own, first.axis):
                self.nodes[name].trials.append(Trial(first, index, name not in below))

    def _on_axis(self, names: Iterable[str], axis: str) -> set[str]:
        """These nodes and what they stand on, as far as they have a value of the axis."""
        found = list(names)
        for name in found:
            found += [before for before in self.nodes[name].node.predecessors if before not in found]
        return {name for name in found if axis in self.nodes[name].node.variant}

    def __getitem__(self, name: str) -> NodeState:
        return self.nodes[name]

    def hold_disk(self, state: NodeState, size: int) -> None:
        self.held["disk"] += size - state.disk
        state.disk = size


def judge_gates(states: States, state: NodeState, metrics: Mapping[str, Json] | None = None) -> tuple[GateVerdict, ...]:
    """metrics: its own, where others are meant than those it has."""
    look = lookup(states, state, metrics)
    return tuple(
        GateVerdict(gate=gate, verdict=gate.evaluate(look), cure=_misnamed(state, gate)) for gate in state.node.gates
    )


def _misnamed(state: NodeState, gate: Condition) -> str:
    """What to do about a gate on a metric that its own node has not measured."""
    paths = sorted(path for name, path in gate.references if name is None) if _is_over(state) else []
    missing = next((path for path in paths if metric(state.metrics, path) is UNKNOWN), None)
    if missing is None:
        return ""
    return f"{state.name} measured no {missing}; " + did_you_mean(missing, state.metrics, otherwise="it measured")


def _is_over(state: NodeState) -> bool:
    """Will it measure nothing more? Not so of what is but foreseen, which has no record."""
    return state.status is Status.SKIPPED or state.record is not None


def lookup(states: States, own: NodeState, metrics: Mapping[str, Json] | None = None) -> Lookup:
    """Metrics of the nodes, UNKNOWN where a node has none yet, None where it will never have it. metrics: of its own,
    in place of those it has."""

    def look(name: str | None, path: str) -> Json:
        state = states.nodes.get(name) if name else own
        if state is None:
            return UNKNOWN
        if metrics is not None and state is own:
            return metric(metrics, path)
        found = metric(state.metrics, path)
        return None if found is UNKNOWN and _is_over(state) else found

    return look
