"""Freeing what no manifest or lock file names any more."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bigpipe.errors import Transient, UsageError
from bigpipe.files import is_partial

from .artifacts import all_records, load_artifact, remove_tree
from .keeping import all_roots, root_path
from .layout import Layout, explained, is_hex, names_in, sealed_digests
from .locks import Presence, StoreLock, anybody, keeps_out

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
    """Free all that no existing manifest or lock names. Raise Transient while another process uses the store,
    UsageError where a lock file cannot be read."""
    with explained(layout.root):
        layout.refuse_foreign()
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


@dataclass
class _Collection:
    layout: Layout
    locked: LockedDigests
    dry_run: bool
    freed: list[Freed] = field(default_factory=list)

    def collect(self) -> GcReport:
        """What names something goes before what it names, so that a crash leaves no name without its bytes."""
        layout = self.layout
        keys, digests = self._roots()
        records = all_records(layout)
        kept = {record.key: record for record in records if record.key in keys or record.digest in digests}
        digests |= {record.digest for record in kept.values() if record.digest is not None}
        for record in records:
            if record.key not in kept:
                self._free("record", layout.key(record.key))
        self._free_others("record", layout.partials, _hexes(record.partial for record in kept.values()))
        there = digests & {*sealed_digests(layout.artifacts)}
        artifacts = [artifact for digest in there if (artifact := load_artifact(layout, digest))]
        named = {f"{name}.json" for name in _hexes(digests)}
        self._free_others("artifact", layout.artifacts, named | _hexes(digests))
        self._free_others("record", layout.released, named)
        held = {sha256 for artifact in artifacts for sha256 in artifact.objects}
        self._free_others("object", layout.objects, held)
        self._leftovers(_hexes(keys))
        kept_bytes = sum(_size(layout.object(sha256)) for sha256 in held)
        kept_artifacts = sum(layout.tree(artifact.digest).exists() for artifact in artifacts)
        return GcReport(self.dry_run, tuple(self.freed), kept_artifacts, kept_bytes)

    def _roots(self) -> tuple[set[str], set[str]]:
        """The keys that existing manifests name, and the digests that existing lock files name."""
        keys: set[str] = set()
        digests: set[str] = set()
        for root in all_roots(self.layout):
            if root.exists:
                keys |= root.keys
                if root.lock is not None and os.path.exists(root.lock):
                    digests |= self.locked(Path(root.lock))
            else:
                self._free("root", root_path(self.layout, root.manifest))
        return keys, digests

    def _leftovers(self, working: set[str]) -> None:
        layout = self.layout
        self._free_others("work", layout.work, working)
        parts = [*_files(layout.parts)]
        # A part whose bytes are an artifact's costs nothing, nor what is noted beside it under the same name; one that
        # is only kept for later edits does.
        kept = {path.with_suffix("") for path in parts if path.is_symlink() and path.exists()}
        for path in parts:
            if path.with_suffix("") not in kept or is_partial(path.name):
                self._free("part", path)
        self._free_others("run", layout.runs, names_in(layout.runs)[-RUNS:])
        self._free_others("quarantine", layout.quarantine, ())
        for folder in (layout.keys, layout.roots):
            self._free_others("temporary", folder, [name for name in names_in(folder) if not is_partial(name)])
        others = [name for name in names_in(layout.locks) if not is_hex(name.partition(".")[0])]
        self._free_others("temporary", layout.locks, {*others, *(f"{name}.lock" for name in working)})

    def _free_others(self, kind: Kind, folder: Path, kept: Collection[str]) -> None:
        """Free what is in a folder under other names than these."""
        for name in names_in(folder):
            if name not in kept:
                self._free("temporary" if is_partial(name) else kind, folder / name)

    def _free(self, kind: Kind, path: Path) -> None:
        size = _size(path)
        if not self.dry_run:
            remove_tree(path)
        self.freed.append(Freed(kind, str(path.relative_to(self.layout.root)), size))


def _hexes(digests: Iterable[str]) -> set[str]:
    return {digest.partition(":")[2] for digest in digests}


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
