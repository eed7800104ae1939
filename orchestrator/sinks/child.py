"""A sink's process: reads what happens as lines of JSON, and tells one system.

    python -m bigpipe.orchestrator.sinks.child NAME


The first line is what is known when the run begins (`telling.known`), each further one an event. Lines end with the
run's; where they end without `run_finished`, the run was killed. What goes wrong is one line on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from bigpipe.modules import said_by

from .table import SINKS

AFTER = 15
"""Seconds after the last line: whoever fed this process may be gone, and waits no longer."""


def events() -> Iterator[dict[str, Any]]:
    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):
            break  # cut off, as its writer was
        yield json.loads(line)
    signal.alarm(AFTER)


def main(name: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is nobody's answer
    module, _, function = SINKS[name].tell.partition(":")
    try:
        told = events()
        if (about := next(told, None)) is not None:
            getattr(import_module(module), function)(about, told)
    except Exception as error:  # of any library, about any server
        os.write(answer, said_by(error).encode())
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(status)  # threads of a client, which send what nobody waits for, hold it up no longer
