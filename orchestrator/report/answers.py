"""What every `--json` holds and every line of `--events`, as models: the published schemas are generated from them, and
tests hold what commands really print against those."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from bigpipe.machine import Gpu, Machine
from bigpipe.orchestrator.contract import EVENTS, Json
from bigpipe.orchestrator.planning import Difference
from bigpipe.orchestrator.recipe import texts_under_fields
from bigpipe.orchestrator.running import Gate, NodeRun

from .told_of_origin import Attested, CheckedDirectory, Reproduced
from .told_of_recipes import Answer, Exchanged, Export, Graph, Lock, Plan, Run, Status, Validated, Why, Written
from .told_of_stores import Collected, Differences, Held, Log, Page, Record, Removed, RunsThatGoOn, Taken, Verified


class Estimate(Answer):
    """What a model needs, in bytes; `dtypes` as the kind `estimate` says, with the interval of each term."""

    model_config = ConfigDict(extra="allow")
    model: str
    """As it was asked for."""
    revision: str | None
    """The commit, of a repository."""
    source: Literal["headers", "config"]
    """headers: of the weight files; config: of nothing but the config."""
    fetched_bytes: int
    """What it took to know."""
    dtypes: dict[str, dict[str, Any]]
    """By dtype, the terms in bytes."""


class Estimates(Answer):
    """Of several models."""

    estimates: list[dict[str, Any]]
    """Each as `bigpipe.estimate/1` has it."""


class Kinds(Answer):
    """The stage kinds."""

    kinds: dict[str, dict[str, Any]]
    """By name: ports, and JSON schemas of params and metrics."""


class Doctor(Answer):
    """What this machine has; `plan --machine` reads it back."""

    machine: Machine
    """CPUs, memory, GPUs, disk."""
    platform: str
    """System and processor."""
    versions: dict[str, str | None]
    """By package; None: not installed."""
    hub: dict[str, Any]
    """Endpoint and cache, whether it is offline, whether there is a token."""
    store: dict[str, Any]
    """Path, free bytes, whether it can be written."""
    checks: dict[str, dict[str, Any]]
    """What was tried: whether it works, and what was seen."""


class Text(Answer):
    """A text to be used as it is."""

    text: str
    """A recipe, or a script for a shell."""


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
    "bigpipe.export/1": Export,
    "bigpipe.push/1": Exchanged,
    "bigpipe.pull/1": Exchanged,
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
    "bigpipe.reproduce/1": Reproduced,
    "bigpipe.directory/1": CheckedDirectory,
    "bigpipe.attest/1": Attested,
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
    for described in (NodeRun, Gate, Machine, Gpu, Difference):
        _describe(inner[described.__name__]["properties"], described)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bigpipe --json and --events",
        "anyOf": [{"$ref": f"#/$defs/{name.replace('/', '~1')}"} for name in [*tops, "event"]],
        "$defs": {**tops, "event": {"anyOf": [_event(event) for event in EVENTS.values()]}, **inner},
    }


def _describe(properties: dict[str, Json], described: type) -> None:
    """Give fields the texts that stand under them in the class."""
    for name, text in texts_under_fields(described).items():
        properties[name].setdefault("description", text)


def _event(event: type[Any]) -> dict[str, Json]:
    """A line of a file of events: the fields of the event, what it is and when it was."""
    found = TypeAdapter(event).json_schema(mode="serialization")
    _describe(found["properties"], event)
    own = {"time": {"type": "string", "format": "date-time"}, "event": {"const": event.name}}
    return {
        "type": "object",
        "title": event.name,
        "description": " ".join((event.__doc__ or "").split()),
        "properties": {**own, **found["properties"]},
        "required": [*own, *(item.name for item in fields(event))],
        "additionalProperties": False,
    }
