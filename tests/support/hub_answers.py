"""What the loopback Hub writes down, answers, and spoils on request."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CHUNK = 1 << 20
BURST = 0.1
"""Seconds of an idle line that may be made up for, as buffers on the way do."""
FaultKind = Literal["status", "cut", "garbage", "hang", "html", "slow", "redirect", "etag"]


@dataclass(slots=True)
class Request:
    """One answered request. `sent` counts the bytes of the body."""

    method: str
    path: str
    range: str | None
    user: str | None
    token: str | None
    agent: str
    status: int = 0
    sent: int = 0
    received: int = 0
    done: bool = False


@dataclass(slots=True)
class Fault:
    kind: FaultKind
    match: str
    times: int
    method: str | None
    status: int
    headers: Mapping[str, str]
    seconds: float
    rate: int


@dataclass(frozen=True, slots=True)
class FileRange:
    """The bytes `start` ≤ position < `end` of a file."""

    path: Path
    start: int
    end: int

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def send(self, connection: int, bandwidth: Bandwidth) -> Iterator[int]:
        """Sends them from the page cache, as web servers do; gives how many bytes went, piece by piece."""
        with self.path.open("rb") as file:
            position = self.start
            while position < self.end:
                bandwidth.take(size := min(bandwidth.piece, self.end - position))
                sent = os.sendfile(connection, file.fileno(), position, size)
                if not sent:
                    return
                position += sent
                yield sent


class Bandwidth:
    """A limit that all connections share, in bytes per second; 0: none."""

    def __init__(self, rate: int = 0) -> None:
        self.rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    @property
    def piece(self) -> int:
        """Bytes to send at once: a hundredth of a second's worth, so that connections take turns."""
        return min(max(self.rate // 100, 1 << 12), CHUNK) if self.rate else CHUNK

    def take(self, size: int) -> None:
        """Returns when `size` more bytes may go out."""
        if not self.rate:
            return
        with self._lock:
            turn = max(time.monotonic() - BURST, self._free)
            self._free = turn + size / self.rate
        time.sleep(max(0.0, turn - time.monotonic()))


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()
    size: int = 0


class Refusal(Exception):
    """Ends a request with an error as the Hub words it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.answer = as_json({"error": message or code}, status)
        self.answer.headers |= {
            key: text for key, text in (("X-Error-Code", code), ("X-Error-Message", message)) if text
        }


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    data = json.dumps(value).encode()
    return Answer(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, [data], len(data))
