"""Rows and chunks on the disk, so that any number of them takes little memory.

rows.jsonl       a line per row
rows.index       of each row: where its line begins, and its digest
chunks.rows      the rows of all chunks, one chunk after the other
chunks.index     of each chunk: where its rows begin, and what it costs

The last three are unsigned numbers of 64 bits in the order of this machine's bytes.
"""

from __future__ import annotations

import mmap
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import TypeVar, overload

from bigpipe.bigmodel.tasks import Row
from bigpipe.files import LogFile

from .lines import from_line, to_line
from .sharing import Batching, chunks_of

ROWS, ROWS_INDEX, CHUNKS, CHUNKS_INDEX = "rows.jsonl", "rows.index", "chunks.rows", "chunks.index"
T = TypeVar("T")


def store_rows(
    folder: Path, rows: Iterable[Row], length_of: Callable[[Row], int], batch_size: int, batch_tokens: int | None
) -> Batching:
    """Write rows, whose indices are 0, 1, …, and the chunks that `chunks_of` makes of them. Return how these came out.
    Nothing is synced: after a power cut they are written again."""
    batching = Batching()
    for name in (ROWS, ROWS_INDEX, CHUNKS, CHUNKS_INDEX):
        (folder / name).unlink(missing_ok=True)
    with LogFile(folder / ROWS) as lines, LogFile(folder / ROWS_INDEX) as index:
        offset = 0

        def keep(row: Row) -> int:
            nonlocal offset
            line = to_line(_fields(row)) + b"\n"
            index.append(array("Q", (offset, int(row.digest, 16))).tobytes(), later=True)
            lines.append(line, later=True)
            offset += len(line)
            return length_of(row)

        with LogFile(folder / CHUNKS) as members, LogFile(folder / CHUNKS_INDEX) as chunks:
            begin = 0
            for chunk, longest in chunks_of(map(keep, rows), batch_size, batch_tokens):
                members.append(array("Q", chunk).tobytes(), later=True)
                chunks.append(array("Q", (begin, longest * len(chunk))).tobytes(), later=True)
                begin += len(chunk)
                batching.add(len(chunk), longest)
    return batching


_fields = attrgetter(*(field.name for field in fields(Row)))
"""All of a row, in the order in which `Row` takes them."""


def numbers(path: Path) -> memoryview:
    """Return the numbers in a file, which are read as they are looked at."""
    if not path.stat().st_size:
        return memoryview(array("Q"))
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")


class _Stored(Sequence[T]):
    """What an index of two numbers each leads to."""

    _index: memoryview

    def __len__(self) -> int:
        return len(self._index) // 2

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self._one(each) for each in range(*number.indices(len(self)))]
        return self._one(number)

    def _one(self, number: int) -> T:
        raise NotImplementedError


class StoredRows(_Stored[Row]):
    """What `store_rows` wrote, read row by row, from any thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ROWS
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._index = numbers(folder / ROWS_INDEX)

    def _one(self, number: int) -> Row:
        begin = self._index[2 * number]
        end = self._index[2 * number + 2] if number + 1 < len(self) else self._size
        return Row(*from_line(os.pread(self._file, end - begin, begin)))

    def __iter__(self) -> Iterator[Row]:
        with self._path.open("rb") as file:
            for line in file:
                yield Row(*from_line(line))

    def digest(self, number: int) -> str:
        """Return the digest of a row, as `Row.digest` has it."""
        return f"{self._index[2 * number + 1]:016x}"


class StoredChunks(_Stored[list[int]]):
    """The rows of each chunk."""

    def __init__(self, folder: Path) -> None:
        self._rows = numbers(folder / CHUNKS)
        self._index = numbers(folder / CHUNKS_INDEX)

    def _one(self, number: int) -> list[int]:
        begin = self._index[2 * number]
        return self._rows[begin : begin + self.size(number)].tolist()

    def size(self, number: int) -> int:
        """Return how many rows a chunk has."""
        end = self._index[2 * number + 2] if number + 1 < len(self) else len(self._rows)
        return end - self._index[2 * number]

    def cost(self, number: int) -> int:
        """Return the tokens of a chunk, padded to its longest row."""
        return self._index[2 * number + 1]
