"""What a kind's functions are given besides their params: one frozen value each, all standing on `Surroundings`.

Context             the surroundings, and their parts by name
├─ CheckContext     at plan time: for `check`, `pin` and `present`
│  └─ ForecastContext
└─ Assignment       what one attempt works on, as the engine knows it and a job file holds it
   └─ StageContext  the same in the process that does the work: for `run`, `prepare` and `finish`
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

from bigpipe.passing import Inlet, OpenInlet, OpenOutlet, Outlet

from .events import Bounded, LogLine, Progress, Reporter
from .types import Forecast, Json, Launch, Lineage, Machine, Trust

T = TypeVar("T")
_number = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What lies around a node, whatever it is asked for."""

    base: Path
    """The manifest's directory: what relative paths are relative to."""
    machine: Machine
    memo: Path
    """A directory for answers that are dear to get, named by what they depend on."""
    trust: Trust = field(default_factory=Trust)
    offline: bool = False
    launch: Launch = field(default_factory=Launch.model_construct)
    """How its ranks are started."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The node's `env` and the secrets it may see; also set in the process that does the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all contexts share: the surroundings, and their parts by name."""

    surroundings: Surroundings

    @property
    def base(self) -> Path:
        return self.surroundings.base

    @property
    def machine(self) -> Machine:
        return self.surroundings.machine

    @property
    def memo(self) -> Path:
        return self.surroundings.memo

    @property
    def trust(self) -> Trust:
        return self.surroundings.trust

    @property
    def offline(self) -> bool:
        return self.surroundings.offline

    @property
    def launch(self) -> Launch:
        return self.surroundings.launch

    @property
    def environment(self) -> Mapping[str, str]:
        return self.surroundings.environment

    def within(self, **changes: Any) -> Self:
        """Return the same with other surroundings: `within(launch=…)`."""
        return replace(self, surroundings=replace(self.surroundings, **changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext(Context):
    """All a plan-time preflight, a `pin` and a `present` may look at."""

    inputs: Mapping[str, tuple[Forecast, ...]] = field(default_factory=dict)
    """Per port, the forecasts of what is wired to it; an absent optional port is not in the map."""
    known: Mapping[str, Json] = field(default_factory=dict)
    """What `Pinned.known` gave when the recipe was locked: for where the source cannot be asked."""
    recipe_name: str = ""
    node: str = ""
    """Who asks; both are empty where nobody does, as in a test of a kind."""

    def input(self, port: str) -> Forecast | None:
        """Return the forecast of the single node wired to `port`, or None."""
        return next(iter(self.inputs.get(port, ())), None)

    def described(self, port: str, kind: type[T]) -> T | None:
        """Return what the output on `port` will be, or None where that is not known as one of this type."""
        wired = self.input(port)
        return wired.output if wired is not None and isinstance(wired.output, kind) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastContext(CheckContext):
    """All a forecast may look at."""

    artifact: Path | None = None
    """The node's own artifact, where it is already cached: read its headers rather than guess."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """What `pin` gave for this node (a branch → its commit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment(Context):
    """What one attempt of a node works on, and where. Paths are absolute, input directories read-only."""

    node: str
    inputs: Mapping[str, tuple[Path, ...]]
    """Per port, artifact directories; an absent optional port is not in the map."""
    out: Path
    """Becomes the artifact. Kept over crashes until published: what is found here is this stage's own earlier work.
    A symlink to an absolute path (an input's file, a blob of the Hub cache) is a reference, not copied."""
    scratch: Path
    """Kept over crashes like `out`, dropped when the node is published."""
    parts: Path
    """Content-addressed pieces shared by all nodes of all runs."""
    lineage: tuple[Lineage, ...] = ()
    recipe: str = ""
    """The manifest's text, for provenance."""
    recipe_name: str = ""
    recipe_params: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's parameters as they were used, `-p` included."""
    git: Mapping[str, Any] | None = None
    """`commit` and `dirty` of the checkout that the recipe lies in, if it lies in one."""
    pins: Mapping[str, str] = field(default_factory=dict)
    passes_on: Path | None = None
    """The folder through which its files reach, one by one, those that wait for them."""
    arriving: Mapping[str, Path] = field(default_factory=dict)
    """Port → the folder through which the files of that input come, one by one, as they are made."""

    def input(self, port: str) -> Path:
        """Return the directory of the single artifact on `port`. Raise KeyError where the port is not wired."""
        return self.inputs[port][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext(Assignment):
    """All that one attempt of a stage may touch."""

    rank: int = 0
    world_size: int = 1
    rank_dir: Path | None = None
    """The folder of a rank alone, `scratch/rank-N`, kept over crashes; in `scratch` it writes only what all ranks
    may write at once."""
    lost: Mapping[int, str] = field(default_factory=dict)
    """For `prepare`: the ranks that died since this attempt was last prepared, and how: `was ended by SIGSEGV`."""
    outlet: Outlet = field(default_factory=Outlet)
    """Where a kind that `streams` tells of each finished file, whether or not anybody waits for it."""
    reporter: Reporter

    @classmethod
    def of(cls, assignment: Assignment, **own: Any) -> Self:
        """Return the context of a process that works on this assignment. own: what is that process's alone."""
        outlet = OpenOutlet(assignment.passes_on, assignment.out) if assignment.passes_on else Outlet()
        same = {item.name: getattr(assignment, item.name) for item in fields(Assignment)}
        return cls(**same, outlet=outlet, **own)

    def open(self, port: str) -> Inlet:
        """Return where the files of the single artifact on `port` come from: all there, or one by one as they are made.
        The latter only on the port that the kind `follows`. Raise KeyError where the port is not wired."""
        return OpenInlet(self.arriving[port], self.node) if port in self.arriving else Inlet(self.input(port))

    @contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Inside, a model's own files are at work. The attempt ends where they take more than the manifest's limits.
        what: the subject of the sentence that then says so."""
        limits, process = self.trust.limits, os.getpid()
        begun = Bounded(self.node, what, process, next(_number), limits.seconds, limits.memory, self.rank)
        self.reporter.report(begun)
        try:
            yield
        finally:
            self.reporter.report(replace(begun, seconds=0, memory=0))

    def progress(
        self,
        done: int,
        total: int | None,
        unit: str = "B",
        task: str = "",
        note: str = "",
        *,
        tokens: int | None = None,
        busy: float | None = None,
        whole: int | None = None,
    ) -> None:
        self.reporter.report(Progress(self.node, done, total, unit, task, self.rank, note, tokens, busy, whole))

    def log(self, line: str, *, detail: bool = False) -> None:
        self.reporter.report(LogLine(self.node, str(line), detail, self.rank))
