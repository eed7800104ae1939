"""Every row answered exactly once, whatever the number of ranks and after any crash.

    plan_work       rows → chunks (fixed once, whatever the ranks); chunks that nobody has finished → shares of ranks
    compute_share   each rank: its chunks, one batch each, appended to a log of its own
    merge_results   the union of all logs, in the order of the rows → results.jsonl

All three work on one folder, which a crash leaves as it is. A chunk is a batch of `batch_size` rows in their order, so
the same batches form, and the same bits come out, on any number of ranks.
"""

from .workfolder import RESULTS, Record, WorkPlan, assign, chunked, merge_results, plan_work, read_log
from .working import Bound, compute_share

__all__ = [
    "RESULTS", "Bound", "Record", "WorkPlan", "assign", "chunked", "compute_share", "merge_results", "plan_work",
    "read_log",
]  # fmt: skip
