"""The recipe of one stage about one model: what commands without a recipe run, and print."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bigpipe.orchestrator.contract import Json, Stage

from .arguments import quoted
from .initial import as_text, source_of
from .interpolation import escape
from .problems import Keys
from .registry import load_stage
from .schema import described_schema

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
    typed: Mapping[Keys, str] = field(default_factory=dict)
    """Path in the manifest → what was typed to make that part, as far as that is the caller's affair: the fields."""

    @property
    def saved_as(self) -> str | None:
        """The port of `save` that takes what comes out; None: it can only be taken out of the store."""
        output = load_stage(self.kind).output
        return next((name for name, port in load_stage(DESTINATION).inputs.items() if output in port.types), None)

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

    def arguments(self) -> dict[Keys, str]:
        """Return path in the manifest → what was typed to make that part."""
        found: dict[Keys, str] = {(): f"bigpipe {self.name}"}
        for port, models in self.models.items():
            for stage, model in self._named(port, models).items():
                found["stages", stage] = model if port == "model" else f"--{port} {model}"
        found["stages", SOURCE, "with", "revision"] = f"--revision {self.revision}"
        found["stages", self.name, "launch"] = " ".join(
            f"{option(name)} {value}" for name, value in self.launch.items()
        )
        found["trust", "modules"] = " ".join(f"--trust {module}" for module in self.trust)
        found["stages", DESTINATION] = f"-o {self.to}"
        return found | {("stages", self.name, "with", *path): text for path, text in self.typed.items()}

    @staticmethod
    def _named(port: str, models: str | tuple[str, ...]) -> dict[str, str]:
        """Stage that brings it → a model."""
        if isinstance(models, str):
            return {port if port != "model" else SOURCE: models}
        return {port if len(models) == 1 else f"{port}-{number}": model for number, model in enumerate(models, 1)}

    def _source(self, port: str, model: str) -> dict[str, Json]:
        found: dict[str, Json] = dict([source_of(model)])
        return {**found, "revision": self.revision} if self.revision and port == "model" and "repo" in found else found


def option(field: str) -> str:
    """Return what a field of a kind is called on a command line."""
    return f"--{field.replace('_', '-')}"


def in_options(text: str, kind: str) -> str:
    """Return what is said of fields of a kind in the words of its command: `--max-steps` for `max_steps`, and
    "`--scheme …`" for "`scheme: …` under `with`"."""
    stage = load_stage(kind)
    fields = {*described_schema(stage.params)["properties"], *stage.inputs}
    name = "|".join(sorted(fields, key=len, reverse=True))
    alone = "|".join(sorted((field for field in fields if "_" in field), key=len, reverse=True)) or "(?!)"
    text = re.sub(r", or write overwrite: true[^,;]*", " with -o", text)  # of `save`, which no command has options of
    for pattern, words in (
        (rf"`(?P<name>{name}): …`(?: under `with`)?", "`{} …`"),
        (rf"inputs: (?P<name>{name})\b", "{}"),
        (rf"set (?P<name>{name})\.(?P<key>\S+) to (?P<value>[^\s,;]+)", "give {} {key}={value}"),
        (rf"set (?P<name>{name}) to (?P<value>[^\s,;]+)", "give {} {value}"),
        (rf"(?<=needs )'(?P<name>{name})'", "{}"),
        (rf"(?<=`)(?P<name>{name})(?=`)", "{}"),
        (rf"(?<![\w.'-])(?P<name>{alone})(?![\w.'-])", "{}"),
    ):
        text = re.sub(pattern, partial(_spoken, words), text)
    return text


def _spoken(words: str, found: re.Match[str]) -> str:
    parts = found.groupdict()
    return words.format(option(parts.pop("name")), **parts)


def fed_ports(stage: Stage[Any]) -> dict[str, bool]:
    """Return the ports that a model from somewhere may be wired to, and whether each must be."""
    source = load_stage(SOURCE)
    return {name: not port.optional for name, port in stage.inputs.items() if source.may_fill(port)}


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
    return escape(quoted(value))
