"""One weight file being written: bytes go to the disk and through sha256 side by side, then sync and rename."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from bigpipe.errors import StageFailed
from bigpipe.files import FileWriter

from .containers import Container

PIECES_IN_FLIGHT = 3
"""So many pieces may still be on their way to the disk when the next is asked for: a producer that reuses its buffers
needs one more than that."""
SMALL = 256 * 1024
"""Tensors below this many bytes are gathered and written together."""

Piece = bytes | bytearray | memoryview


class Lanes:
    """The two threads behind a writer: one writes, one hashes."""

    def __init__(self) -> None:
        self.writes = ThreadPoolExecutor(1, "write")
        self.hashes = ThreadPoolExecutor(1, "hash")
        self._pending: deque[tuple[Future[Any], ...]] = deque()

    def started(self, *jobs: Future[Any]) -> None:
        """Takes note of what reads a piece now (nothing, if it was copied), then waits until few are in flight."""
        self._pending.append(jobs)
        self._wait(PIECES_IN_FLIGHT)

    def flush(self) -> None:
        """Waits until nothing is in flight."""
        self._wait(0)

    def stop(self) -> None:
        """Waits until nothing is in flight, whatever became of it."""
        while self._pending:
            wait(self._pending.popleft())

    def _wait(self, count: int) -> None:
        while len(self._pending) > count:
            for job in self._pending.popleft():
                job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in (self.writes, self.hashes):
            lane.shutdown()


class ShardWriter:
    """Writes one file at known positions. Tensors may come in any order; in the file's order they are hashed at once.

    Once it is complete, `file.settle` is all that is left to do, in whatever thread. Leaving the context with an error
    removes what was written.
    """

    def __init__(self, path: Path, container: Container, lanes: Lanes, partial: Path | None = None) -> None:
        """partial: as `FileWriter` takes it."""
        self.container = container
        self._lanes = lanes
        self._hash = sha256()
        self._hashed = 0
        self._crcs: dict[str, int] = {}
        self._small = bytearray(container.head)
        self._small_at = 0
        self.file = FileWriter(path, container.size, partial)

    def write(self, name: str, pieces: Iterable[Piece], nbytes: int) -> None:
        """Writes one tensor. ValueError where the pieces do not add up to `nbytes`."""
        at = begin = self.container.offsets[name]
        if nbytes < SMALL:
            content = bytearray()
            for piece in pieces:  # not join: the producer may use a piece's memory again
                content += piece
                self._lanes.started()
            self._write_small(name, bytes(content), nbytes, at)
            return
        self._flush_small()
        crc = _Crc() if self.container.checksums else None
        for piece in pieces:
            view = memoryview(piece).cast("B")
            if at + len(view) > begin + nbytes:
                raise ValueError(f"{name}: more than the {nbytes} bytes planned were produced")
            self._put(view, at, crc)
            at += len(view)
        if at != begin + nbytes:
            raise ValueError(f"{name}: {at - begin} bytes were produced, {nbytes} planned")
        if crc is not None:
            self._put_after(name, at, crc)

    def _write_small(self, name: str, content: bytes, nbytes: int, at: int) -> None:
        if len(content) != nbytes:
            raise ValueError(f"{name}: {len(content)} bytes were produced, {nbytes} planned")
        if self.container.checksums:
            self._crcs[name] = zlib.crc32(content)
            content += self.container.after(name, self._crcs[name])
        self._put_small(content, at)

    def _put_small(self, content: bytes, at: int) -> None:
        if at != self._small_at + len(self._small) or len(self._small) > 4 * SMALL:
            self._flush_small()
            self._small_at = at
        self._small += content

    def _flush_small(self) -> None:
        if self._small:
            content, self._small = self._small, bytearray()
            self._put(memoryview(content), self._small_at, None)
            self._small_at += len(content)

    def _put(self, piece: memoryview, at: int, crc: _Crc | None) -> None:
        jobs: list[Future[Any]] = [self._lanes.writes.submit(self.file.write, piece, at)]
        if at == self._hashed:
            jobs.append(self._lanes.hashes.submit(self._digest, piece, crc))
            self._hashed += len(piece)
        elif crc is not None:
            jobs.append(self._lanes.hashes.submit(crc.add, piece))
        self._lanes.started(*jobs)

    def _put_after(self, name: str, at: int, crc: _Crc) -> None:
        """What follows a tensor holds its CRC, which the hashing thread knows when it gets there."""
        following = len(self.container.after(name, 0))

        def make() -> bytes:
            self._crcs[name] = crc.value
            return self.container.after(name, crc.value)

        if at == self._hashed:
            made = self._lanes.hashes.submit(lambda: self._digest(make(), None))
            self._hashed += following
        else:
            made = self._lanes.hashes.submit(make)
        self._lanes.started(made, self._lanes.writes.submit(lambda: self.file.write(made.result(), at)))

    def _digest(self, piece: Piece, crc: _Crc | None) -> Any:
        self._hash.update(piece)
        if crc is not None:
            crc.add(piece)
        return piece

    def complete(self) -> str:
        """Write what ends the file and wait for all of it; return its sha256 in hex."""
        self._flush_small()
        self._lanes.flush()
        tail = self.container.tail(self._crcs)
        self.file.write(tail, self.container.size - len(tail))
        self._hash_rest()
        return self._hash.hexdigest()

    def _hash_rest(self) -> None:
        """Hashes what did not come in order, from the file (the page cache holds it)."""
        buffer = memoryview(bytearray(min(2**20, self.container.size - self._hashed)))
        while self._hashed < self.container.size:
            count = self.file.read_into(buffer, self._hashed)
            if count == 0:
                raise StageFailed(f"{self.file.path}: was cut short by somebody else", "run again")
            self._hash.update(buffer[:count])
            self._hashed += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._lanes.stop()
            self.file.abandon()


class _Crc:
    """The running CRC-32 of one tensor."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: Piece) -> None:
        self.value = zlib.crc32(piece, self.value)
