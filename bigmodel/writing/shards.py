"""One weight file being written: bytes go to the disk and through sha256 side by side, then sync and rename."""

from __future__ import annotations

import errno
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, Self

from bigpipe.errors import BigpipeError, DoesNotFit, StageFailed
from bigpipe.sizes import format_transfer

from .containers import Container

PIECES_IN_FLIGHT = 3
"""So many pieces may still be on their way to the disk when the next is asked for: a producer that reuses its buffers
needs one more than that."""
SMALL = 256 * 1024
"""Tensors below this many bytes are gathered and written together."""
WRITE = 256 * 1024
"""Bytes per call. Larger ones make Linux look for pages of megabytes, which a virtual machine has often given back to
its host: 8 MiB a call took four times as long as this (2.2 to 4.3 s per GiB against 0.5 to 1 s), 16 KiB a third longer.
"""
PARTIAL = ".part"
"""Suffix of a file that is not whole yet."""

Piece = bytes | bytearray | memoryview


class Lanes:
    """The threads behind a writer: one writes, one hashes, one settles finished files while the next are written."""

    def __init__(self) -> None:
        self.writes = ThreadPoolExecutor(1, "write")
        self.hashes = ThreadPoolExecutor(1, "hash")
        self._settles = ThreadPoolExecutor(1, "settle")
        self._pending: deque[tuple[Future[Any], ...]] = deque()
        self._settling: Future[None] | None = None

    def started(self, *jobs: Future[Any]) -> None:
        """Takes note of what reads a piece now (nothing, if it was copied), then waits until few are in flight."""
        self._pending.append(jobs)
        self._wait(PIECES_IN_FLIGHT)

    def flush(self) -> None:
        """Waits until nothing is in flight."""
        self._wait(0)

    def settle(self, job: Callable[[], None]) -> None:
        """Runs `job` while further files are written; one at a time, so that at most two are not yet on the disk."""
        self._settled()
        self._settling = self._settles.submit(job)

    def stop(self) -> None:
        """Waits until nothing is in flight, whatever became of it."""
        while self._pending:
            wait(self._pending.popleft())

    def _wait(self, count: int) -> None:
        while len(self._pending) > count:
            for job in self._pending.popleft():
                job.result()

    def _settled(self) -> None:
        if self._settling is not None:
            self._settling.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.flush()
                self._settled()
        finally:
            for lane in (self.writes, self.hashes, self._settles):
                lane.shutdown()


class ShardWriter:
    """Writes one file at known positions. Tensors may come in any order; in the file's order they are hashed at once.

    Leaving the context with an error removes what was written.
    """

    def __init__(self, path: Path, container: Container, lanes: Lanes) -> None:
        self.path = path
        self.container = container
        self._lanes = lanes
        self._hash = sha256()
        self._hashed = 0
        self._crcs: dict[str, int] = {}
        self._small = bytearray()
        self._small_at = 0
        self._partial = path.with_name(path.name + PARTIAL)
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            self._allocate()
            self._put_small(container.head, 0)
        except BaseException:
            self.abandon()
            raise

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
        jobs: list[Future[Any]] = [self._lanes.writes.submit(self._store, piece, at)]
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
        self._lanes.started(made, self._lanes.writes.submit(lambda: self._store(made.result(), at)))

    def _digest(self, piece: Piece, crc: _Crc | None) -> Any:
        self._hash.update(piece)
        if crc is not None:
            crc.add(piece)
        return piece

    def _store(self, piece: Piece, at: int) -> None:
        view, start = memoryview(piece), at
        while view:
            try:
                count = os.pwrite(self._file, view[:WRITE], at)
            except OSError as error:
                self._explain(error, at)
            view, at = view[count:], at + count
        if at - start >= SMALL and hasattr(os, "posix_fadvise"):
            # Dirty pages: this sends them to the disk now, without waiting, so that fsync finds little left to do. They
            # stay in the page cache for whoever reads the file next, since only clean ones are let go.
            os.posix_fadvise(self._file, start, at - start, os.POSIX_FADV_DONTNEED)

    def _allocate(self) -> None:
        if not hasattr(os, "posix_fallocate") or not self.container.size:
            return
        try:
            os.posix_fallocate(self._file, 0, self.container.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                self._explain(error, 0)

    def _explain(self, error: OSError, at: int) -> NoReturn:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                f"{self.path}: the disk is full; this file needs {format_transfer(self.container.size)}",
                "free that much there, or work on another disk",
            ) from error
        cause = f"{self.path}: cannot write byte {at}: {error.strerror}"
        raise StageFailed(cause, "check the disk, then run again") from error

    def all_written(self) -> None:
        """Waits until all bytes given so far are written and hashed; then `settle` may run in another thread."""
        self._flush_small()
        self._lanes.flush()

    def settle(self, settled: Callable[[str], None]) -> None:
        """Completes the file, syncs it and gives it its name; then calls `settled` with its sha256 in hex."""
        try:
            tail = self.container.tail(self._crcs)
            self._store(tail, self.container.size - len(tail))
            self._hash_rest()
            os.fsync(self._file)
        except OSError as error:
            self.abandon()
            self._explain(error, 0)
        except BigpipeError:
            self.abandon()
            raise
        os.close(self._file)
        os.rename(self._partial, self.path)
        sync_directory(self.path.parent)
        settled(self._hash.hexdigest())

    def _hash_rest(self) -> None:
        """Hashes what did not come in order, from the file (the page cache holds it)."""
        buffer = memoryview(bytearray(min(2**20, self.container.size - self._hashed)))
        while self._hashed < self.container.size:
            count = os.preadv(self._file, [buffer], self._hashed)
            if count == 0:
                raise StageFailed(f"{self._partial}: was cut short by somebody else", "run again")
            self._hash.update(buffer[:count])
            self._hashed += count

    def abandon(self) -> None:
        """Removes the unfinished file. Nothing may be in flight."""
        os.close(self._file)
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._lanes.stop()
            self.abandon()


class _Crc:
    """The running CRC-32 of one tensor."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: Piece) -> None:
        self.value = zlib.crc32(piece, self.value)


def write_file(path: Path, content: bytes) -> tuple[str, int]:
    """Writes a small file durably under its final name. Its sha256 in hex, and its size."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    sync_directory(path.parent)
    return sha256(content).hexdigest(), len(content)


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
