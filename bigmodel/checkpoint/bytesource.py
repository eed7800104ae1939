"""Reading byte ranges: from a local file here, over HTTP in `remote`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, Self

from bigpipe.errors import StageFailed

from .tensors import invalid


class ByteSource(Protocol):
    """Something with a size of which ranges can be read."""

    @property
    def name(self) -> str:
        """A path or URL for error messages."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; InvalidCheckpoint where the source ends before."""


class FileSource:
    """A local file, opened once. Positions are absolute, so threads may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without O_NONBLOCK a FIFO that replaced the file since it was checked would hang us.
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.size = os.fstat(self._file).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise self._cut(offset + length)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on."""
        while buffer:
            try:
                count = os.preadv(self._file, [buffer], offset)
            except OSError as error:
                raise StageFailed(
                    f"{self.path}: cannot read byte {offset}: {error.strerror}", "check the disk, then run again"
                ) from error
            if count == 0:
                raise self._cut(offset + len(buffer))
            buffer, offset = buffer[count:], offset + count

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, end: int) -> Exception:
        return invalid(
            self.path, f"ends at byte {self.size}, but {end} bytes are needed", "fetch the file again; it was cut short"
        )
