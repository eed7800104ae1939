"""The ways to run one attempt of a node, by name: a kind's `runs_in` names one.

    inline    in this process, which it may not bring torch into
    process   in a child process
    ranks     as ranks of accelerate's launcher, between a `prepare` and a `finish`

Others come through the entry-point group `bigpipe.executors`, as values of `Executor`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import Stage, Surroundings, late

if TYPE_CHECKING:
    from .jobs import Job, Outcome

GROUP = "bigpipe.executors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    run: Callable[[Job], Outcome]
    """Does the attempt, and leaves no process of it behind when it returns or raises."""
    takes_launch: bool = False
    """The recipe's `launch` says how it starts."""
    waits: bool = False
    """It runs one process that can start before its turn, wait for files that are still being made, and be ended."""

    def start(self, job: Job) -> Outcome:
        """Run the attempt to its end. Call it from a thread that lives until then: workers die with it.

        Raise the stage's own BigpipeError; StageFailed, with the log's path, for crashes, unexpected errors and the
        timeout; Interrupted.
        """
        started = time.monotonic()
        for folder in (job.out, job.scratch, job.parts, job.memo, job.folder.path):
            folder.mkdir(parents=True, exist_ok=True)
        job.folder.clear()
        return self.run(job).model_copy(update={"seconds": time.monotonic() - started})


EXECUTORS = {
    "inline": Executor(run=late("bigpipe.orchestrator.launch.inline:run")),
    "process": Executor(run=late("bigpipe.orchestrator.launch.supervision:run"), waits=True),
    "ranks": Executor(run=late("bigpipe.orchestrator.launch.ranks:run"), takes_launch=True),
}


@cache
def executor(name: str) -> Executor:
    """Return the executor of this name. Raise UsageError where nobody offers one."""
    if name in EXECUTORS:
        return EXECUTORS[name]
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=name):
        found = entry.load()
        if isinstance(found, Executor):
            return found
        raise UsageError(f"{entry.value} is a {type(found).__name__}, not an Executor", "correct its entry point")
    known = ", ".join(EXECUTORS)
    raise UsageError(f"there is no executor {name!r}", f"a kind runs in one of {known}, or install the one it needs")


def run_alone(
    stage: Stage[Any], module: str, params: Mapping[str, Any], surroundings: Surroundings, folder: Path, **job: Any
) -> Outcome:
    """Run one attempt of a stage to its end, without recipe or store: for `doctor`, and for tests of kinds.

    module: `module:attribute` of the stage. params: as in a manifest. folder: takes `out`, which the stage writes to,
    and what it works with beside it. job: further fields of the `Job`. Raise what `Executor.start` does, and pydantic's
    ValidationError for params that are none of the kind's.
    """
    from .jobs import AttemptFolder, Job

    given = {"inputs": {}, "parent_environment": os.environ, "report": lambda event: None, **job}
    attempt = Job(
        surroundings=surroundings,
        node=stage.kind,
        stage=stage,
        module=module,
        params=stage.params.model_validate(dict(params)),
        out=folder / "out",
        scratch=folder / "scratch",
        parts=folder / "parts",
        folder=AttemptFolder(folder / "attempt"),
        **given,
    )
    return executor(stage.runs_in).start(attempt)
