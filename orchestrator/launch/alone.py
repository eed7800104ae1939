"""A stage on its own: one attempt in a folder, without recipe or store. For `doctor`, and for tests of kinds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract import Stage, Surroundings

from .attemptfolder import AttemptFolder
from .executors import executor
from .jobs import Job, Outcome


def run_alone(
    stage: Stage[Any], module: str, params: Mapping[str, Any], surroundings: Surroundings, folder: Path, **job: Any
) -> Outcome:
    """Run one attempt to its end, by the executor of the kind. It writes to `out` in `folder`, and works beside it.

    module: `module:attribute` of the stage. params: as in a manifest. job: further fields of the `Job`.
    Raise what `Executor.start` does, and pydantic's ValidationError for params that are none of the kind's.
    """
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
