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
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from bigpipe.sizes import parse_size

from .contexts import CheckContext, ForecastContext, StageContext
from .forecast import Forecast
from .types import Json, Machine


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
