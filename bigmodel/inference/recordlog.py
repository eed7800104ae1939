"""What ranks write down while they work, so that a crash loses nothing that was finished and nothing counts twice.

Each rank appends to a file of its own: a line per record with a checksum, made durable chunk by chunk. Whoever reads
takes the union of all files; lines that a crash tore are not there.

    {"id": [7, "9f86d081884c7d65"], "chunk": 3, "payload": {"text": "…"}, "tokens": 9, "seconds": 0.4, "crc": "89ab…"}
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import LogFile, make_directory, sync_directory

LOG = "records.jsonl"
"""In each rank's folder."""


@dataclass(frozen=True, slots=True)
class Record:
    index: int
    digest: str
    """Of the input; with the index, the record's identity."""
    chunk: int
    payload: dict[str, Any]
    tokens: int = 0
    seconds: float = 0.0
    """Its share of the time its chunk took."""

    @property
    def failed(self) -> bool:
        return "error" in self.payload


class RecordLog:
    """One rank's file, open for appending. A torn tail is cut off first."""

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self._file = LogFile(path)
        self._file.cut(_sound_length(path))
        sync_directory(path.parent)

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one chunk. On return they are on the disk."""
        self._file.append(b"".join(map(_encode, records)), durable=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_log(path: Path) -> Iterator[Record]:
    """Return the records of all whole lines of a file that may be missing, torn or damaged."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            record = _decode(line)
            if record is not None:
                yield record


def rank_logs(folder: Path) -> list[Path]:
    """Return the logs of all ranks of all attempts in `folder`."""
    return sorted(folder.glob(f"rank-*/{LOG}"))


def gather(rows: Sequence[Row], folder: Path) -> dict[int, Record]:
    """Return the record of each row that any rank of any attempt wrote; one without an error before one with."""
    digests = {row.index: row.digest for row in rows}
    found: dict[int, Record] = {}
    for record in (record for log in rank_logs(folder) for record in read_log(log)):
        if digests.get(record.index) != record.digest:
            continue
        if record.index not in found or found[record.index].failed:
            found[record.index] = record
    return found


def check_errors(failed: Sequence[Record], allowed: int) -> None:
    """Raise StageFailed, with the first error beyond those allowed, where there are more."""
    if len(failed) <= allowed:
        return
    first = failed[allowed]
    raise StageFailed(
        f"{len(failed)} prompt(s) failed, and max_errors allows {allowed}; "
        f"prompt {first.index}: {first.payload['error']}",
        "mend the prompt, or raise max_errors: the results then hold the error in its place",
    )


def _encode(record: Record) -> bytes:
    fields = {
        "id": [record.index, record.digest],
        "chunk": record.chunk,
        "payload": record.payload,
        "tokens": record.tokens,
        "seconds": round(record.seconds, 6),
    }
    body = _text(fields)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def _decode(line: bytes) -> Record | None:
    try:
        fields = json.loads(line)
        found = fields.pop("crc")
        if not line.endswith(b"\n") or found != f"{zlib.crc32(_text(fields).encode()):08x}":
            return None
        index, digest = fields.pop("id")
        return Record(index, digest, **fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))


def _sound_length(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    length = end = 0
    with path.open("rb") as file:
        for line in file:
            length += len(line)
            if _decode(line) is not None:
                end = length
    return end
