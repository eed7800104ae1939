"""A recipe made small, to be run as a whole in less than a minute: `run --smoke`.

    smaller(session, folder) -> (session, smoke)     the recipe that then takes the ordinary way
    smoke.judged(metrics)                            what its conditions come to once that has run

Each kind says itself how it does little (`Stage.smoke`). The store, and all that is written, lies in a folder of its
own, whose path is in every key: nothing that a smoke run makes is ever taken for what it stands for. Conditions are not
heeded, since numbers of a made-up model say nothing: every stage runs, and what they come to is told at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigpipe.errors import GateFailed, Offline, UsageError
from bigpipe.orchestrator.contract import SMOKE, Forecast, ForecastContext, Json, Launch, Machine
from bigpipe.orchestrator.recipe import UNKNOWN, Condition, Node, Recipe, ResourcesSpec, metric
from bigpipe.orchestrator.store import Store

from .decision import GateVerdict
from .keys import Difference, changed
from .session import Session

RANKS = 2
"""The most of a stage."""
NOT_SHOWN = (
    "what the models do, and how well: their weights are made up, and what gates and `when` come to decides nothing",
    "speed, and whether it fits at full size: `bigpipe plan` says what it takes",
    "that places outside can be written: what is saved goes to a temporary directory",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoke:
    """What a smoke run is of."""

    recipe: Recipe
    """As it is written."""
    changes: Mapping[str, tuple[Difference, ...]]
    """Node → what is smaller, or left out."""
    kept: Path | None = None
    """The store of one that failed; None: it is gone."""

    def judged(self, metrics: Mapping[str, Mapping[str, Json]]) -> dict[str, tuple[GateVerdict, ...]]:
        """Return what the conditions of the nodes that ran come to. metrics: of each that did."""
        conditions = {name: _conditions(self.recipe.nodes[name], metrics) for name in metrics}
        return {
            name: tuple(GateVerdict(gate=each, verdict=each.evaluate(_lookup(name, metrics))) for each in of_node)
            for name, of_node in conditions.items()
            if of_node
        }

    def undecided(self, judged: Mapping[str, tuple[GateVerdict, ...]], machine: Machine) -> Iterator[GateFailed]:
        """Give an error for each condition that names what was not measured, which the recipe would fail at too. What
        only a GPU is measured on is none where there is no GPU."""
        for name, verdicts in judged.items():
            for verdict in verdicts:
                named = [path for _, path in verdict.gate.references]
                if verdict.verdict is None and not (_of_gpu(named) and not machine.gpus):
                    cause = f"{name}: {verdict.gate.text} cannot be decided: not all of it was measured"
                    error = GateFailed(cause, f"`bigpipe kinds {self.recipe.nodes[name].kind.kind}` lists metrics",
                                       place=verdict.gate.place)  # fmt: skip
                    error.node = name
                    yield error

    def told(self) -> list[str]:
        """Return what is smaller, and what the run does not show, as lines for people."""
        smaller = [f"  {name}: {', '.join(map(str, changes))}" for name, changes in self.changes.items() if changes]
        return ["", "smoke run, smaller than the recipe:", *smaller, "it does not show:", *self.not_shown()]

    def not_shown(self) -> list[str]:
        return [f"  {each}" for each in NOT_SHOWN]

    def as_json(self) -> dict[str, Json]:
        smaller = {name: [{"path": c.path, "old": c.old, "new": c.new} for c in changes]
                   for name, changes in self.changes.items() if changes}  # fmt: skip
        return {"smaller": smaller, "not_shown": list(NOT_SHOWN), "store": str(self.kept) if self.kept else None}


def _conditions(node: Node, metrics: Mapping[str, Mapping[str, Json]]) -> list[Condition]:
    """Those about nodes that ran."""
    own = (*((node.when,) if node.when else ()), *node.gates)
    return [each for each in own if all(name is None or name in metrics for name, _ in each.references)]


def _of_gpu(paths: list[str]) -> bool:
    return any(part.isdecimal() or part == "gpu" for path in paths for part in path.split("."))


def _lookup(own: str, metrics: Mapping[str, Mapping[str, Json]]) -> Callable[[str | None, str], Json]:
    def look(name: str | None, path: str) -> Json:
        found = metrics.get(name or own)
        return UNKNOWN if found is None else metric(found, path)

    return look


def smaller(session: Session, folder: Path) -> tuple[Session, Smoke]:
    """Return the session of the small recipe, over a store in `folder`. Raise as the kinds do for what cannot be tried,
    UsageError for one that writes outside of the store and does not say what else it could do, and NotAuthorised,
    Offline and Transient where a source cannot be asked."""
    written, pins = session.recipe, {node.name: session.pinned(node) for node in session.nodes}
    nodes = {node.name: _plain(node, folder, session) for node in session.nodes}
    tried = replace(
        session, recipe=replace(written, nodes=nodes), store=Store(folder / "store", memo=session.store.memo),
        remote=None, lock=None, _pins=pins, _surroundings={},
    )  # fmt: skip
    forecasts: dict[str, Forecast] = {}
    for name, node in nodes.items():
        nodes[name], forecasts[name] = _shrink(tried, node, forecasts)
    changes = {name: tuple(_changes(written.nodes[name], node)) for name, node in nodes.items()}
    return replace(tried, _identities={}), Smoke(recipe=written, changes=changes)


def _plain(node: Node, folder: Path, session: Session) -> Node:
    """Without conditions and secrets that are not set, and with few ranks on this machine; what it holds is as little
    as its forecast says. A launch file is heeded where it says `use_cpu` alone: which GPUs it names, and what for, is
    of the whole run."""
    launch, gpus = session.surroundings(node).launch, len(session.machine_of(node).gpus)
    ranks = min(launch.num_processes, RANKS, gpus or RANKS)
    first = node.first.choices[0] if node.first else None
    return replace(
        node,
        when=None,
        gates=(),
        first=None,
        inputs=first.inputs if first else node.inputs,
        needs=first.needs if first else node.needs,
        launch=Launch(
            config_file=node.launch.config_file if session.on_cpu(node) else None,
            num_processes=ranks,
            num_machines=1,
            machine_rank=0,
            main_process_ip=None,
            main_process_port=None,
            mixed_precision=launch.mixed_precision,
            max_restarts=launch.max_restarts,
        ),
        resources=ResourcesSpec(),
        env={**node.env, SMOKE: str(folder)},
        secrets=tuple(name for name, value in session.secrets(node).items() if value),
    )


def _shrink(session: Session, node: Node, forecasts: Mapping[str, Forecast]) -> tuple[Node, Forecast]:
    """The node with params that do little, and what is then foreseen of it."""
    inputs = {port: tuple(forecasts[name] for name in names) for port, names in node.inputs.items() if names}
    context = ForecastContext(
        surroundings=session.surroundings(node),
        inputs=inputs,
        pins=session.known_pins(node).values,
        known=session.locked_answers.get(node.name, {}),
        recipe_name=session.recipe.name,
        node=node.name,
    )
    if node.kind.smoke is not None:
        params = session.ask(node, node.kind.smoke, context)
        node = replace(node, params=params, kind=node.kind.with_params(params))
    elif node.kind.planning.writes is not None:
        cause = f"{node.name} ({node.kind.kind}) writes outside of the store, and its kind does not say how it is tried"
        error = UsageError(cause, "give its Stage a `smoke`, or name the nodes that are to be tried")
        error.place, error.node = node.places.of("uses"), node.name
        raise error
    try:
        return node, session.ask(node, node.kind.forecast, context)
    except Offline as error:
        return node, Forecast(unknown=(error.cause,))


def _changes(written: Node, small: Node) -> Iterator[Difference]:
    yield from changed("params", _dumped(written), _dumped(small))
    yield from changed("launch", written.launch.model_dump(), small.launch.model_dump())


def _dumped(node: Node) -> Mapping[str, Any]:
    found: Mapping[str, Any] = node.params.model_dump(mode="json", by_alias=True)
    return found
