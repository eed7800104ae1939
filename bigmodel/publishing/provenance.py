"""What led to a published model: every step with its parameters, metrics and digests, and the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import invalid, read_json
from bigpipe.redaction import redact_json
from bigpipe.versions import package_version

from .destinations import Stored

PROVENANCE = "provenance.json"
SCHEMA = "bigpipe.provenance/1"
LARGEST = 100_000_000
"""Bytes of one that is read."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    recipe: str = ""
    """Its name."""
    node: str = ""
    """The step of it that publishes."""
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
        return next((step for step in reversed(self.steps) if step.kind == kind and not step.left), None)

    def param(self, kind: str, name: str) -> Any:
        """Return what the last step of this kind was given; None where there is none."""
        step = self.last(kind)
        return step.params.get(name) if step else None

    def json(self, files: Mapping[str, Stored]) -> str:
        """Return the contents of `provenance.json`. files: everything that lies beside it."""
        listed = {name: {"sha256": file.sha256, "size": file.size} for name, file in files.items()}
        told = {"schema": SCHEMA, "bigpipe": version(), **asdict(self), "files": listed}
        return json.dumps(redact_json(told), indent=2) + "\n"


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
