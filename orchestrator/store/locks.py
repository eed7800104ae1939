"""Locks that the kernel holds, and the presence of a process in a store.

`flock` on files that are there for nothing else: advisory, released when their holder dies, whatever it dies of. No
age, pid or clock decides who holds a lock. A present process has a folder for its temporary files, and a lock that says
it lives; folders whose lock is free belong to processes that are gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from bigpipe.errors import Interrupted, UsageError
from bigpipe.files import NO_LOCKS, close_lock, open_lock

from .artifacts import remove_tree
from .layout import Layout, explained, make_directory, names_in

POLL = 0.05
"""Seconds between two tries. `flock` cannot wait and listen for a cancellation at once."""
SIGN = 120
"""Characters of a lock file's content."""
WORK_LOCK = "lock"
"""In a work folder; workers hold it shared, so that nobody works there while one of them lives."""


class StoreLock:
    """One hold on a lock file, shared or exclusive. The file stays where it is; its content names the holder."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor: int | None = None
        self._holder = 0

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Raise UsageError where the file system has no locks."""
        with explained(self.path):
            make_directory(self.path.parent, durable=False)
            while True:
                descriptor = open_lock(self.path, mode=0o600)
                if not self._flock(descriptor):
                    os.close(descriptor)
                    return False
                if _is_at(descriptor, self.path):
                    break
                os.close(descriptor)  # removed between opening and locking it
            self._descriptor, self._holder = descriptor, os.getpid()
        if self._operation == fcntl.LOCK_EX:
            # Of fixed width: cutting the file first would make ext4 write it out when it is closed. It is only read to
            # tell whoever waits, so a full disk does not matter.
            with suppress(OSError):
                os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".ljust(SIGN).encode(), 0)
        return True

    def _flock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, self._operation | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return False
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                raise UsageError(
                    f"the file system of the store has no locks: {self.path}: {error.strerror}",
                    "keep the store on a local disk: --store DIR or BIGPIPE_HOME",
                ) from error
            raise
        return True

    def acquire(
        self, cancelled: threading.Event | None = None, waiting: Callable[[str], None] | None = None, holder: str = ""
    ) -> None:
        """Take the lock, waiting as long as it is held, or until `cancelled`. `waiting` hears once who holds it."""
        told = False
        while not self.try_acquire():
            if not told and waiting is not None:
                waiting(holder or self.holder())
            told = True
            if (cancelled or threading.Event()).wait(POLL):
                raise Interrupted("stopped while waiting for another run", "run the same command again")

    def holder(self) -> str:
        """Return who says to hold the lock: `process 4242 on host`."""
        told = ""
        with suppress(OSError):
            told = self.path.read_text(errors="replace")[:SIGN].strip()
        return told or "another process"

    def release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):  # that the sign could not be written: the lock is free all the same
                close_lock(descriptor, self._holder)

    def __enter__(self) -> StoreLock:
        if not self.held:
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


MEMBER = re.compile(r"[0-9]+-[0-9a-f]{8}")
"""What a process is called in `tmp/`."""


@contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Yield whether the lock was free; it is then held within."""
    lock = StoreLock(path)
    free = lock.try_acquire()
    try:
        yield free
    finally:
        lock.release()


def keeps_out(path: Path) -> bool:
    """Return whether a lock held on `path` is refused to others: some network file systems accept all and keep none."""
    with if_free(path) as free:
        return not free


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
        """Return the folder of this process, which need not be there. The first call removes what dead ones left."""
        with self._guard:
            if self._folder is None or self._process != os.getpid():  # a forked child is somebody else
                self._folder, self._process = self._enter(), os.getpid()
            return self._folder

    def _enter(self) -> Path:
        tmp = self._layout.tmp
        with explained(tmp):
            self._layout.refuse_foreign()
            make_directory(tmp, durable=False)
            make_directory(self._layout.locks, durable=False)
            with StoreLock(self._layout.locks / "gc", shared=True):
                name = f"{os.getpid()}-{os.urandom(4).hex()}"
                if self._lock is not None:  # of the process that forked this one, which must not keep it
                    self._lock.release()
                self._lock = StoreLock(tmp / f"{name}.lock")
                self._lock.acquire()
                self.locks_work = keeps_out(self._lock.path)
                if self.locks_work:
                    _others(self._layout, name)
        return tmp / name

    def temporary(self) -> Path:
        """Return a free path in the folder, which is there from now on."""
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
        """Return whether no other process is known to live here: never, where locks do not work."""
        own = self.enter().name
        return self.locks_work and not _others(self._layout, own)


def anybody(layout: Layout) -> bool:
    """Return whether any living process is present."""
    return layout.tmp.is_dir() and _others(layout, "")


def _others(layout: Layout, own: str) -> bool:
    """Is any process present besides the one named `own`? Removes what dead ones left."""
    alive = False
    for name in {item.partition(".")[0] for item in names_in(layout.tmp)} - {own}:
        if not MEMBER.fullmatch(name):
            continue
        path = layout.tmp / f"{name}.lock"
        with if_free(path) as dead:
            if dead:
                remove_tree(layout.tmp / name)
                remove_tree(path)
            alive |= not dead
    return alive
