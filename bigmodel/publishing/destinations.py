"""Where a finished model goes: a directory, an fsspec URL, a repository on the Hub.

    with destination.replacing(scratch) as new:
        stored = {"model.safetensors": destination.put(new, "model.safetensors", path, report)}
        receipt = destination.finish(new, stored)     only now is it there under its name

Killed at whatever point, a transfer leaves the old version or the new one. A directory is exchanged in one step, and so
is a commit of the Hub. Behind a URL the new version is written beside the old one, counts once a last file says that it
is whole, and is copied over; a transfer that is killed meanwhile is completed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol, Self

from bigpipe.environment import ONLINE
from bigpipe.errors import BigpipeError, Offline, StageFailed, Transient, UsageError, first_few
from bigpipe.files import (
    CHUNK,
    copy_file,
    exchange,
    existing,
    forget_cached,
    hash_file,
    make_directory,
    move,
    require_space,
    sync_directory,
)
from bigpipe.filesystems import foreign_errors
from bigpipe.redaction import redact_value

LONGEST_READ, LONGEST_MARK = 10_000_000, 500
"""Bytes of a small file, and characters of a mark."""
RECEIPT = "receipt.json"
RECEIPT_SCHEMA = "bigpipe.receipt/1"
BESIDE = ".bigpipe-"
"""How the names of what is being transferred begin."""
WHOLE = "whole.json"
"""Behind a URL: the files and sizes of a version that is complete, and is to take its place."""
Report = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One file at the destination."""

    sha256: str
    """Hex; "" in a listing, which reads no file."""
    size: int
    mark: str = ""
    """What a listing tells of it, and what changes whenever the file is written."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was written to a destination, file by file."""

    url: str
    files: Mapping[str, Stored]
    commit: str | None = None

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def text(self) -> str:
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        content = {"schema": RECEIPT_SCHEMA, "url": redact_value(self.url), "commit": self.commit, "files": files}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Return the receipt that lies in `folder`. Raise StageFailed where there is none that can be read."""
        try:
            data = json.loads((folder / RECEIPT).read_bytes())
            files = {name: Stored(**file) for name, file in data["files"].items()}
            return cls(data["url"], files, data["commit"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageFailed(f"{folder / RECEIPT} is not a receipt: {error}", "run the step again") from error


class Destination(Protocol):
    keeps_versions: ClassVar[bool] = False
    """Can what is replaced be had again?"""

    @property
    def url(self) -> str:
        """For people: a path or an address."""

    @property
    def name(self) -> str:
        """For whoever loads it; of a directory without where it lies, which is nobody else's business."""
        return self.url

    def names(self) -> list[str]:
        """Return everything by which others may mean it too: its absolute path, or addresses."""
        return [self.url]

    def pinned(self) -> Self:
        """Return it as it is now: what others put there afterwards is not replaced, where that can be told."""
        return self

    def check(self) -> None:
        """Raise now what would keep `finish` from working: no rights, no token, a file in the way."""
        self.listing()

    def check_card(self, text: str) -> None:
        """Raise UsageError now where `finish` would fail for a model card with such metadata."""
        return

    def listing(self) -> Mapping[str, Stored] | None:
        """Return what is there by relative name; None where nothing is."""

    def is_broken_off(self) -> bool:
        """Was a transfer killed while it replaced what is there? That was allowed, and the next one completes it."""
        return False

    def read(self, name: str) -> bytes:
        """Return a small file, whole. Raise OSError."""

    def digest(self, name: str) -> str:
        """Return the sha256 of what is there, by reading it. Raise OSError."""

    def replacing(self, scratch: Path) -> AbstractContextManager[Path]:
        """Give a directory where the new version is prepared. What is left there at the end is removed."""
        return nullcontext(scratch)

    def put(self, new: Path, name: str, source: Path, report: Report) -> Stored:
        """Take one file under a relative name."""

    def finish(self, new: Path, stored: Mapping[str, Stored]) -> Receipt:
        """Let what was put be what is there, and nothing else. Raise StageFailed where it reads back differently."""


@dataclass(frozen=True, slots=True)
class Directory(Destination):
    """A directory that is replaced as a whole, by renaming one that was written beside it."""

    path: Path
    """Absolute."""

    @property
    def url(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, and would have to be a directory", "choose another destination")
        above = existing(self.path.parent)
        if not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"{above} may not be written by this user", "choose another destination")

    def listing(self) -> Mapping[str, Stored] | None:
        if not self.path.is_dir():
            return None
        # What is no file would go as well when the directory is replaced: a link to a folder, or to nothing
        files = {
            path: path.stat() if path.exists() else path.lstat()
            for path in sorted(self.path.rglob("*"))
            if path.is_symlink() or not path.is_dir()
        }
        return {
            path.relative_to(self.path).as_posix(): Stored("", stat.st_size, str(stat.st_mtime_ns))
            for path, stat in files.items()
        }

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def digest(self, name: str) -> str:
        return hash_file(self.path / name)

    @contextmanager
    def replacing(self, scratch: Path) -> Iterator[Path]:
        make_directory(self.path.parent)
        self._restore()
        self._clean()
        new = self.beside()
        new.mkdir()
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield new
        finally:
            os.close(lock)
            shutil.rmtree(new, ignore_errors=True)

    @property
    def _prefix(self) -> str:
        return f".{self.path.name}{BESIDE}"

    @property
    def _old(self) -> Path:
        """What is replaced, while nothing has the name: where two directories cannot be exchanged."""
        return self.path.with_name(f"{self._prefix}old")

    def _restore(self) -> None:
        """Give what a killed transfer had put aside its name back."""
        if self._old.exists() and not self.path.exists():
            move(self._old, self.path, durable=True)

    def beside(self) -> Path:
        """A name that no other transfer takes."""
        return self.path.with_name(self._prefix + os.urandom(8).hex())

    def _clean(self) -> None:
        """Remove what a killed transfer left: its lock is free."""
        for left in [path for path in self.path.parent.iterdir() if path.name.startswith(self._prefix)]:
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

    def finish(self, new: Path, stored: Mapping[str, Stored]) -> Receipt:
        for name, file in stored.items():
            forget_cached(new / name)
            _compare(f"{self.url}/{name}", file.sha256, hash_file(new / name))
        for folder in (new, *[path for path in new.rglob("*") if path.is_dir()]):
            sync_directory(folder)
        self._swap(new)
        return _receipt(self, stored)

    def _swap(self, new: Path) -> None:
        """Give the new version the name; the old one, if it is left, lies where that was, or beside."""
        if not self.path.exists():
            return move(new, self.path, durable=True)
        if exchange(new, self.path):
            return sync_directory(self.path.parent)
        move(self.path, self._old)
        move(new, self.path, durable=True)
        shutil.rmtree(self._old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class FileSystem(Destination):
    """Anything fsspec opens: s3://, gs://, memory://… A new version lies in a folder of its own until it is whole."""

    address: str
    system: Any
    root: str
    offline: bool = False
    """Nothing may be asked of it."""

    @property
    def url(self) -> str:
        return self.address

    def listing(self) -> Mapping[str, Stored] | None:
        if self.offline:
            cause = f"{self.address} cannot be looked at while asking the network is switched off"
            raise Offline(cause, f"run {ONLINE}, or save to a directory", field="to")
        with self._errors(UsageError):
            self.system.invalidate_cache()
            try:
                found = self.system.find(self.root, detail=True)
            except FileNotFoundError:
                return None
            prefix = self.root.rstrip("/") + "/"
            files = {path.removeprefix(prefix): info for path, info in found.items() if path.startswith(prefix)}
            return {
                name: Stored("", int(info["size"]), self._mark(info))
                for name, info in files.items()
                if not name.startswith(BESIDE) and not _is_folder(name)
            } or None

    def is_broken_off(self) -> bool:
        return any(self._whole(folder) for folder in self._left())

    def read(self, name: str) -> bytes:
        with self._errors(StageFailed), self.system.open(self._path(name), "rb") as file:
            content = bytearray()
            while len(content) <= LONGEST_READ and (piece := file.read(CHUNK)):
                content += piece
            return bytes(content)

    def digest(self, name: str, longest: int | None = None) -> str:
        """longest: bytes that are read at most, before one more."""
        digest, size = hashlib.sha256(), 0
        with self._errors(StageFailed), self.system.open(self._path(name), "rb") as file:
            while (longest is None or size <= longest) and (piece := file.read(CHUNK)):
                digest.update(piece)
                size += len(piece)
        return digest.hexdigest()

    @contextmanager
    def replacing(self, scratch: Path) -> Iterator[Path]:
        for left in self._left():
            self._complete(left)
        new = scratch / (BESIDE + os.urandom(8).hex())
        try:
            yield new
        except BaseException:
            with suppress(BigpipeError):
                if not self._whole(new.name):
                    self._remove(new.name)
            raise

    def put(self, new: Path, name: str, source: Path, report: Report) -> Stored:
        name = f"{new.name}/{name}"
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
        _compare(f"{self.url}/{name}", digest.hexdigest(), self.digest(name, size))
        return Stored(digest.hexdigest(), size)

    def finish(self, new: Path, stored: Mapping[str, Stored]) -> Receipt:
        with self._errors(StageFailed):
            sizes = {name: file.size for name, file in stored.items()}
            self.system.pipe_file(self._path(f"{new.name}/{WHOLE}"), json.dumps(sizes).encode())
        self._complete(new.name)
        return _receipt(self, stored)

    def _left(self) -> list[str]:
        """The folders of transfers that are not over."""
        with self._errors(StageFailed):
            self.system.invalidate_cache()
            try:
                names = [path.rstrip("/").rpartition("/")[2] for path in self.system.ls(self.root, detail=False)]
            except FileNotFoundError:
                return []
        return [name for name in names if name.startswith(BESIDE)]

    def _whole(self, folder: str) -> dict[str, int]:
        """Name → size of the files in a transfer's folder, once they are all there; else none."""
        with self._errors(StageFailed):
            try:
                sizes = json.loads(self.system.cat_file(self._path(f"{folder}/{WHOLE}"), start=0, end=LONGEST_READ))
            except (FileNotFoundError, ValueError, RecursionError):
                return {}
            told = sizes if isinstance(sizes, dict) else {}
            return told if all(_is_file(*item) for item in told.items()) else {}

    def _complete(self, folder: str) -> None:
        """Let a version that is whole take its place, the last of its files last; then remove the transfer's folder."""
        if sizes := self._whole(folder):
            for name in sizes:
                self._copy(f"{folder}/{name}", name)
            stale = [self._path(name) for name in self.listing() or {} if name not in sizes]
            with self._errors(StageFailed):
                if stale:
                    self.system.rm(stale)
                there = {name: file.size for name, file in (self.listing() or {}).items()}
                if wrong := [name for name in there | sizes if there.get(name) != sizes.get(name)]:
                    cause = f"{self.url} does not hold what was copied there: {first_few(wrong)}"
                    raise StageFailed(cause, "run again, or choose another destination")
                self.system.rm_file(self._path(f"{folder}/{WHOLE}"))
        self._remove(folder)

    def _copy(self, name: str, to: str) -> None:
        source, target = self._path(name), self._path(to)
        with self._errors(StageFailed):
            self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                self.system.cp_file(source, target)
            except NotImplementedError:  # through this machine
                with self.system.open(source, "rb") as reading, self.system.open(target, "wb") as writing:
                    shutil.copyfileobj(reading, writing, CHUNK)

    def _remove(self, folder: str) -> None:
        with self._errors(StageFailed), suppress(FileNotFoundError):
            self.system.rm(self._path(folder), recursive=True)

    def _errors(self, kind: type[UsageError | StageFailed]) -> AbstractContextManager[None]:
        return foreign_errors(self.url, kind)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @staticmethod
    def _mark(info: Mapping[str, Any]) -> str:
        """Whatever the file system tells that changes with the content."""
        names = ("ETag", "etag", "md5Hash", "content_settings", "LastModified", "mtime", "updated", "created")
        return next((f"{name}={info[name]}"[:LONGEST_MARK] for name in names if info.get(name)), "")


def _is_folder(name: str) -> bool:
    """Is this how a bucket marks a folder: by an object without a name, which its console and other programs make?"""
    return name == "" or name.endswith("/")


def _is_file(name: str, size: object) -> bool:
    """Could this be a file of a version, by its name, and be written by us?"""
    parts = PurePosixPath(name).parts
    return name == "/".join(parts) and ".." not in parts and not name.startswith(("/", BESIDE)) and type(size) is int


def _receipt(target: Destination, stored: Mapping[str, Stored]) -> Receipt:
    seen = target.listing() or {}
    if missing := sorted(stored.keys() - seen.keys()):
        cause = f"{target.url} does not list what was written there: {first_few(missing)}"
        raise StageFailed(cause, "run again, or choose another destination")
    return Receipt(target.url, {name: replace(file, mark=seen[name].mark) for name, file in stored.items()})


def _compare(what: str, written: str, read: str) -> None:
    if written != read:
        raise StageFailed(
            f"{what} reads back as sha256 {read[:12]}…, but {written[:12]}… was written",
            "the disk or the service changes what it stores; try again, or choose another destination",
        )


def is_present(target: Destination, receipt: Receipt) -> bool:
    """Return whether everything is there as it was written; where the destination cannot be asked now, it is believed.
    A file is read only where a look tells a difference."""

    def same(name: str, stored: Stored, now: Stored | None) -> bool:
        if now is None or now.size != stored.size:
            return False
        return bool(stored.mark and now.mark == stored.mark) or target.digest(name) == stored.sha256

    try:
        there = target.listing() or {}
        return all(same(name, stored, there.get(name)) for name, stored in receipt.files.items())
    except Transient:
        return True
    except (BigpipeError, OSError):
        return False
