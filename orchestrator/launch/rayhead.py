"""The head of a Ray cluster: how it is written, and whether it still answers while a run goes on.

Ray's own client waits for a head that is gone, and after `RECONNECT` ends its process with a line on standard error
(`gcs_rpc_server_reconnect_timeout_s`, ray_config_def.h, 60 s), whatever else the process is about. So it is asked here,
and a run ends in an error of its own.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from bigpipe.errors import Transient, UsageError

ANSWER_SECONDS = 10.0
LOOKS = 1.0
"""Seconds between two questions."""
SILENCE = 20.0
"""Seconds without an answer after which it is gone."""
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
LONG = "600"
"""Seconds: as long as what a run does itself, and what others than Ray do in this process, may take to end."""
CONNECT = "`ray start --head` starts one; bigpipe runs on one of its machines, with --executor ray:HOST:PORT"
NONE_NAMED = frozenset({"", "auto"})


def stay_with_it() -> None:
    """Keep Ray from ending this process. Has an effect before Ray is imported, which reads its variables once."""
    os.environ.setdefault(RECONNECT, LONG)


def parts(address: str) -> tuple[str, int]:
    """Return host and port. Raise UsageError for what is no HOST:PORT."""
    name, _, port = address.rpartition(":")
    if "://" in address or not name or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        cause = f"{address!r:.200} is not where the head of a Ray cluster is"
        also = ": ray:// is of Ray's client, http:// of its page" * ("://" in address)
        raise UsageError(cause, f"give HOST:PORT, as `ray start --head` says it (6379){also}; or see to RAY_ADDRESS")
    return name.strip("[]"), int(port)


def require_answer(address: str) -> None:
    """Raise UsageError where nobody listens at an address: Ray would try for minutes."""
    if address in NONE_NAMED:
        return
    try:
        with socket.create_connection(parts(address), ANSWER_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise UsageError(f"no Ray cluster answers at {address}: {error}", CONNECT) from error


def is_same(address: str, other: str) -> bool:
    """Do two addresses lead to the same head?"""
    try:
        found = [{info[4][:2] for info in socket.getaddrinfo(*parts(each))} for each in (address, other)]
    except OSError:
        return address == other
    return not found[0].isdisjoint(found[1])


class Head:
    """Asked by a thread of its own, from the first `begin` to `close`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._silent_since: float | None = None
        self._gone = False

    def begin(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._ask_on, name="head of the cluster", daemon=True)
                self._thread.start()

    def close(self) -> None:
        self._ended.set()

    @property
    def answers(self) -> bool:
        """Did it when it was last asked?"""
        return self._silent_since is None

    def ask(self) -> bool:
        """Return whether it answers now."""
        asked = time.monotonic()
        try:
            with socket.create_connection(parts(self.address), LOOKS):
                self._silent_since = None
        except OSError:
            since = self._silent_since = self._silent_since or asked
            self._gone = self._gone or time.monotonic() - since > SILENCE
        return self.answers

    def check(self) -> None:
        """Raise Transient where it is gone. It does not come back: one that is started anew knows nothing of its
        tasks."""
        if self._gone:
            cause = f"the head of the Ray cluster at {self.address} is gone: it has not answered for {SILENCE:g} s"
            raise Transient(cause, "start it again; the same command continues where it stopped")

    def _ask_on(self) -> None:
        while not self._ended.wait(LOOKS) and not self._gone:
            self.ask()
