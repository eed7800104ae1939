"""What one question to a server may cost: seconds and bytes, whatever it answers and however slowly.

`huggingface_hub` and httpx limit each step of a request alone: a byte of a header now and then, preliminary answers
without end, or an endless body would hold them for ever. Here every read and write of every socket of the client is
charged to the exchange that it belongs to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from bigpipe.errors import Transient
from bigpipe.sizes import format_duration, format_transfer

MOST_ANSWERS = 200
"""Redirects and repetitions of one exchange; and one more a MiB, for files that are sent or resumed in parts."""
OVERHEAD = 2**19
"""Bytes of an exchange that belong to no body."""
HEADERS = 2**14
"""Bytes of those of one answer."""
PIECE = 1 << 16
"""Bytes that are written at once."""
LATER = "run again later, or over another network"


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One question, with its redirects and repetitions.

    Waiting costs patience, and bytes that arrive win it back at `slowest` bytes a second, up to what it was at first:
    what stalls is given up as what never begins."""

    patience: float
    """Seconds."""
    slowest: int
    limit: int
    """Bytes of one answer."""
    pause: float = 0.0
    """Seconds that a server may ask to wait before the question is repeated, all together."""
    asked_for: str = ""
    """For messages."""
    commit: str = ""
    digest: str = ""
    size: int | None = None
    """What is known of the file that is asked for. Empty or None: nothing."""
    left: float = field(init=False)
    received: int = field(init=False, default=0)
    sent: int = field(init=False, default=0)
    """Bytes."""
    delivered: int = field(init=False, default=0)
    """Bytes of bodies, as they come; chunk sizes and preliminary answers are none."""
    answers: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.left = self.patience

    def step(self, timeout: float | None) -> float:
        """Return how long one step may take."""
        left = max(self.left, 0.001)
        return left if timeout is None else min(timeout, left)

    def charge(self, seconds: float, host: str, *, received: int = 0, sent: int = 0) -> None:
        """Raise Transient where that was too much."""
        self.received += received
        self.sent += sent
        self.left = min(self.patience, self.left - seconds + (received + sent) / self.slowest)
        if self.left <= 0:
            got = f"{format_transfer(self.received)} in more than {self.patience:g} s of waiting"
            raise Transient(f"{host} sends its answer too slowly{self.for_what}: {got}", LATER)
        if self.received > 2 * self.delivered + self.answers * HEADERS + OVERHEAD:
            raise Transient(f"{host} sends {self.received} bytes{self.for_what}, and hardly an answer in them", LATER)
        if self.delivered > 4 * self.limit + OVERHEAD:
            cause = f"{host} answered{self.for_what} with more than four times the {self.limit} bytes that may come"
            raise Transient(cause, LATER)

    def answered(self, host: str) -> None:
        """Raise Transient where that was one too many."""
        self.answers += 1
        if self.answers > MOST_ANSWERS + (self.sent + self.received) // 2**20:
            raise Transient(f"{host} answered {self.answers} times{self.for_what}, and it never ended", LATER)

    def wait(self, seconds: float, host: str, status: int) -> None:
        """Raise Transient where a server asks for a longer pause than it may."""
        self.pause -= seconds
        if self.pause < 0:
            pause = format_duration(seconds, whole=True)
            cause = f"{host} takes no more requests for {pause} ({status}){self.for_what}"
            raise Transient(cause, "run again after that time")

    @property
    def for_what(self) -> str:
        return f", asked for {self.asked_for}" if self.asked_for else ""


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current() -> Exchange | None:
    return _current.get()


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[Exchange]:
    """What this thread asks inside is charged to one exchange."""
    token = _current.set(exchange)
    try:
        yield exchange
    finally:
        _current.reset(token)


def charge_sockets(client: Any, unknown: Callable[[], Exchange]) -> None:
    """Let every connection that an httpx client makes be charged. unknown: for requests that belong to no exchange."""
    for transport in (client._transport, *client._mounts.values()):
        pool: Any = getattr(transport, "_pool", None)
        if hasattr(pool, "_network_backend"):
            pool._network_backend = _Backend(pool._network_backend, unknown)


class _Backend:
    """An httpcore network backend whose streams are charged."""

    def __init__(self, backend: Any, unknown: Callable[[], Exchange]) -> None:
        self._backend = backend
        self._unknown = unknown

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> _Stream:
        step = (current() or self._unknown()).step(timeout)
        try:
            stream = self._backend.connect_tcp(host=host, port=port, timeout=step, **options)
        except UnicodeError as error:  # of a name that DNS cannot hold; else as of one that it does not know
            library = sys.modules[type(self._backend).__module__.partition(".")[0]]
            raise library.ConnectError(f"{host[:80]!r} is no host's name") from error
        return _Stream(stream, host, self._unknown)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Stream:
    """An httpcore network stream that is charged."""

    def __init__(self, stream: Any, host: str, unknown: Callable[[], Exchange]) -> None:
        self._stream = stream
        self._host = host
        self._unknown = unknown
        self._own = unknown()
        self._reading = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._reading = True
        exchange, begun = current() or self._own, time.monotonic()
        data: bytes = b""
        try:
            data = self._stream.read(max_bytes, exchange.step(timeout))
        finally:
            exchange.charge(time.monotonic() - begun, self._host, received=len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._reading:  # the next request on this connection
            self._reading, self._own = False, self._unknown()
        view = memoryview(buffer)
        for start in range(0, len(view), PIECE):
            piece, begun = view[start : start + PIECE], time.monotonic()
            exchange, sent = current() or self._own, 0
            try:
                self._stream.write(piece, exchange.step(timeout))
                sent = len(piece)
            finally:
                exchange.charge(time.monotonic() - begun, self._host, sent=sent)

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        step = (current() or self._own).step(timeout)
        secure = self._stream.start_tls(ssl_context=ssl_context, server_hostname=server_hostname, timeout=step)
        return _Stream(secure, self._host, self._unknown)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
