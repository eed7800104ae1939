"""What led to a published model: every step with its parameters, metrics and digests, and the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bigpipe.bigmodel.checkpoint import invalid, read_json
from bigpipe.redaction import redact_fields
from bigpipe.versions import package_version

from .destinations import Stored

PROVENANCE = "provenance.json"
SCHEMA = "bigpipe.provenance/1"
LARGEST = 100_000_000
"""Bytes of one that is read."""


class Linked(Protocol):
    """A step of a recipe, and what it takes."""

    @property
    def node(self) -> str: ...
    @property
    def left(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Sequence[str]]: ...


S = TypeVar("S", bound=Linked)


def led_to(node: str, steps: Sequence[S]) -> list[S]:
    """Return the steps by which a checkpoint came to what `node` made, with that one, in their order: along the ports
    `model`, and along all of a step without such a port. Adapters, baselines and what was only measured are not among
    them, nor variants that were left. Empty where there is no such step."""
    known = {step.node: step for step in steps if not step.left}
    found: set[str] = set()
    coming = [node]
    while coming:
        step = known.get(coming.pop())
        if step is not None and step.node not in found:
            found.add(step.node)
            ports = {"model": step.inputs["model"]} if "model" in step.inputs else step.inputs
            coming += [name for names in ports.values() for name in names]
    return [step for step in steps if step.node in found]


@dataclass(frozen=True, slots=True)
class Step:
    node: str
    kind: str
    """download, quantize, distributed-infer…"""
    key: str
    digest: str | None
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]
    left: str = ""
    """The gates that do not hold, of a step whose variant was left for another: it led to nothing."""
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Port → steps; where it takes the `first` variant that passes, all of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    recipe: str = ""
    """Its name."""
    node: str = ""
    """The step of it that publishes."""
    model: str = ""
    """The step that made the model which is published; not known where it is empty."""
    text: str = ""
    """The recipe itself."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters as they were used."""
    git: Mapping[str, Any] | None = None
    """`commit` and `dirty` of the checkout that it lay in."""
    steps: tuple[Step, ...] = ()

    @property
    def maker(self) -> tuple[str, str]:
        """Who may replace what was published: the same step of the same recipe."""
        return self.recipe, self.node

    def used(self) -> dict[str, Any]:
        """Return the recipe's parameters, and the seed of each step that has one as `NODE.seed`."""
        seeds = {f"{step.node}.seed": step.params["seed"] for step in self.steps if "seed" in step.params}
        return {**self.params, **seeds}

    def last(self, kind: str) -> Step | None:
        """Return the last step of this kind, of those that led to the model where these are known."""
        steps = led_to(self.model, self.steps) or self.steps
        return _last(steps, kind)

    def measured(self, kind: str) -> Step | None:
        """Return the last step of this kind, whatever it was about."""
        return _last(self.steps, kind)

    def param(self, kind: str, name: str) -> Any:
        """Return what that `last` step was given; None where there is none."""
        step = self.last(kind)
        return step.params.get(name) if step else None

    def json(self, files: Mapping[str, Stored]) -> str:
        """Return the contents of `provenance.json`. files: everything that lies beside it."""
        listed = {name: {"sha256": file.sha256, "size": file.size} for name, file in files.items()}
        told = {"schema": SCHEMA, "bigpipe": version(), **asdict(self), "files": listed}
        return json.dumps(redact_fields(told), indent=2) + "\n"


def _last(steps: Sequence[Step], kind: str) -> Step | None:
    return next((step for step in reversed(steps) if step.kind == kind and not step.left), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a `provenance.json` holds."""

    provenance: Provenance
    version: str
    """Of the bigpipe that wrote it."""
    files: Mapping[str, Stored]
    """Everything beside it."""


def read_provenance(folder: Path) -> Published | None:
    """Return what the `provenance.json` in `folder` holds; None where there is none of bigpipe's. Raise
    InvalidCheckpoint where it is damaged."""
    from pydantic import TypeAdapter, ValidationError

    file = folder / PROVENANCE
    if not file.is_file():
        return None
    told = read_json(file, folder, LARGEST)
    if told.pop("schema", None) != SCHEMA:
        return None
    written_by, files = told.pop("bigpipe", ""), told.pop("files", {})
    try:
        listed = TypeAdapter(dict[str, Stored]).validate_python(files)
        return Published(provenance=TypeAdapter(Provenance).validate_python(told), version=written_by, files=listed)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise invalid(file, f"{where}: {first['msg']}", "take the provenance.json that was published with it") from None


def version() -> str:
    return package_version("bigpipe-ml") or "from source"
