"""One recipe, one store, one machine: what every command about a manifest starts from."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from bigpipe.environment import Environment, says_offline
from bigpipe.errors import BigpipeError, Offline, UsageError
from bigpipe.files import make_directory, without_detours, write_file
from bigpipe.git import Checkout
from bigpipe.machine import detect
from bigpipe.orchestrator.contract import (
    CheckContext,
    ForecastContext,
    Json,
    LogLine,
    Machine,
    Pinned,
    Reporter,
    Surroundings,
)
from bigpipe.orchestrator.launch import visible_secrets
from bigpipe.orchestrator.recipe import Node, Recipe, Shared, load_recipe
from bigpipe.orchestrator.store import KeyRecord, StatMemo, Store, default_root, digest_of
from bigpipe.redaction import printable, redact
from bigpipe.versions import bars

from .keys import Difference, Identity, differences, identity, written_at

if TYPE_CHECKING:
    from bigpipe.orchestrator.store import Remote

NOTHING_PINNED = Pinned({}, "")
T = TypeVar("T")

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract import Forecast, Stage
    from bigpipe.orchestrator.launch import Cluster, Executor, Meeting, Needs, Standing


@dataclass(kw_only=True, repr=False)
class Session:
    """Everything a plan and a run share. Dear answers are asked once: pins, identities, the machine."""

    recipe: Recipe
    store: Store
    selected: frozenset[str]
    forced: frozenset[str] = frozenset()
    arguments: Mapping[str, str] = field(default_factory=dict)
    """The `-p` values, as written."""
    offline: bool = False
    locked: bool = False
    """Inputs that differ from the lock file are refused, and its pins are used without asking."""
    lock: Path | None = None
    """The recipe's lock file, where there is one."""
    locked_pins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Node → what its floating values were when it was locked: the source of pins when the network is not."""
    locked_asked: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """Node → what those values were the answer to: they are used only where the recipe still says that."""
    locked_answers: Mapping[str, Mapping[str, Json]] = field(default_factory=dict, repr=False)
    """Node → what its source said when it was locked, for where that cannot be asked."""
    given_machine: Machine | None = None
    cluster: Cluster | None = None
    """Whose machines the nodes run on, but for those that run in the command itself; None: on this one."""
    meeting: Meeting | None = None
    """Of the machines that a scheduler started, where this is the one that drives."""
    unwritten: bool = False
    """No file holds the recipe: others have the same path."""
    side_by_side: bool = True
    """May several nodes run at a time, and take each other's files as they are made?"""
    environment: Mapping[str, str] = field(default_factory=Environment, repr=False)
    _pins: dict[str, Pinned] = field(default_factory=dict)
    _identities: dict[str, Identity] = field(default_factory=dict)
    _surroundings: dict[str, Surroundings] = field(default_factory=dict)
    provisional: dict[str, str] = field(default_factory=dict)
    """Node → its provisional key, where that was asked for."""
    reporter: Reporter | None = None
    """Hears of what takes long before the run begins."""
    remote: Remote | None = None
    """Where others share what their stores have; None also where nothing may be asked."""
    shared: Remote | None = None
    """The same, whether it may be asked or not."""
    _identifying: str = ""

    def __repr__(self) -> str:
        return f"<Session of {self.recipe.name} over {self.store.root}>"

    @cached_property
    def checkout(self) -> Checkout:
        """What git says of the manifest."""
        return Checkout(self.recipe.path)

    @property
    def variant(self) -> str:
        """Return what names the `-p` values, and the recipe where no file holds it: none, or a digest, since they may
        be secret."""
        if self.unwritten:
            return digest_of("variant", [dict(self.arguments), self.recipe.text])
        return digest_of("variant", dict(self.arguments)) if self.arguments else ""

    @cached_property
    def base(self) -> Path:
        return self.recipe.path.parent

    @cached_property
    def machine(self) -> Machine:
        return self.given_machine or detect(self.store.root)

    def machine_of(self, node: Node) -> Machine:
        """Return the machine that a node is planned for, without GPUs where its `config_file` says `use_cpu`. Raise
        DoesNotFit where none of a cluster has its labels, UsageError for a `config_file` that cannot be used."""
        if self.cluster is None or node.kind.runs_in == "inline":
            return replace(self.machine, gpus=()) if self.on_cpu(node) else self.machine
        from .spreading import planned_for

        return planned_for(self.cluster, self.asking(node)).machine

    def on_cpu(self, node: Node) -> bool:
        """Return whether a node's `config_file` says `use_cpu`. Raise UsageError for one that cannot be used."""
        if node.launch.config_file is None:
            return False
        from bigpipe.orchestrator.launch import runs_on_cpu

        try:
            return runs_on_cpu(node.launch, self.base)
        except UsageError as error:
            error.place, error.node = error.place or node.places.of("launch"), node.name
            raise

    def asking(self, node: Node) -> Node:
        """Return the node as it asks for a machine of a cluster: for no GPU where its ranks are to run on the CPU."""
        if not self.on_cpu(node):
            return node
        return replace(node, resources=node.resources.model_copy(update={"gpus": 0}))

    def executor(self, kind: Stage[Any]) -> Executor:
        """Return what runs attempts of a kind: the cluster, or, of a kind that is light, the command itself."""
        from bigpipe.orchestrator.launch import executor

        return executor(kind.runs_in) if self.cluster is None or kind.runs_in == "inline" else self.cluster.executor

    def needs(self, node: Node, forecast: Forecast) -> Needs:
        """Return what an attempt of a node takes of a cluster's machines."""
        from bigpipe.orchestrator.launch import Needs

        if self.cluster is None or node.kind.runs_in == "inline":
            return Needs()
        from .spreading import needs

        launch = self.surroundings(node).launch
        return needs(self.cluster, self.asking(node), forecast, launch.local_processes, launch.num_machines)

    @cached_property
    def memo(self) -> StatMemo:
        return StatMemo(self.store.memo, self._announce)

    def _announce(self, what: str) -> None:
        if self.reporter is not None:
            self.reporter.report(LogLine(self._identifying, f"reading {what}, to know what it holds"))

    def tell_of_remote(self, line: str) -> None:
        if self.reporter is not None:
            self.reporter.report(LogLine("remote store", line))

    @cached_property
    def place(self) -> Standing | None:
        """Where this machine stands among those that a scheduler started; None where a cluster has them all. Raise
        UsageError for odd variables."""
        from bigpipe.orchestrator.launch import standing

        return standing(self.environment) if self.cluster is None else None

    @property
    def may_span_machines(self) -> bool:
        """Return whether a node may be meant to run on several machines: as it says, or a `config_file` may."""
        return any(node.launch.num_machines > 1 or node.launch.config_file is not None for node in self.nodes)

    @cached_property
    def nodes(self) -> list[Node]:
        """The selected nodes in topological order."""
        return [node for name, node in self.recipe.nodes.items() if name in self.selected]

    def secrets(self, node: Node) -> dict[str, str]:
        """Return the secrets that the node may see and that are set, name → value."""
        return visible_secrets(node.kind, node.secrets, self.environment)

    def surroundings(self, node: Node) -> Surroundings:
        """Return what all contexts of the node stand on. Raise UsageError for a `config_file` that cannot be used."""
        if node.name not in self._surroundings:
            launch = node.launch
            if launch.config_file is not None or launch.num_machines > 1:
                from bigpipe.orchestrator.launch import effective_launch, require_heeded

                try:
                    launch = effective_launch(launch, self.base, lambda: self.place)
                    require_heeded(launch, node.kind)
                except UsageError as error:
                    error.place, error.node = error.place or node.places.of(error.field or "launch"), node.name
                    raise
            self._surroundings[node.name] = Surroundings(
                base=self.base,
                machine=self.machine_of(node),
                memo=self.store.memo,
                trust=self.recipe.trust,
                offline=self.offline,
                launch=launch,
                environment={**node.env, **self.secrets(node)},
            )
        return self._surroundings[node.name]

    def check_context(self, node: Node) -> CheckContext:
        return CheckContext(
            surroundings=self.surroundings(node), known=self.locked_answers.get(node.name, {}),
            recipe_name=self.recipe.name, node=node.name,
        )  # fmt: skip

    def foreseeing(self, node: Node) -> ForecastContext:
        """Return the context of what is asked with the pins that are known so far."""
        return ForecastContext(
            surroundings=self.surroundings(node), known=self.locked_answers.get(node.name, {}),
            pins=self.known_pins(node).values,
        )  # fmt: skip

    def room(self, jobs: int) -> dict[str, int]:
        """Return what all running nodes together may hold here, see `states.States`. A cluster keeps account of what it
        has: there all start at once. Where there is no GPU, nobody waits for one."""
        machine = self.machine
        if self.cluster is not None:
            return {"jobs": jobs, **dict.fromkeys(("CPUs", "RAM", "GPUs"), sys.maxsize), "disk": machine.disk_free}
        holds = {"CPUs": max(machine.cpus, 1), "RAM": machine.memory_available, "disk": machine.disk_free}
        return {"jobs": jobs, "GPUs": 1 if machine.gpus else sys.maxsize, **holds}

    @property
    def jobs(self) -> int:
        """Return how many nodes run side by side where nobody says."""
        return max(2, self.machine.cpus if self.cluster is None else sum(h.machine.cpus for h in self.cluster.hosts))

    def ask(self, node: Node, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a kind answers before anything runs. What it raises gets the place of its stage; of what is no
        BigpipeError, a bug of the kind, the traceback is kept."""
        try:
            return function(node.params, *arguments)
        except BigpipeError as error:
            error.place, error.node = error.place or node.places.of(error.field), node.name
            raise
        except Exception as error:
            from bigpipe.orchestrator.launch import Failure

            log = node_folder(self.store.runs / "plan", node.name) / "log.txt"
            make_directory(log.parent)
            write_file(log, printable(redact(traceback.format_exc())), durable=False)
            failed = Failure.of(error).error(f"{node.name} ({node.kind.kind})", log)
            failed.place, failed.node = node.places.get(""), node.name
            raise failed from error

    def pinned(self, node: Node) -> Pinned:
        """Return floating params made exact: asked of the source once, else the lock's, else the last recorded, of the
        same question. Raise Offline where none of the three has an answer."""
        if node.name not in self._pins:
            self._pins[node.name] = self._pin(node)
        return self._pins[node.name]

    def known_pins(self, node: Node) -> Pinned:
        """Return what `pinned` has found so far; nothing is asked."""
        return self._pins.get(node.name, NOTHING_PINNED)

    def _pin(self, node: Node) -> Pinned:
        if node.kind.planning.pin is None:
            return NOTHING_PINNED
        self.asked(node)  # a fault of the kind is told before anything is asked for
        locked = self._locked_pin(node)
        if self.locked and locked:
            return locked
        try:
            return self.ask(node, node.kind.planning.pin, self.check_context(node)) or NOTHING_PINNED
        except Offline:
            if (known := locked or self._recorded_pin(node)) is None:
                raise
            return known

    def asked(self, node: Node) -> dict[str, Json]:
        """Return what the pins of a node are the answer to: field path → what its params say there."""
        return self.ask(node, written_at, node.kind.planning.pin_asks)

    def _locked_pin(self, node: Node) -> Pinned | None:
        pins = self.locked_pins.get(node.name)
        return Pinned(pins, "the lock file") if pins and self.locked_asked.get(node.name) == self.asked(node) else None

    def _recorded_pin(self, node: Node) -> Pinned | None:
        """What the source answered to the same question, when the node was last run with it."""
        asked = self.asked(node)
        for record in reversed(self.store.history(self.recipe.path, self.recipe.own_name, node.name)):
            if record.pins and record.kind == node.kind.kind and asked in record.asked:
                return Pinned(record.pins, f"the run of {record.created[:10]}, the Hub cannot be asked")
        return None

    @cached_property
    def _last_keys(self) -> dict[str, str]:
        return self.store.last_keys(self.recipe.path, self.recipe.own_name)

    def last(self, name: str) -> KeyRecord | None:
        """Return the last record of a node when this session began: of this manifest, else the latest of the
        name that it says."""
        key = self._last_keys.get(name)
        return self.store.find(key) if key else None

    def _ranks(self, node: Node) -> int | None:
        """How many ranks will run, where that matters to the result."""
        return self.surroundings(node).launch.num_processes if node.kind.ranks.counted else None

    def _recorded(self, node: Node) -> Mapping[str, str]:
        """The versions of packages that a node last ran with, where it cannot run here and is only looked up."""
        last = self.last(node.name) if bars(node.kind.packages) else None
        return {
            name: version for name, version in (last.identity if last else {}).get("packages", {}).items() if version
        }

    def _only(self, node: Node) -> Sequence[str]:
        """What a node takes where that may be less than it asks for."""
        if (only := node.kind.planning.only) is None:
            return ()
        self.pinned(node)
        found: Sequence[str] = self.ask(node, only, self.foreseeing(node))
        return found

    def identity(self, node: Node) -> Identity:
        """Return what the node computes, apart from its inputs. Raise UsageError with the place of a missing file."""
        if node.name not in self._identities:
            self._identities[node.name] = self._identify(node)
        return self._identities[node.name]

    def _identify(self, node: Node) -> Identity:
        self._identifying = node.name
        try:
            return identity(
                node, base=self.base, memo=self.memo, machine=self.machine_of(node), trust=self.recipe.trust,
                pins=self.pinned(node).values, only=self._only(node), ranks=self._ranks(node),
                recorded=self._recorded(node),
            )  # fmt: skip
        except BigpipeError as error:
            error.place, error.node = error.place or node.places.of(error.field), node.name
            raise

    def moved(self, node: Node) -> list[Difference]:
        """Return what a node computes by now that it did not when `identity` was first asked: of files that were edited
        since. Raise UsageError as that does."""
        return differences(self.identity(node).as_json, self._identify(node).as_json, {}, {})


def open_session(
    manifest: str | Path,
    nodes: Sequence[str] = (),
    *,
    params: Mapping[str, str],
    store: str | Path | None = None,
    force: Collection[str] = (),
    offline: bool = False,
    text: str | None = None,
    typed: Mapping[tuple[str | int, ...], str] = MappingProxyType({}),
    remote: str | Path | None = None,
    **further: Any,
) -> Session:
    """Read and check a manifest and open the store. Return the session.

    nodes, force: stage or node names; the selected nodes are these and their ancestors (none: everything).
    params: `-p` values as written, read as the type of each parameter's default. text: the manifest, where no file
    holds it; typed: what was typed on a command line to make its parts. remote: the address of a remote store, see
    `remote_of`. further: fields of the Session.
    Raise ManifestError with every problem at once, UsageError for unknown node names.
    """
    path = Path(manifest)
    # Places are named as the path was given; the rest of the engine must not depend on the current directory.
    recipe = replace(load_recipe(path, params, text=text, arguments=typed), path=without_detours(path))
    found = Store(Path(store) if store else default_root())
    found.refuse_foreign()
    selected = recipe.select(nodes) if nodes else frozenset(recipe.nodes)
    session = Session(
        recipe=recipe,
        store=found,
        selected=selected,
        forced=_forced(recipe, force, selected),
        arguments=params,
        unwritten=text is not None,
        offline=offline or says_offline(os.environ),
        **further,
    )
    session.shared = remote_of(session, remote)
    session.remote = None if offline else session.shared
    return session


def remote_of(session: Session, given: str | Path | None) -> Remote | None:
    """Return the remote store that is meant: by an option, else by BIGPIPE_REMOTE, else by the recipe; an empty address
    means none. Paths begin at the working directory, those of the recipe beside it. Raise UsageError for one that
    cannot be."""
    choice, base = session.recipe.remote, session.base
    if given is not None or "BIGPIPE_REMOTE" in session.environment:
        address = session.environment.get("BIGPIPE_REMOTE", "") if given is None else os.fspath(given)
        choice, base = replace(choice or Shared(""), address=address, publish=True), Path.cwd()
    if choice is None or not choice.address:
        return None
    from bigpipe.orchestrator.store import open_remote  # of what has one

    found = open_remote(choice.address, base, session.store.root, session.environment)
    found.publishes, found.patience, found.tell = choice.publish, choice.timeout, session.tell_of_remote
    return found


def _forced(recipe: Recipe, names: Collection[str], selected: Collection[str]) -> frozenset[str]:
    """Return the nodes that are to run whatever the store holds. Raise UsageError for a name that means none of those
    selected."""
    meant = {name: recipe.meant(name).intersection(selected) for name in names}
    for name, found in meant.items():
        if not found:
            cure = f"name it too: {name}; or leave it out of what is forced"
            raise UsageError(f"{name} cannot be forced: it is not among the nodes that are to run", cure)
    return frozenset().union(*meant.values())


LONGEST_NAME = 200
"""Bytes of a node's name in that of its folder; file systems take 255 in all."""


def node_folder(run_folder: Path, node: str) -> Path:
    """Return where the attempts of a node lie: `nodes/<node>`. Where a file name cannot hold that, what it can hold of
    it, and a digest: no two nodes share a folder."""
    plain = re.sub(r"[^\w@=,.+-]", "_", node)
    if plain == node and len(node.encode()) <= LONGEST_NAME:
        return run_folder / "nodes" / node
    head = plain.encode()[:LONGEST_NAME].decode(errors="ignore")
    return run_folder / "nodes" / f"{head}~{digest_of('node', node)[7:19]}"


def lock_path(manifest: Path) -> Path:
    """Return where the lock file of a manifest lies: beside it."""
    return Path(f"{manifest}.lock")
