"""The logs of all ranks as one file of results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import write_file

from .recordlog import check_errors, gather, rank_logs, read_log
from .working import PEAKS
from .workplan import WorkPlan

RESULTS = "results.jsonl"


def merge_results(folder: Path, out: Path, *, max_errors: int = 0) -> tuple[dict[str, Any], tuple[str, int]]:
    """Write `out/results.jsonl`: one line per row of the plan in `folder`, in their order.

    Return what came of it, and the file's (hex sha256, size): `prompts`, `errors`, `tokens`; `tokens_per_second` of all
    ranks together, while the slowest was computing; `idle`, the share of their time spent waiting for the slowest;
    `peak`, bytes by device, of the rank that took most. Raise StageFailed where a row has no record, or more than
    `max_errors` rows failed.
    """
    plan = WorkPlan.read(folder)
    found = gather(plan.rows, folder)
    if missing := [row.index for row in plan.rows if row.index not in found]:
        raise StageFailed(f"{len(missing)} prompts have no result, the first is {missing[0]}", "run it again")
    failed = [found[row.index] for row in plan.rows if found[row.index].failed]
    check_errors(failed, max_errors)
    written = write_file(out / RESULTS, "".join(_line(row, found[row.index].payload) for row in plan.rows))
    tokens = sum(record.tokens for record in found.values())
    counts = {"prompts": len(found), "errors": len(failed), "tokens": tokens}
    return {**counts, **_times(folder, len(plan.shares), tokens), "peak": _peak(folder)}, written


def _line(row: Row, payload: Mapping[str, Any]) -> str:
    own = {"index": row.index, "prompt": row.prompt}
    return json.dumps({**own, **payload, **own}, ensure_ascii=False, allow_nan=False) + "\n"


def _times(folder: Path, ranks: int, tokens: int) -> dict[str, float]:
    busy = [sum(record.seconds for record in read_log(log)) for log in rank_logs(folder)]
    if not (longest := max(busy, default=0.0)):
        return {"tokens_per_second": 0.0, "idle": 0.0}
    idle = 1 - sum(busy) / (max(ranks, len(busy)) * longest)
    return {"tokens_per_second": round(tokens / longest, 3), "idle": round(idle, 4)}


def _peak(folder: Path) -> dict[str, int]:
    peak: Counter[str] = Counter()
    for file in folder.glob(f"rank-*/{PEAKS}"):
        peak |= Counter(json.loads(file.read_bytes()))
    return dict(sorted(peak.items()))
