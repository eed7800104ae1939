"""A sink's process: reads what happens as lines of JSON, and tells one system.

    python -m bigpipe.orchestrator.sinks.child NAME


The first line is what is known when the run begins (`telling.known`), each further one an event. Lines end with the
run's; where they end without `run_finished`, the run was killed. What goes wrong first is said on standard output as it
happens; the rest is told all the same, so that a system which was away for a while learns how the run ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from bigpipe.modules import said_by

from .table import SINKS

AFTER = 15
"""Seconds after the last line: whoever fed this process may be gone, and waits no longer."""


def events() -> Iterator[dict[str, Any]]:
    """Yield what comes. It is read in a thread, so that its end is seen while somebody waits for a system."""
    lines: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    yield from map(json.loads, iter(lines.get, None))


def _read(lines: SimpleQueue[bytes | None]) -> None:
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # else it is cut off, as its writer was
            lines.put(line)
    lines.put(None)
    signal.alarm(AFTER)


def main(name: str) -> int:
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is nobody's answer
    module, _, function = SINKS[name].tell.partition(":")
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        if not failures:
            os.write(answer, said_by(error).encode())
        failures.append(error)

    try:
        told = events()
        if (about := next(told, None)) is not None:
            getattr(import_module(module), function)(about, told, failed)
    except Exception as error:  # of any library, about any server
        failed(error)
    return 1 if failures else 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(status)  # threads of a client, which send what nobody waits for, hold it up no longer
