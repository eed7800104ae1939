"""A run from plan to record: the loop, one node's work, files that pass between nodes, results and run records."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from . import records, sharing
    from .nodes import HEADS, Gate, NodeRun, metrics_line, node_rows, sentence
    from .probing import Held, probe, refuse_elsewhere, shortages
    from .records import RunRecord
    from .result import RunResult, refused_json, run_json
    from .runner import run_plan
    from .smoking import plan_small, run_small
    from .telling import telling_sinks

__getattr__, __all__ = face(__name__)
