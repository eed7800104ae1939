"""Where a finished model goes: a directory, an fsspec URL, a repository on the Hub.

    with destination.transfer(scratch, report=report) as transfer:
        transfer.put("model.safetensors", path)     copied, hashed, read back
        receipt = transfer.finish(inspect)          only now is it there under its name

A directory appears as a whole or not at all. Object stores and the Hub have no such step; their last file, or their
commit, is what makes the rest count.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import (
    CHUNK,
    copy_file,
    forget_cached,
    hash_file,
    make_directory,
    move,
    require_space,
    sync_directory,
)

from .receipt import Receipt, Stored

Report = Callable[[int], None]
"""Called with the number of bytes done since the last call."""
Inspect = Callable[[Path], None]
"""Called with a directory that holds everything under its names; raises where that is not what it should be."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look without reading tells of a file. `mark` changes whenever the file is written."""

    size: int
    mark: str


class Transfer(Protocol):
    def put(self, name: str, source: Path) -> tuple[str, int]:
        """Take one file under a relative name; its (hex sha256, size)."""

    def finish(self, inspect: Inspect) -> Receipt:
        """Let what was put be what is there, and nothing else. Raises StageFailed where it reads back differently.

        A directory is inspected before it takes its name; elsewhere the digests of all files must do.
        """


class Destination(Protocol):
    @property
    def url(self) -> str:
        """For people: a path or an address."""

    @property
    def name(self) -> str:
        """For whoever loads it; of a directory without where it lies, which is nobody else's business."""

    @property
    def keeps_versions(self) -> bool:
        """Can what is replaced be had again?"""

    def check(self) -> None:
        """Raise now what would keep `finish` from working: no rights, no token, a file in the way."""

    def listing(self) -> Mapping[str, Seen] | None:
        """Relative name → what is there; None where nothing is."""

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises OSError."""

    def digest(self, name: str) -> str:
        """sha256 of what is there, by reading it. Raises OSError."""

    def transfer(self, scratch: Path, *, report: Report) -> AbstractContextManager[Transfer]: ...


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that is replaced as a whole, by renaming one that was written beside it."""

    path: Path
    """Absolute."""
    keeps_versions: ClassVar[bool] = False

    @property
    def url(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, and would have to be a directory", "choose another destination")
        existing = next(place for place in self.path.parents if place.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"{existing} may not be written by this user", "choose another destination")

    def listing(self) -> Mapping[str, Seen] | None:
        if not self.path.is_dir():
            return None
        files = {path: path.stat() for path in sorted(self.path.rglob("*")) if path.is_file()}
        return {
            path.relative_to(self.path).as_posix(): Seen(stat.st_size, str(stat.st_mtime_ns))
            for path, stat in files.items()
        }

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def digest(self, name: str) -> str:
        return hash_file(self.path / name)

    @contextmanager
    def transfer(self, scratch: Path, *, report: Report) -> Iterator[Transfer]:
        make_directory(self.path.parent)
        self._clean()
        new = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.path.parent))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.chmod(0o777 & ~_umask())
            yield _DirectoryTransfer(self, new, report)
        finally:
            os.close(lock)
            shutil.rmtree(new, ignore_errors=True)

    @property
    def _prefix(self) -> str:
        return f".{self.path.name}.bigpipe-"

    def _clean(self) -> None:
        """Remove what a killed transfer left: its lock is free."""
        for left in self.path.parent.iterdir():
            if not left.name.startswith(self._prefix):
                continue
            with suppress(OSError):
                lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)


@dataclass(slots=True)
class _DirectoryTransfer:
    target: Directory
    new: Path
    report: Report
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)

    def put(self, name: str, source: Path) -> tuple[str, int]:
        require_space(self.target.path, source.stat().st_size)
        self.stored[name] = copy_file(source, self.new / name, progress=self.report)
        return self.stored[name]

    def finish(self, inspect: Inspect) -> Receipt:
        for name, (sha256, _) in self.stored.items():
            forget_cached(self.new / name)
            compare(f"{self.target.url}/{name}", sha256, hash_file(self.new / name))
        inspect(self.new)
        for folder in (self.new, *[path for path in self.new.rglob("*") if path.is_dir()]):
            sync_directory(folder)
        self._swap()
        seen = self.target.listing() or {}
        return Receipt(self.target.url, {name: Stored(*known, seen[name].mark) for name, known in self.stored.items()})

    def _swap(self) -> None:
        path = self.target.path
        if path.exists():
            # A crash between the two renames leaves both versions beside the name; the next transfer writes it anew.
            old = Path(tempfile.mkdtemp(prefix=self.target._prefix, dir=path.parent))
            move(path, old / path.name)
            move(self.new, path, durable=True)
            shutil.rmtree(old, ignore_errors=True)
        else:
            move(self.new, path, durable=True)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Anything fsspec opens: s3://, gs://, memory://… The files are in place one by one, in the order they were put."""

    url: str
    system: Any
    root: str
    keeps_versions: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.url

    def check(self) -> None:
        self.listing()

    def listing(self) -> Mapping[str, Seen] | None:
        with _foreign_errors(self.url, UsageError):
            self.system.invalidate_cache()
            try:
                found = self.system.find(self.root, detail=True)
            except FileNotFoundError:
                return None
            prefix = self.root.rstrip("/") + "/"
            files = {path.removeprefix(prefix): info for path, info in found.items() if path.startswith(prefix)}
            return {name: Seen(int(info["size"]), self._mark(info)) for name, info in files.items()} or None

    def read(self, name: str) -> bytes:
        with _foreign_errors(self.url, StageFailed):
            content: bytes = self.system.cat_file(self._path(name))
        return content

    def digest(self, name: str) -> str:
        digest = hashlib.sha256()
        with _foreign_errors(self.url, StageFailed), self.system.open(self._path(name), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def transfer(self, scratch: Path, *, report: Report) -> Iterator[Transfer]:
        yield _FileSystemTransfer(self, report)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @staticmethod
    def _mark(info: Mapping[str, Any]) -> str:
        """Whatever the file system tells that changes with the content."""
        names = ("ETag", "etag", "md5Hash", "content_settings", "LastModified", "mtime", "updated", "created")
        return next((f"{name}={info[name]}" for name in names if info.get(name)), "")


@dataclass(slots=True)
class _FileSystemTransfer:
    target: FileSystem
    report: Report
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)

    def put(self, name: str, source: Path) -> tuple[str, int]:
        path = self.target._path(name)
        digest, size = hashlib.sha256(), 0
        with _foreign_errors(self.target.url, StageFailed), source.open("rb") as reading:
            self.target.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.target.system.open(path, "wb") as writing:
                while chunk := reading.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    writing.write(chunk)
                    self.report(len(chunk))
        compare(f"{self.target.url}/{name}", digest.hexdigest(), self.target.digest(name))
        self.stored[name] = (digest.hexdigest(), size)
        return self.stored[name]

    def finish(self, inspect: Inspect) -> Receipt:
        seen = self.target.listing() or {}
        stale = [self.target._path(name) for name in seen if name not in self.stored]
        if stale:
            with _foreign_errors(self.target.url, StageFailed):
                self.target.system.rm(stale)
        files = {name: Stored(*known, seen[name].mark) for name, known in self.stored.items()}
        return Receipt(self.target.url, files)


def compare(what: str, written: str, read: str) -> None:
    if written != read:
        raise StageFailed(
            f"{what} reads back as sha256 {read[:12]}…, but {written[:12]}… was written",
            "the disk or the service changes what it stores; try again, or choose another destination",
        )


@contextmanager
def _foreign_errors(url: str, kind: type[UsageError | StageFailed]) -> Iterator[None]:
    """Every file system raises classes of its own library; none of them is a bug of ours."""
    try:
        yield
    except (UsageError, StageFailed, FileNotFoundError):
        raise
    except Exception as error:
        cause = f"{url}: {type(error).__name__}: {error}"
        raise kind(cause, "check the address and the credentials that its fsspec package reads") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
