"""The folder that all ranks work on: what each is to compute, what they write down, and the results made of that.

Each rank appends to a log of its own: a line per record with a checksum, made durable chunk by chunk. Whoever reads
takes the union of all logs; lines that a crash tore are not there. So a crash loses nothing that was finished, and
nothing counts twice.

    {"index": 7, "digest": "9f86d081884c7d65", "payload": {"text": "…"}, "tokens": 9, …, "crc": "89ab…"}
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import LogFile, make_directory, parse_json, sync_directory, write_file
from bigpipe.redaction import redact_json

from .deaths import Deaths, note_deaths
from .sharing import Queue, Split, chunked, share_out

PLAN, RESULTS = "workplan.json", "results.jsonl"
SUSPECTS = "suspects"
LOG, PEAKS = "records.jsonl", "peaks.json"
"""In each rank's folder: its records, and the memory it took at most."""


@dataclass(frozen=True, slots=True)
class Record:
    index: int
    digest: str
    """Of the row; with the index, the record's identity."""
    payload: dict[str, Any]
    tokens: int = 0
    seconds: float = 0.0
    """Its share of the time its chunk took."""
    read: int = 0
    """Tokens of its prompt."""

    @property
    def failed(self) -> bool:
        return "error" in self.payload


def open_log(path: Path) -> LogFile:
    """Open one rank's file for appending. A line that a crash tore is ended, and stays one that nobody reads."""
    make_directory(path.parent)
    log = LogFile(path)
    sync_directory(path.parent)
    if path.read_bytes()[-1:] not in (b"", b"\n"):
        log.append(b"\n")
    return log


def append(log: LogFile, records: Iterable[Record]) -> None:
    """Write the records of one chunk. On return they are on the disk."""
    log.append(b"".join(map(_encode, records)), durable=True)


def read_log(path: Path) -> Iterator[Record]:
    """Return the records of all whole lines of a file that may be missing, torn or damaged."""
    if path.exists():
        with path.open("rb") as file:
            yield from filter(None, map(_decode, file))


def rank_logs(folder: Path) -> list[Path]:
    """Return the logs of all ranks of all attempts in `folder`."""
    return sorted(folder.glob(f"rank-*/{LOG}"))


def gather(rows: Sequence[Row], folder: Path) -> dict[int, Record]:
    """Return the record of each row that any rank of any attempt wrote; one without an error before one with."""
    digests = {row.index: row.digest for row in rows}
    found: dict[int, Record] = {}
    for record in (record for log in rank_logs(folder) for record in read_log(log)):
        known = found.get(record.index)
        if digests.get(record.index) == record.digest and (known is None or known.failed):
            found[record.index] = record
    return found


def check_errors(failed: Sequence[Record], allowed: int) -> None:
    """Raise StageFailed, with the first error beyond those allowed, where there are more."""
    if len(failed) > allowed:
        first = failed[allowed]
        raise StageFailed(
            f"{len(failed)} prompt(s) failed, and max_errors allows {allowed}; "
            f"prompt {first.index}: {first.payload['error']}",
            "mend the prompt, or raise max_errors: the results then hold the error in its place",
        )


def _encode(record: Record) -> bytes:
    body = _text(redact_json(asdict(record)))
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def _decode(line: bytes) -> Record | None:
    try:
        fields = parse_json(line)
        found = fields.pop("crc")
        return Record(**fields) if found == f"{zlib.crc32(_text(fields).encode()):08x}" else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))


@dataclass(frozen=True)
class WorkPlan:
    """Rows in chunks, and the queues of those chunks that were unfinished when it was made."""

    rows: list[Row]
    chunks: list[list[int]]
    """The rows of each."""
    queues: list[list[int]]
    """One that all ranks take chunks from, or one for each rank."""
    suspects: list[int]
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
        sizes = (len(self.chunks[chunk]) for chunk in chunks)
        return Queue(_queue_file(folder, number), chunks, sizes, takers, rank // len(self.queues))

    def suspects_queue(self, folder: Path, rank: int) -> Queue:
        """Return what all ranks take the suspects from."""
        return Queue(_queue_file(folder, SUSPECTS), self.suspects, [1] * len(self.suspects), self.ranks, rank)

    @classmethod
    def read(cls, folder: Path) -> WorkPlan:
        data = json.loads((folder / PLAN).read_bytes())
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def _queue_file(folder: Path, number: int | str) -> Path:
    return folder / f"queue-{number}"


def plan_work(
    folder: Path, rows: list[Row], lengths: Sequence[int], *, ranks: int, batch_size: int = 1,
    batch_tokens: int | None = None, split: Split = "queue", pad: bool = False, together: int = 1,
    lost: Mapping[int, str] = {}, max_errors: int = 0,
) -> WorkPlan:  # fmt: skip
    """Share out what nobody has finished in `folder`; return the plan, which is saved there too.

    lengths: of each row, about, in tokens. batch_size, batch_tokens: see `chunked`. split: one queue for all
    `ranks`, or one for each, padded where asked; see `share_out`. together: chunks of a rank that may be under way at
    once. lost: ranks that died since it was last shared out, and how. A row that was there when two died is computed
    alone, and one that was there three times fails. Raise StageFailed where more than `max_errors` rows failed so.
    """
    chunks = chunked(lengths, batch_size, batch_tokens)
    found = gather(rows, folder)
    done = {number for number, row in enumerate(rows) if row.index in found and not found[row.index].failed}
    deaths = note_deaths(folder, lost, {number for number, row in enumerate(rows) if row.index in found})
    done |= give_up(folder, rows, deaths, max_errors)
    missing = [number for number, chunk in enumerate(chunks) if not done.issuperset(chunk)]
    suspected = {chunk for chunk in missing if not deaths.suspected.isdisjoint(chunks[chunk])}
    suspects = [row for chunk in sorted(suspected) for row in chunks[chunk] if row not in done]
    whole = [chunk for chunk in missing if chunk not in suspected]

    def cost(chunk: int) -> int:
        return len(chunks[chunk]) * max(lengths[row] for row in chunks[chunk])

    queues = share_out(whole, cost, ranks, split, pad=pad)
    plan = WorkPlan(rows, chunks, queues, suspects, len(chunks) - len(missing), ranks, together)
    for number in (*range(len(plan.queues)), SUSPECTS):
        _queue_file(folder, number).unlink(missing_ok=True)
    write_file(folder / PLAN, json.dumps(asdict(plan)))
    return plan


def give_up(folder: Path, rows: Sequence[Row], deaths: Deaths, max_errors: int) -> set[int]:
    """Write down the error of each row that too many ranks died of, and return these rows. Raise StageFailed where they
    are more than `max_errors`."""
    records = [Record(rows[row].index, rows[row].digest, {"error": why}) for row, why in deaths.given_up.items()]
    if records:
        with open_log(folder / "rank-0" / LOG) as log:
            append(log, records)
    check_errors(records, max_errors)
    return set(deaths.given_up)


def merge_results(folder: Path, out: Path, *, max_errors: int = 0) -> tuple[dict[str, Any], tuple[str, int]]:
    """Write `out/results.jsonl`: one line per row of the plan in `folder`, in their order.

    Return what came of it, and the file's (hex sha256, size): `prompts`, `errors`, `tokens`, `prompt_tokens`;
    `micro_batches`, chunks under way at once; `tokens_per_second` of all ranks together, while the slowest was
    computing; `idle`, the share of their time spent waiting for the slowest; `peak`, bytes by device, of the rank that
    took most. Raise StageFailed where a row has no record, or more than `max_errors` rows failed.
    """
    plan = WorkPlan.read(folder)
    found = gather(plan.rows, folder)
    if missing := [row.index for row in plan.rows if row.index not in found]:
        raise StageFailed(f"{len(missing)} prompts have no result, the first is {missing[0]}", "run it again")
    failed = [found[row.index] for row in plan.rows if found[row.index].failed]
    check_errors(failed, max_errors)
    written = write_file(out / RESULTS, "".join(_line(row, found[row.index]) for row in plan.rows))
    tokens = sum(record.tokens for record in found.values())
    counts = {"prompts": len(found), "errors": len(failed), "tokens": tokens}
    counts["prompt_tokens"] = sum(record.read for record in found.values())
    return {
        **counts,
        "micro_batches": plan.together,
        **_times(folder, plan.ranks, tokens),
        "peak": peak_of(folder),
    }, written


def _line(row: Row, record: Record) -> str:
    own = {"index": row.index, "prompt": row.prompt}
    return json.dumps(redact_json({**own, **record.payload, **own}), ensure_ascii=False, allow_nan=False) + "\n"


def _times(folder: Path, ranks: int, tokens: int) -> dict[str, float]:
    busy = [sum(record.seconds for record in read_log(log)) for log in rank_logs(folder)]
    if not (longest := max(busy, default=0.0)):
        return {"tokens_per_second": 0.0, "idle": 0.0}
    idle = 1 - sum(busy) / (max(ranks, len(busy)) * longest)
    return {"tokens_per_second": round(tokens / longest, 3), "idle": round(idle, 4)}


def peak_of(folder: Path) -> dict[str, int]:
    """Return bytes by device, of the rank that took most."""
    peak: Counter[str] = Counter()
    for file in folder.glob(f"rank-*/{PEAKS}"):
        peak |= Counter(json.loads(file.read_bytes()))
    return dict(sorted(peak.items()))
