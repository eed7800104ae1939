"""Faults at exact system calls: strace is attached to a fork of this process, which has imported all it needs.

    turns = count(work, CALLS)                              how often `work` makes each of these calls
    for call, turn in each(turns):
        ended = inject(work, f"{call}:signal=SIGKILL:when={turn}")

A fork starts in milliseconds where a new Python takes half a second, and what is counted begins with `work` itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

DURABLE = ("fsync", "rename", "renameat2", "symlink", "link", "unlink", "rmdir", "mkdir", "write", "pwrite64", "chmod",
           "utimensat", "ftruncate", "fallocate", "copy_file_range", "openat", "close", "flock")  # fmt: skip
"""The calls by which bytes and names reach the disk."""
SECONDS = 60


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    """Negative: the signal that ended it."""
    output: str
    calls: tuple[str, ...] = ()
    """As strace writes them."""


def needs_strace() -> str:
    """Return where strace is; skip the test where it is not, or may not trace."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("needs strace")
    if subprocess.run([found, "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs strace that may trace (ptrace is forbidden here)")
    return found


def count(work: Callable[[], object], calls: tuple[str, ...] = DURABLE) -> Counter[str]:
    """Return how often `work` makes each of these calls, its last moments as a process not included."""
    made = traced(work, "-e", f"trace={','.join(calls)}").calls
    return Counter(line.split(maxsplit=1)[1].partition("(")[0] for line in made if "(" in line)


def each(turns: Mapping[str, int], every: int = 1) -> Iterator[tuple[str, int]]:
    """Return every call and turn of it, or every n-th."""
    all_of_them = [(call, turn) for call, most in turns.items() for turn in range(1, most + 1)]
    yield from all_of_them[::every]


def inject(work: Callable[[], object], *faults: str) -> Ended:
    """Run `work` in a fork in which these faults happen: `rename:error=ENOSPC:when=3`, `write:signal=SIGKILL`."""
    return traced(work, *(part for fault in faults for part in ("-e", f"inject={fault}")))


def traced(work: Callable[[], object], *options: str) -> Ended:
    """Run `work` in a fork under strace. What it raises is printed, and it ends with status 1."""
    strace = needs_strace()
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder, "calls"), Path(folder, "output")
        ready, there = os.pipe()
        told, go = os.pipe()
        warm()
        child = os.fork()
        if child == 0:
            os.close(go)
            _work(work, there, told, output)
        os.close(told)
        os.close(there)
        os.read(ready, 1)
        os.close(ready)
        tracer = subprocess.Popen([strace, "-f", "-qq", "-o", log, *options, "-p", str(child)], stderr=subprocess.PIPE)
        try:
            _await_tracer(child, tracer)
            os.close(go)
            code = _await_end(child)
        finally:
            tracer.wait(SECONDS)
            assert tracer.stderr is not None
            tracer.stderr.close()
        return Ended(code, output.read_text(errors="replace"), tuple(log.read_text(errors="replace").splitlines()))


def _work(work: Callable[[], object], there: int, told: int, output: Path) -> None:
    """In the fork; never returns."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.write(there, b".")
        os.read(told, 1)  # until the tracer is there
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _await_tracer(child: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    status = Path(f"/proc/{child}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            said = tracer.stderr.read().decode() if tracer.stderr else ""
            pytest.skip(f"needs strace that may attach (-p): {said.strip()[-200:]}")
        time.sleep(0.001)
    time.sleep(0.002)  # from being traced to its options being set


def _await_end(child: int) -> int:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError(f"it was still at it after {SECONDS} s")


def warm() -> None:
    """Flush what a fork would print again."""
    sys.stdout.flush()
    sys.stderr.flush()
