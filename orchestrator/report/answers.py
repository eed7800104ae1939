"""What every `--json` holds and every line of `--events`, as models: the published schemas are generated from them, and
tests hold what commands really print against those."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bigpipe.machine import Machine
from bigpipe.orchestrator.contract import EVENTS, Json
from bigpipe.orchestrator.planning import Difference
from bigpipe.orchestrator.running import NodeRun

Actions = Literal["run", "cached", "maybe", "skipped"]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True, use_attribute_docstrings=True
    )


class Told(Strict):
    """Why an exit code is not 0."""

    code: str
    """Of errors in manifests, or the name of an error's class."""
    cause: str
    cure: str
    file: str | None
    line: int | None
    column: int | None
    node: str | None


class Answer(Strict):
    """What every object has."""

    exit_code: int
    errors: list[Told]


class Checkout(Strict):
    commit: str
    dirty: bool


class Run(Answer):
    """What a run did."""

    run: str | None
    """None: it was refused before it began."""
    status: Literal["succeeded", "failed", "interrupted", "refused"]
    manifest: str
    params: dict[str, Any]
    git: Checkout | None
    seconds: float
    nodes: dict[str, NodeRun]


class Change(Strict):
    path: str
    old: Any
    new: Any
    place: str | None


class Gate(Strict):
    text: str
    value: Any
    passed: bool | None


class PlannedMisfit(Strict):
    node: str
    cause: str
    cure: str


class Foreseen(Strict):
    """Bytes and seconds; None: not known."""

    download_bytes: int | None
    write_bytes: int | None
    ram: int | None
    vram: dict[str, int]
    seconds: float | None
    metrics: dict[str, Any]
    unknown: list[str]
    details: list[str]


class Planned(Strict):
    kind: str
    action: Actions
    reason: str
    key: str | None
    pins: dict[str, Any]
    changes: list[Change]
    gates: list[Gate]
    tried: list[dict[str, Any]]
    problem: str | None
    forecast: Foreseen | None


class Plan(Answer):
    """What a run would do."""

    manifest: str
    machine: Machine
    fits: bool
    download_bytes: int
    write_bytes: int
    peak_disk_bytes: int
    misfits: list[PlannedMisfit]
    not_installed: dict[str, list[str]]
    """Node that may run and cannot run here → the packages that it lacks."""
    nodes: dict[str, Planned]


class Validity(Strict):
    valid: bool


class Validated(Answer):
    manifests: dict[str, Validity]


class NodeStatus(Strict):
    action: Actions
    reason: str


class Status(Answer):
    nodes: dict[str, NodeStatus]


class Last(Strict):
    run: str
    created: str
    seconds: float


class Reason(Strict):
    action: Actions
    reason: str
    key: str | None
    changes: list[Change]
    tried: list[dict[str, Any]]
    because_of: dict[str, str]
    last: Last | None


class Why(Answer):
    nodes: dict[str, Reason]


class Wired(Strict):
    kind: str
    inputs: dict[str, list[str]]
    needs: list[str]
    first: dict[str, Any] | None
    status: str | None
    """What a run made of it, where one was asked about; `verdict` and `tried` as in its record."""
    verdict: str | None
    tried: list[dict[str, str]] | None


class Graph(Answer):
    manifest: str
    nodes: dict[str, Wired]


class Lock(Answer):
    lock: str


class Written(Answer):
    files: list[str]


class Estimate(Answer):
    """What a model needs, in bytes; `dtypes` as the kind `estimate` says, with the interval of each term."""

    model_config = ConfigDict(extra="allow")
    model: str
    revision: str | None
    source: Literal["headers", "config"]
    fetched_bytes: int
    dtypes: dict[str, dict[str, Any]]


class Estimates(Answer):
    estimates: list[dict[str, Any]]


class Kinds(Answer):
    kinds: dict[str, dict[str, Any]]


class Doctor(Answer):
    machine: Machine
    platform: str
    versions: dict[str, str | None]
    hub: dict[str, Any]
    store: dict[str, Any]
    checks: dict[str, dict[str, Any]]


class Listed(Strict):
    digest: str
    type: str
    path: str
    files: int
    bytes: int
    referenced_bytes: int
    present: bool
    key: str
    node: str
    kind: str
    manifest: str
    created: str


class ListedRun(Strict):
    run: str
    status: str
    seconds: float
    recipe: str


class Held(Answer):
    store: str
    artifacts: list[Listed]
    runs: list[ListedRun]


class Running(Strict):
    run: str
    process: int
    started: str
    seconds: int
    manifest: str
    recipe: str
    nodes: int
    done: int
    at: dict[str, str]


class RunsThatGoOn(Answer):
    runs: list[Running]


class Record(Answer):
    run: str
    manifest: str
    recipe: str
    params: dict[str, Any]
    git: Checkout | None
    status: Literal["running", "succeeded", "failed", "interrupted", "dead"]
    started: str
    seconds: float
    process: int
    nodes: dict[str, NodeRun]
    text: str


class LoggedLine(Strict):
    node: str
    attempt: int
    line: str


class Log(Answer):
    lines: list[LoggedLine]


class Differences(Answer):
    runs: list[str] = Field(min_length=2, max_length=2)
    changes: list[Difference]
    nodes: dict[str, list[Difference]]


class Page(Answer):
    path: str
    bytes: int


class Taken(Answer):
    run: str
    node: str
    digest: str
    path: str
    files: dict[str, int]


class FreedThing(Strict):
    kind: str
    name: str
    bytes: int
    node: str | None
    created: str | None
    manifest: str | None


class Removed(Answer):
    dry_run: bool
    freed: list[FreedThing]
    freed_bytes: int


class Collected(Removed):
    kept_artifacts: int
    kept_bytes: int


class Found(Strict):
    path: str
    problem: str
    detail: str
    repaired: bool


class Verified(Answer):
    artifacts: int
    files: int
    bytes: int
    findings: list[Found]


class Text(Answer):
    text: str


class Refusal(Answer):
    """A command ended before it had an answer."""


ANSWERS: dict[str, type[Answer]] = {
    "bigpipe.run/1": Run,
    "bigpipe.plan/1": Plan,
    "bigpipe.validate/1": Validated,
    "bigpipe.status/1": Status,
    "bigpipe.why/1": Why,
    "bigpipe.graph/1": Graph,
    "bigpipe.lock/1": Lock,
    "bigpipe.init/1": Written,
    "bigpipe.estimate/1": Estimate,
    "bigpipe.estimates/1": Estimates,
    "bigpipe.kinds/1": Kinds,
    "bigpipe.doctor/1": Doctor,
    "bigpipe.ls/1": Held,
    "bigpipe.ps/1": RunsThatGoOn,
    "bigpipe.record/1": Record,
    "bigpipe.log/1": Log,
    "bigpipe.diff/1": Differences,
    "bigpipe.report/1": Page,
    "bigpipe.get/1": Taken,
    "bigpipe.rm/1": Removed,
    "bigpipe.gc/1": Collected,
    "bigpipe.verify/1": Verified,
    "bigpipe.recipe/1": Text,
    "bigpipe.completion/1": Text,
    "bigpipe.error/1": Refusal,
}
"""Schema → what such an object holds besides."""


def outputs_schema() -> dict[str, Json]:
    """Return the JSON schema (draft 2020-12) of all that is printed with `--json`, each under its name in `$defs`, and
    of a line of events, as `event`."""
    inner: dict[str, Json] = {}
    tops: dict[str, Json] = {}
    for name, model in ANSWERS.items():
        tops[name] = model.model_json_schema(mode="serialization", ref_template="#/$defs/{model}")
        inner |= tops[name].pop("$defs", {})
        tops[name]["properties"] = {"schema": {"const": name}, **tops[name]["properties"]}
        tops[name]["required"] = ["schema", *tops[name]["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bigpipe --json and --events",
        "anyOf": [{"$ref": f"#/$defs/{name.replace('/', '~1')}"} for name in [*tops, "event"]],
        "$defs": {**tops, "event": {"anyOf": [_event(event) for event in EVENTS.values()]}, **inner},
    }


def _event(event: type[Any]) -> dict[str, Json]:
    """A line of a file of events: the fields of the event, what it is and when it was."""
    found = TypeAdapter(event).json_schema(mode="serialization")
    own = {"time": {"type": "string", "format": "date-time"}, "event": {"const": event.name}}
    return {
        "type": "object",
        "title": event.name,
        "description": " ".join((event.__doc__ or "").split()),
        "properties": {**own, **found["properties"]},
        "required": [*own, *(item.name for item in fields(event))],
        "additionalProperties": False,
    }
