"""A run from plan to record: the loop, one node's work, files that pass between nodes, results and run records."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from . import records as records
    from .records import RunDiff as RunDiff, RunRecord as RunRecord
    from .result import RunResult as RunResult
    from .runner import run_plan as run_plan
else:
    __getattr__ = face(
        __name__,
        records="RunDiff RunRecord",
        result="RunResult",
        runner="run_plan",
    )
