"""What workers print: read from pipes, cut into lines, redacted, written to the node's log."""

from __future__ import annotations

import codecs
import os
import queue
import re
import selectors
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from bigpipe.files import LogFile

from .redaction import Redactor

LONGEST_LINE = 64 * 1024
"""Characters after which a line without an end is cut."""
PENDING_SECONDS = 30.0
"""A progress bar is redrawn in place and may never end its line: its state is logged this often."""
LAST_LINES = 20
_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]"
)


class LineSplitter:
    """Bytes in, lines out. Of a line redrawn by carriage returns only its last state counts; terminal control
    sequences are dropped, and secrets masked."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._open = ""

    def feed(self, data: bytes, *, final: bool = False) -> list[str]:
        self._open += self._decode(data, final)
        *whole, self._open = self._open.split("\n")
        lines = [self._clean(line) for line in whole]
        if "\r" in self._open[:-1]:
            # Keep what may still be overwritten, and a final \r, which may belong to a \r\n.
            self._open = self._open[self._open.rstrip("\r").rfind("\r") + 1 :]
        if len(self._open) > LONGEST_LINE:
            # A secret may lie across the cut: mask first, and hold back as much as one could still need.
            masked = self._redactor.text(self._open)
            cut = len(masked) - self._redactor.longest
            lines.append(self._clean(masked[:cut]))
            self._open = masked[cut:]
        if final and self._open.strip():
            lines.append(self.pending())
            self._open = ""
        return [line for line in lines if line.strip()]

    def pending(self) -> str:
        """The state of the line that has not ended."""
        return self._clean(self._open)

    def _clean(self, line: str) -> str:
        states = [state for state in line.rstrip("\r").split("\r") if state.strip()]
        return _CONTROL.sub("", self._redactor.text(states[-1])).rstrip() if states else ""


class Log:
    """The log file of an attempt, opened at its first line, and its last lines for error messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._lock = threading.Lock()

    def write(self, *lines: str, rank: int | None = None) -> None:
        texts = lines if rank is None else [f"[rank {rank}] {line}" for line in lines]
        with self._lock:
            self.last.extend(texts)
            with LogFile(self.path) as log:
                log.append("".join(text + "\n" for text in texts).encode())


class OutputReader:
    """One thread that reads all pipes of the running workers. Lines go to the log at once and wait for the thread that
    reports to `take` them; only so many wait, so that a flood slows its writer down rather than filling memory."""

    def __init__(self, log: Log, redactor: Redactor, pipes: Mapping[int, int | None]) -> None:
        """Begin to read. pipes: descriptor, which is closed at its end → rank."""
        self._lines: queue.Queue[tuple[int | None, str]] = queue.Queue(maxsize=10_000)
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._splitters = {descriptor: (LineSplitter(redactor), rank) for descriptor, rank in pipes.items()}
        for descriptor in pipes:
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._logged: dict[int, tuple[float, str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="output", daemon=True)
        self._thread.start()

    def take(self) -> list[tuple[int | None, str]]:
        """The (rank, line) that came since the last call."""
        return [self._lines.get_nowait() for _ in range(self._lines.qsize())]

    def finish(self) -> list[tuple[int | None, str]]:
        """Take what is left in the pipes, then close them; a process that escaped and holds one is not waited for."""
        self._stop.set()
        lines = self.take()
        while self._thread.is_alive():
            self._thread.join(0.01)
            lines += self.take()
        return lines + self.take()

    def _read(self) -> None:
        while self._splitters:
            stopping = self._stop.is_set()
            ready = self._selector.select(0.0 if stopping else 0.1)
            for key, _ in ready:
                self._take(key.fd)
            self._log_pending()
            if stopping and not ready:
                break
        for descriptor in list(self._splitters):
            self._close(descriptor)
        self._selector.close()

    def _take(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(descriptor)
            return
        splitter, rank = self._splitters[descriptor]
        self._emit(splitter.feed(data), rank)

    def _close(self, descriptor: int) -> None:
        splitter, rank = self._splitters.pop(descriptor)
        self._emit(splitter.feed(b"", final=True), rank)
        self._selector.unregister(descriptor)
        os.close(descriptor)

    def _emit(self, lines: list[str], rank: int | None) -> None:
        if lines:
            self._log.write(*lines, rank=rank)
        for line in lines:
            self._lines.put((rank, line))

    def _log_pending(self) -> None:
        now = time.monotonic()
        for descriptor, (splitter, rank) in self._splitters.items():
            since, before = self._logged.setdefault(descriptor, (now, ""))
            if now - since < PENDING_SECONDS:
                continue
            state = splitter.pending()
            if state and state != before:
                self._emit([state], rank)
            self._logged[descriptor] = (now, state)
