"""The one place that writes, renames and syncs files.

    write_file       a small file, replaced as a whole
    write_sealed     a record with its own sha256, read by `read_sealed`
    FileWriter       a large one, at any position, that has its name only once it is complete
    copy_file        a file as it is, sharing its blocks where the file system can
    LogFile          a file that grows at its end
    link, give_name, give_free_name    a symlink, a second name, a name that nothing else has
    exchange         a directory in the place of another

The order is always: write beside the target, fsync the file, rename, fsync the directory. Everything raises OSError as
the system gives it, with the file's name, but for `FileWriter`; `explained` makes an error with a cure of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import POLLOUT, poll
from tempfile import mkstemp
from typing import Any, Self

from .errors import BigpipeError, DoesNotFit, StageFailed, UsageError
from .names import begins_address
from .sizes import format_transfer

PARTIAL = ".part"
"""Suffix of a file that is not complete."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
MISNAMED = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
NO_LOCKS = (errno.ENOLCK, *NOT_SUPPORTED)
LIMITS = {
    errno.EFBIG: "allow larger files (`ulimit -f`, or another file system)",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.ENFILE: "close other programs: the whole system has too many files open",
    errno.EAGAIN: "allow more processes and threads (`ulimit -u`)",
    errno.ENOBUFS: "start its reader first, and let it keep up",
}
"""What to change where one of the system's limits was met, or a FIFO has no reader."""
PATIENCE = 5.0
"""Seconds for the reader of a FIFO to catch up."""
CHUNK = 1 << 22
WRITE = 256 * 1024
"""Bytes per call. Larger ones make Linux look for pages of megabytes, which a virtual machine has often given back to
its host: 8 MiB a call took four times as long as this (2.2 to 4.3 s per GiB against 0.5 to 1 s), 16 KiB a third longer.
"""
LATER = 1 << 16
"""Bytes of a log that wait at most."""
FICLONE = 0x40049409
"""linux/fs.h: let a file share its blocks with another until one of them is written to."""
Bytes = bytes | bytearray | memoryview


def explain(
    error: OSError, path: Path, needed: int = 0, *, owner: str = "", free: str = "", mend: str = "", other: str = ""
) -> BigpipeError:
    """Return what the system said about `path`, or the file it names, as an error with a cure. needed: bytes. owner:
    whose file it is, such as "the store"; free, mend, other: how to make room there, how to put right what is in its
    place, and how to use another one."""
    named = error.filename2 or error.filename  # of two, the one that was to be
    where = Path(os.fsdecode(named)) if named else path
    named_so = f"{mend}, or {other}" if mend and other else mend or other or "name another"
    other = other or "work on another disk"
    instead = f"{mend}, or {other}" if mend else f"or {other}"
    if error.errno in NO_SPACE:
        disk = f"the disk of {owner}" if owner else "the disk"
        if not _has_inodes(where):
            cause = f"{disk} has no inodes left for further files: {where}"
            return StageFailed(cause, f"{free or 'remove files there'}, or {other}")
        need = f", {format_transfer(needed)} needed" if needed else ""
        cause = f"{disk} is full: {where}: {format_transfer(free_space(where))} free{need}"
        return StageFailed(cause, f"{free or 'free space there'}, or {other}")
    if error.errno in NO_PERMISSION:
        return UsageError(
            f"{owner or 'a file'} may not be used: {where}: {error.strerror}",
            f"make it readable and writable for you, {instead}",
        )
    if error.errno in MISNAMED:
        return UsageError(
            f"{owner or 'a file'} cannot be where it is named: {where}: {error.strerror}",
            named_so,
        )
    return StageFailed(
        f"{owner or 'a file'} cannot be read or written: {where}: {error.strerror or error}",
        f"{LIMITS.get(error.errno or 0, 'check the disk (`dmesg`)')}, {instead}",
    )


def _has_inodes(path: Path) -> bool:
    """May the file system of `path` hold one more file? Many have no bound, and say that they have none at all."""
    facts = os.statvfs(existing(path))
    return facts.f_favail > 0 or facts.f_files == 0


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise every OSError within with a file's name: what fails on a descriptor has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


@contextmanager
def explained(path: Path, needed: int = 0, **whose: str) -> Iterator[None]:
    """Raise every OSError within as `explain` says it. whose: its `owner`, `free`, `mend` and `other`."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, needed, **whose) from error


def existing(path: Path) -> Path:
    """Return the path, made absolute, or the nearest directory above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether `path` is the directory `folder` or leads into it, by whatever names and links: two names mean one
    directory where the system says so. Neither need be there."""
    real = Path(os.path.realpath(folder))
    here = Path(os.path.realpath(path))
    return any(place == real or _is_same(place, real) for place in (here, *here.parents))


def without_detours(path: str | Path) -> Path:
    """Return the path, made absolute, without `..`, so that it is one text wherever it is named from; as it is where
    `..` leads elsewhere, behind a link to a directory."""
    given, plain = Path(path), Path(os.path.abspath(path))
    return plain if _is_same(given.parent, plain.parent) else given.absolute()


def _is_same(place: Path, other: Path) -> bool:
    try:
        return os.path.samestat(place.stat(), other.stat())
    except OSError:
        return False


def refuse_overlap(out: Path, read: Iterable[Path], *, around: bool = True) -> None:
    """Raise UsageError where the directory `out`, which is to be written, is one that is read, lies in it or holds it,
    or is where its files lead to, by whatever names and links. read: directories and files. around: may `out` not hold
    them either? A directory that is read as a whole, such as a model's, would have them among its files."""
    given = list(read)
    folders = [path for path in given if path.is_dir()]
    files = [path for path in given if not path.is_dir()]
    for folder in folders:
        with explained(folder):
            files += folder.iterdir()
    cure = "write to another directory, apart from what is read"
    for folder in folders:
        if lies_in(out, folder):
            raise UsageError(f"{out}: is where the source is, or lies in it: {folder}", cure, field="out")
        if around and lies_in(folder, out):
            raise UsageError(f"{out}: holds the source, {folder}", cure, field="out")
    if any(lies_in(place, out) and lies_in(out, place) for place in real_folders(files)):
        raise UsageError(f"{out}: is where the source is: its files lie there", cure, field="out")


def missing(name: str, base: Path) -> tuple[str, str]:
    """Return why there is no file of this name, relative to `base`, and what to do."""
    path = base / name
    if os.path.islink(path) and not os.path.exists(path):  # for any name, as long as it may be
        cause = f"{name[:200]} is a link to {os.readlink(path)[:200]}, which is not there"
        return cause, "mend the link, or leave it out"
    where = "in " if os.path.isdir(path) else ""
    return f"there is no file {where}{name[:200]}", only_a_shell_reads(name) or f"relative paths start at {base}"


def only_a_shell_reads(path: str, *, home: bool = True) -> str:
    """Return what to write in place of a path with `$NAME` in it, or, with `home`, one from `~` on; "" where it has
    neither. A shell would have replaced them."""
    found = re.search(r"^~(?=/|$)|(?:^|/)\$(?P<name>[A-Za-z_]\w*)", path)
    if found is None or not (home or found["name"]):
        return ""
    return f"write ${{env.{found['name'] or 'HOME'}}} for {found[0].lstrip('/')} in a recipe: no shell reads it"


def real_folders(files: Collection[Path]) -> set[Path]:
    """Return the directories that hold these files, and those that hold what they lead to where they are links."""
    found = {path.parent for path in files}
    return {Path(os.path.realpath(place)) for place in found} | {
        Path(os.path.realpath(path)).parent for path in files if path.is_symlink()
    }


@contextmanager
def room_held(folder: Path, size: int) -> Iterator[bool]:
    """Set so many bytes aside on the file system of a folder, in a file without a name, which is gone with this process
    at the latest. Give False where nothing can be set aside without writing it (Linux alone can, on most file systems).
    Raise OSError where there is no room."""
    descriptor = _nameless(folder)
    try:
        yield _allocated(descriptor, size)
    finally:
        os.close(descriptor)


def _nameless(folder: Path) -> int:
    with suppress(OSError, AttributeError):  # Linux alone has it, on most file systems
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, name = mkstemp(dir=folder)
    os.unlink(name)
    return descriptor


def _allocated(descriptor: int, size: int) -> bool:
    """As fallocate(2); `posix_fallocate` would write where a file system has none."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(descriptor, 0, 0, size) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def free_space(path: Path) -> int:
    """Return the bytes that are free on the disk where `path` is, or would be made."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            facts = os.statvfs(place)
            return facts.f_bavail * facts.f_frsize
    return 0


def require_space(path: Path, needed: int) -> None:
    """Raise DoesNotFit where the disk of `path` has less than `needed` bytes free."""
    free = free_space(path)
    if needed > free:
        raise DoesNotFit(
            f"{path}: {format_transfer(needed)} are to be written, and the disk has {format_transfer(free)} free",
            f"free {format_transfer(needed - free)} there, or work on another disk",
        )


def sync(descriptor: int) -> None:
    """Bring a file's bytes to the disk: on macOS plain fsync stops at the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network drives have only the plain one
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss."""
    try:
        _sync_at(path, os.O_DIRECTORY)
    except OSError as error:
        # Some file systems cannot sync directories and say so; there is nothing better to do on them.
        if error.errno not in NOT_SUPPORTED:
            raise


def read_file(path: Path, limit: int) -> bytes:
    """Return what a file that somebody named holds. Raise OSError, also for what is no regular file (a device or a pipe
    would never end) and for one of more than `limit` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        content = bytearray()
        while len(content) <= limit and (more := file.read(min(CHUNK, limit + 1 - len(content)))):
            content += more
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"it holds more than {format_transfer(limit)}", os.fspath(path))
    return bytes(content)


def sync_file(path: Path) -> None:
    _sync_at(path, 0)


def _sync_at(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, durable: bool = True, mode: int = 0o777) -> None:
    """Create a directory that somebody named, and its parents where they are missing; sync what they were created in.
    Raise UsageError for `s3:` and the like: as a path, an address would be one of this machine's directories."""
    if odd := [each.name for each in (path, *path.parents) if begins_address(each.name) and not each.is_dir()]:
        cause = f"{odd[-1]}// begins an address, and a directory of this machine is meant"
        raise UsageError(cause, "give a path; the stage `save` writes to a bucket, or to the Hub")
    make_folders(path, durable=durable, mode=mode)


def make_folders(path: Path, *, durable: bool = True, mode: int = 0o777) -> None:
    """Create a directory as `make_directory` does, whatever its name: files of a model have any."""
    if path.is_dir():
        return
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    except FileNotFoundError:
        make_folders(path.parent, durable=durable, mode=mode)
        with suppress(FileExistsError):
            path.mkdir(mode=mode)
    if durable:
        sync_directory(path.parent)


def let_in(folder: Path) -> None:
    """Give the owner every right to a directory and to those below it, so that it can be removed: a tool may have left
    some that nobody may write to. Where links lead stays as it is, and so does what belongs to somebody else."""
    if folder.is_symlink():
        return
    _let_in(folder)
    for place, inner, _ in os.walk(folder):
        for name in inner:
            _let_in(os.path.join(place, name))


def _let_in(folder: str | Path) -> None:
    with suppress(PermissionError, FileNotFoundError):
        mode = os.lstat(folder).st_mode
        if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(folder, stat.S_IMODE(mode) | stat.S_IRWXU)


def move(source: Path, target: Path, *, durable: bool = False) -> None:
    """Rename in one step; `target` is replaced."""
    source.rename(target)
    if durable:
        sync_directory(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two directories swap their names in one step. False where the system or the file system cannot."""
    import ctypes

    at_working_directory, both_ways = -100, 2  # AT_FDCWD of <fcntl.h>, RENAME_EXCHANGE of <linux/fs.h>
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28 and musl 1.2.6 have it
    if sys.platform != "linux" or rename is None:
        return False
    if rename(at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other), both_ways) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))


def partial_name(path: Path) -> Path:
    """Return a name beside `path` that no other writer uses: not in a container or on a host of the same disk, where
    the same process number means another process. Raise IsADirectoryError where the path says by itself that it is a
    directory: `.`, `..`, `/`."""
    if path.name in ("", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.with_name(f".{path.name[:40]}.{os.urandom(8).hex()}{PARTIAL}")


def is_partial(name: str) -> bool:
    """Is this a name that `partial_name` gave?"""
    return name.startswith(".") and name.endswith(PARTIAL)


def write_file(path: Path, content: bytes | str, *, durable: bool = True, mode: int = 0o666) -> tuple[str, int]:
    """Replace `path` by `content` at once; return its (hex sha256, size). A reader, or a crash, meets the old or the
    new bytes, never a part. Not durable: after a power loss, neither may be there."""
    data = content.encode() if isinstance(content, str) else content
    beside = partial_name(path)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with _named(path):
            try:
                write_all(descriptor, data)
                if durable:
                    sync(descriptor)
            finally:
                os.close(descriptor)
        move(beside, path, durable=durable)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    return hashlib.sha256(data).hexdigest(), len(data)


def flows_on(path: Path) -> bool:
    """Return whether what is written to `path` goes on from there, as into a pipe or a device. Raise UsageError where
    it is neither that nor a file, or a name for one."""
    cure = "name another file with -o"
    with explained(path, other=cure):
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise UsageError(f"{path} is {'a directory' if stat.S_ISDIR(mode) else 'no file'}", cure)
    return not stat.S_ISREG(mode)


def write_named(path: Path, text: str) -> int:
    """Write to what somebody named with `-o`, and return its bytes: into a pipe or a device, else as `write_file` does,
    where a link leads, and with the mode of the file that is replaced. Raise what `explain` gives, and UsageError as
    `flows_on` does."""
    with explained(path, other="name another file with -o"):
        if flows_on(path):
            with LogFile(path) as file:
                file.append(text.encode())
            return len(text.encode())
        place = Path(os.path.realpath(path))
        make_directory(place.parent, durable=False)
        mode = place.stat().st_mode if place.exists() else None
        size = write_file(place, text)[1]
        if mode is not None:
            os.chmod(place, stat.S_IMODE(mode))
        return size


class Damaged(Exception):
    """The bytes of a file are not those that were written, or something else has its name."""


_HEAD, _MIDDLE, _TAIL = b'{"sha256": "', b'", "record":\n', b"\n}\n"


def seal(value: Any) -> bytes:
    """Return a JSON document that holds `value` on a line of its own and the sha256 of that line."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def unseal(data: bytes) -> Any:
    """Return the inverse of `seal`. Raise Damaged where any byte has changed."""
    start = len(_HEAD) + 64
    body = data[start + len(_MIDDLE) : -len(_TAIL)]
    expected = _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE
    if data[: start + len(_MIDDLE)] != expected or data[-len(_TAIL) :] != _TAIL:
        raise Damaged
    try:
        return parse_json(body)
    except ValueError as error:
        raise Damaged from error


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON document holds, whoever wrote it. Raise ValueError for one that is none, or too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_sealed(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a record that only its owner may read, as `write_file` does."""
    write_file(path, seal(value), durable=durable, mode=0o600)


def read_sealed(path: Path) -> Any:
    """Return the value sealed in a file. Raise Damaged, or OSError (a missing file and an I/O error among them)."""
    return unseal(read_regular(path))


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file. Raise Damaged where something else has its name, else OSError."""
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path, *, links: bool = False) -> io.BufferedReader:
    """Open a regular file for reading. Raise Damaged where a link, a directory, a socket or a FIFO (which would be
    waited for) has its name, else OSError. links: take what a link leads to."""
    try:
        follow = 0 if links else os.O_NOFOLLOW
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | follow)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Damaged from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged
    return open(descriptor, "rb")


def write_all(descriptor: int, data: Bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def link(target: Path | str, path: Path) -> None:
    """Make `path` a symlink to `target`; what was there is replaced at once."""
    beside = partial_name(path)
    beside.symlink_to(target)
    beside.rename(path)


def share_name(source: Path, path: Path) -> bool:
    """Make `path`, which is free, a second name of the file `source`; return whether the file system has such."""
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def give_name(source: Path, path: Path, beside: Path | None = None) -> None:
    """Make `path` a second name of the file `source`; what was there is replaced at once.

    Where there are no hard links `source` is renamed, and a reader may just miss it. beside: a free name on the same
    file system that it has first.
    """
    beside = beside or partial_name(path)
    try:
        os.link(source, beside)
    except OSError:
        beside = source
    beside.rename(path)


def give_free_name(source: Path, path: Path) -> bool:
    """Rename `source` unless something has the name `path` already; `source` is gone either way. Return whether it has
    it now. In one step, but where there are no hard links."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:
        if os.path.lexists(path):
            return False
        source.rename(path)
    finally:
        source.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def forget_cached(path: Path) -> None:
    """Let the next read come from the disk, where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_lock(path: Path, *, mode: int = 0o666) -> int:
    """Open a file that is there to be locked, and make it where it is missing; return the descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)


def close_lock(descriptor: int, holder: int) -> None:
    """Close a file that the process `holder` has locked. In that process the lock is then free, though processes that
    it has forked meanwhile have the file open too; in these it stays."""
    try:
        if holder == os.getpid():
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


class LogFile:
    """A file that grows at its end. Each `append` is one write, so that several processes may share it. Of a FIFO, the
    reader must be there, and keep up: it is waited for once."""

    def __init__(self, path: Path, *, mode: int = 0o666) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, mode)
        except OSError as error:
            raise (_unread(path) if error.errno == errno.ENXIO else error) from None
        self._holder = 0
        self._patience = PATIENCE
        self._waiting = bytearray()

    def hold(self) -> None:
        """Lock the file until it is closed, where the file system has locks, so that `is_held` tells of it."""
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._holder = os.getpid()

    def append(self, data: bytes, *, durable: bool = False, later: bool = False) -> None:
        """Write at the end. Durable: it is on the disk on return. Later: with what is appended next."""
        self._waiting += data
        if later and len(self._waiting) < LATER:
            return
        data, self._waiting = bytes(self._waiting), bytearray()
        with _named(self._path):
            self._write(memoryview(data))
            if durable:
                sync(self._file)

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._file, data) :]
                self._patience = PATIENCE
            except BlockingIOError:
                room = poll()
                room.register(self._file, POLLOUT)
                if not room.poll(self._patience * 1000):
                    self._patience = 0
                    raise _unread(self._path) from None

    def sync(self) -> None:
        """Bring what was written to the disk, from any thread."""
        with _named(self._path):
            sync(self._file)

    def close(self) -> None:
        try:
            self.append(b"")
        finally:
            close_lock(self._file, self._holder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unread(path: Path) -> OSError:
    return OSError(errno.ENOBUFS, "nobody reads it", os.fspath(path))


def is_held(path: Path) -> bool:
    """Return whether a process lives that holds this log; True where the file system cannot tell."""
    try:
        with open(path, "rb", opener=_at_once) as file, open(path, "rb", opener=_at_once) as other:
            if not _locks(file.fileno(), fcntl.LOCK_SH):
                return True
            return _locks(other.fileno(), fcntl.LOCK_EX)  # granted beside the first one: locks mean nothing here
    except OSError as error:
        return not isinstance(error, FileNotFoundError)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would be waited for


def _locks(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FileWriter:
    """A file that is written at any position, from any thread, and has its name only once it is complete.

    Until then it has a name of this writer's own, as `partial_name` gives it; a killed writer leaves that behind.
    Raises what `explain` gives. Leaving the context with an error removes what was written.
    """

    def __init__(self, path: Path, size: int = 0, partial: Path | None = None) -> None:
        """size: bytes that are set aside, where the file system can. partial: another name until it is complete."""
        self.path = path
        self.size = size
        self._partial = partial or partial_name(path)
        with explained(path, size):
            self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._set_aside()
        except BaseException:
            self.abandon()
            raise

    def _set_aside(self) -> None:
        if not hasattr(os, "posix_fallocate") or not self.size:
            return
        with explained(self.path, self.size):
            try:
                os.posix_fallocate(self._file, 0, self.size)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise

    def write(self, piece: Bytes, at: int) -> None:
        view, start = memoryview(piece), at
        with explained(self.path, self.size):
            while view:
                written = os.pwrite(self._file, view[:WRITE], at)
                view, at = view[written:], at + written
        if at - start >= WRITE and hasattr(os, "posix_fadvise"):
            # Dirty pages: this sends them to the disk now, without waiting, so that fsync finds little left to do. They
            # stay in the page cache for whoever reads the file next, since only clean ones are let go.
            os.posix_fadvise(self._file, start, at - start, os.POSIX_FADV_DONTNEED)

    def share(self, source: int) -> bool:
        """Take over the content of an open file without writing it. False where the file system cannot."""
        if sys.platform != "linux":
            return False
        with suppress(OSError):
            fcntl.ioctl(self._file, FICLONE, source)
            return True
        return False

    def settle(self, *, durable: bool = True) -> None:
        """Sync the file, give it its name, and make that last."""
        try:
            with explained(self.path, self.size):
                if durable:
                    sync(self._file)
                self._close()
                move(self._partial, self.path, durable=durable)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Remove what was written and has no name yet."""
        self._close()
        with suppress(OSError):
            self._partial.unlink()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.abandon()


def copy_file(
    source: Path, target: Path, *, progress: Callable[[int], None] = lambda size: None, durable: bool = True
) -> tuple[str, int]:
    """Copy one regular file; return its (hex sha256, size). No block is written where they can be shared.

    progress: called with the number of bytes done since the last call. Raise StageFailed where the source changed
    meanwhile, OSError where it cannot be read, and what `explain` gives.
    """
    make_folders(target.parent, durable=durable)
    with source.open("rb") as reading, FileWriter(target) as writing:
        before = os.fstat(reading.fileno())
        shared = writing.share(reading.fileno())
        digest, size = hashlib.sha256(), 0
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            if not shared:
                writing.write(chunk, size)
            size += len(chunk)
            progress(len(chunk))
        after = os.fstat(reading.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or size != after.st_size:
            raise StageFailed(f"{source} changed while it was copied", "run again when nothing writes to it")
        writing.settle(durable=durable)
    return digest.hexdigest(), size


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
