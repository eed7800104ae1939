"""How the files of an artifact come from a remote store: into a work folder, compared with their sha256 as they come.

What a killed process had fetched is gone on with: a file that is whole, and the beginning of the one that was coming.
Both are read again before they count, like all else.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bigpipe.errors import Interrupted
from bigpipe.files import CHUNK, Damaged, LogFile, link, make_folders, move, open_regular, require_space

from .artifacts import KeyRecord, remove_tree
from .hashing import digest_of, hash_file
from .layout import Layout, explained, write_sealed
from .remote import Moved, Remote, Wrong
from .work import Work, fetching_key


def listed(record: KeyRecord) -> dict[str, tuple[str, int]]:
    """Return the files that a record names: relative path → (sha256 in hex, size)."""
    return {name: (str(file["sha256"]), int(file["size"])) for name, file in record.files.items()}


def lacking(layout: Layout, record: KeyRecord) -> int:
    """Return the bytes of a record's files that would have to come, each object counted once."""
    work = Work(layout.working(fetching_key(record.key)))
    return _to_come(layout, listed(record), work.out, work.scratch)


def _to_come(layout: Layout, files: Mapping[str, tuple[str, int]], out: Path, scratch: Path) -> int:
    """Of what is no object here: the bytes that an earlier attempt has not brought, by the sizes of what it left."""
    whole = {sha256 for name, (sha256, size) in files.items() if _size(out / name) == size}
    return sum(
        max(0, size - _size(_coming(scratch, sha256)))
        for sha256, size in dict(files.values()).items()
        if sha256 not in whole and not layout.object(sha256).is_file()
    )


def _coming(scratch: Path, sha256: str) -> Path:
    """Where an object comes to."""
    return scratch / f"{sha256}.coming"


def _size(path: Path) -> int:
    """The bytes of a file; 0 where none is."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


SLOWEST_TOLD = 2**20
"""Bytes from which the time that they took says something of the way there."""


def known_rate(layout: Layout, remote: Remote) -> float | None:
    """Return the bytes a second at which the last artifact came from a remote store; None: not known."""
    rate = layout.load(_rates(layout, remote), float)
    return rate if rate and rate > 0 else None


def note_rate(layout: Layout, remote: Remote, size: int, seconds: float) -> None:
    """Remember how fast `size` bytes came."""
    if size >= SLOWEST_TOLD and seconds > 0:
        with suppress(OSError):  # a store that cannot be written foretells nothing
            write_sealed(_rates(layout, remote), size / seconds)


def _rates(layout: Layout, remote: Remote) -> Path:
    return layout.memo / f"remote-{digest_of('remote', remote.name)[7:]}.json"


@dataclass(frozen=True, slots=True)
class Fetching:
    """One artifact that comes."""

    layout: Layout
    remote: Remote
    out: Path
    """Where its files go; nothing else stays there."""
    scratch: Path
    cancelled: threading.Event
    moved: Moved

    def fetch(self, files: Mapping[str, tuple[str, int]]) -> None:
        """Fill `out`. Raise Wrong for bytes that are not those of their sha256, Away, DoesNotFit for a full disk,
        Interrupted."""
        require_space(self.out, _to_come(self.layout, files, self.out, self.scratch))
        with explained(self.out):
            self._clear(files)
            for name, (sha256, size) in files.items():
                self._settle(self.out / name, sha256, size)

    def _clear(self, files: Mapping[str, tuple[str, int]]) -> None:
        """What an earlier attempt left that does not belong here, such as links."""
        for path in sorted(self.out.rglob("*"), reverse=True):
            wanted = path.relative_to(self.out).as_posix() in files
            if path.is_symlink() or not (path.is_dir() or (wanted and path.is_file())):
                remove_tree(path)
        for path in sorted(self.out.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _settle(self, path: Path, sha256: str, size: int) -> None:
        if path.is_file():
            if hash_file(path) == sha256:
                self.moved(size)
                return
            path.unlink()
        make_folders(path.parent, durable=False)
        if self._here(sha256, size):
            link(self.layout.object(sha256), path)
            self.moved(size)
            return
        part = _coming(self.scratch, sha256)
        if not (self._come(part, sha256, size) or self._come(part, sha256, size)):  # the second time from its beginning
            self.remote.refuse(sha256, f"the object {sha256[:12]}… has other bytes than its name says")
            raise Wrong("an object of it has other bytes than its name says")
        move(part, path)

    def _here(self, sha256: str, size: int) -> bool:
        """Whether the store has the object, by its bytes."""
        path = self.layout.object(sha256)
        if not path.is_file() or path.is_symlink():
            return False
        if path.stat().st_size == size and hash_file(path) == sha256:
            return True
        self.layout.set_aside(path)
        return False

    def _come(self, part: Path, sha256: str, size: int) -> bool:
        """Let the rest of an object come. False, and nothing is left of it, where it has other bytes."""
        digest, start = _begun(part)
        if start > size:
            part.unlink()
            digest, start = hashlib.sha256(), 0
        self.moved(start)
        with LogFile(part, mode=0o600) as log:
            for piece in self.remote.read(sha256, size, start):
                if self.cancelled.is_set():
                    raise Interrupted(
                        "interrupted while bytes came from the remote store", "run the same command again"
                    )
                digest.update(piece)
                log.append(piece)
                self.moved(len(piece))
        if digest.hexdigest() == sha256:
            return True
        part.unlink()
        self.moved(-size)
        return False


def _begun(part: Path) -> tuple[hashlib._Hash, int]:
    """What an earlier attempt has of an object: its bytes hashed so far, and how many there are."""
    digest, size = hashlib.sha256(), 0
    try:
        with open_regular(part) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        pass
    except Damaged:
        remove_tree(part)
    return digest, size
