"""Freeing what no manifest or lock file names any more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigpipe.errors import Transient, UsageError
from bigpipe.files import is_partial

from .artifacts import remove_tree
from .hashing import is_hex
from .keyrecord import all_records, sealed_names
from .layout import Layout
from .locks import StoreLock, keeps_out
from .presence import Presence, anybody
from .releasing import held_objects
from .roots import all_roots
from .sealing import explained

Kind = Literal["record", "artifact", "object", "work", "part", "temporary", "quarantine", "root", "run"]

RUNS = 200
"""Runs whose records and logs stay, the latest ones; an id begins with its time."""
LockedDigests = Callable[[Path], set[str]]
"""Gives the digests of the artifacts that a lock file names; UsageError where it cannot be read."""


@dataclass(frozen=True, slots=True)
class Freed:
    """One thing that was freed, or would be."""

    kind: Kind
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class GcReport:
    dry_run: bool
    freed: tuple[Freed, ...]
    kept_artifacts: int
    kept_bytes: int
    """Of the objects that stay; referenced files are not the store's."""

    @property
    def freed_bytes(self) -> int:
        return sum(item.bytes for item in self.freed)


def collect_garbage(layout: Layout, presence: Presence, locked: LockedDigests, *, dry_run: bool) -> GcReport:
    """Free all that no existing manifest or lock names.

    Raise Transient while another process uses the store, UsageError where a lock file cannot be read.
    """
    with explained(layout.root):
        if dry_run:
            return _Collection(layout, locked, dry_run=True).collect()
        # Nothing new is written before bytes are freed: `gc` is what people call when the disk is full.
        presence.leave()  # whoever enters waits for the lock below, this process too
        with StoreLock(layout.locks / "gc") as entrance, StoreLock(layout.locks / "objects"):
            if not keeps_out(entrance.path):
                raise UsageError(
                    f"the file system of the store keeps no locks, so nobody knows who uses it: {layout.root}",
                    "move the store to a local disk, or remove it when nothing runs",
                )
            if anybody(layout):
                raise Transient("another run uses the store", "collect garbage when it has ended")
            return _Collection(layout, locked, dry_run=False).collect()


class _Collection:
    def __init__(self, layout: Layout, locked: LockedDigests, *, dry_run: bool) -> None:
        self.layout = layout
        self.locked = locked
        self.dry_run = dry_run
        self.freed: list[Freed] = []

    def collect(self) -> GcReport:
        keys, digests = self._roots()
        records = {record.key: record for record in all_records(self.layout)}
        kept = {key for key, record in records.items() if key in keys or record.digest in digests}
        digests |= {digest for key in kept if (digest := records[key].digest) is not None}
        for key in records.keys() - kept:
            self._free("record", self.layout.key(key))
        partials = {records[key].partial for key in kept}
        for name in _names(self.layout.partials):
            if f"sha256:{name}" not in partials:
                self._free("record", self.layout.partials / name)
        held = held_objects(self.layout, digests)
        self._artifacts(digests)
        for name in _names(self.layout.objects):
            if name not in held:
                self._free("object", self.layout.objects / name)
        self._leftovers(keys)
        kept_bytes = sum(_size(self.layout.object(sha256)) for sha256 in held)
        kept_artifacts = sum(self.layout.tree(digest).exists() for digest in digests)
        return GcReport(self.dry_run, tuple(self.freed), kept_artifacts, kept_bytes)

    def _roots(self) -> tuple[set[str], set[str]]:
        """The keys that existing manifests name, and the digests that existing lock files name."""
        keys: set[str] = set()
        digests: set[str] = set()
        for path, root in all_roots(self.layout):
            if root.exists:
                keys |= root.keys
                if root.lock is not None and os.path.exists(root.lock):
                    digests |= self.locked(Path(root.lock))
            else:
                self._free("root", path)
        return keys, digests

    def _artifacts(self, digests: set[str]) -> None:
        kept = {digest.partition(":")[2] for digest in digests}
        for name in _names(self.layout.artifacts):
            if name.partition(".")[0] not in kept:
                self._free("artifact", self.layout.artifacts / name)
        for name in sealed_names(self.layout.released):
            if name not in kept:
                self._free("record", self.layout.released / f"{name}.json")

    def _leftovers(self, keys: set[str]) -> None:
        working = {key.partition(":")[2] for key in keys}
        for name in _names(self.layout.work):
            if name not in working:
                self._free("work", self.layout.work / name)
        for path in _files(self.layout.parts):
            # A part whose bytes are an artifact's costs nothing; one that is only kept for later edits does.
            if not path.is_symlink() or not path.exists():
                self._free("part", path)
        for name in _names(self.layout.runs)[:-RUNS]:
            self._free("run", self.layout.runs / name)
        for name in _names(self.layout.quarantine):
            self._free("quarantine", self.layout.quarantine / name)
        for folder in (self.layout.keys, self.layout.artifacts, self.layout.roots, self.layout.released):
            for name in filter(is_partial, _names(folder)):
                self._free("temporary", folder / name)
        for name in _names(self.layout.locks):
            if is_hex(name.partition(".")[0]) and name.partition(".")[0] not in working:
                self._free("temporary", self.layout.locks / name)

    def _free(self, kind: Kind, path: Path) -> None:
        size = _size(path)
        if not self.dry_run:
            remove_tree(path)
        self.freed.append(Freed(kind, str(path.relative_to(self.layout.root)), size))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            yield Path(place) / name


def _size(path: Path) -> int:
    """Bytes of a file, or of the files below a directory; links count nothing."""
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(item.lstat().st_size for item in _files(path) if not item.is_symlink())
