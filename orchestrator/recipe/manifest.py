"""The shape of a manifest: what may stand at its top level and in a stage, besides what each kind says of `with:`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, WrapValidator

from bigpipe.names import did_you_mean
from bigpipe.orchestrator.contract import Count, Json, Launch, Size, Text, Trust
from bigpipe.redaction import has_password, redact
from bigpipe.trust import Limits

from .problems import Fault, Problems
from .spelling import Spelt
from .validation import Target, fields_at, validate
from .yamlsource import Document, Key, to_python

VERSION = 1
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")

_DURATION = r"\s*(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s)?\s*"
LONGEST = 10**9
"""Seconds: 30 years."""
_MODULE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_PINNED = r"[\w.-]+/[\w.-]+@[0-9a-f]{40}"

_REFUSED = frozenset({
    "PATH", "HOME", "SHELL", "ENV", "IFS", "PS4", "BASH_ENV", "PROMPT_COMMAND", "CDPATH", "GLOBIGNORE", "SHELLOPTS",
    "BASHOPTS", "NODE_OPTIONS", "PERL5LIB", "PERL5OPT", "RUBYOPT", "RUBYLIB", "JAVA_TOOL_OPTIONS", "GCONV_PATH",
    "VIRTUAL_ENV", "TRACEPARENT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
})  # fmt: skip
_REFUSED_PREFIXES = ("LD_", "DYLD_", "PYTHON", "BASH_FUNC_", "MALLOC_", "GIT_", "BIGPIPE_", "ACCELERATE_")
"""They change which code a child process loads or which program it is, or belong to the engine's own launch."""


def refused_variable(name: str) -> bool:
    return name.upper() in _REFUSED or name.upper().startswith(_REFUSED_PREFIXES)


def parse_duration(value: int | float | str) -> float:
    """Return the seconds of `30m`, `90s`, `1h30m`, `1.5h`, or of a number of seconds. Raise ValueError with cause and
    cure."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = re.fullmatch(_DURATION, value) if isinstance(value, str) and value.strip() else None
        if match is None:
            raise ValueError(f"{value!r} is not a time; write 90s, 30m, 1h30m or a number of seconds")
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = hours * 3600 + minutes * 60 + rest
    if not 0 < seconds < LONGEST:
        raise ValueError(f"{value!r} is no time to wait; it must be more than 0, and less than {LONGEST:,} seconds")
    return seconds


def _like(pattern: str, otherwise: str) -> AfterValidator:
    def check(name: str) -> str:
        if not re.fullmatch(pattern, name):
            raise ValueError(f"{name!r} is not {otherwise}")
        return name

    return AfterValidator(check)


Module = Annotated[
    str,
    _like(_MODULE, "a module name; write it as in `import`: mingpt or mingpt.model"),
    WithJsonSchema({"type": "string", "pattern": f"^{_MODULE}$"}),
]
PinnedRepository = Annotated[
    str,
    _like(_PINNED, "a pinned repository; write owner/name@ and the 40 digits of its commit"),
    WithJsonSchema({"type": "string", "pattern": f"^{_PINNED}$"}),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {
            "type": ["number", "string"],
            "exclusiveMinimum": 0,
            "exclusiveMaximum": LONGEST,
            "pattern": rf"^(?=.*[1-9]){_DURATION}$",
            "examples": ["30m", "1h30m"],
        }
    ),
]
LIMITS = Limits()


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class LimitsSpec(Spec):
    """What a model's own config, tokenizer and chat template may take."""

    seconds: Duration = LIMITS.seconds
    """Of work on what a model brings, each time."""
    memory: Size = LIMITS.memory
    """Bytes beyond what the process has before."""
    modules: Count = Field(default=LIMITS.modules, ge=1)
    """Of a class that a config names."""
    sequences: Count = Field(default=LIMITS.sequences, ge=1)
    """That a tokenizer may make of one text."""


class TrustSpec(Spec):
    modules: tuple[Module, ...] = Field((), description="Python modules that a custom class or function may come from.")
    remote_code: tuple[PinnedRepository, ...] = Field(
        (), description="Pinned repositories (owner/name@commit) that may run their own code."
    )

    limits: LimitsSpec = Field(
        default=LimitsSpec.model_construct(),
        description="What a model's own config, tokenizer and chat template may take.",
    )

    def value(self) -> Trust:
        return Trust(self.modules, self.remote_code, Limits(**dict(self.limits)))


class ResourcesSpec(Spec):
    """What the node holds while it runs; what is left out is derived from the forecast."""

    cpus: Count | None = Field(default=None, ge=1)
    """CPU cores."""
    ram: Size | None = None
    """Bytes of memory, of all its processes together."""
    gpus: Count | None = Field(default=None, ge=0)
    """GPUs."""
    gpu_memory: Size | None = None
    """Bytes on each of them."""
    disk: Size | None = None
    """Bytes that it writes on the disk of the store."""
    labels: dict[Text, Text] = Field(
        default_factory=dict,
        description="Labels of the machines of a cluster that may run it (`--executor`); elsewhere they say nothing.",
    )


def _as_spelt(value: Json, read: Callable[[Json], Json]) -> Json:
    """A variant is called as its value is written."""
    return value if isinstance(value, Spelt) and read(value) is not None else read(value)


def _one_axis(value: Json) -> Json:
    if isinstance(value, list):
        raise ValueError(
            "several axes are not tried at once; name one, and let a stage after it take the first of another"
        )
    return value


class FirstSpec(Spec):
    """Along which axis a stage takes one variant of its inputs, and whose gates decide which."""

    axis: Annotated[Text, BeforeValidator(_one_axis)] = Field(
        description="The axis whose values are tried, in their order."
    )
    of: Text = Field(description="The stage on that axis whose gates decide: the first variant that passes is taken.")


@dataclass(frozen=True, slots=True)
class Shared:
    """A remote store, as a recipe names it."""

    address: str
    """An address, or a path; empty: none."""
    publish: bool = True
    """Is what runs make offered there?"""
    timeout: float = 30.0
    """Seconds without anything moving after which a run goes on without it."""


class RemoteSpec(Spec):
    """A remote store that is only read, or waited for longer."""

    url: Text
    """An address that fsspec opens, or a path."""
    publish: bool = True
    """Offer there what runs make. An address from outside the recipe is always offered to."""
    timeout: Duration = 30.0
    """How long nothing may move before a run goes on without it."""


class Structure(Spec):
    """The part of a stage that shapes the graph. It cannot depend on the matrix."""

    uses: Text = Field(description="The stage kind.")
    inputs: Text | dict[str, Text | list[Text]] = Field(
        default_factory=dict,
        description="A stage for the port `model`, or a map of ports to stages; a list gathers every variant.",
    )
    needs: list[Text] = Field(default_factory=list, description="Stages that must have finished before.")
    matrix: dict[str, list[Annotated[str | bool | int | float, WrapValidator(_as_spelt)]]] = Field(
        default_factory=dict, description="Axes: one node for each combination of their values."
    )
    first: FirstSpec | None = Field(
        default=None, description="Take one variant of an axis: the first that passes; those after it are not run."
    )
    secrets: list[Text] = Field(default_factory=list, description="Declared secrets that this stage may see.")


OnFail = Literal["stop", "continue", "skip", "warn"]


class NodeSettings(Spec):
    """The rest of a stage, read once per node, after `${matrix.…}` has its values."""

    with_: dict[str | int, Any] = Field(default_factory=dict, alias="with", description="The kind's own fields.")
    when: Text | None = Field(default=None, description="Run only if: a comparison over `${stages.NODE.metrics.PATH}`.")
    launch: Launch = Field(Launch.model_construct(), description="How ranks are started, in accelerate's words.")
    resources: ResourcesSpec = Field(
        ResourcesSpec.model_construct(), description="What it holds while it runs; else what is foreseen."
    )
    retries: Count = Field(default=0, ge=0, le=100, description="Further attempts after a transient failure.")
    timeout: Duration | None = Field(default=None, description="30m, 1h30m, or seconds.")
    gates: list[Text] = Field(default_factory=list, description="Comparisons over the stage's metrics that must hold.")
    on_fail: OnFail = Field(
        "stop",
        description="stop, continue: what a failure does to the other branches. skip, warn: a gate that does not hold "
        "is no failure; what depends on the stage is skipped, or goes on.",
    )
    cache: bool = Field(default=True, description="false: drop the bytes once the last consumer has them.")
    env: dict[str, str | Count] = Field(default_factory=dict, description="Environment variables of the stage.")


STRUCTURE = tuple(Structure.model_fields)
SETTINGS = tuple(info.alias or name for name, info in NodeSettings.model_fields.items())


class ManifestSpec(Spec):
    version: Literal[1] = Field(description="The manifest format.")
    name: Text | None = Field(None, max_length=100, description="What the recipe is called; else the file's name.")
    description: str = Field("", description="What the recipe is for, in words.")
    params: dict[str | int, Any] = Field(
        default_factory=dict, description="Values that `-p name=value` replaces; null means required."
    )
    secrets: tuple[str, ...] = Field(default=(), description="Environment variables that stages may list as secrets.")
    trust: TrustSpec = Field(TrustSpec.model_construct(), description="What code of others may do.")
    remote: Text | RemoteSpec | None = Field(
        default=None, description="A store that others share: an address, or a map with `url`; else $BIGPIPE_REMOTE."
    )
    sinks: tuple[Text, ...] = Field(default=(), description="Systems that are told of runs: mlflow, openlineage.")
    stages: dict[str | int, Any] = Field(min_length=1)

    def shared(self) -> Shared | None:
        """Return the remote store that it names."""
        if self.remote is None or isinstance(self.remote, str):
            return Shared(self.remote) if self.remote else None
        return Shared(self.remote.url, self.remote.publish, self.remote.timeout)


def read_manifest(document: Document, problems: Problems) -> ManifestSpec | None:
    """Return the top level; names under it are checked, stages not read yet. None after errors that hide the rest."""
    whole: dict[str, Json] = to_python(document.root)
    fields = {key: value for key, value in whole.items() if not str(key).startswith("x-")}
    _check_version(fields, problems)
    manifest = validate(ManifestSpec, fields, Target(document, (), "the manifest"), problems, salvage=True)
    if manifest is None:
        return None
    if manifest.name is not None and "${" in manifest.name:
        cause, cure = "the name cannot hold a reference", "write it out; references stand in stages"
        problems.add(Fault.MISPLACED_REFERENCE, ("name",), cause, cure)
    _check_remote(manifest, problems)
    _check_sinks(manifest, problems)
    for where, what in (("params", "a parameter"), ("stages", "a stage")):
        for name in getattr(manifest, where):
            check_name(name, (where, name), what, problems)
    for index, name in enumerate(manifest.secrets):
        check_name(name, ("secrets", index), "a secret", problems, key=False)
    return manifest


def _check_remote(manifest: ManifestSpec, problems: Problems) -> None:
    if (shared := manifest.shared()) is None:
        return
    path = ("remote",) if isinstance(manifest.remote, str) else ("remote", "url")
    if "${" in shared.address:
        cause, cure = "`remote` cannot hold a reference", "write it out, or set BIGPIPE_REMOTE where it differs"
        problems.add(Fault.MISPLACED_REFERENCE, path, cause, cure)
    if has_password(shared.address):
        cause = f"the address {redact(shared.address)} has a password or token in it, which would be recorded"
        cure = "leave it out; its fsspec package reads credentials from the environment or its own files"
        problems.add(Fault.PASSWORD, path, cause, cure)


def _check_sinks(manifest: ManifestSpec, problems: Problems) -> None:
    if not manifest.sinks:
        return
    from bigpipe.orchestrator.sinks import SINKS  # of what is told to others

    for index, name in enumerate(manifest.sinks):
        if name not in SINKS:
            cure = did_you_mean(name, SINKS, otherwise="there are")
            problems.add(Fault.NOT_A_CHOICE, ("sinks", index), f"unknown sink {name!r}", cure)


def named(fields: Mapping[Key, Json]) -> dict[str, Json]:
    """Return the fields with a text as key; the others have been reported."""
    return {name: value for name, value in fields.items() if isinstance(name, str)}


def _check_version(fields: dict[str, Json], problems: Problems) -> None:
    found = fields.get("version")
    if "version" not in fields:
        problems.add(Fault.MISSING_FIELD, (), "the manifest needs 'version'", f"add `version: {VERSION}`", key=True)
    elif found != VERSION or isinstance(found, bool | float):
        newer = isinstance(found, int) and not isinstance(found, bool) and found > VERSION
        cure = "update bigpipe" if newer else f"write `version: {VERSION}`"
        problems.add(Fault.WRONG_VERSION, ("version",), f"this bigpipe reads manifests of version {VERSION}", cure)
    fields["version"] = VERSION


def check_name(name: Key, path: tuple[Key, ...], what: str, problems: Problems, *, key: bool = True) -> None:
    if isinstance(name, str) and NAME.fullmatch(name):
        return
    name = str(name)
    better = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:64]
    cure = "names are letters, digits, _ and -, at most 64, a letter first"
    if NAME.fullmatch(better):
        cure = f"call it {better!r}; {cure}"
    problems.add(Fault.BAD_NAME, path, f"{name[:80]!r} cannot name {what}", cure, key=key)


def split_stage(
    raw: Mapping[str, Json], name: str, problems: Problems, params: type[BaseModel] | None = None
) -> tuple[dict[str, Json], dict[str, Json]]:
    """Return the fields of `Structure` and those of `NodeSettings`; others are reported. params: of the stage's kind,
    if it is known."""
    below = fields_at(params, ()) if params else []
    for key in raw:
        if key not in STRUCTURE and key not in SETTINGS:
            cure = did_you_mean(str(key), [*STRUCTURE, *SETTINGS], otherwise="it takes")
            cure = f"write it under `with`: {raw.get('uses')} takes it there" if key in below else cure
            cause = f"unknown field {str(key)!r} in stage {name}"
            problems.add(Fault.UNKNOWN_FIELD, ("stages", name, key), cause, cure, key=True)
    shape, settings = ({key: raw[key] for key in raw if key in taken} for taken in (STRUCTURE, SETTINGS))
    return shape, settings
