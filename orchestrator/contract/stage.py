"""The contract between the engine and a stage kind: plain data and functions.

A kind is one `Stage` value in one module: a params model, a metrics model, typed ports, and the functions `run` and
`forecast`; the rest is optional. Nothing registers itself; `registry` finds kinds by name. Third parties add theirs
through the entry-point group `bigpipe.stages`, and they look the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from bigpipe.errors import (
    BigpipeError,
    DoesNotFit,
    GatedRepository,
    GateFailed,
    InvalidCheckpoint,
    NotAuthorised,
    Offline,
    StageFailed,
    Transient,
    UsageError,
)
from bigpipe.sizes import format_size, parse_size

from .events import LogLine, Progress, Reporter
from .types import Gpu, Json, Launch, Lineage, Machine, Trust

if TYPE_CHECKING:
    from .passing import Inlet, Outlet

__all__ = [
    "BigpipeError", "CheckContext", "Code", "ContentField", "DoesNotFit", "File", "FileOrLiteral", "Forecast",
    "ForecastContext", "GateFailed", "GatedRepository", "Gpu", "InvalidCheckpoint", "Json", "Launch", "Lineage",
    "Machine", "Metrics", "Misfit", "NotAuthorised", "Offline", "Params", "Pinned", "PinnedFile", "Port", "Size",
    "Stage", "StageContext", "StageFailed", "StageResult", "Transient", "Tree", "Trust", "UsageError", "format_size",
    "late", "parse_size",
]  # fmt: skip


class Params(BaseModel):
    """What stands under `with:`. Frozen; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Metrics(BaseModel):
    """What a finished stage measured: readable by gates, `why`, `diff` and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema({"type": ["integer", "string"]})]
"""Bytes; `10GiB` and `10GB` are understood."""


@dataclass(frozen=True, slots=True)
class ContentField:
    """Marks a params field that enters the key by what it points to, never by the path itself.

    file: a path or a glob relative to the manifest; the digest of the bytes of each. Values that are not a string
    (a list of prompts, an inline map) are taken as they are. tree: a directory. code: `module:name`; the digest of
    the module's source (of all `.py` files of its top-level package).
    """

    kind: Literal["file", "tree", "code"]


File = Annotated[str, ContentField("file")]
Tree = Annotated[str, ContentField("tree")]
Code = Annotated[str, ContentField("code")]
FileOrLiteral = ContentField("file")
"""For unions: `Annotated[str | list[str], FileOrLiteral]`."""


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a kind. `many` takes a list of nodes and gathers all variants of a matrix."""

    type: str
    optional: bool = False
    many: bool = False


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something a plan knows will not fit here, and the smallest change that makes it fit."""

    cause: str
    cure: str
    change: Mapping[str, Json] = field(default_factory=dict)
    """The same change as params field → new value, so that the plan can say it as a `-p` and try it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a node will cost and give, known before it runs. None means unknown. Sizes in bytes."""

    download_bytes: int | None = None
    """Over the network."""
    write_bytes: int | None = None
    """New bytes in the store."""
    file_bytes: int = 0
    """Of the largest of the files that others may take one by one as they are made."""
    works_on: int = 0
    """Bytes of its input that are between begun and done at a time, where it takes files one by one; 0: one file."""
    fetches_to: Path | None = None
    """Where what is downloaded stays, if that is not the store."""
    ram: int | None = None
    """Peak of all its processes, besides the page cache."""
    vram: Mapping[int, int] = field(default_factory=dict)
    """Peak per GPU index."""
    seconds: float | None = None
    """By the kind's own reckoning. What was recorded of a run with the same params counts for more."""
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """Those metrics that are known now, with the values the run will give; gates on them are decided now."""
    output: Any = None
    """A description of the output for the next node's forecast; its type is the kinds' own affair."""
    unknown: tuple[str, ...] = ()
    """Facts that could not be had, each a sentence: `size of facebook/opt-13b: the Hub cannot be reached`."""
    misfits: tuple[Misfit, ...] = ()
    summary: str = ""
    """One line for people: `6 shards, +25.7 GB`."""
    details: tuple[str, ...] = ()
    """Lines for those who ask for more: which part of a model goes on which device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastContext:
    """All a forecast may look at."""

    inputs: Mapping[str, tuple[Forecast, ...]]
    """Per port, the forecasts of what is wired to it; an absent optional port is not in the map."""
    base: Path
    """The manifest's directory: what relative paths are relative to."""
    machine: Machine
    memo: Path
    """A directory for answers that are dear to get, named by what they depend on."""
    launch: Launch = field(default_factory=Launch)
    offline: bool = False
    artifact: Path | None = None
    """The node's own artifact, where it is already cached: read its headers rather than guess."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """What `pin` gave for this node (a branch → its commit)."""
    trust: Trust = field(default_factory=Trust)
    environment: Mapping[str, str] = field(default_factory=dict)
    """The node's `env` and the secrets it may see."""

    def input(self, port: str) -> Forecast | None:
        """The forecast of the single node wired to `port`, or None."""
        return next(iter(self.inputs.get(port, ())), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """All a plan-time preflight and a `pin` may look at."""

    base: Path
    machine: Machine
    memo: Path
    offline: bool = False
    trust: Trust = field(default_factory=Trust)
    environment: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, tuple[Forecast, ...]] = field(default_factory=dict)
    launch: Launch = field(default_factory=Launch)


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file that a source offers: bytes, and sha256 or git blob id in hex."""

    size: int
    sha256: str | None = None
    git_blob: str | None = None


@dataclass(frozen=True, slots=True)
class Pinned:
    """A floating value made exact: field path → exact value (`revision` → 40 hex digits), and how it was learnt."""

    values: Mapping[str, str]
    source: str
    files: Callable[[], Mapping[str, PinnedFile]] = dict
    """What the source says it will give, as far as it says. Asked only where a lock is written or checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """All that one attempt of a stage may touch. Input directories are read-only."""

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
    memo: Path
    base: Path
    """The manifest's directory."""
    machine: Machine
    launch: Launch = field(default_factory=Launch)
    trust: Trust = field(default_factory=Trust)
    environment: Mapping[str, str] = field(default_factory=dict)
    """The node's `env` and the secrets it may see; also set in the process."""
    lineage: tuple[Lineage, ...] = ()
    recipe: str = ""
    """The manifest's text, for provenance."""
    recipe_name: str = ""
    pins: Mapping[str, str] = field(default_factory=dict)
    offline: bool = False
    rank: int = 0
    world_size: int = 1
    outlet: Outlet | None = None
    """Where a kind that `streams` tells of each finished file; None where nobody is waiting for them."""
    inlet: Inlet | None = None
    """Where the files of the port it `follows` come from, one by one; None where they are all there."""
    rank_dir: Path | None = None
    """The only folder a rank may write to; `scratch/rank-N`, kept over crashes."""
    reporter: Reporter

    def input(self, port: str) -> Path:
        """The directory of the single artifact on `port`. KeyError where the port is not wired."""
        return self.inputs[port][0]

    def progress(self, done: int, total: int | None, unit: str = "B", task: str = "") -> None:
        self.reporter.report(Progress(self.node, done, total, unit, task, self.rank))

    def log(self, line: str, *, detail: bool = False) -> None:
        self.reporter.report(LogLine(self.node, line, detail, self.rank))


@dataclass(frozen=True, slots=True)
class StageResult:
    """Metrics, and those files of `out` whose sha256 the stage already knows: relative path → (hex digest, size)."""

    metrics: Metrics
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def late(target: str) -> Callable[..., Any]:
    """The function at `module:name`, imported when it is first called: every command reads every kind, few call one."""
    module, _, name = target.partition(":")

    def call(*arguments: Any) -> Any:
        return getattr(import_module(module), name)(*arguments)

    return call


P = TypeVar("P", bound=Params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[P]):
    """One stage kind.

    run: does the work of one attempt (of one rank, where `runs_in` is ranks).
    forecast: cost, metrics and output known beforehand; never imports torch, never moves weights.
    check: plan-time preflight (token, licence, prompts, destination); raises a BigpipeError.
    pin: makes floating params exact, for the key; raises Offline where the answer is out of reach.
    prepare: ranks only; runs once before launch in a process of its own, fixes the work plan under `scratch`.
    finish: ranks only; runs once after all ranks ended, merges `scratch/rank-*` into `out`, gives the result.
    present: is the outside effect recorded in this artifact still there? A hit needs True.
    facts: what the result depends on besides params (device names and total memory, where a param leaves them open).
    warms: modules that `run` will import, for kinds that run in a process: a worker may start, import them and wait
      while what the node needs is still being made. Importing them must do nothing else.
    result_line: recorded metrics in a few words, for the table at the end of a run; None: its scalar metrics.
    """

    kind: str
    version: int
    params: type[P]
    metrics: type[Metrics]
    inputs: Mapping[str, Port]
    output: str | None
    run: Callable[[P, StageContext], StageResult]
    forecast: Callable[[P, ForecastContext], Forecast]
    check: Callable[[P, CheckContext], None] | None = None
    pin: Callable[[P, CheckContext], Pinned | None] | None = None
    runs_in: Literal["inline", "process", "ranks"] = "process"
    prepare: Callable[[P, StageContext], None] | None = None
    finish: Callable[[P, StageContext], StageResult] | None = None
    present: Callable[[P, Path, CheckContext], bool] | None = None
    streams: bool = False
    """`run` passes each finished file on through `context.outlet`, where there is one."""
    follows: str = ""
    """A port whose files `run` can take one by one from `context.inlet`, while they are being made. What it finds in
    `out` and `scratch` may then have been made from other bytes, and must be checked by content."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions enter the key because the output's bytes depend on them."""
    facts: Callable[[P, Machine], Mapping[str, Json]] | None = None
    warms: Callable[[P], Sequence[str]] | None = None
    secrets: tuple[str, ...] = ()
    """Environment variables with secrets that the kind itself needs."""
    reproducible: bool = True
    reviewed: tuple[str, ...] = ()
    """Small JSON files of the artifact whose content the lock file shows for review."""
    needs_input: bool = False
    """Some port must be wired, though each of them is optional."""
    result_line: Callable[[Mapping[str, Json]], str] | None = None
    title: str = ""
    """One sentence for `bigpipe kinds` and the reference."""
