"""A kind whose revisions are commits that a source must be asked for, and one that takes what it brought out."""

from __future__ import annotations

import os
from hashlib import sha1

from bigpipe.errors import Offline
from bigpipe.orchestrator.stage import (
    CheckContext,
    Forecast,
    Metrics,
    Params,
    Pinned,
    Planning,
    Port,
    Stage,
    StageContext,
    StageResult,
)


class SourceParams(Params):
    repo: str = "org/model"
    revision: str = "main"
    note: str = ""
    """Of no matter to the commit."""
    drifts: bool = False
    """Other bytes each time."""


class NoMetrics(Metrics):
    pass


def commit(repo: str, revision: str) -> str:
    """Tags whose names end in the same digit mean the same commit."""
    return sha1(f"{repo}@{revision[-1]}".encode(), usedforsecurity=False).hexdigest()


def pin(params: SourceParams, context: CheckContext) -> Pinned | None:
    if len(params.revision) == 40:
        return None
    if context.offline:
        raise Offline(f"the commit of {params.revision} cannot be asked for", "go online")
    return Pinned({"revision": commit(params.repo, params.revision)}, "asked")


def bring(params: SourceParams, context: StageContext) -> StageResult:
    drift = os.urandom(8).hex() if params.drifts else ""
    (context.out / "text").write_text(context.pins.get("revision", params.revision) + drift)
    return StageResult(NoMetrics())


class TakeParams(Params):
    drifts: bool = False


def take(params: TakeParams, context: StageContext) -> StageResult:
    text = (context.input("model") / "text").read_text() + (os.urandom(8).hex() if params.drifts else "")
    (context.base / "taken").write_text(text)
    (context.out / "text").write_text(text)
    return StageResult(NoMetrics())


SOURCE = Stage(
    kind="bring", version=1, params=SourceParams, metrics=NoMetrics, inputs={}, output="text", runs_in="inline",
    run=bring, forecast=lambda params, context: Forecast(),
    planning=Planning(pin=pin, pin_asks=("repo", "revision")),
)  # fmt: skip
ASKED_BY_ALL = Stage(
    kind="bring-all", version=1, params=SourceParams, metrics=NoMetrics, inputs={}, output="text", runs_in="inline",
    run=bring, forecast=lambda params, context: Forecast(), planning=Planning(pin=pin),
)  # fmt: skip
ASKS_WRONGLY = Stage(
    kind="bring-wrongly", version=1, params=SourceParams, metrics=NoMetrics, inputs={}, output="text",
    runs_in="inline", run=bring, forecast=lambda params, context: Forecast(),
    planning=Planning(pin=pin, pin_asks=("nope",)),
)  # fmt: skip
TAKE = Stage(
    kind="take", version=1, params=TakeParams, metrics=NoMetrics, inputs={"model": Port("text")}, output="text",
    runs_in="inline", run=take, forecast=lambda params, context: Forecast(),
)  # fmt: skip
