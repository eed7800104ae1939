"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from support.workshop import Workshop, environment

from bigpipe import redaction
from bigpipe.machine import cores, detect

SEED = os.environ.setdefault("BIGPIPE_SEED", str(random.SystemRandom().randrange(2**32)))
"""Of everything random in one run of the tests, in all its processes."""

MEMORY = 2 << 30
"""Bytes for one worker with torch and transformers, and what it starts."""
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # else the threads of one worker's torch fight with another's over the same cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // WORKERS)))

# Where the environment forbids to keep bytecode, each of the thousand processes that tests start would compile anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

for number in (signal.SIGINT, signal.SIGHUP):  # in the background, or under nohup, children would be deaf to them too
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker for each core that this process may use, as long as there is memory for them."""
    here = detect(Path.cwd())
    return max(1, min(here.cpus, here.memory_available // MEMORY))


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"BIGPIPE_SEED={SEED}")


@pytest.fixture(autouse=True)
def _nothing_stays_concealed():
    """What one test calls a secret may be any word in the next; a process that is not a test's has one command."""
    known = redaction._known
    yield
    redaction._known = known


@pytest.fixture
def seed(request) -> int:
    """Another number for each test, the same again under the same BIGPIPE_SEED."""
    return random.Random(f"{SEED} {request.node.nodeid}").randrange(2**32)  # noqa: S311


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "BIGPIPE_HOME"):
        monkeypatch.setenv(name, environment(tmp_path)[name])
    return Workshop(tmp_path)
