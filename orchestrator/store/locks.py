"""Locks that the kernel holds: advisory, released when their holder dies, whatever it dies of.

`flock` on files that are there for nothing else. No age, pid or clock decides who holds a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bigpipe.errors import Interrupted, UsageError
from bigpipe.files import NO_LOCKS, open_lock

from .sealing import explained, make_directory

POLL = 0.05
"""Seconds between two tries. `flock` cannot wait and listen for a cancellation at once."""
SIGN = 120
"""Characters of a lock file's content."""


class StoreLock:
    """One hold on a lock file, shared or exclusive. The file stays where it is; its content names the holder."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor: int | None = None

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
            self._descriptor = descriptor
        self._sign()
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

    def _sign(self) -> None:
        if self._descriptor is not None and self._operation == fcntl.LOCK_EX:
            # Of fixed width: cutting the file first would make ext4 write it out when it is closed. It is only read to
            # tell whoever waits, so a full disk does not matter.
            with suppress(OSError):
                os.pwrite(self._descriptor, f"process {os.getpid()} on {os.uname().nodename}".ljust(SIGN).encode(), 0)

    def acquire(
        self, cancelled: threading.Event | None = None, waiting: Callable[[str], None] | None = None, holder: str = ""
    ) -> None:
        """Take the lock, waiting as long as it is held. `waiting` hears once who holds it.

        Raise Interrupted when `cancelled` is set meanwhile.
        """
        told = False
        while not self.try_acquire():
            if not told and waiting is not None:
                waiting(holder or self.holder())
            told = True
            if cancelled is None:
                time.sleep(POLL)
            elif cancelled.wait(POLL):
                raise Interrupted("stopped while waiting for another run", "run the same command again")

    def holder(self) -> str:
        """Return who says to hold the lock: `process 4242 on host`."""
        with suppress(OSError):
            return self.path.read_text(errors="replace")[:SIGN].strip() or "another process"
        return "another process"

    def release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):  # that the sign could not be written: the lock is free all the same
                os.close(descriptor)

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


def keeps_out(path: Path) -> bool:
    """Return whether a lock held on `path` is refused to others. Some network file systems accept every lock and keep
    none."""
    second = StoreLock(path)
    taken = second.try_acquire()
    second.release()
    return not taken
