"""`bigpipe ui` as a process, and a client that says what a browser would, or what no browser says."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from support.commanding import start
from support.workshop import Workshop

QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def form_token(self) -> str:
        found = re.search(r'name="form_token" value="([^"]+)"', self.text)
        assert found is not None, self.text[:500]
        return found[1]


@dataclass(frozen=True, slots=True)
class Visit:
    """The page of one process."""

    address: str
    process: subprocess.Popen[bytes]

    @property
    def place(self) -> str:
        return urlsplit(self.address).netloc

    def get(self, path: str = "/", **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, fields: Mapping[str, str], **headers: str) -> Answer:
        """As a form of the page would: with its token, if none is given."""
        given = {"form_token": self.get().form_token, **fields} if "form_token" not in fields else fields
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.ask("POST", path, urlencode(given).encode(), {**kind, **headers})

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Header names may be written with `_`."""
        line = http.client.HTTPConnection(self.place, timeout=60)
        try:
            given = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
            line.request(method, path, body, given)
            found = line.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read().decode())
        finally:
            line.close()


@contextmanager
def visiting(workshop: Workshop, *arguments: str, **environ: str) -> Iterator[Visit]:
    """Start the page of the workshop's folder on a free port, and end it."""
    process = start(workshop, "ui", "--port", "0", *arguments, environ=environ)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().decode().partition(" ")[0].strip()
        assert address.startswith("http://"), process.communicate()
        yield Visit(address, process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()


def until(answer, seconds: float = 60.0):
    """Ask again and again, until the answer is a true one; return it."""
    deadline = time.monotonic() + seconds
    while not (found := answer()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found
    return found
