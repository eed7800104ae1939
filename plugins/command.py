"""`command`: any tool as a stage, with declared inputs and outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from bigpipe.orchestrator.stage import ANY, AnyPath, Metrics, Params, Planning, Port, Stage, late

PLACEHOLDER = re.compile(r"\$\{(?:(input)\.([^{}]*)|(out|python))\}")
"""`${input.PORT}`, `${out}`, `${python}`."""


class CommandParams(Params):
    argv: Annotated[list[Annotated[str, Field(coerce_numbers_to_str=True)]], Field(min_length=1)]
    """The program and its arguments, one by one; no shell reads them. `${input.PORT}` is the directory of what is wired
    to that port (alone, several arguments where several are gathered), `${out}` the directory that becomes the
    artifact, `${python}` the interpreter that bigpipe runs in. Numbers that parameters or axes bring are written
    out."""
    files: list[AnyPath] = Field(default_factory=list)
    """Code and data of the recipe's own: files, globs, directories, relative to the manifest. They enter the key by
    content, and lie in the working directory under the same paths, as copies. What is not listed is not there."""
    produces: Literal["checkpoint", "adapter", "report", "results", "directory"]
    """What `${out}` is in the end. A checkpoint is read as any other, an adapter is peft's own files, results are rows
    in `results.jsonl`."""
    metrics: str | None = None
    """A JSON file under `${out}`: one object of names and numbers, which gates can read."""

    @field_validator("argv", mode="before")
    @classmethod
    def _split(cls, argv: Any) -> Any:
        if isinstance(argv, str) and len(words := re.findall(r"\S+", argv)) > 1:
            raise ValueError(f"it is a list, and no shell splits a text; write {json.dumps(words)}")
        return argv

    @field_validator("argv")
    @classmethod
    def _can_be_passed(cls, argv: list[str]) -> list[str]:
        if any("\0" in argument for argument in argv):
            raise ValueError("an argument cannot hold a character of code 0; write it to a file")
        rest = "".join(PLACEHOLDER.sub("", argument) for argument in argv)
        if (unknown := re.search(r"\$\{(?:input|out|python)\b[^}]*\}?", rest)) is not None:
            raise ValueError(f"{unknown[0]} is not known; write ${{input.PORT}}, ${{out}} or ${{python}}")
        if PLACEHOLDER.search(argv[0]) and argv[0] != "${python}":
            raise ValueError(f"{argv[0]} is no program: what stages give is not run; name one of your own")
        return argv

    @field_validator("metrics")
    @classmethod
    def _lies_under_out(cls, metrics: str | None) -> str | None:
        if metrics is not None and (PurePosixPath(metrics).is_absolute() or ".." in PurePosixPath(metrics).parts):
            raise ValueError(f"{metrics} does not lie under ${{out}}; write a path relative to it: metrics.json")
        return metrics


class CommandMetrics(Metrics):
    """What the file of `metrics` holds."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float]


def unmeasured(params: CommandParams, ports: Collection[str], metric: str) -> tuple[str, str] | None:
    if params.metrics is None:
        return "`metrics`", "say where the metrics come from: with: {metrics: …}"
    return None


def settled(params: CommandParams) -> Stage[CommandParams]:
    """What its arguments name it cannot do without: where that is skipped, so is the command."""
    named = {port for argument in params.argv for _, port, _ in PLACEHOLDER.findall(argument) if port}
    return replace(STAGE, inputs={port: Port(ANY, many=True) for port in sorted(named)}) if named else STAGE


STAGE = Stage(
    kind="command",
    version=1,
    params=CommandParams,
    metrics=CommandMetrics,
    inputs={},
    open_ports=Port(ANY, optional=True, many=True),
    output="directory",
    outputs=("checkpoint", "adapter", "report", "results"),
    output_field="produces",
    unmeasured=unmeasured,
    settled=settled,
    placeholders=("input", "out", "python"),
    run=late("bigpipe.plugins.commanding:run"),
    forecast=late("bigpipe.plugins.commanding:forecast"),
    planning=Planning(check=late("bigpipe.plugins.commanding:check")),
    reproducible=False,
    title="Run any tool as a stage: its files in the key, its output an artifact, its numbers for gates",
)
