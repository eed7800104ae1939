"""Standard output and error that can be written to whoever reads them, or nobody: what is printed must change neither
the work nor the exit code.

    listen()      puts them in place, at the start
    below(text)   what a stream stands on: `gone` once nobody reads it
    lost()        at the end: what could not be printed, although somebody wanted it
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from bigpipe.errors import BigpipeError
from bigpipe.files import explain

GONE = (errno.EPIPE, errno.EBADF, errno.ECONNRESET)
"""The reader went away: nobody misses what is not printed."""


class Stream(io.FileIO):
    """A descriptor that is written to as long as that works."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.fault: OSError | None = None
        self._terminal = self.isatty()

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """Return how many bytes were taken: all of them once it is no use any more."""
        try:
            while self.fault is None:
                if (written := super().write(data)) is not None:
                    return written
                select.select((), (self,), ())  # somebody made it one that does not wait
        except OSError as error:
            self.fault = error
        return len(data)

    @property
    def gone(self) -> bool:
        """Whether its reader went away: there is nobody to print for."""
        return self.fault is not None and self.lost is None

    @property
    def lost(self) -> OSError | None:
        """What kept it from printing; None where that was its reader's end, as of a terminal that was closed."""
        gone = (*GONE, errno.EIO) if self._terminal else GONE
        return None if self.fault is None or self.fault.errno in gone else self.fault


def listen() -> None:
    """Put streams in place that never raise, not for a sign that their encoding lacks either. A descriptor that is
    closed leads nowhere from now on: else a file would get its number, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  None where it was closed
    sys.stdout, sys.stderr = _text(1, sys.stdout), _text(2, sys.stderr)


def _text(descriptor: int, before: TextIO | None) -> io.TextIOWrapper:
    stream: Any = Stream(descriptor)
    lines = descriptor == 2 or stream.isatty()
    encoding = before.encoding if before is not None else None
    return io.TextIOWrapper(io.BufferedWriter(stream), encoding, "backslashreplace", line_buffering=lines)


def below(text: TextIO) -> Stream | None:
    """Return the descriptor that a stream writes to, None where it is not one of these."""
    raw = getattr(getattr(text, "buffer", None), "raw", None)
    return raw if isinstance(raw, Stream) else None


def lost() -> BigpipeError | None:
    """Return why what went to standard output did not arrive; None where it did, or where nobody waits for it."""
    for text in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            text.flush()
    raw = below(sys.stdout)
    if raw is not None and (error := raw.lost) is not None:
        return explain(error, Path(os.path.realpath("/dev/stdout")), other="print to another place")
    return None
