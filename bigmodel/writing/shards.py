"""One weight file being written: bytes go to the disk and through sha256 side by side, then sync and rename."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

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
        """Take note of what reads a piece now (nothing, if it was copied), then wait until few are in flight."""
        self._pending.append(jobs)
        self.flush(PIECES_IN_FLIGHT)

    def flush(self, left: int = 0) -> None:
        """Wait until so many pieces are in flight at most."""
        while len(self._pending) > left:
            for job in self._pending.popleft():
                job.result()

    def stop(self) -> None:
        """Wait until nothing is in flight, whatever became of it."""
        while self._pending:
            wait(self._pending.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in (self.writes, self.hashes):
            lane.shutdown()


class ShardWriter:
    """Writes and hashes one file from its beginning to its end; `partial` as `FileWriter` takes it.
    Once it is complete, `file.settle` is all that is left to do, in whatever thread. Leaving the context with an error
    removes what was written."""

    def __init__(self, path: Path, container: Container, lanes: Lanes, partial: Path) -> None:
        self.container = container
        self.file = FileWriter(path, container.size, partial)
        self._lanes = lanes
        self._hash = sha256()
        self._at = 0
        self._crc = 0
        self._crcs: dict[str, int] = {}
        self._small = bytearray(container.head)

    def write(self, name: str, pieces: Iterable[Piece], nbytes: int) -> None:
        """Write the next tensor. Raise ValueError where the pieces do not add up to `nbytes`."""
        size = self._gather(name, pieces) if nbytes < SMALL else self._stream(name, pieces, nbytes)
        if size != nbytes:
            raise ValueError(f"{name}: {size} bytes were produced, {nbytes} planned")

    def _gather(self, name: str, pieces: Iterable[Piece]) -> int:
        content = bytearray()
        for piece in pieces:  # not join: the producer may use a piece's memory again
            content += piece
            self._lanes.started()
        self._small += content
        if self.container.checksums:
            self._crcs[name] = zlib.crc32(content)
            self._small += self.container.after(name, self._crcs[name])
        if len(self._small) > 4 * SMALL:
            self._flush()
        return len(content)

    def _stream(self, name: str, pieces: Iterable[Piece], nbytes: int) -> int:
        self._flush()
        size = 0
        for piece in pieces:
            view = memoryview(piece).cast("B")
            size += len(view)
            if size > nbytes:
                raise ValueError(f"{name}: more than the {nbytes} bytes planned were produced")
            self._put(view, self._digest)
        if size == nbytes and self.container.checksums:
            self._put_after(name)
        return size

    def _flush(self) -> None:
        content, self._small = self._small, bytearray()
        self._put(memoryview(content), self._hash.update)

    def _put(self, piece: memoryview, digest: Callable[[memoryview], None]) -> None:
        lanes = self._lanes
        lanes.started(lanes.writes.submit(self.file.write, piece, self._at), lanes.hashes.submit(digest, piece))
        self._at += len(piece)

    def _digest(self, piece: memoryview) -> None:
        self._hash.update(piece)
        if self.container.checksums:
            self._crc = zlib.crc32(piece, self._crc)

    def _put_after(self, name: str) -> None:
        """What follows a tensor holds its CRC, which the hashing thread knows when it gets there."""
        at, lanes = self._at, self._lanes
        made = lanes.hashes.submit(self._after, name)
        lanes.started(made, lanes.writes.submit(lambda: self.file.write(made.result(), at)))
        self._at += len(self.container.after(name, 0))

    def _after(self, name: str) -> bytes:
        self._crcs[name], self._crc = self._crc, 0
        following = self.container.after(name, self._crcs[name])
        self._hash.update(following)
        return following

    def complete(self) -> str:
        """Write what ends the file and wait for all of it; return its sha256 in hex."""
        self._flush()
        self._lanes.flush()
        tail = self.container.tail(self._crcs)
        self.file.write(tail, self._at)
        self._hash.update(tail)
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._lanes.stop()
            self.file.abandon()
