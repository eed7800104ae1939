"""The contract between the engine and a stage kind: plain data and functions.

A kind is one `Stage` value in one module: a params model, a metrics model, typed ports, and the functions `run` and
`forecast`; the rest is optional. Nothing registers itself; `registry` finds kinds by name. Third parties add theirs
through the entry-point group `bigpipe.stages`, and they look the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema
from pydantic_core import CoreSchema, PydanticKnownError
from pydantic_core.core_schema import no_info_after_validator_function

from bigpipe.errors import UsageError
from bigpipe.sizes import BARE, MOST, is_bare, parse_size, refuse_bare

from .contexts import CheckContext, ForecastContext, StageContext
from .types import Forecast, Json, Machine

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler


class Params(BaseModel):
    """What stands under `with:`. Frozen; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, defer_build=True)


class Metrics(BaseModel):
    """What a finished stage measured: readable by gates, `why`, `diff` and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Written:
    """The context in which params are validated as somebody wrote them, not as the engine passes them on: the scalars
    of what was written, which tell it from defaults. They are gathered when a field first asks."""

    def __init__(self, value: Json) -> None:
        self.value = value

    def __contains__(self, text: str) -> bool:
        return text in self._scalars

    @cached_property
    def _scalars(self) -> set[str]:
        found, waiting = set(), [self.value]
        for value in waiting:
            if isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
            else:
                found.add(str(value))
        return found


def read_size(value: int | str, info: ValidationInfo) -> int:
    if is_bare(value) and str(value) in (info.context or ()):
        refuse_bare(value)
    return parse_size(value)


_WRITTEN = rf"^\s*(\d+(\.\d+)?\s*([KkMmGgTt][Ii]?B|[Bb])|0|[1-9]\d{{{len(str(BARE)) - 1},}})\s*$"
"""A size as `parse_size` reads one: no unit in bits, and a unit where there are few digits."""
_SIZE: dict[str, Any] = {
    "type": ["integer", "string"],
    "minimum": 0,
    "maximum": MOST,
    "pattern": _WRITTEN,
    "examples": ["10GiB", "5GB"],
    "not": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": BARE},
}
Size = Annotated[int, BeforeValidator(read_size), WithJsonSchema(_SIZE)]
"""Bytes; `10GiB` and `10GB` are understood, and in a manifest a small number needs a unit."""
_NONE_OF_IT = r"^(?!\s*0+(\.0+)?\s*[A-Za-z]*\s*$)"
FileSize = Annotated[
    int,
    BeforeValidator(read_size),
    Field(gt=0),
    WithJsonSchema(_SIZE | {"minimum": BARE, "pattern": _NONE_OF_IT + _WRITTEN.removeprefix("^")}),
]
"""A Size that something fits into."""
BYTES = "bytes"
Bytes = Annotated[int, BYTES]
"""A metric in bytes: conditions compare it with sizes."""


@dataclass(frozen=True, slots=True)
class ContentField:
    """Marks a params field that enters the key by what it points to, never by the path itself.

    path: a file, a glob, or a directory; its digest as of these, with the path as it is written, which a kind that lays
    it out somewhere needs.
    file: a path or a glob relative to the manifest; the digest of the bytes of each. Values that are not a string
    (a list of prompts, an inline map) are taken as they are. tree: a directory, with what links in it lead to.
    folder: a directory without the folders that links in it lead to, for who does not look into them either. code:
    `module:name`; the digest of the module's source (of all `.py` files of its top-level package).
    """

    kind: Literal["file", "tree", "folder", "code", "path"]
    names: bool = False
    """The names of a glob's files enter too, since results tell them."""


File = Annotated[str, ContentField("file")]
Tree = Annotated[str, ContentField("tree")]
Folder = Annotated[str, ContentField("folder")]
Code = Annotated[str, ContentField("code")]
AnyPath = Annotated[str, ContentField("path", names=True)]
FileOrLiteral = ContentField("file")
"""For unions: `Annotated[str | list[str], FileOrLiteral]`."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """Marks a text that is a name in a table to which other distributions add: `Annotated[str, OneOf(names, find)]`.
    names: all of them, asked only where they are listed. find: raises UsageError for what is none of them."""

    names: Callable[[], Sequence[str]]
    find: Callable[[str], object]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._found, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.names())}

    def _found(self, name: str) -> str:
        try:
            self.find(name)
        except UsageError as error:
            expected = " or ".join(f"'{choice}'" for choice in self.names())
            raise PydanticKnownError("literal_error", {"expected": expected}) from error
        return name


ANY = "any"


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a kind. `many` takes a list of nodes and gathers all variants of a matrix."""

    type: str
    """Of the artifact; ANY: of any type."""
    optional: bool = False
    many: bool = False
    others: tuple[str, ...] = ()
    """Types that it takes as well."""

    @property
    def types(self) -> tuple[str, ...]:
        return self.type, *self.others

    @property
    def told(self) -> str:
        """Its types in words: `checkpoint or adapter`."""
        return " or ".join(self.types)


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
    known: Callable[[], Mapping[str, Json]] = dict
    """What a plan asks of the source besides, question → answer. Asked only where a lock is written."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """Metrics, and those files of `out` whose sha256 the stage already knows: relative path → (hex digest, size)."""

    metrics: Metrics
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    type: str = ""
    """Of the artifact, where the kind may give several; left out, its `output`."""


def late(target: str) -> Callable[..., Any]:
    """The function at `module:name`, imported when it is first called: every command reads every kind, few call one."""
    module, _, name = target.partition(":")

    @cache
    def found() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        return found()(*arguments, **options)

    return call


P = TypeVar("P", bound=Params)
SMOKE = "BIGPIPE_SMOKE"
"""The variable that stages of a smoke run see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning(Generic[P]):
    """What a kind answers before anything runs, besides its `forecast`."""

    check: Callable[[P, CheckContext], None] | None = None
    """Preflight (token, licence, prompts, destination): raises a BigpipeError for what would fail later."""
    pin: Callable[[P, CheckContext], Pinned | None] | None = None
    """Makes floating params exact, for the key; raises Offline where the answer is out of reach."""
    pin_asks: tuple[str, ...] = ()
    """What `pin` reads of the params: paths of fields, `revision`. What it gave once is used without asking, locked or
    offline, only where these say the same. Left out: all params."""
    only: Callable[[P, ForecastContext], Sequence[str]] | None = None
    """The names of what `run` takes where that may be less than the params ask for, as where nothing may be asked; else
    none. They enter the key then: what is made of less is no answer to the same question."""
    present: Callable[[P, Path, CheckContext], bool] | None = None
    """Is the outside effect that this artifact records still there? A hit needs True."""
    reads: Callable[[P, ForecastContext], Sequence[str]] | None = None
    """What `run` reads outside the store besides the fields that are content, and everything it is called: absolute
    paths of directories, or addresses of the kind's own making. Nothing is asked for it."""
    writes: Callable[[P, ForecastContext], Mapping[str, Sequence[str]]] | None = None
    """Where `run` puts something outside the store, replacing what is there: the field that says so → everything that
    the place is called, as in `reads`. A plan refuses what another node writes, or the recipe reads."""
    facts: Callable[[P, Machine], Mapping[str, Json]] | None = None
    """What the result depends on besides params: device names and total memory, where a param leaves them open."""
    apart: Callable[[P], Sequence[str]] | None = None
    """Params that change how the work is done, and nothing of what comes out: their paths, `serving.timeout`. They are
    left out of the key, so that another value of them goes on with what is there."""
    resumed: Callable[[P], Sequence[str]] | None = None
    """Params that leave standing what a stopped run had done: their paths. They are in the key, and where only these
    differ, `run` finds in `scratch` what was begun under the other key, and must tell what of it is still right."""
    leads_to: Callable[[P, Path], Sequence[Path]] | None = None
    """Files that the content of the params names, sounds of rows, by the manifest's directory: their content enters the
    key too. Raises UsageError for one that is not there."""
    smaller: tuple[str, ...] | None = None
    """Params that say how much is done at a time, or in how few bytes, what changes least first: which of them a plan
    tries, in this order, where the memory is not there. None: all, in the order of the params."""
    extras: Callable[[P, Path], Collection[str]] | None = None
    """The extras of bigpipe that what the params name needs besides `packages`, by the manifest's directory: of files
    in a format, of an address; and other distributions, such as one that offers what is named. An exported recipe
    installs them."""
    heeds_code: bool = False
    """The result is another one where code that came with a model may run: what the recipe trusts so enters the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks(Generic[P]):
    """What happens around the ranks of a kind that runs in ranks; `run` is then called by each of them."""

    prepare: Callable[[P, StageContext], None] | None = None
    """Runs once before the launch, in a process of its own, and fixes the work plan under `scratch`."""
    finish: Callable[[P, StageContext], StageResult] | None = None
    """Runs once after all ranks ended, merges `scratch/rank-*` into `out` and gives the result."""
    counted: bool = False
    """The result depends on how many ranks there are: their number enters the key."""
    mixes: bool = True
    """They make an `Accelerator` of accelerate's, which heeds `launch.mixed_precision` and what a `config_file` says of
    FSDP, DeepSpeed and Megatron-LM; otherwise the former is refused, and the latter left out."""
    replaced: bool = False
    """Where a rank dies, `prepare` is told of it in `context.lost`, and the ranks are started again with what is
    unfinished, up to `launch.max_restarts` times. Otherwise its death is the end of the attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """How a kind passes files on, and takes them, one by one while they are made."""

    streams: bool = False
    """`run` passes each finished file on through `context.outlet`, where there is one."""
    follows: str = ""
    """A port whose files `run` can take one by one, while they are being made. What it finds in `out` and `scratch` may
    then have been made from other bytes, and must be checked by content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """One field of the params says what another one, a map, holds."""

    field: str
    decides: str
    models: Callable[[], Mapping[str, type[BaseModel]]]
    """Value of `field` → what the map then holds, as far as it is known. Asked only where it is listed."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Stage(Generic[P]):
    """One stage kind."""

    kind: str
    """What recipes write under `uses:`."""
    version: int
    """In the key: raise it when the bytes of the output change."""
    params: type[P]
    metrics: type[Metrics]
    inputs: Mapping[str, Port]
    output: str | None
    """The type of the artifact; None: there is none."""
    outputs: tuple[str, ...] = ()
    """Types that it may have instead, by what is found when it runs, which `StageResult.type` then says; a port that
    takes one of them may be wired, and whoever stands behind it checks what comes."""
    output_field: str = ""
    """The field of the params that says which of these types it has."""
    unmeasured: Callable[[P, Collection[str], str], tuple[str, str] | None] | None = None
    """(params, ports that are wired, path of a metric) → what it is not measured without, and the cure; None: it is
    measured. A gate or a `when` on what is not measured could never be decided, and is refused before anything runs."""
    open_ports: Port | None = None
    """What ports of any other name are; None: there are no others."""
    placeholders: tuple[str, ...] = ()
    """Names before the dot of `${…}` in `with:` that the kind fills in itself, when it runs."""
    run: Callable[[P, StageContext], StageResult]
    """Does the work of one attempt; of one rank, where the kind runs in ranks."""
    forecast: Callable[[P, ForecastContext], Forecast]
    """Cost, metrics and output known beforehand; never imports torch, never moves weights."""
    runs_in: str = "process"
    """The executor: process, inline (in the command itself: light work without torch), ranks, or another's."""
    settled: Callable[[P], Stage[P]] | None = None
    """What it is with these params, where they decide its ports, how it runs, or the packages that its bytes depend on.
    Before they are known it is what is written here, and a port that only some of them need is optional."""
    planning: Planning[P] = field(default_factory=Planning)
    ranks: Ranks[P] = field(default_factory=Ranks)
    passing: Passing = field(default_factory=Passing)
    choices: tuple[Choices, ...] = ()
    """For the reference and the schema; the params check what stands there."""
    smoke: Callable[[P, ForecastContext], P] | None = None
    """The params with which it does little of the same, for `run --smoke`: a small model, few rows, few steps, nothing
    written where others read. What is wired is small already, and described by its forecasts; `context.environment` has
    under `SMOKE` a folder that is gone after the run. Raises UsageError where it cannot be tried so. None: it runs as
    it is written, and sees that variable."""
    warms: Callable[[P], Sequence[str]] | None = None
    """Modules that `run` will import: its worker may start, import them and wait while what the node needs is still
    being made. Importing them must do nothing else."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions enter the key because the output's bytes depend on them."""
    secrets: tuple[str, ...] = ()
    """Environment variables with secrets that the kind itself needs."""
    inherits: tuple[str, ...] = ()
    """What the names of variables begin with that its workers inherit besides those of any child: `AWS_`, where what
    they write to is signed in to by these."""
    asks: bool = False
    """It asks servers that are no Hub: its workers are given the passwords of proxies."""
    reproducible: bool = True
    """Do equal inputs give equal bytes? Only then are the outputs in a lock file enforced."""
    reviewed: tuple[str, ...] = ()
    """Small JSON files of the artifact whose content the lock file shows for review."""
    needs_input: bool = False
    """Some port must be wired, though each of them is optional."""
    title: str = ""
    """One sentence for `bigpipe kinds` and the reference."""
    result_line: Callable[[Mapping[str, Json]], str] | None = None
    """Recorded metrics in a few words, for the table at the end of a run; None: its scalar metrics."""

    def __post_init__(self) -> None:
        """Raise TypeError for what is not of its type, so that its module says so when it is imported."""
        for name, model in (("params", Params), ("metrics", Metrics)):
            given = getattr(self, name)
            if not isinstance(given, type) or not issubclass(given, model):
                raise TypeError(f"Stage {self.kind}: `{name}` is {given!r}, and not a class of {model.__name__}")
        if wrong := [name for name, port in self.inputs.items() if not isinstance(port, Port)]:
            raise TypeError(f"Stage {self.kind}: its input {wrong[0]} is {self.inputs[wrong[0]]!r}, and not a Port")

    def port(self, name: str) -> Port | None:
        """Return the port of this name, None where there is none."""
        return self.inputs.get(name, self.open_ports)

    def with_params(self, params: P) -> Stage[P]:
        """Return what it is with these params."""
        return self.settled(params) if self.settled is not None else self

    def may_give(self, artifact: str) -> bool:
        """Return whether its artifact may be of this type."""
        return artifact == self.output or artifact in self.outputs

    def may_fill(self, port: Port) -> bool:
        """Return whether its artifact may be of a type that this port takes."""
        return any(map(self.may_give, port.types))

    def __repr__(self) -> str:
        return f"<Stage {self.kind}, version {self.version}: {', '.join(self.inputs) or 'nothing'} → {self.output}>"
