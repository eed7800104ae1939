"""What ranks write down while they work, so that a crash loses nothing that was finished and nothing counts twice.

Each rank appends to a file of its own: a line per record with a checksum, made durable chunk by chunk. Whoever reads
takes the union of all files; lines that a crash tore are not there.

    {"index": 7, "digest": "9f86d081884c7d65", "payload": {"text": "…"}, "tokens": 9, "seconds": 0.4, "crc": "89ab…"}
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import LogFile, make_directory, sync_directory

LOG = "records.jsonl"
"""In each rank's folder."""


@dataclass(frozen=True, slots=True)
class Record:
    index: int
    digest: str
    """Of the row; with the index, the record's identity."""
    payload: dict[str, Any]
    tokens: int = 0
    seconds: float = 0.0
    """Its share of the time its chunk took."""

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
    body = _text(asdict(record))
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def _decode(line: bytes) -> Record | None:
    try:
        fields = json.loads(line)
        found = fields.pop("crc")
        return Record(**fields) if found == f"{zlib.crc32(_text(fields).encode()):08x}" else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
