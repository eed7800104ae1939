"""Workers as operating system processes: started in sessions of their own, watched, and ended without leftovers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .lifeline import GRACE_SECONDS, PARENT_VARIABLE, PROCESSES, host, start_mark

MEMORY = 1 << 30
"""Bytes that a waiting worker is reckoned with (a bound): torch, transformers and accelerate take 420 MB."""
GO = b"go\n"
GONE_SECONDS = 10.0
"""How long a killed process may take to vanish (the kernel frees its memory first)."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that signed in, or the one we started ourselves."""

    pid: int
    session: int
    mark: str | None
    rank: int | None = None

    @classmethod
    def of(cls, child: subprocess.Popen[bytes]) -> Worker:
        return cls(child.pid, child.pid, start_mark(child.pid))

    @property
    def alive(self) -> bool:
        return self.mark is not None and start_mark(self.pid) == self.mark


def worker_command(job_file: Path, *mode: str) -> list[str]:
    """What starts `worker` on a job file, which need not be there yet."""
    return [sys.executable, "-m", "bigpipe.orchestrator.launch.worker", str(job_file), *mode]


def start(
    job_file: Path, *mode: str, environment: Mapping[str, str], directory: Path, told: bool = False
) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own, its two outputs in one pipe, no input; a pipe where it is to be `told`.
    The calling thread must live as long as the child, which dies with it (see lifeline)."""
    return subprocess.Popen(
        worker_command(job_file, *mode),
        env={**environment, PARENT_VARIABLE: str(os.getpid())},
        cwd=directory,
        stdin=subprocess.PIPE if told else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def signed_in(folder: Path) -> Iterator[Worker]:
    """All workers on this machine that left their mark in `folder`, alive or not."""
    for path in (folder / host()).glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            pid, session, mark, rank = path.read_text(encoding="ascii").split()
            yield Worker(int(pid), int(session), mark, None if rank == "-1" else int(rank))


def end(
    workers: Sequence[Worker], *, grace: float = GRACE_SECONDS, reap: Callable[[], object] = lambda: None
) -> list[int]:
    """End these workers and all else in their sessions: SIGTERM, `grace` seconds, SIGKILL. Return those still there.
    reap: called while waiting, so that a child of ours does not stay as a zombie."""
    left: list[int] = []
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, GONE_SECONDS)):
        left = _members(workers)
        if left and seconds:
            for process in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
            left = _wait(workers, seconds, reap)
    return left


def _wait(workers: Sequence[Worker], seconds: float, reap: Callable[[], object]) -> list[int]:
    deadline = time.monotonic() + seconds
    while True:
        reap()
        left = _members(workers)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _members(workers: Sequence[Worker]) -> list[int]:
    """Every living process in a session of these workers. A session's number is its leader's process id, which may
    serve a stranger once all of the session has ended."""
    import psutil

    known = {worker.pid: worker.mark for worker in workers}
    ours = {worker.session for worker in workers if _still_ours(worker.session, known)}
    found = []
    for process in psutil.pids() if ours else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process) in ours and process != os.getpid() and start_mark(process) is not None:
                found.append(process)
    return found


def _still_ours(session: int, known: Mapping[int, str | None]) -> bool:
    if session == os.getsid(0):
        return False
    mark = start_mark(session)
    return mark is None or session not in known or known[session] == mark


def peak_resident(process: int) -> int:
    """Return the largest resident size of a process so far, in bytes; 0 where the kernel does not tell (not Linux)."""
    # VmHWM, not ru_maxrss: the latter starts from the size of the process that forked (getrusage(2)).
    return _told_by_kernel(f"{process}/status", "VmHWM:") * 1024


def resident(process: int) -> int:
    """Return the resident size of a process, in bytes; 0 where the kernel does not tell."""
    return _told_by_kernel(f"{process}/status", "VmRSS:") * 1024


def own_peak() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    if peak := peak_resident(os.getpid()):
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed so far because memory ran out; 0 where it does not tell."""
    return _told_by_kernel("vmstat", "oom_kill")


def _told_by_kernel(file: str, name: str) -> int:
    """The number after `name` in a file of proc(5); 0 where there is none."""
    with contextlib.suppress(OSError):
        text = (PROCESSES / file).read_text(encoding="ascii", errors="replace")
        found = re.search(rf"^{name}\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


class WarmWorker:
    """A worker that starts before its job is known, imports what its kind will need, and waits.

    It is told to go on through its standard input, whose end means that nobody needs it. Where it has died, or its turn
    needs another environment, it is ended, and a fresh worker starts in its place. The thread that starts it must live
    until it has ended.
    """

    def __init__(
        self, modules: Sequence[str], job_file: Path, *, environment: Mapping[str, str], directory: Path
    ) -> None:
        """Start it on a job file to come."""
        job_file.parent.mkdir(parents=True, exist_ok=True)
        self._job_file, self._environment = job_file, environment
        mode = ("run", "--warm", *modules)
        self._child = start(job_file, *mode, environment=environment, directory=directory, told=True)
        self._worker = Worker.of(self._child)
        self._gone = False
        """Taken, or ended."""

    def take(self, job_file: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """The worker, at work on this job; None (and ended) where it is not the right one for it any more."""
        fits = not self._gone and self._job_file == job_file and self._environment == environment
        if not fits or self._child.poll() is not None or not self._go():
            self.end()
            return None
        self._gone = True
        return self._child

    def _go(self) -> bool:
        assert self._child.stdin is not None  # noqa: S101 (always a pipe)
        try:
            with self._child.stdin as told:
                told.write(GO)
        except BrokenPipeError:
            return False
        return True

    def end(self) -> None:
        """End it and all its children, unless it was taken. May be called again."""
        if not self._gone:
            self._gone = True
            end([self._worker], grace=0, reap=self._child.poll)
            for pipe in filter(None, (self._child.stdin, self._child.stdout)):
                pipe.close()
