"""Every row answered exactly once, whatever the number of ranks and after any crash.

    plan_work       rows → chunks (cut once, whatever the ranks); chunks that nobody has finished → queues of ranks
    compute_share   each rank: chunk after chunk of its queue, one batch each, appended to a log of its own
    merge_results   the union of all logs, in the order of the rows → results.jsonl

All three work on one folder, which a crash leaves as it is. A chunk is a batch of rows of like length, whoever takes
it, so the same batches form, and the same bits come out, on any number of ranks.
"""

from .sharing import Split, assign, chunked
from .splitting import split_between_processes
from .workfolder import RESULTS, Record, WorkPlan, gather, merge_results, peak_of, plan_work, read_log
from .working import Bound, Work, compute_share

__all__ = [
    "RESULTS", "Bound", "Record", "Split", "Work", "WorkPlan", "assign", "chunked", "compute_share", "gather",
    "merge_results", "peak_of", "plan_work", "read_log", "split_between_processes",
]  # fmt: skip
