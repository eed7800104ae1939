"""What led to a published model: every step with its parameters, metrics and digests, and the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

PROVENANCE = "provenance.json"
SCHEMA = "bigpipe.provenance/1"


@dataclass(frozen=True, slots=True)
class Step:
    node: str
    kind: str
    """download, quantize, distributed-infer…"""
    key: str
    digest: str | None
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    recipe: str = ""
    """Its name."""
    node: str = ""
    """The step of it that publishes."""
    text: str = ""
    """The recipe itself."""
    steps: tuple[Step, ...] = ()

    @property
    def maker(self) -> tuple[str, str]:
        """Who may replace what was published: the same step of the same recipe."""
        return self.recipe, self.node

    def last(self, kind: str) -> Step | None:
        return next((step for step in reversed(self.steps) if step.kind == kind), None)

    def json(self, files: Mapping[str, tuple[str, int]]) -> str:
        """Return the contents of `provenance.json`. files: name → (hex sha256, size) of everything beside it."""
        listed = {name: {"sha256": sha256, "size": size} for name, (sha256, size) in files.items()}
        content = {
            "schema": SCHEMA,
            "bigpipe": version(),
            "recipe": self.recipe,
            "node": self.node,
            "text": self.text,
            "steps": [asdict(step) for step in self.steps],
            "files": listed,
        }
        return json.dumps(content, indent=2) + "\n"


def read_provenance(content: bytes) -> dict[str, Any] | None:
    """Return what a `provenance.json` says; None where it is not one of bigpipe's."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def version() -> str:
    try:
        return metadata.version("bigpipe-ml")
    except metadata.PackageNotFoundError:
        return "from source"
