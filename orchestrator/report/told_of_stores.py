"""What `--json` holds of commands about a store and its runs, as models; `answers` says which is which."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bigpipe.orchestrator.planning import Difference
from bigpipe.orchestrator.running import NodeRun

from .told_of_recipes import Answer, Checkout, Strict


class Listed(Strict):
    """An artifact in the store."""

    digest: str
    """Of all its files."""
    type: str
    """What ports call it: checkpoint, adapter, report."""
    path: str
    """Its directory."""
    files: int
    """How many."""
    bytes: int
    """Of its files."""
    referenced_bytes: int
    """Of those that lie elsewhere, in the Hub's cache."""
    present: bool
    """Its bytes are here."""
    key: str
    """Of the computation that gave it."""
    node: str
    """That gave it."""
    kind: str
    """Of that node."""
    manifest: str
    """Whose node it is."""
    created: str
    """When."""


class ListedRun(Strict):
    """A run on record."""

    run: str
    """Its id."""
    status: str
    """As `bigpipe.record/1` has it."""
    seconds: float
    """How long it took."""
    recipe: str
    """Its name."""


class Held(Answer):
    """What is in the store."""

    store: str
    """Its directory."""
    artifacts: list[Listed]
    """Newest first."""
    runs: list[ListedRun]
    """Oldest first."""


class Running(Strict):
    """A run that goes on."""

    run: str
    """Its id."""
    process: int
    """Its number on its machine."""
    started: str
    """When."""
    seconds: int
    """Since then."""
    manifest: str
    """Its path."""
    recipe: str
    """Its name."""
    nodes: int
    """How many there are."""
    done: int
    """How many are over."""
    at: dict[str, str]
    """Node that runs → how far it is."""


class RunsThatGoOn(Answer):
    """Runs that go on."""

    runs: list[Running]
    """Oldest first."""


class Record(Answer):
    """The record of a run."""

    run: str
    """Its id."""
    manifest: str
    """Its path."""
    recipe: str
    """Its name."""
    params: dict[str, Any]
    """As they were used, `-p` included."""
    git: Checkout | None
    """None: the manifest lay in no checkout."""
    status: Literal["running", "succeeded", "failed", "interrupted", "dead"]
    """dead: its process is gone, and did not say why."""
    started: str
    """When."""
    seconds: float
    """So far, or in all."""
    process: int
    """Its number on its machine."""
    nodes: dict[str, NodeRun]
    """By name."""
    text: str
    """The manifest as it was."""


class LoggedLine(Strict):
    """A line that a node wrote."""

    node: str
    """Its name."""
    attempt: int
    """Which of its attempts, from 1."""
    line: str
    """Without its end."""


class Log(Answer):
    """What nodes wrote."""

    lines: list[LoggedLine]
    """In the order of the nodes."""


class Differences(Answer):
    """What differs between two runs, or two lock files."""

    runs: list[str] = Field(min_length=2, max_length=2)
    """Their ids; of lock files, their paths."""
    changes: list[Difference]
    """Of the recipe and its parameters."""
    nodes: dict[str, list[Difference]]
    """By name: inputs, metrics, digests; of lock files also versions, and what is there for review."""


class Page(Answer):
    """A report was written."""

    path: str
    """Where."""
    bytes: int
    """Its size."""


class Taken(Answer):
    """An artifact was copied."""

    run: str
    """Whose it is."""
    node: str
    """That gave it."""
    digest: str
    """Of all its files."""
    path: str
    """Where it is now."""
    files: dict[str, int]
    """Name → bytes."""


class FreedThing(Strict):
    """Something that goes, or went."""

    kind: str
    """An artifact, a run, what a node had done so far, a piece."""
    name: str
    """Its digest or id."""
    bytes: int
    """What is free then."""
    node: str | None
    """That gave it, where that is known."""
    created: str | None
    """When, where that is known."""
    manifest: str | None
    """Whose node it was, where that is known."""


class Removed(Answer):
    """What was removed."""

    dry_run: bool
    """Nothing was; this is what would be."""
    freed: list[FreedThing]
    """One by one."""
    freed_bytes: int
    """In all."""


class Collected(Removed):
    """What was collected, and what stays."""

    kept_artifacts: int
    """How many stay."""
    kept_bytes: int
    """Their bytes."""


class Found(Strict):
    """Something that is not as the store made it."""

    path: str
    """Of the file."""
    problem: str
    """In a word."""
    detail: str
    """In words."""
    repaired: bool
    """It was set aside or made good."""


class Verified(Answer):
    """Whether the store is whole."""

    artifacts: int
    """How many were read."""
    files: int
    """How many were hashed."""
    bytes: int
    """Of these."""
    findings: list[Found]
    """What is wrong."""
