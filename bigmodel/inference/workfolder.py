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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import LogFile, make_directory, parse_json, sync_directory, write_file
from bigpipe.redaction import redact_json

PLAN, RESULTS = "workplan.json", "results.jsonl"
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
    """Rows in chunks, and the shares of ranks in the chunks that were unfinished when it was made."""

    rows: list[Row]
    batch_size: int
    shares: list[list[int]]
    """Per rank, its chunks in their order."""
    together: int = 1
    """How many chunks of a rank may be under way at once."""

    @cached_property
    def chunks(self) -> list[list[Row]]:
        return chunked(self.rows, self.batch_size)

    @property
    def finished(self) -> int:
        """Chunks that were finished before it was made."""
        return len(self.chunks) - len({chunk for share in self.shares for chunk in share})

    @classmethod
    def read(cls, folder: Path) -> WorkPlan:
        data = json.loads((folder / PLAN).read_bytes())
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def plan_work(
    folder: Path, rows: list[Row], *, batch_size: int, ranks: int, pad: bool = False, together: int = 1
) -> WorkPlan:
    """Share out what nobody has finished in `folder` among `ranks`; return the plan, which is saved there too. pad:
    every rank gets as many chunks; see `assign`. together: chunks of a rank that may be under way at once."""
    good = {index for index, record in gather(rows, folder).items() if not record.failed}
    chunks = chunked(rows, batch_size)
    missing = [number for number, chunk in enumerate(chunks) if not good.issuperset(row.index for row in chunk)]
    plan = WorkPlan(rows, batch_size, assign(missing, ranks, pad=pad), together)
    write_file(folder / PLAN, json.dumps(asdict(plan)))
    return plan


def chunked(rows: list[Row], batch_size: int) -> list[list[Row]]:
    """Return the chunks, whatever the ranks: `batch_size` rows each, in their order."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def assign(chunks: Sequence[int], ranks: int, *, pad: bool = False) -> list[list[int]]:
    """Return each rank's contiguous share, as accelerate's `split_between_processes` gives them. pad: the last chunk is
    repeated until all ranks have as many."""
    each, extra = divmod(len(chunks), ranks)
    ends = [rank * each + min(rank, extra) for rank in range(ranks + 1)]
    shares = [list(chunks[start:end]) for start, end in pairwise(ends)]
    longest = max(map(len, shares)) if pad else 0
    return [[*share, *list(chunks[-1:]) * (longest - len(share))] for share in shares]


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
        **_times(folder, len(plan.shares), tokens),
        "peak": _peak(folder),
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


def _peak(folder: Path) -> dict[str, int]:
    peak: Counter[str] = Counter()
    for file in folder.glob(f"rank-*/{PEAKS}"):
        peak |= Counter(json.loads(file.read_bytes()))
    return dict(sorted(peak.items()))
