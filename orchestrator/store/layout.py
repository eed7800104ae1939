"""Where things lie in a store.

objects/HEX             files by sha256, read-only, one name each
artifacts/HEX/          a tree of links into objects and to referenced files; what stages and people read
artifacts/HEX.json      what the tree holds, and what `stat` said of each file when its bytes were last known
keys/HEX.json           what a computation gave
partials/HEX            computations that share everything but their inputs
roots/HEX.json          what a manifest's nodes were last
released/HEX.json       artifacts whose bytes nobody wants to keep (`cache: false`)
runs/ID/                what happened in a run
work/HEX/{out,scratch}  what a node has done so far
parts/                  pieces that stages reuse over edits
memo/                   answers that were dear to get
tmp/ locks/ quarantine/
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from bigpipe.files import move
from bigpipe.orchestrator.contract import Json

from .hashing import hex_of
from .location import memo_directory
from .sealing import Damaged, explained, make_directory, read_sealed

T = TypeVar("T")
_serial = count()


class Layout:
    """The paths of a store. Creates nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.artifacts = root / "artifacts"
        self.keys = root / "keys"
        self.partials = root / "partials"
        self.roots = root / "roots"
        self.released = root / "released"
        self.runs = root / "runs"
        self.work = root / "work"
        self.parts = root / "parts"
        self.memo = memo_directory(root)
        self.tmp = root / "tmp"
        self.locks = root / "locks"
        self.quarantine = root / "quarantine"

    def object(self, sha256: str) -> Path:
        return self.objects / sha256

    def tree(self, digest: str) -> Path:
        return self.artifacts / hex_of(digest)

    def artifact(self, digest: str) -> Path:
        return self.artifacts / f"{hex_of(digest)}.json"

    def key(self, key: str) -> Path:
        return self.keys / f"{hex_of(key)}.json"

    def partial(self, partial: str) -> Path:
        return self.partials / hex_of(partial)

    def release(self, digest: str) -> Path:
        return self.released / f"{hex_of(digest)}.json"

    def root_record(self, digest: str) -> Path:
        return self.roots / f"{hex_of(digest)}.json"

    def working(self, key: str) -> Path:
        return self.work / hex_of(key)

    def working_lock(self, key: str) -> Path:
        return self.locks / f"{hex_of(key)}.lock"

    def load(self, path: Path, read: Callable[[Json], T]) -> T | None:
        """Return what `read` makes of a record: None where there is none. A damaged one goes to quarantine and is none.

        Raise BigpipeError where the file system fails.
        """
        with explained(path):
            try:
                return read(read_sealed(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (Damaged, ValueError, TypeError, KeyError):
                self.set_aside(path)
        return None

    def set_aside(self, path: Path) -> None:
        """Move a damaged file or tree to quarantine, where `gc` frees it. Another process may have done it first."""
        make_directory(self.quarantine)
        place = self.quarantine / f"{path.name}.{os.getpid()}.{next(_serial)}"
        while os.path.lexists(place):
            place = place.with_name(f"{place.name}.{next(_serial)}")
        with suppress(FileNotFoundError):
            move(path, place)
