"""The recipe of one stage about one model: what commands without a recipe run, and print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bigpipe.orchestrator.contract import Json, Stage

from .initial import as_text, source_of
from .interpolation import escape
from .registry import load_stage

SOURCE, DESTINATION = "download", "save"
"""The kinds that bring a model, and that put what came out in its place."""


@dataclass(frozen=True, kw_only=True)
class Single:
    """One use of a kind."""

    name: str
    """Of the stage."""
    kind: str
    models: Mapping[str, str | tuple[str, ...]]
    """Port → a repository or a directory; several where the port gathers them."""
    revision: str | None = None
    """Of what is wired to `model`."""
    fields: Mapping[str, Json] = field(default_factory=dict)
    launch: Mapping[str, Json] = field(default_factory=dict)
    trust: tuple[str, ...] = ()
    to: str | None = None
    """Where the result goes; None: it stays in the store."""

    @property
    def saved_as(self) -> str | None:
        """The port of `save` that takes what comes out; None: it can only be taken out of the store."""
        output = load_stage(self.kind).output
        return next((name for name, port in load_stage(DESTINATION).inputs.items() if port.type == output), None)

    def manifest(self) -> str:
        """Return the manifest."""
        stages: dict[str, Json] = {}
        brought: dict[str, Json] = {}
        for port, models in self.models.items():
            given = self._named(port, models)
            stages |= {name: {"uses": SOURCE, "with": self._source(port, model)} for name, model in given.items()}
            brought[port] = [*given] if len(given) > 1 else next(iter(given))
        stages[self.name] = {"uses": self.kind, "inputs": brought, "with": self.fields, "launch": self.launch}
        if self.to is not None and self.saved_as is not None:
            stages[DESTINATION] = {"uses": DESTINATION, "inputs": {self.saved_as: self.name}, "with": {"to": self.to}}
        trust = {"trust": {"modules": [*self.trust]}} if self.trust else {}
        return "\n".join(_block({"version": 1, "name": self.name, **trust, "stages": stages})) + "\n"

    @staticmethod
    def _named(port: str, models: str | tuple[str, ...]) -> dict[str, str]:
        """Stage that brings it → a model."""
        if isinstance(models, str):
            return {port if port != "model" else SOURCE: models}
        return {port if len(models) == 1 else f"{port}-{number}": model for number, model in enumerate(models, 1)}

    def _source(self, port: str, model: str) -> dict[str, Json]:
        found: dict[str, Json] = dict([source_of(model)])
        return {**found, "revision": self.revision} if self.revision and port == "model" and "repo" in found else found


def fed_ports(stage: Stage[Any]) -> dict[str, bool]:
    """Return the ports that a model from somewhere may be wired to, and whether each must be."""
    source = load_stage(SOURCE)
    return {name: not port.optional for name, port in stage.inputs.items() if source.may_give(port.type)}


def _block(value: Mapping[str, Json], indent: str = "") -> list[str]:
    """A map as lines of YAML in block style, with lists and maps of plain values in one line each."""
    lines = []
    for name, item in value.items():
        if isinstance(item, Mapping) and not item:
            continue
        if isinstance(item, Mapping):
            lines += [f"{indent}{as_text(name)}:", *_block(item, indent + "  ")]
        else:
            lines.append(f"{indent}{as_text(name)}: {as_text(item) if isinstance(item, str) else _flow(item)}")
    return lines


def _flow(value: Json) -> str:
    return escape(json.dumps(value, ensure_ascii=False))
