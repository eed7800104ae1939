"""The systems that a recipe can be exported to, by name. One more is a file with a `Target`, and a line here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bigpipe.errors import Stale, UsageError
from bigpipe.files import explained, flows_on, without_detours
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import Session
from bigpipe.redaction import redact_value

from .work import Work, work_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A system that runs recipes."""

    title: str
    """What is written for it, in words."""
    write: Callable[[Work], str]
    """Returns the text of its file."""
    evaluates: str = ""
    """What begins an expression in any text of such a file: no name or value of the recipe may hold it."""
    beside: bool = False
    """The recipe is found from the file; else from where the work begins, the top of the checkout."""
    sized: bool = False
    """It asks for memory by task."""
    machines: bool = False
    """A node may span several machines there."""
    reserved: str = ""
    """What the names of secrets may not begin with, besides those in `given`."""
    given: tuple[str, ...] = ()
    """Secrets that it has by itself."""


TARGETS: Mapping[str, str] = {
    "github": "bigpipe.orchestrator.export.github:TARGET",
    "airflow": "bigpipe.orchestrator.export.airflow:TARGET",
    "argo": "bigpipe.orchestrator.export.argo:TARGET",
    "dockerfile": "bigpipe.orchestrator.export.dockerfile:TARGET",
}
"""Name → where its `Target` stands."""


MARK = b"Written by `bigpipe export "
"""Stands in the head of every file."""
HEAD = 1000
"""Bytes in which it is looked for."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written for a target."""

    target: str
    text: str
    unknown: tuple[str, ...]
    """What could not be foreseen, each a sentence: the file then asks for no memory there."""

    def as_json(self, manifest: Path, out: Path | None) -> dict[str, Json]:
        """Return `bigpipe.export/1`. out: where it was written."""
        return {
            "schema": "bigpipe.export/1",
            "target": self.target,
            "manifest": str(without_detours(manifest)),
            "path": str(out.absolute()) if out else None,
            "text": self.text,
            "unknown": list(self.unknown),
        }

    def require_same(self, out: Path) -> None:
        """Raise Stale where `out` does not hold this text."""
        with explained(out):
            there = out.read_text(encoding="utf-8", errors="replace") if out.is_file() else None
        if there != self.text:
            what = "is not there" if there is None else f"is not what `bigpipe export {self.target}` writes now"
            raise Stale(f"{out} {what}", "write it with the same command without --check, and commit it")


def export(name: str, session: Session, out: Path | None = None) -> Exported:
    """Return a recipe's file for a target. session: over an empty store, so that everything is foreseen. out: where
    the file will lie. Raise UsageError for what the target cannot hold or do, and where a file that was not written so
    lies there."""
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}", did_you_mean(name, TARGETS, otherwise="there are"))
    module, _, attribute = TARGETS[name].partition(":")
    target: Target = getattr(import_module(module), attribute)
    if out is not None:
        _refuse_others(out)
    work = work_of(session, (out.absolute().parent if out else Path.cwd()) if target.beside else None)
    for text in work.texts():
        if target.evaluates and target.evaluates in text:
            cause = f"{text!r} holds {target.evaluates}, which {target.title} would evaluate"
            raise UsageError(cause, "give it another name or value")
        if redact_value(text) != text:
            cause = f"{text!r} holds a secret, which would stand in the file"
            raise UsageError(cause, "leave it out, and list its variable under `secrets`")
    _refuse_secrets(work, target)
    for task in work.tasks:
        if task.machines > 1 and not target.machines:
            cause = f"{task.asks[0]} spans {task.machines} machines, and {target.title} starts one for it"
            raise UsageError(cause, "run it by a scheduler that starts all of them, such as SLURM")
    return Exported(name, target.write(work), work.unknown if target.sized else ())


def _refuse_others(out: Path) -> None:
    """Raise UsageError for a file of somebody else's, such as the recipe."""
    there = Path(os.path.realpath(out))  # `x/../recipe.yaml` is the recipe as soon as x is made
    with explained(out, other="name another file with -o"):
        if flows_on(out) or not there.exists():
            return
        with there.open("rb") as file:
            ours = MARK in file.read(HEAD)
    if not ours:
        cause = f"{out} is there, and was not written by `bigpipe export`"
        raise UsageError(cause, "name another file with -o, or remove it first")


def _refuse_secrets(work: Work, target: Target) -> None:
    """Raise UsageError for secrets that cannot be handed on by their names."""
    variables = {each.variable: each.name for each in work.parameters}
    for secret in work.secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", secret):
            cause = f"the secret {secret!r} cannot be the name of a variable in {target.title}"
            raise UsageError(cause, "call it by letters, digits and _")
        if secret in variables:
            cause = f"the secret {secret} is called as the variable that holds the parameter {variables[secret]}"
            raise UsageError(cause, "call one of them otherwise")
        if target.reserved and secret.upper().startswith(target.reserved) and secret not in target.given:
            cause = f"{target.title} has no secret {secret}: it keeps names that begin with {target.reserved} to itself"
            raise UsageError(cause, "call it otherwise")
