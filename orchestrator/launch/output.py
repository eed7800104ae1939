"""What workers tell and print, over the process border.

Events: a worker appends JSON lines to a file, the command reads what is new. Output: the command reads it from pipes,
cuts it into lines, redacts them and writes them to the node's log.
"""

from __future__ import annotations

import codecs
import json
import os
import queue
import selectors
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from bigpipe.errors import BigpipeError
from bigpipe.files import LogFile, explain, parse_json
from bigpipe.orchestrator.contract import Event, Progress, event_from_json
from bigpipe.redaction import plain, printable, redact, unfinished

PROGRESS_SECONDS = 0.1
"""At most one Progress per task in this time; the first and the last always pass."""
LONGEST_LINE = 64 * 1024
"""Characters after which a line without an end is cut."""
PENDING_SECONDS = 30.0
"""A progress bar is redrawn in place and may never end its line: its state is logged this often."""
LAST_LINES = 20
LEFT_SECONDS = 2.0
"""In which what the ended workers left in their pipes is read."""


class EventWriter:
    """A Reporter for workers. Safe for threads. What it writes is redacted. Events that cannot be written are lost, and
    the first time says so on stderr: the work matters more."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log: LogFile | None = LogFile(path)
        self._lock = threading.Lock()
        self._shown: dict[str, float] = {}
        self._held: dict[str, Progress] = {}
        self._lost = False

    def report(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Progress):
                now, last = time.monotonic(), self._shown.get(event.task, 0.0)
                self._held[event.task] = event
                if now - last < PROGRESS_SECONDS and event.done != event.total:
                    return
                self._shown[event.task] = now
                del self._held[event.task]
            self._write(event)

    def close(self) -> None:
        """Write what was held back. Events that come later (from a stage's own threads) are dropped."""
        with self._lock:
            if self._log is not None:
                for event in self._held.values():
                    self._write(event)
                with suppress(OSError):
                    self._log.close()
                self._log = None

    def _write(self, event: Event) -> None:
        if self._log is None:
            return
        try:
            self._log.append(json.dumps(event.redacted().as_json(), default=str).encode() + b"\n")
        except OSError as error:
            if not self._lost:
                sys.stderr.write(f"events are lost: {explain(error, Path()).cause}\n")
            self._lost = True


class EventTail:
    """Reads the events that the workers of one attempt have appended since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def new(self) -> Iterator[Event]:
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path, 0)
            if path.stat().st_size == offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = offset + len(whole)
            for line in whole.splitlines():
                # A stage's own Event class or a line torn by a killed worker is not worth failing a stage for.
                with suppress(ValueError, KeyError, TypeError):
                    yield event_from_json(parse_json(line))


class LineSplitter:
    """Bytes in, lines out. Of a line redrawn by carriage returns only its last state counts; terminal control
    sequences are dropped, and secrets masked."""

    def __init__(self) -> None:
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
            # A secret may lie across the cut: mask first, and hold back what may be the beginning of one.
            masked = redact(plain(self._open))
            cut = len(masked) - unfinished(masked)
            lines.append(masked[:cut])
            self._open = masked[cut:]
        if final and self._open.strip():
            lines.append(self._clean(self._open))
            self._open = ""
        return [line for line in lines if line.strip()]

    def pending(self) -> str:
        """The state of the line that has not ended, but for what may be the beginning of a secret."""
        state = self._clean(self._open)
        return state[: len(state) - unfinished(state)].rstrip()

    def _clean(self, line: str) -> str:
        states = [state for state in line.rstrip("\r").split("\r") if state.strip()]
        return redact(plain(states[-1])).rstrip() if states else ""


class Log:
    """The log file of an attempt, opened at its first line, and its last lines for error messages. Lines that cannot be
    written are lost: the work that told them goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.fault: BigpipeError | None = None
        """Why lines were lost, until somebody takes it to tell it."""
        self._lost = 0
        self._lock = threading.Lock()

    def write(self, *lines: str, rank: int | None = None) -> None:
        head = "" if rank is None else f"[rank {rank}] "
        texts = [head + printable(redact(line)) for line in lines]
        with self._lock:
            self.last.extend(texts)
            missing = [f"({self._lost} lines could not be written here)"] if self._lost else []
            try:
                with LogFile(self.path) as log:
                    log.append("".join(text + "\n" for text in (*missing, *texts)).encode())
                self._lost = 0
            except OSError as error:
                if not self._lost:
                    self.fault = explain(error, self.path)
                self._lost += len(texts)


def last_lines(path: Path) -> list[str]:
    """Return the last lines of a log that another machine writes; none where it is not to be read."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return []


class OutputReader:
    """One thread that reads all pipes of the running workers. Lines go to the log at once and wait for the thread that
    reports to `take` them; only so many wait, so that a flood slows its writer down rather than filling memory. Should
    the thread die, `take` raises what it died of: nobody empties the pipes any more."""

    def __init__(self, log: Log, pipes: Mapping[int, int | None]) -> None:
        """Begin to read. pipes: descriptor, which is closed at its end → rank."""
        self._lines: queue.Queue[tuple[int | None, str]] = queue.Queue(maxsize=10_000)
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._splitters = {descriptor: (LineSplitter(), rank) for descriptor, rank in pipes.items()}
        for descriptor in pipes:
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._logged: dict[int, tuple[float, str]] = {}
        self._stop = threading.Event()
        self._died: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def take(self) -> list[tuple[int | None, str]]:
        """The (rank, line) that came since the last call."""
        if self._died is not None:
            raise self._died
        return self._waiting()

    def _waiting(self) -> list[tuple[int | None, str]]:
        return [self._lines.get_nowait() for _ in range(self._lines.qsize())]

    def finish(self) -> list[tuple[int | None, str]]:
        """Take what is left in the pipes, then close them; a process that escaped and holds one is not waited for, and
        read for `LEFT_SECONDS` at the most."""
        self._stop.set()
        lines = self._waiting()
        while self._thread.is_alive():
            self._thread.join(0.01)
            lines += self._waiting()
        return lines + self._waiting()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self._died = error

    def _read(self) -> None:
        until: float | None = None
        while self._splitters:
            stopping = self._stop.is_set()
            if stopping and until is None:
                until = time.monotonic() + LEFT_SECONDS
            ready = self._selector.select(0.0 if stopping else 0.1)
            for key, _ in ready:
                self._take(key.fd)
            self._log_pending()
            if stopping and (not ready or (until is not None and time.monotonic() > until)):
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
