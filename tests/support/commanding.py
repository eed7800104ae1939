"""The `bigpipe` command as a process that a test may kill, starve or hang up on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from support.workshop import Workshop, environment

BIGPIPE = [sys.executable, "-m", "bigpipe"]


def start(workshop: Workshop, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    """Start the command in the workshop's folder, in a session of its own."""
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    around = {**environment(workshop.folder), **given.pop("environ", {})}
    command = [*given.pop("command", BIGPIPE), *arguments]
    return subprocess.Popen(command, cwd=workshop.folder, env=around, start_new_session=True, **given)


def left_of(store: Path, seconds: float = 10.0) -> list[int]:
    """Return the processes that were told of this store and are there still, after they had time to end."""
    deadline = time.monotonic() + seconds
    while (found := _told_of(f"{store}".encode())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _told_of(name: bytes) -> list[int]:
    found = []
    for process in psutil.pids():
        folder = Path(f"/proc/{process}")
        try:
            told = name in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        if told and alive and process != os.getpid():
            found.append(process)
    return found


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> int:
    """Send a signal and return how the process ended."""
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode
