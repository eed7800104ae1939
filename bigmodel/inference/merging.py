"""The logs of all ranks as one file of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import write_file

from .recordlog import Record, check_errors, gather, rank_logs, read_log
from .working import PEAKS
from .workplan import WorkPlan

RESULTS = "results.jsonl"


@dataclass(frozen=True, slots=True)
class Summary:
    prompts: int
    errors: int
    tokens: int
    tokens_per_second: float
    """Of all ranks together, while the slowest was computing."""
    idle: float
    """Share of the ranks' time spent waiting for the slowest."""
    peak: dict[str, int]
    """Bytes by device, of the rank that took most."""


def merge_results(folder: Path, out: Path, *, max_errors: int = 0) -> tuple[Summary, tuple[str, int]]:
    """Write `out/results.jsonl`: one line per row of the plan in `folder`, in their order.

    Return what came of it, and the file's (hex sha256, size). Raise StageFailed where a row has no record, or more
    than `max_errors` rows failed.
    """
    plan = WorkPlan.read(folder)
    found = gather(plan.rows, folder)
    if missing := [row.index for row in plan.rows if row.index not in found]:
        raise StageFailed(f"{len(missing)} prompts have no result, the first is {missing[0]}", "run it again")
    failed = [found[row.index] for row in plan.rows if found[row.index].failed]
    check_errors(failed, max_errors)
    written = write_file(out / RESULTS, "".join(_line(row, found[row.index].payload) for row in plan.rows))
    return _summary(found, len(failed), len(plan.shares), folder), written


def _line(row: Row, payload: Mapping[str, Any]) -> str:
    own = {"index": row.index, "prompt": row.prompt}
    return json.dumps({**own, **payload, **own}, ensure_ascii=False, allow_nan=False) + "\n"


def _summary(found: Mapping[int, Record], errors: int, ranks: int, folder: Path) -> Summary:
    busy = [sum(record.seconds for record in read_log(log)) for log in rank_logs(folder)]
    peaks: dict[str, int] = {}
    for file in folder.glob(f"rank-*/{PEAKS}"):
        for device, size in json.loads(file.read_bytes()).items():
            peaks[device] = max(size, peaks.get(device, 0))
    tokens, longest = sum(record.tokens for record in found.values()), max(busy, default=0.0)
    return Summary(
        prompts=len(found),
        errors=errors,
        tokens=tokens,
        tokens_per_second=round(tokens / longest, 3) if longest else 0.0,
        idle=round(1 - sum(busy) / (max(ranks, len(busy)) * longest), 4) if longest else 0.0,
        peak=dict(sorted(peaks.items())),
    )
