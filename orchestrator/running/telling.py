"""What sinks are told of a run: what is known when it begins, and its events, each with where its artifact lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.git import origin_of
from bigpipe.orchestrator.contract import (
    Event,
    Json,
    LogLine,
    NodeFinished,
    NodeStarted,
    Reporter,
    RunFinished,
    RunStarted,
)
from bigpipe.orchestrator.planning import Session, content_paths
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.sinks import Feeds
from bigpipe.versions import package_version

TOLD = (NodeStarted, NodeFinished, RunFinished)
"""Progress and lines of logs are not: they are many, and what a tool prints is not for others."""


@contextmanager
def telling_sinks(session: Session, reporter: Reporter) -> Iterator[Reporter]:
    """Give who hears of the run: `reporter`, and the recipe's sinks through it. Afterwards wait for them a while."""
    teller = Teller(session, reporter)
    try:
        yield teller
    finally:
        teller.feeds.end()


@dataclass(slots=True)
class Teller:
    session: Session
    reporter: Reporter
    feeds: Feeds = field(init=False)

    def __post_init__(self) -> None:
        self.feeds = Feeds(lambda name, line: self.reporter.report(LogLine(name, line)))

    def report(self, event: Event) -> None:
        self.reporter.report(event)
        if isinstance(event, RunStarted):
            self.feeds.begin(list(self.session.recipe.sinks), self.session.environment)
            if self.feeds.feeds:
                self.feeds.tell(known(self.session, event))
        elif isinstance(event, TOLD) and self.feeds.feeds:
            uri = {"uri": self._uri(event.digest)} if isinstance(event, NodeFinished) else {}
            self.feeds.tell({**event.as_json(), **uri})

    def _uri(self, digest: str | None) -> str | None:
        path = self.session.store.artifact_path(digest) if digest else None
        return path.as_uri() if path is not None else None


def known(session: Session, started: RunStarted) -> dict[str, Json]:
    """Return what is known of a run when it begins, JSON-ready."""
    recipe, origin = session.recipe, origin_of(session.recipe.path)
    return {
        "run": started.run,
        "recipe": recipe.name,
        "manifest": origin.inside if origin else str(recipe.path),
        "repository": origin.remote if origin else "",
        "git": session.checkout.state,
        "params": dict(recipe.params),
        "version": package_version("bigpipe-ml") or "0",
        "nodes": {name: _node(recipe.nodes[name], session.base) for name in started.nodes},
    }


def _node(node: Node, base: Path) -> dict[str, Json]:
    return {
        "kind": node.kind.kind,
        "params": node.params.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "inputs": list(node.producers),
        "sources": list(_sources(node, base)),
    }


def _sources(node: Node, base: Path) -> Iterator[dict[str, Any]]:
    """What it reads from elsewhere, as OpenLineage names datasets: files, and repositories of the Hub."""
    if isinstance(repository := getattr(node.params, "repo", None), str):
        yield {"namespace": os.environ.get("HF_ENDPOINT") or "hf://", "name": repository}
    try:
        trees, files = content_paths(node.params, base, inside=False)
    except UsageError:
        return
    yield from ({"namespace": "file", "name": os.path.abspath(path)} for path in (*trees, *files))
