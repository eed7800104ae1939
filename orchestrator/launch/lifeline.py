"""Ties a child process to its parent's life and to its work folder. Imports nothing heavy: this runs first.

A process that outlives its command holds memory and may write where its successor works. Three ties:

- on Linux the kernel ends the process when its parent ends (`PR_SET_PDEATHSIG`, prctl(2)). The signal is sent when the
  parent's *thread* that forked ends, so whoever starts a child must wait for it in the same thread. It is SIGKILL; for
  a rank SIGTERM, so that one which listens may finish what it has under way, as where its launcher ends it;
- everywhere a thread looks twice a second whether the parent is still the same one, and leaves no process either;
- the process holds a shared lock on `lock` in its work folder; a successor takes that lock exclusively first.

The parent of a rank is the launcher, whose parent is the command, so a death anywhere above travels down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from bigpipe.programs import death_with_parent

PARENT_VARIABLE = "BIGPIPE_PARENT"
"""Environment variable with the process id of the parent that a worker must have."""
WATCH_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
PROCESSES = Path("/proc")
"""Linux's own account of its processes; it is not there on other systems."""
ORPHANED = 113
"""Exit status of a worker whose parent was gone before it could start."""
UNTOLD = 114
"""Exit status of a worker that could not write into its attempt's folder: a full disk, for example."""


def tie_to_parent(number: int = signal.SIGKILL) -> None:
    """Get this signal when the parent dies, and SIGKILL where that is no end. Exits at once where it is gone now."""
    expected = int(os.environ.pop(PARENT_VARIABLE, "") or os.getppid())
    death_with_parent(number)()
    if os.getppid() != expected:
        os._exit(ORPHANED)
    threading.Thread(target=watch_parent, args=(expected,), name="lifeline", daemon=True).start()


def stand_in_for_parent() -> None:
    """Be the one the kernel kills when memory runs out, rather than the command, which is to tell of it; and leave no
    core file, which would hold secrets and weights."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    with contextlib.suppress(OSError):  # Linux alone has it
        (PROCESSES / "self" / "oom_score_adj").write_text("500", encoding="ascii")


def watch_parent(expected: int, seconds: float = WATCH_SECONDS) -> None:
    """Return never, but end this process and its group once `expected` is no longer its parent: what listens to SIGTERM
    is sent that first."""
    while os.getppid() == expected:
        time.sleep(seconds)
    if callable(signal.getsignal(signal.SIGTERM)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def hold_work_folder(folder: Path, patience: float = 10.0) -> None:
    """Take a shared lock on `folder/lock` until this process ends, where the file system has locks. Exit as an orphan
    where a successor has taken over: it holds the lock exclusively for `patience` seconds."""
    import fcntl

    from bigpipe.files import NO_LOCKS, open_lock

    descriptor = open_lock(folder / "lock")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                os._exit(ORPHANED)
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return


def start_mark(process: int) -> str | None:
    """What tells this process from a later one with the same number; None if it is gone (a zombie counts as gone)."""
    if (PROCESSES / "self" / "stat").exists():
        try:
            text = (PROCESSES / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *rest = text.rpartition(")")[2].split()
        threads, start_time = int(rest[16]), rest[18]  # fields 20 and 22 of proc_pid_stat(5)
        # The first thread is a zombie as long as others of a dying process still run.
        return None if state in "ZX" and threads <= 1 else start_time
    import psutil

    try:
        running = psutil.Process(process)
        return None if running.status() == psutil.STATUS_ZOMBIE else f"{running.create_time():.2f}"
    except psutil.Error:
        return None


def host() -> str:
    """Process numbers mean something on their own machine only; ranks on others share the attempt's folder."""
    return os.uname().nodename or "localhost"


def sign_in(folder: Path, rank: int | None = None) -> None:
    """Leave `folder/HOST/PID`: process, session, start mark and rank, so that the command finds this process to end it.
    torch starts each rank in a session of its own, out of reach of a signal to the launcher's group."""
    from bigpipe.files import write_file

    folder = folder / host()
    folder.mkdir(parents=True, exist_ok=True)
    process = os.getpid()
    text = f"{process} {os.getsid(0)} {start_mark(process)} {-1 if rank is None else rank}\n"
    write_file(folder / str(process), text, durable=False)
