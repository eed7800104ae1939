"""The presence of one process in a store: a folder for its temporary files, and a lock that says it lives.

The lock is taken once and freed by the kernel. Folders whose lock is free belong to processes that are gone.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path

from .artifacts import remove_tree
from .layout import Layout
from .locks import StoreLock, keeps_out
from .sealing import explained, make_directory


class Presence:
    """Entered on first use, left by `leave` or with the process."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._guard = threading.Lock()
        self._lock: StoreLock | None = None
        self._folder: Path | None = None
        self._serial = count()
        self._process = 0
        self.locks_work = True
        """False where the file system accepts every lock and keeps none: work is then not shared."""

    def enter(self) -> Path:
        """Return the folder of this process, which need not be there. The first call removes what dead
        processes left, and waits for a running `gc`."""
        with self._guard:
            if self._folder is None or self._process != os.getpid():  # a forked child is somebody else
                self._folder, self._process = self._enter(), os.getpid()
            return self._folder

    def _enter(self) -> Path:
        tmp = self._layout.tmp
        with explained(tmp):
            make_directory(tmp, durable=False)
            make_directory(self._layout.locks, durable=False)
            with StoreLock(self._layout.locks / "gc", shared=True):
                name = f"{os.getpid()}-{os.urandom(4).hex()}"
                self._lock = StoreLock(tmp / f"{name}.lock")
                self._lock.acquire()
                self.locks_work = keeps_out(self._lock.path)
                if self.locks_work:
                    _others(self._layout, name)
        return tmp / name

    def temporary(self) -> Path:
        """Return a path in the folder, which is there from now on, that nothing stands at."""
        folder = self.enter()
        make_directory(folder, durable=False)
        return folder / str(next(self._serial))

    def leave(self) -> None:
        with self._guard:
            if self._folder is not None and self._lock is not None and self._process == os.getpid():
                with suppress(OSError):
                    remove_tree(self._folder)
                    self._lock.path.unlink(missing_ok=True)
                self._lock.release()
            self._folder = self._lock = None

    def alone(self) -> bool:
        """Return whether no other living process is present. Where locks do not work nobody can know: False."""
        own = self.enter().name
        return self.locks_work and not _others(self._layout, own)


def anybody(layout: Layout) -> bool:
    """Return whether any living process is present."""
    return layout.tmp.is_dir() and _others(layout, "")


def _others(layout: Layout, own: str) -> bool:
    """Is any process present besides the one named `own`? Removes what dead ones left."""
    alive = False
    for name in {item.partition(".")[0] for item in os.listdir(layout.tmp)} - {own}:
        lock = StoreLock(layout.tmp / f"{name}.lock")
        if lock.try_acquire():
            remove_tree(layout.tmp / name)
            remove_tree(lock.path)
            lock.release()
        else:
            alive = True
    return alive
