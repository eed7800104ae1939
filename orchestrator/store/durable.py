"""Writing so that it stays written, and telling damaged files from whole ones.

The order is always: write beside the target, fsync the file, rename, fsync the directory. A record is one line of JSON
in an envelope that holds the sha256 of that line, so any changed byte is seen.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import BigpipeError, DoesNotFit, StageFailed, UsageError
from bigpipe.sizes import format_size

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract.types import Json

PRIVATE = 0o700
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_serial = count()


class Damaged(Exception):
    """A sealed file whose bytes are not those that were written."""


def explain(error: OSError, path: Path, needed: int = 0) -> BigpipeError:
    """What the operating system said about a file of the store, as an error with a cure. `needed` is in bytes."""
    where = Path(os.fsdecode(error.filename)) if error.filename else path
    if error.errno in NO_SPACE:
        need = f", needed {format_size(needed)}" if needed else ""
        return DoesNotFit(
            f"the disk of the store is full: {where}: {format_size(_free(path))} free{need}",
            "free space (`bigpipe gc` drops what no manifest names), or choose another store with --store DIR",
        )
    if error.errno in NO_PERMISSION:
        return UsageError(
            f"the store may not be used: {where}: {error.strerror}",
            "make it readable and writable for you, or choose another store with --store DIR or BIGPIPE_HOME",
        )
    return StageFailed(
        f"the store cannot be read or written: {where}: {error.strerror or error}",
        "check the disk (`dmesg`), or choose another store with --store DIR or BIGPIPE_HOME",
    )


def _free(path: Path) -> int:
    for place in (path, *path.parents):
        with suppress(OSError):
            facts = os.statvfs(place)
            return facts.f_bavail * facts.f_frsize
    return 0


@contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns every OSError within into an error with a cure."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, needed) from error


def sync(descriptor: int) -> None:
    """fsync that reaches the disk: on macOS plain fsync stops at the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    except OSError as error:
        # Some file systems cannot sync directories and say so; there is nothing better to do on them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, durable: bool = True) -> None:
    """Creates a directory of the store and its parents, readable by its owner alone, and syncs what it created in."""
    try:
        path.mkdir(mode=PRIVATE)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(path.parent, durable=durable)
        with suppress(FileExistsError):
            path.mkdir(mode=PRIVATE)
    if durable:
        sync_directory(path.parent)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces `path` by `data` at once: a reader, or a crash, meets the old or the new bytes, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{next(_serial)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:  # left by a process of this number that was killed
        partial.unlink()
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(descriptor, data)
            if durable:
                sync(descriptor)
        finally:
            os.close(descriptor)
        partial.rename(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if durable:
        sync_directory(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def is_partial(name: str) -> bool:
    """Is this the name of a file that `write_atomically` had not finished?"""
    return name.startswith(".")


_HEAD, _MIDDLE, _TAIL = b'{"sha256": "', b'", "record":\n', b"\n}\n"


def seal(value: Json) -> bytes:
    """A JSON document that holds `value` on a line of its own and the sha256 of that line."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def unseal(data: bytes) -> Json:
    """The inverse of `seal`. Raises Damaged where any byte has changed."""
    start = len(_HEAD) + 64
    body = data[start + len(_MIDDLE) : -len(_TAIL)]
    expected = _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE
    if data[: start + len(_MIDDLE)] != expected or data[-len(_TAIL) :] != _TAIL:
        raise Damaged
    return json.loads(body)


def read_sealed(path: Path) -> Json:
    """The value sealed in a file. Raises Damaged, or OSError (a missing file and an I/O error among them)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(descriptor, 2**16):
            pieces.append(piece)
    finally:
        os.close(descriptor)
    return unseal(b"".join(pieces))
