"""A run's side of the sinks: what happens is handed to a process for each, and nobody waits for it but at the end.

A process that hangs, dies, or talks to a system that is away costs the run a line, and PATIENCE seconds at the most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from bigpipe.environment import inherited, python_path
from bigpipe.orchestrator.contract import Json
from bigpipe.redaction import redact, redact_fields

from .table import SINKS, install

PATIENCE = 10.0
"""Seconds after a run's end in which all sinks together may bring to an end what they have to tell."""
LONGEST = 300
"""Characters of what a sink says of itself."""


@dataclass(slots=True)
class Feed:
    """A sink's process, and what it still has to be told."""

    name: str
    child: subprocess.Popen[bytes]
    waiting: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)

    @classmethod
    def begin(cls, name: str, environment: Mapping[str, str]) -> Feed:
        child = subprocess.Popen(
            [sys.executable, "-m", "bigpipe.orchestrator.sinks.child", name], env=dict(environment),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        feed = cls(name, child)
        threading.Thread(target=feed._write, name=f"sink {name}", daemon=True).start()
        return feed

    def _write(self) -> None:
        """In a thread: a pipe that is full holds up nobody else."""
        assert self.child.stdin is not None  # noqa: S101  it is a pipe
        try:
            with self.child.stdin as pipe:
                for line in iter(self.waiting.get, None):
                    pipe.write(line)
                    pipe.flush()
        except OSError:  # it has ended
            return

    def end(self, seconds: float) -> str:
        """Wait for its end. Return what went wrong; "" where nothing did."""
        self.waiting.put(None)
        assert self.child.stdout is not None  # noqa: S101  it is a pipe
        with self.child.stdout as answer:
            try:
                status, otherwise = self.child.wait(seconds), "its process ended with {}"
            except subprocess.TimeoutExpired:
                self.child.kill()
                status, otherwise = (
                    self.child.wait(),
                    f"it did not answer within {PATIENCE:.0f} s of the end of the run",
                )
            said = answer.read(4 * LONGEST).decode("utf-8", "replace").strip()
        return "" if status == 0 else said or otherwise.format(status)


@dataclass(slots=True)
class Feeds:
    """All sinks of a run. say: takes a sink's name and a line about it."""

    say: Callable[[str, str], None]
    feeds: list[Feed] = field(default_factory=list)

    def begin(self, names: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start those that can be; of others say why not."""
        for name in names:
            sink = SINKS[name]
            # An empty one is what a runner hands on of a variable that nobody set; clients take it for a value.
            own = {key: value for key, value in environment.items() if value and key.startswith(sink.environment)}
            if not any(environment.get(variable) for variable in sink.address):
                self.say(name, f"not told of this run: {' or '.join(sink.address[:2])} is not set")
            elif not sink.installed:
                self.say(name, f"not told of this run: it needs {sink.package}: {install(name)}")
            else:
                self._start(name, _seen({**inherited(environment, passwords=True), **own}))

    def _start(self, name: str, environment: Mapping[str, str]) -> None:
        try:
            self.feeds.append(Feed.begin(name, environment))
        except OSError as error:
            self.say(name, f"not told of this run: {error.strerror}")

    def tell(self, what: Mapping[str, Json]) -> None:
        """Hand it on to all of them, with the time, without a secret."""
        line = json.dumps({"time": time.time(), **redact_fields(what)}, default=str).encode() + b"\n"
        for feed in self.feeds:
            feed.waiting.put(line)

    def end(self) -> None:
        until = time.monotonic() + PATIENCE
        for feed in self.feeds:
            if wrong := feed.end(max(0.0, until - time.monotonic())):
                self.say(feed.name, f"told of this run in part at most: {redact(wrong)[:LONGEST]}")


def _seen(environment: dict[str, str]) -> dict[str, str]:
    """With what keeps an `mlflow.py` in the working directory from being imported for mlflow."""
    return {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": python_path(environment.get("PYTHONPATH", ""))}
