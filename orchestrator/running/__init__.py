"""A run from plan to record: the loop, one node's work, files that pass between nodes, results and run records."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from . import records, sharing
    from .records import Gate, NodeRun, RunRecord
    from .result import RunResult, run_json
    from .runner import run_plan
    from .sentences import HEADS, metrics_line, node_rows, sentence

__getattr__, __all__ = face(__name__)
