"""How work is shared out: rows in chunks, cut once whatever the ranks, and queues that ranks take chunks from."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Literal

Split = Literal["queue", "static"]
WINDOW = 2**16
"""Rows among which those of like length are looked for: that many lengths are in memory at a time."""


def chunked(lengths: Sequence[int], batch_size: int, batch_tokens: int | None = None) -> list[list[int]]:
    """Return the rows of each chunk, by the length of each row in tokens: rows of like length, at most `batch_size` of
    them and, padded to the longest, `batch_tokens` tokens; a longer row is alone. Chunks are in the order of their
    first rows. Equal lengths, or a `batch_size` of 1, keep the order of the rows."""
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        last = chunks[-1] if chunks else []
        fits = batch_tokens is None or (len(last) + 1) * lengths[last[0]] <= batch_tokens if last else False
        if fits and len(last) < batch_size:
            last.append(row)
        else:
            chunks.append([row])
    return sorted(map(sorted, chunks))


def chunks_of(
    lengths: Iterable[int], batch_size: int, batch_tokens: int | None = None
) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of each chunk and the length of its longest, as `chunked` makes them of each `WINDOW` of rows:
    whatever the number of rows, no more lengths than that are in memory."""
    first, source = 0, iter(lengths)
    while window := array("q", islice(source, WINDOW)):
        for chunk in chunked(window, batch_size, batch_tokens):
            yield [first + row for row in chunk], max(window[row] for row in chunk)
        first += len(window)


@dataclass(slots=True)
class Batching:
    """How rows came out in chunks."""

    sizes: array[int] = field(default_factory=lambda: array("I"))
    """Rows of each chunk."""
    shapes: set[tuple[int, int]] = field(default_factory=set)
    """(rows, tokens of the longest) that a chunk has."""

    def add(self, rows: int, longest: int) -> None:
        self.sizes.append(rows)
        self.shapes.add((rows, longest))

    @classmethod
    def of(cls, lengths: Iterable[int], batch_size: int, batch_tokens: int | None = None) -> Batching:
        """Return how rows of these lengths come out."""
        made = cls()
        for chunk, longest in chunks_of(lengths, batch_size, batch_tokens):
            made.add(len(chunk), longest)
        return made

    @property
    def rows(self) -> int:
        return sum(self.sizes)


def share_out(
    missing: Sequence[int], costs: Sequence[int], ranks: int, split: Split, *, pad: bool = False
) -> list[Sequence[int]]:
    """Return the chunks of each queue. costs: of each of the `missing`. queue: one for all ranks, what costs most
    first, so that none is left with much to do at the end. static: one for each rank; see `assign`."""
    if split == "queue":
        import numpy as np

        order = np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable")
        return [array("Q", np.asarray(missing, dtype=np.uint64)[order].tobytes())]
    return [array("Q", share) for share in assign(missing, ranks, pad=pad)]


def bounds(count: int, ranks: int) -> list[tuple[int, int]]:
    """Return where each rank's contiguous share of `count` things begins and ends: as many for all, and one more for
    the first, as accelerate's `PartialState.split_between_processes` has it."""
    each, extra = divmod(count, ranks)
    return list(pairwise(rank * each + min(rank, extra) for rank in range(ranks + 1)))


def assign(chunks: Sequence[int], ranks: int, *, pad: bool = False) -> list[list[int]]:
    """Return each rank's share within its `bounds`. pad: the last chunk is repeated until all ranks have as many."""
    shares = [list(chunks[start:end]) for start, end in bounds(len(chunks), ranks)]
    longest = max(map(len, shares)) if pad else 0
    return [[*share, *list(chunks[-1:]) * (longest - len(share))] for share in shares]


class Queue:
    """A list that several processes take from, each thing once. The file has a byte for each that was taken.

    A write that appends moves the end of the file and the writer's own position to it at once (POSIX, `write`), which
    tells each writer its place without a lock. Where a file system does not keep that, as NFS, something may be taken
    twice and nothing is left out.
    """

    def __init__(self, path: Path, things: Sequence[int], sizes: Iterable[int], takers: int, place: int) -> None:
        """sizes: of each thing. takers: how many processes share it, of which this is the one at `place`."""
        self._path = path
        self._things = things
        self._ends = array("Q", accumulate(sizes, initial=0))
        self._takers, self._place = takers, place
        self._taken = 0
        self._position = path.stat().st_size if path.exists() else 0

    def __iter__(self) -> Iterator[int]:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while (place := self._take(descriptor)) < len(self._things):
                self._taken += self._ends[place + 1] - self._ends[place]
                yield self._things[place]
        finally:
            os.close(descriptor)

    def __len__(self) -> int:
        """What nobody had taken when this process last looked."""
        return max(0, len(self._things) - self._position)

    def _take(self, descriptor: int) -> int:
        os.write(descriptor, b".")
        self._position = os.lseek(descriptor, 0, os.SEEK_CUR)
        return self._position - 1

    @property
    def expected(self) -> int:
        """The sizes of what this process took, and of its share of what is left."""
        left = self._ends[-1] - self._ends[min(self._position, len(self._things))]
        return self._taken + (left + self._takers - 1 - self._place) // self._takers
