"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import random
import signal

import pytest
from support.workshop import Workshop, environment

from bigpipe import redaction

SEED = os.environ.setdefault("BIGPIPE_SEED", str(random.SystemRandom().randrange(2**32)))
"""Of everything random in one run of the tests, in all its processes."""

for number in (signal.SIGINT, signal.SIGHUP):  # in the background, or under nohup, children would be deaf to them too
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


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
