"""What a kind has left unfinished when its `run` returns, and Python would finish at the end of a program: threads that
still work, and files that are open. A worker ends at once, and what is published must not change."""

from __future__ import annotations

import gc
import io
import os
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigpipe.errors import StageFailed

PATIENCE = 60.0
"""Seconds for threads that still work."""
_BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
_OPEN = Path("/proc/self/fd")


def await_threads(kind: str, *folders: Path, seconds: float = PATIENCE) -> None:
    """Wait until all threads of this process have ended, but this one and daemons. For one that has not by then, raise
    StageFailed where a file below the folders is open, else say so and go on: it changes nothing there."""
    others = [each for each in threading.enumerate() if not each.daemon and each is not threading.current_thread()]
    if others and (pools := sys.modules.get("concurrent.futures")):
        for pool in [each for each in gc.get_objects() if issubclass(type(each), pools.Executor)]:
            pool.shutdown(wait=False)  # its threads end once they have done what they were given
    deadline = time.monotonic() + seconds
    for each in others:
        each.join(max(0.0, deadline - time.monotonic()))
    if late := [each.name for each in others if each.is_alive()]:
        cause = f"kind {kind}: the thread {late[0]} still works {seconds:g} s after `run` returned"
        if _open_below(folders):
            raise StageFailed(cause, "wait for it in `run`, or make it a daemon")
        print(f"{cause}; it is left", flush=True)  # noqa: T201  which is the log of a worker


def write_out(*folders: Path) -> None:
    """Write out what files below these hold back, and let go what nobody can reach any more, as writers of libraries
    that end with their last row."""
    if not _open_below(folders):
        return
    for kind in _BUFFERED:  # a text lies on what is buffered
        for file in [each for each in gc.get_objects() if type(each) is kind and not each.closed]:
            with suppress(OSError, ValueError):
                if _lies_below(_target(file), folders) and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.flush()  # not a pipe, whose reader may never come
    gc.collect()


def _target(file: Any) -> str:
    """Where a file lies, whatever it was called when it was opened."""
    return os.readlink(_OPEN / str(file.fileno())) if _OPEN.is_dir() else os.path.realpath(file.name)


def _open_below(folders: tuple[Path, ...]) -> bool:
    """Does this process have a file open there? True where the system does not tell."""
    if not _OPEN.is_dir():
        return True
    targets = set()
    for name in os.listdir(_OPEN):
        with suppress(OSError):
            targets.add(os.readlink(_OPEN / name))
    return any(_lies_below(target, folders) for target in targets)


def _lies_below(target: str, folders: tuple[Path, ...]) -> bool:
    return any(target.startswith(f"{os.path.realpath(folder)}{os.sep}") for folder in folders)
