"""Where a finished model goes: a directory, an fsspec URL, a repository on the Hub.

    with destination.replacing(scratch) as new:
        stored = {"model.safetensors": destination.put(new, "model.safetensors", path, report)}
        receipt = destination.finish(new, stored, inspect)     only now is it there under its name

A directory appears as a whole or not at all. Object stores and the Hub have no such step; their last file, or their
commit, is what makes the rest count.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bigpipe.errors import BigpipeError, StageFailed, Transient, UsageError
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

RECEIPT = "receipt.json"
RECEIPT_SCHEMA = "bigpipe.receipt/1"
Report = Callable[[int], None]
"""Called with the number of bytes done since the last call."""
Inspect = Callable[[Path], None]
"""Called with a directory that holds everything under its names; raises where that is not what it should be."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One file at the destination. `mark`: what a look without reading told of it when it was written."""

    sha256: str
    size: int
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    url: str
    files: Mapping[str, Stored]
    commit: str | None = None

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def text(self) -> str:
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return (
            json.dumps({"schema": RECEIPT_SCHEMA, "url": self.url, "commit": self.commit, "files": files}, indent=2)
            + "\n"
        )

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Return the receipt that lies in `folder`. Raise StageFailed where there is none that can be read."""
        try:
            data = json.loads((folder / RECEIPT).read_bytes())
            files = {name: Stored(**file) for name, file in data["files"].items()}
            return cls(data["url"], files, data["commit"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageFailed(f"{folder / RECEIPT} is not a receipt: {error}", "run the step again") from error


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look without reading tells of a file. `mark` changes whenever the file is written."""

    size: int
    mark: str


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

    def replacing(self, scratch: Path) -> AbstractContextManager[Path]:
        """A directory where the new version is prepared. What is left there at the end is removed."""

    def put(self, new: Path, name: str, source: Path, report: Report) -> Stored:
        """Take one file under a relative name."""

    def finish(self, new: Path, stored: Mapping[str, Stored], inspect: Inspect) -> Receipt:
        """Let what was put be what is there, and nothing else. Raises StageFailed where it reads back differently.

        A directory is inspected before it takes its name; elsewhere the digests of all files must do.
        """


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
        seen = {path: Seen(stat.st_size, str(stat.st_mtime_ns)) for path, stat in files.items()}
        return {path.relative_to(self.path).as_posix(): found for path, found in seen.items()}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def digest(self, name: str) -> str:
        return hash_file(self.path / name)

    @contextmanager
    def replacing(self, scratch: Path) -> Iterator[Path]:
        make_directory(self.path.parent)
        self._clean()
        new = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.path.parent))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.chmod(0o777 & ~_umask())
            yield new
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

    def put(self, new: Path, name: str, source: Path, report: Report) -> Stored:
        require_space(self.path, source.stat().st_size)
        return Stored(*copy_file(source, new / name, progress=report))

    def finish(self, new: Path, stored: Mapping[str, Stored], inspect: Inspect) -> Receipt:
        for name, file in stored.items():
            forget_cached(new / name)
            _compare(f"{self.url}/{name}", file.sha256, hash_file(new / name))
        inspect(new)
        for folder in (new, *[path for path in new.rglob("*") if path.is_dir()]):
            sync_directory(folder)
        self._swap(new)
        return _receipt(self, stored)

    def _swap(self, new: Path) -> None:
        if not self.path.exists():
            move(new, self.path, durable=True)
            return
        # A crash between the two renames leaves both versions beside the name; the next transfer writes it anew.
        old = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.path.parent))
        move(self.path, old / self.path.name)
        move(new, self.path, durable=True)
        shutil.rmtree(old, ignore_errors=True)


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
        with self._errors(UsageError):
            self.system.invalidate_cache()
            try:
                found = self.system.find(self.root, detail=True)
            except FileNotFoundError:
                return None
            prefix = self.root.rstrip("/") + "/"
            files = {path.removeprefix(prefix): info for path, info in found.items() if path.startswith(prefix)}
            return {name: Seen(int(info["size"]), self._mark(info)) for name, info in files.items()} or None

    def read(self, name: str) -> bytes:
        with self._errors(StageFailed):
            content: bytes = self.system.cat_file(self._path(name))
        return content

    def digest(self, name: str) -> str:
        with self._errors(StageFailed), self.system.open(self._path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def replacing(self, scratch: Path) -> AbstractContextManager[Path]:
        return nullcontext(scratch)

    def put(self, new: Path, name: str, source: Path, report: Report) -> Stored:
        path = self._path(name)
        digest, size = hashlib.sha256(), 0
        with self._errors(StageFailed), source.open("rb") as reading:
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.system.open(path, "wb") as writing:
                while chunk := reading.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    writing.write(chunk)
                    report(len(chunk))
        _compare(f"{self.url}/{name}", digest.hexdigest(), self.digest(name))
        return Stored(digest.hexdigest(), size)

    def finish(self, new: Path, stored: Mapping[str, Stored], inspect: Inspect) -> Receipt:
        stale = [self._path(name) for name in self.listing() or {} if name not in stored]
        if stale:
            with self._errors(StageFailed):
                self.system.rm(stale)
        return _receipt(self, stored)

    @contextmanager
    def _errors(self, kind: type[UsageError | StageFailed]) -> Iterator[None]:
        """Every file system raises classes of its own library; none of them is a bug of ours."""
        try:
            yield
        except (UsageError, StageFailed, FileNotFoundError):
            raise
        except Exception as error:
            cause = f"{self.url}: {type(error).__name__}: {error}"
            raise kind(cause, "check the address and the credentials that its fsspec package reads") from error

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @staticmethod
    def _mark(info: Mapping[str, Any]) -> str:
        """Whatever the file system tells that changes with the content."""
        names = ("ETag", "etag", "md5Hash", "content_settings", "LastModified", "mtime", "updated", "created")
        return next((f"{name}={info[name]}" for name in names if info.get(name)), "")


def is_present(target: Destination, receipt: Receipt) -> bool:
    """Return whether everything is there as it was written. A file is read only where a look tells a difference.

    Where the destination cannot be asked just now, the receipt is believed.
    """
    try:
        return _holds(target, receipt)
    except Transient:
        return True
    except (BigpipeError, OSError):
        return False


def _holds(target: Destination, receipt: Receipt) -> bool:
    there = target.listing() or {}
    for name, stored in receipt.files.items():
        now = there.get(name)
        if now is None or now.size != stored.size:
            return False
        if (not stored.mark or now.mark != stored.mark) and target.digest(name) != stored.sha256:
            return False
    return True


def _receipt(target: Destination, stored: Mapping[str, Stored]) -> Receipt:
    seen = target.listing() or {}
    return Receipt(target.url, {name: replace(file, mark=seen[name].mark) for name, file in stored.items()})


def _compare(what: str, written: str, read: str) -> None:
    if written != read:
        raise StageFailed(
            f"{what} reads back as sha256 {read[:12]}…, but {written[:12]}… was written",
            "the disk or the service changes what it stores; try again, or choose another destination",
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
