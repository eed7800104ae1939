"""What ranks write down: a line per record with a checksum, made durable chunk by chunk.

    {"index":7,"digest":"9f86d081884c7d65","tokens":9,…,"failed":false,"payload":{"text":"…"},"crc":"89ab0123"}

The payload comes last, so that whoever looks for a record need not parse what it holds.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import LogFile, make_directory, sync_directory
from bigpipe.redaction import masked_texts
from bigpipe.sizes import counted

from .lines import compact, from_line, to_line
from .storedrows import StoredRows

LOG = "records.jsonl"
"""In each rank's folder: its records."""
PAYLOAD, CRC = b',"payload":', b',"crc":"'
LOGS = 48
"""Bits of a place that are the offset in a log; those above are its number."""
SHORT = 2**10
"""Bytes of a line: most have less."""
MISSING, FAILED, DONE = 0, 1, 2


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
    files: list[list[Any]] = field(default_factory=list)
    """(name, hex sha256, bytes) of each file that the payload names."""

    @property
    def failed(self) -> bool:
        return is_failure(self.payload)


def is_failure(payload: Mapping[str, Any]) -> bool:
    """Does it say, under `error`, why there is no answer? A number there, or nothing, is a result as any other."""
    error = payload.get("error")
    return isinstance(error, str) and bool(error)


def open_log(path: Path) -> LogFile:
    """Open one rank's file for appending. A line that a crash tore is ended, and stays one that nobody reads."""
    make_directory(path.parent)
    log = LogFile(path)
    sync_directory(path.parent)
    if _last_byte(path) not in (b"", b"\n"):
        log.append(b"\n")
    return log


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read()


def append(log: LogFile, records: Iterable[Record]) -> None:
    """Write the records of one chunk. On return they are on the disk."""
    log.append(encoded(records), durable=True)


def encoded(records: Iterable[Record], masked: Callable[[int], None] = lambda index: None) -> bytes:
    """Return the lines of records, as a log holds them. masked: told the row whose answer holds the value of a secret,
    which is not written."""
    records = list(records)
    # By the encoder that tasks were held to, whatever they made their values of
    payloads, changed = masked_texts([record.payload for record in records], compact)
    for number in changed:
        masked(records[number].index)
    return b"".join(map(_encode, records, payloads))


def _encode(record: Record, payload: str) -> bytes:
    head = to_line(
        {
            "index": record.index, "digest": record.digest, "tokens": record.tokens, "seconds": record.seconds,
            "read": record.read, "files": record.files, "failed": record.failed,
        }
    )  # fmt: skip
    body = b"%s%s%s}" % (head[:-1], PAYLOAD, payload.encode())
    return b'%s%s%08x"}\n' % (body[:-1], CRC, zlib.crc32(body))


def _body(line: bytes) -> bytes | None:
    """What was written, where it is as it was."""
    whole = line.rstrip(b"\n")
    head, mark, tail = whole[:-18], whole[-18:-10], whole[-10:]
    body = head + b"}"
    return body if mark == CRC and tail == b'%08x"}' % zlib.crc32(body) else None


def read_log(path: Path) -> Iterator[Record]:
    """Return the records of all whole lines of a file that may be missing, torn or damaged."""
    if path.exists():
        with path.open("rb") as file:
            yield from filter(None, map(_decode, file))


def _decode(line: bytes) -> Record | None:
    body = _body(line)
    if body is None:
        return None
    fields = from_line(body)
    del fields["failed"]
    return Record(**fields)


def rank_logs(folder: Path) -> list[Path]:
    """Return the logs of all ranks of all attempts in `folder`."""
    return sorted(folder.glob(f"rank-*/{LOG}"))


def _line_at(file: int, offset: int) -> bytes:
    """Return the line that begins there, or what there is of it."""
    line = b""
    while piece := os.pread(file, max(SHORT, len(line)), offset + len(line)):
        end = piece.find(b"\n") + 1
        line += piece[: end or None]
        if end:
            break
    return line


class Found:
    """Where the record of each row stands, of all that any rank of any attempt wrote in `folder`: one without an error
    before one with. It holds 9 bytes a row, and none of the records."""

    def __init__(self, rows: StoredRows, folder: Path) -> None:
        self._logs = rank_logs(folder)
        self._files = [path.open("rb") for path in self._logs]
        self._places = array("Q", bytes(8 * len(rows)))
        self.states = bytearray(len(rows))
        self.busy = [0.0] * len(self._logs)
        """Seconds that each rank computed."""
        for number, file in enumerate(self._files):
            self._look(rows, number, file)

    def _look(self, rows: StoredRows, number: int, file: Iterable[bytes]) -> None:
        offset = 0
        for line in file:
            body, place = _body(line), number << LOGS | offset
            offset += len(line)
            if body is None:
                continue
            head = from_line(body[: body.index(PAYLOAD)] + b"}")
            self.busy[number] += head["seconds"]
            row = head["index"]
            if row < len(rows) and self.states[row] != DONE and rows.digest(row) == head["digest"]:
                if self.states[row] == MISSING or not head["failed"]:
                    self._places[row] = place
                self.states[row] = FAILED if head["failed"] else DONE

    def __getitem__(self, row: int) -> Record:
        """Return the record of a row that is not missing. Raise StageFailed where its bytes changed meanwhile."""
        place = self._places[row]
        record = _decode(_line_at(self._files[place >> LOGS].fileno(), place & (1 << LOGS) - 1))
        if record is None:
            path = self._logs[place >> LOGS]
            raise StageFailed(f"{path} changed while it was read: the record of row {row}", "run it again")
        return record

    def folder(self, row: int) -> Path:
        """Return the folder of the rank that wrote the record of a row."""
        return self._logs[self._places[row] >> LOGS].parent

    def rows(self, state: int) -> Iterator[int]:
        """Return the rows that are MISSING, FAILED or DONE, in their order."""
        row = self.states.find(state)
        while row >= 0:
            yield row
            row = self.states.find(state, row + 1)

    def count(self, state: int) -> int:
        return self.states.count(state)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_errors(count: int, allowed: int, failed: Iterable[Record], rows: Sequence[Row]) -> None:
    """Raise StageFailed, with the first error beyond those allowed and the place of its row, where there are more.
    failed: all `count` of them, in their order."""
    if count > allowed:
        first = next(record for number, record in enumerate(failed) if number == allowed)
        place = rows[first.index].place
        said = f"prompt {first.index}{f' ({place})' if place else ''}: {first.payload['error']}"
        raise StageFailed(
            f"{counted(count, 'prompt')} failed, and max_errors allows {allowed}; {said}",
            "mend the prompt, or the task (the log has a traceback), or raise max_errors: results then hold the error",
        )
