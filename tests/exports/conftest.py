"""What the heavy tests of exports and sinks stand on: other systems, in environments of their own, that `make exports`
installs."""

from __future__ import annotations

import shlex
import socket
import stat
import sys
from pathlib import Path

import pytest
from support.workshop import environment


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A program that is `bigpipe`, whatever else is on the path of who calls it."""
    path = tmp_path / "bigpipe"
    found = environment(tmp_path)["PYTHONPATH"]
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(found)} exec {shlex.quote(sys.executable)} -m bigpipe "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
