"""The folder that all ranks work on: what each is to compute, and what they write down.

Each rank appends to a log of its own (`records`). Whoever reads takes the union of all logs; lines that a crash tore
are not there. So a crash loses nothing that was finished, and nothing counts twice.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.files import write_file
from bigpipe.redaction import redact

from .deaths import Deaths, note_deaths
from .records import DONE, LOG, MISSING, Found, Record, append, check_errors, open_log
from .sharing import Batching, Queue, Split, share_out
from .storedrows import StoredChunks, StoredRows, numbers, store_rows

PLAN = "workplan.json"
SUSPECTS = "suspects"
PEAKS, TIMES = "peaks.json", "times.json"
"""In each rank's folder: the memory it took at most, and when it was at work."""


@dataclass(frozen=True)
class WorkPlan:
    """Rows in chunks, and the queues of those chunks that were unfinished when it was made."""

    rows: StoredRows
    chunks: StoredChunks
    queues: Sequence[Sequence[int]]
    """One that all ranks take chunks from, or one for each rank."""
    suspects: Sequence[int]
    """Rows that ranks died of, as it seems: computed after all others, each of them alone."""
    finished: int
    """Chunks that were finished before it was made."""
    ranks: int
    together: int = 1
    """How many chunks of a rank may be under way at once."""

    def batch(self, chunk: int) -> list[Row]:
        return [self.rows[row] for row in self.chunks[chunk]]

    def queue(self, folder: Path, rank: int) -> Queue:
        """Return what a rank takes its chunks from, as far as the ranks in `folder` have come."""
        number = rank % len(self.queues)
        chunks, takers = self.queues[number], self.ranks // len(self.queues)
        sizes = map(self.chunks.size, chunks)
        return Queue(_taken(folder, number), chunks, sizes, takers, rank // len(self.queues))

    @property
    def to_do(self) -> int:
        """Return the rows that all ranks together do, those that are repeated as padding included."""
        return len(self.suspects) + sum(self.chunks.size(chunk) for queue in self.queues for chunk in queue)

    def suspects_queue(self, folder: Path, rank: int) -> Queue:
        """Return what all ranks take the suspects from."""
        return Queue(_taken(folder, SUSPECTS), self.suspects, [1] * len(self.suspects), self.ranks, rank)

    @classmethod
    def read(cls, folder: Path) -> WorkPlan:
        data = json.loads((folder / PLAN).read_bytes())
        queues = [numbers(_queue(folder, number)) for number in range(data.pop("queues"))]
        return cls(StoredRows(folder), StoredChunks(folder), queues, **data)


def _queue(folder: Path, number: int) -> Path:
    return folder / f"queue-{number}.chunks"


def _taken(folder: Path, number: int | str) -> Path:
    return folder / f"queue-{number}"


def plan_work(
    folder: Path, rows: Iterable[Row], length_of: Callable[[Row], int], *, ranks: int, batch_size: int = 1,
    batch_tokens: int | None = None, split: Split = "queue", pad: bool = False,
    together: Callable[[Batching], int] = lambda batching: 1, lost: Mapping[int, str] = {}, max_errors: int = 0,
) -> WorkPlan:  # fmt: skip
    """Share out what nobody has finished in `folder`; return the plan, which is saved there too. Rows go by one by one:
    what it holds in memory is a few bytes for each of them.

    rows: their indices are 0, 1, … length_of: their lengths, about, in tokens. batch_size, batch_tokens: see
    `chunks_of`. split: one queue for all `ranks`, or one for each, padded where asked; see `share_out`. together: how
    many chunks of a rank may be under way at once. lost: ranks that died since it was last shared out, and how. A row
    that was there when two died is computed alone, and one that was there three times fails. Raise StageFailed where
    more than `max_errors` rows failed so.
    """
    batching = store_rows(folder, rows, length_of, batch_size, batch_tokens)
    stored, chunks = StoredRows(folder), StoredChunks(folder)
    with Found(stored, folder) as found:
        states = found.states
    deaths = note_deaths(folder, lost, lambda row: states[row] != MISSING)
    for row in give_up(folder, stored, deaths, max_errors):
        states[row] = DONE
    missing, suspects = array("Q"), []
    unfinished = 0
    for number, chunk in enumerate(chunks):
        if all(states[row] == DONE for row in chunk):
            continue
        unfinished += 1
        if deaths.suspected.isdisjoint(chunk):
            missing.append(number)
        else:
            suspects += [row for row in chunk if states[row] != DONE]
    for written in folder.glob(f"rank-*/{TIMES}"):
        written.unlink()  # of an attempt that is over
    queues = share_out(missing, [chunks.cost(chunk) for chunk in missing], ranks, split, pad=pad)
    for number, queue in enumerate(queues):
        write_file(_queue(folder, number), array("Q", queue).tobytes())
    for name in (*range(len(queues)), SUSPECTS):
        _taken(folder, name).unlink(missing_ok=True)
    plan = {
        "queues": len(queues), "suspects": suspects, "finished": len(chunks) - unfinished, "ranks": ranks,
        "together": together(batching),
    }  # fmt: skip
    write_file(folder / PLAN, json.dumps(plan))
    return WorkPlan.read(folder)


def give_up(folder: Path, rows: StoredRows, deaths: Deaths, max_errors: int) -> set[int]:
    """Write down the error of each row that too many ranks died of, and return these rows. Raise StageFailed where they
    are more than `max_errors`."""
    records = [Record(row, rows.digest(row), {"error": redact(why)}) for row, why in deaths.given_up.items()]
    if records:
        with open_log(folder / "rank-0" / LOG) as log:
            append(log, records)
    check_errors(len(records), max_errors, records, rows)
    return set(deaths.given_up)


def gather(rows: Sequence[Row] | StoredRows, found: Found) -> Iterator[tuple[Row, Record]]:
    """Yield each row and its record, in their order."""
    for row in rows:
        yield row, found[row.index]


def timeline_of(folder: Path) -> dict[str, dict[str, float]]:
    """Return rank → when it was at work in the last attempt: `began` and `ended`, in seconds since the first of them
    began its first batch; `busy`, the seconds in which it computed; its `prompts` and `tokens`."""
    found = {
        file.parent.name.removeprefix("rank-"): json.loads(file.read_bytes()) for file in folder.glob(f"rank-*/{TIMES}")
    }
    first = min((each["began"] for each in found.values()), default=0.0)
    moved = {"began", "ended"}
    return {
        rank: {name: round(value - first * (name in moved), 3) for name, value in found[rank].items()}
        for rank in sorted(found, key=int)
    }


def peak_of(folder: Path) -> dict[str, int]:
    """Return bytes by device, of the rank that took most."""
    peak: Counter[str] = Counter()
    for file in folder.glob(f"rank-*/{PEAKS}"):
        peak |= Counter(json.loads(file.read_bytes()))
    return dict(sorted(peak.items()))


def times(busy: Sequence[float], ranks: int, tokens: int) -> dict[str, Any]:
    """Return `tokens_per_second` of all ranks together, while the slowest was computing, and `idle`, the share of their
    time spent waiting for the slowest. busy: seconds of each rank."""
    if not (longest := max(busy, default=0.0)):
        return {"tokens_per_second": 0.0, "idle": 0.0}
    idle = 1 - sum(busy) / (max(ranks, len(busy)) * longest)
    return {"tokens_per_second": round(tokens / longest, 3), "idle": round(idle, 4)}
