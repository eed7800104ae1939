"""Every row answered exactly once, whatever the number of ranks and after any crash.

    plan_work       rows → chunks (cut once, whatever the ranks); chunks that nobody has finished → queues of ranks
    compute_share   each rank: chunk after chunk of its queue, one batch each, appended to a log of its own
    merge_results   the union of all logs, in the order of the rows → results

All three work on one folder, which a crash leaves as it is, and none holds all rows in memory. A chunk is a batch of
rows of like length, whoever takes it, so the same batches form, and the same bits come out, on any number of ranks.
"""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .columns import Columns
    from .merging import Output, merge_results, plain_result
    from .records import MISSING, Found, Record, read_log
    from .sharing import Batching, Split, assign
    from .splitting import split_between_processes
    from .workfolder import WorkPlan, gather, peak_of, plan_work
    from .working import Bound, Pace, Work, compute_share, side_by_side

__getattr__, __all__ = face(__name__)
