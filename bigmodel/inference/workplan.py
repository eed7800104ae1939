"""What is to be computed, and which rank computes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from bigpipe.bigmodel.tasks import Row
from bigpipe.files import write_file

from .recordlog import gather

FILE = "workplan.json"


@dataclass(frozen=True)
class WorkPlan:
    """Rows in chunks, and the shares of ranks in the chunks that were unfinished when it was made."""

    rows: list[Row]
    batch_size: int
    shares: list[list[int]]
    """Per rank, its chunks in their order."""

    @cached_property
    def chunks(self) -> list[list[Row]]:
        return chunked(self.rows, self.batch_size)

    @property
    def finished(self) -> int:
        """Chunks that were finished before it was made."""
        return len(self.chunks) - len({chunk for share in self.shares for chunk in share})

    @classmethod
    def read(cls, folder: Path) -> WorkPlan:
        data = json.loads((folder / FILE).read_bytes())
        return cls([Row(**row) for row in data["rows"]], data["batch_size"], data["shares"])


def plan_work(folder: Path, rows: list[Row], *, batch_size: int, ranks: int, pad: bool = False) -> WorkPlan:
    """Share out what nobody has finished in `folder` among `ranks`; return the plan, which is saved there too.

    pad: every rank gets as many chunks; see `assign`.
    """
    good = {index for index, record in gather(rows, folder).items() if not record.failed}
    chunks = chunked(rows, batch_size)
    missing = [number for number, chunk in enumerate(chunks) if not good.issuperset(row.index for row in chunk)]
    plan = WorkPlan(rows, batch_size, assign(missing, ranks, pad=pad))
    write_file(folder / FILE, json.dumps(asdict(plan)))
    return plan


def chunked(rows: list[Row], batch_size: int) -> list[list[Row]]:
    """Return the chunks, whatever the ranks: `batch_size` rows each, in their order."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def assign(chunks: Sequence[int], ranks: int, *, pad: bool = False) -> list[list[int]]:
    """Return each rank's contiguous share, as accelerate's `split_between_processes` gives them.

    pad: the last chunk is repeated until all ranks have as many.
    """
    each, extra = divmod(len(chunks), ranks)
    ends = [rank * each + min(rank, extra) for rank in range(ranks + 1)]
    shares = [list(chunks[start:end]) for start, end in pairwise(ends)]
    longest = max(map(len, shares)) if pad else 0
    return [[*share, *list(chunks[-1:]) * (longest - len(share))] for share in shares]
