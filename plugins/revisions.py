"""What a revision of a repository on the Hub means, for the kinds that name one: the library is imported when asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

from bigpipe.orchestrator.stage import CheckContext, ForecastContext, Pinned, late

COMMIT = re.compile(r"[0-9a-f]{40}")
"""As the library has it."""


class Revised(Protocol):
    """Params that may name a repository."""

    @property
    def repo(self) -> str | None: ...
    @property
    def revision(self) -> str: ...
    @property
    def subfolder(self) -> str | None: ...
    def choice(self) -> Mapping[str, Any]:
        """Which files of the repository are the model."""


def pinned(params: Revised, context: CheckContext, need: Literal["layout", "sizes"]) -> Pinned | None:
    """Return the commit that a branch or tag means now; a commit is asked for nothing. None where no repository is
    named. need: what a lock keeps of the model, see `hub.answers`."""
    if params.repo is None:
        return None
    exact, ask = COMMIT.fullmatch(params.revision), late("bigpipe.plugins.library:pin_revision")
    found: Pinned = Pinned({}, "") if exact else ask(params.repo, params.revision, context)
    commit, answers = commit_of(params, found), late("bigpipe.plugins.library:answers_of")
    return replace(found, known=lambda: answers(context, params.repo, commit, need, params.choice(), params.subfolder))


def commit_of(params: Revised, found: Pinned) -> str:
    """Return the commit that is meant."""
    return found.values.get("revision", params.revision)


def reads(params: Revised, context: ForecastContext) -> list[str]:
    """Return what is read of a repository, see `library.hub_reads`."""
    if params.repo is None:
        return []
    found: list[str] = late("bigpipe.plugins.library:hub_reads")(params.repo, params.revision, context)
    return found
