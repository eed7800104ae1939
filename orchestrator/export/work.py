"""What every target needs to know of a recipe: its tasks in order, what they hold, its parameters and secrets.

A task is what one process of `bigpipe run` does: a node, after those that it stands on, which the store has by then.
Where a node takes the first variant that passes, its task also makes the variants: only so are those after it left.
Where several nodes take one whose bytes are let go, one task makes all of them: the next would make it again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.git import origin_of
from bigpipe.modules import installed_in, top_level
from bigpipe.names import plain_names
from bigpipe.orchestrator.launch import distributions_with
from bigpipe.orchestrator.planning import (
    NodeState,
    Plan,
    PlannedNode,
    Session,
    States,
    lock_path,
    make_plan,
    named_code,
    takes_any_gpus,
)
from bigpipe.orchestrator.recipe import Recipe, distributions_of, is_built_in
from bigpipe.orchestrator.sinks import SINKS
from bigpipe.versions import RUN, brought_by, package_version, requirement

COMPUTES = {"torch", "vllm"}
"""Packages that use GPUs."""
COMMAND_MEMORY = 256 * 2**20
"""Bytes of RAM for the command itself, beside the processes of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Nodes that one command runs. Sizes in bytes; None: not known."""

    name: str
    """Letters, digits and `-`; no other task has it, whatever its case."""
    asks: tuple[str, ...]
    """The nodes that the command names."""
    after: tuple[str, ...]
    """The names of tasks that must have ended before."""
    cpus: int
    ram: int | None
    gpus: int
    machines: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the recipe."""

    name: str
    plain: str
    """Letters, digits and `_`; no other parameter has it, whatever its case."""
    given: str
    """What `-p` said; empty: the recipe's own value holds, also once it has another."""

    @property
    def variable(self) -> str:
        """Return the environment variable that hands its value to a shell."""
        return f"PARAM_{self.plain.upper()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A recipe to be written for a target."""

    recipe: str
    """Its name."""
    plain: str
    """The same in letters, digits and `-`."""
    manifest: str
    """Its path from where the work begins, with `/`."""
    locked: bool
    """There is a lock file: nothing else may be used."""
    parameters: tuple[Parameter, ...]
    secrets: tuple[str, ...]
    """Variables that some of its nodes may see."""
    settings: tuple[str, ...]
    """Further variables, of the command itself: where its sinks are and what they want to see."""
    tasks: tuple[Task, ...]
    """Each after those that it needs."""
    requirements: tuple[str, ...]
    """What pip installs for it: bigpipe, then what kinds of others need."""
    unknown: tuple[str, ...]
    """Of what task it could not be foreseen how much it takes, each a sentence."""

    @property
    def gpus(self) -> int:
        return max(task.gpus for task in self.tasks)

    def texts(self) -> Iterator[str]:
        """Yield everything in it that somebody wrote."""
        yield from (self.recipe, self.manifest, *(each.given for each in self.parameters))
        yield from (name for task in self.tasks for name in task.asks)

    @property
    def given(self) -> list[str]:
        """Return the `-p` that were given, as words."""
        return [word for each in self.parameters if each.given for word in ("-p", f"{each.name}={each.given}")]

    def run(self, asks: Sequence[str] = ()) -> list[str]:
        """Return `bigpipe run` as words, without its parameters. asks: nodes; none: all."""
        return ["bigpipe", "run", self.manifest, *asks, *["--locked"] * self.locked, "--json"]

    def install(self, *options: str) -> list[str]:
        """Return the commands that install bigpipe and what the recipe needs, in the versions that keys are made of and
        that this version of bigpipe is tested with; they come with it. options: of pip."""
        pip = shlex.join(["pip", "install", *options])
        bare = shlex.quote(re.sub(r"\[.*\]", "", self.requirements[0]))
        tested = "python -c 'import bigpipe.versions; print(bigpipe.versions.TESTED)'"
        return [f"{pip} --no-deps {bare}", f'{pip} --constraint "$({tested})" {shlex.join(self.requirements)}']

    def shell(self, words: Sequence[str]) -> str:
        """Return a command as a POSIX shell reads it, with a `-p` for each parameter whose variable is set."""
        own = [f'${{{each.variable}:+-p "{each.name}=${each.variable}"}}' for each in self.parameters]
        return " ".join([*map(shlex.quote, words), *own])


def work_of(session: Session, beside: Path | None) -> Work:
    """beside: the directory from which the recipe's path begins; None: the top of its checkout, where it lies in one,
    else the working directory, or its own folder where it lies outside of that. Raise UsageError for a recipe that
    cannot be planned."""
    recipe, plan = session.recipe, make_plan(session, preflight=False)
    for name in (name for name, value in session.arguments.items() if not value):
        cause = f"-p {name}= is empty, and what is left empty there means the recipe's own value"
        raise UsageError(cause, "write the empty value into the recipe")
    read = [name for name in recipe.params if name not in recipe.unread]
    plain = plain_names(read, "_")
    secrets = tuple(dict.fromkeys(name for node in recipe.nodes.values() for name in node.secrets))
    return Work(
        recipe=recipe.name,
        plain=plain_names([recipe.name])[recipe.name],
        manifest=_found_from(recipe.path, beside),
        locked=lock_path(recipe.path).exists(),
        parameters=tuple(Parameter(name, plain[name], str(session.arguments.get(name, ""))) for name in read),
        secrets=secrets,
        settings=tuple(name for sink in recipe.sinks for name in SINKS[sink].settings if name not in secrets),
        tasks=tuple(_tasks(recipe, plan)),
        requirements=_requirements(session),
        unknown=tuple(_unknown(plan)),
    )


def _found_from(manifest: Path, beside: Path | None) -> str:
    origin = None if beside else origin_of(manifest)
    found = Path(origin.inside if origin else os.path.relpath(manifest, beside or Path.cwd()))
    return manifest.name if found.parts[0] == ".." and not beside else found.as_posix()  # nothing is above the top


def _requirements(session: Session) -> tuple[str, ...]:
    """bigpipe with the extras that the recipe's kinds, what they name, and its sinks need, in the version that wrote
    the file, and what kinds that are not its own need besides. What counts GPUs goes where something computes or asks
    for some: without it none is seen."""
    from importlib.metadata import metadata

    recipe = session.recipe
    packages = {name for node in recipe.nodes.values() for name in node.kind.packages}
    offered = set(metadata("bigpipe-ml").get_all("Provides-Extra") or ())
    extras = (packages & offered - set(RUN)) | ({"run"} if "torch" in packages else set())  # kinds that compute name it
    asked = any(node.resources.gpus or node.resources.gpu_memory for node in recipe.nodes.values())
    extras |= {"gpu"} if asked or packages & COMPUTES else set()
    further = _of_others(recipe, session.base)
    for node in recipe.nodes.values():
        if node.kind.planning.extras is not None:
            needed = set(session.ask(node, node.kind.planning.extras, session.base))
            extras, further = extras | needed & offered, further | needed - offered
    extras |= set(recipe.sinks)
    if recipe.remote and recipe.remote.address.startswith("s3:"):
        extras.add("s3")
    listed = f"[{','.join(sorted(extras))}]" if extras else ""
    brought = {"bigpipe-ml", *offered, *(RUN if "run" in extras else ())}
    return (f"bigpipe-ml{listed}=={package_version('bigpipe-ml')}", *map(requirement, sorted(further - brought)))


def _of_others(recipe: Recipe, base: Path) -> set[str]:
    """The distributions of the kinds which are not bigpipe's own, and those that these kinds name; of executors, and of
    what the params name as `module:name`."""
    found: set[str] = set()
    for node in recipe.nodes.values():
        found |= distributions_with(node.kind.runs_in)
        code = named_code(node.params, base)
        if not is_built_in(node.location):
            found |= {*distributions_of(node.location), *node.kind.packages}
            code.append(node.location)
        for top in {top_level(each) for each in code}:
            if folder := installed_in(top, base):
                found |= brought_by(top, folder).keys()
    return found


def _tasks(recipe: Recipe, plan: Plan) -> Iterator[Task]:
    """Each holds what the largest of its nodes does: what the recipe says, else what is foreseen."""
    groups = _groups(recipe)
    home = {name: group for group in groups for name in group}
    asked = {group: _asked(recipe, group) for group in groups}
    plain = plain_names([asked[group][0] for group in groups])
    for group in groups:
        before = dict.fromkeys(home[name] for node in group for name in recipe.nodes[node].predecessors)
        nodes = [plan.nodes[name] for name in group]
        rams = [_ram(each) for each in nodes]
        yield Task(
            name=plain[asked[group][0]],
            asks=asked[group],
            after=tuple(plain[asked[other][0]] for other in before if other != group),
            cpus=max(each.node.resources.cpus or each.processes for each in nodes),
            ram=None if None in rams else max(filter(None, rams)),
            gpus=max(_gpus(each, plan.session) for each in nodes),
            machines=max(recipe.nodes[name].launch.num_machines for name in group),
        )


Group = tuple[str, ...]


def _groups(recipe: Recipe) -> list[Group]:
    """Return the nodes in groups that one command runs, in an order in which they can run: variants that are tried go
    with whoever takes one, what is let go (`cache: false`) with all who take it, where they are several, and so does
    what cannot be before or after that."""
    import networkx as nx

    graph = recipe.graph.copy()
    for taker, tried in _tried(recipe).items():
        graph.add_edges_from((taker, name) for name in tried)  # the way back: whatever lies between them is one
    for name, takers in _let_go(recipe).items():
        graph.add_edges_from((taker, name) for taker in takers)
    whole = nx.condensation(graph)
    position = {name: index for index, name in enumerate(recipe.nodes)}
    found = {number: sorted(data["members"], key=position.__getitem__) for number, data in whole.nodes(data=True)}
    order = nx.lexicographical_topological_sort(whole, key=lambda number: position[found[number][0]])
    return [tuple(found[number]) for number in order]


def _tried(recipe: Recipe) -> Mapping[str, Collection[str]]:
    """Return node that takes the first variant that passes → the nodes that only some of its choices need."""
    states = States(nodes={name: NodeState(node) for name, node in recipe.nodes.items()}, room={})
    takers = {id(node.first): name for name, node in recipe.nodes.items() if node.first}
    found: dict[str, list[str]] = {name: [] for name in takers.values()}
    for state in states.nodes.values():
        for trial in state.trials:
            found[takers[id(trial.first)]].append(state.name)
    return found


def _let_go(recipe: Recipe) -> Mapping[str, Collection[str]]:
    """Return node whose bytes are dropped once all have them → those who take it, where they are several: the first
    command would drop it, and each further one make it again."""
    nodes = recipe.nodes
    takers = {
        name: [each for each in nodes if name in nodes[each].producers] for name in nodes if not nodes[name].cache
    }
    return {name: found for name, found in takers.items() if len(found) > 1}


def _asked(recipe: Recipe, group: Group) -> tuple[str, ...]:
    """The nodes that bring all of a group about: those that no other of it stands on."""
    below = {before for name in group for before in recipe.nodes[name].predecessors}
    return tuple(name for name in group if name not in below)


def _ram(planned: PlannedNode) -> int | None:
    asked, forecast = planned.node.resources.ram, planned.forecast
    ram = asked if asked is not None else forecast.ram if forecast else None
    return None if ram is None else ram + COMMAND_MEMORY


def _gpus(planned: PlannedNode, session: Session) -> int:
    """As many as it asks for, else is foreseen to use; of ranks of which nothing is foreseen, all that were there."""
    asked, forecast = planned.node.resources.gpus, planned.forecast
    if asked is not None or forecast is None:
        return asked or 0
    if takes_any_gpus(planned.node, forecast):
        return len(session.machine_of(planned.node).gpus)
    return len(forecast.vram or ())


def _unknown(plan: Plan) -> Iterator[str]:
    for name, planned in plan.nodes.items():
        if _ram(planned) is None:
            facts = planned.forecast.unknown if planned.forecast else ()
            yield f"{name}: how much RAM it takes" + (f" ({'; '.join(facts)})" if facts else "")
