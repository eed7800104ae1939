"""Freeing what no manifest or lock file names any more, and what somebody says."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from bigpipe.errors import Transient, UsageError
from bigpipe.files import is_partial

from .artifacts import Artifact, KeyRecord, all_records, load_artifact, load_record, remove_tree
from .keeping import PATIENCE, all_roots, is_young, root_path, wanted_keys, wanting
from .layout import Layout, explained, hex_of, is_hex, names_in, sealed_digests
from .locks import Presence, StoreLock, anybody, keeps_out
from .work import fetching_key

Kind = Literal["record", "artifact", "object", "work", "part", "temporary", "quarantine", "root", "run"]

RUNS = 200
"""Runs whose records and logs stay, the latest ones; an id begins with its time."""
NOBODY: Mapping[str, KeyRecord] = MappingProxyType({})
LockedDigests = Callable[[Path], set[str]]
"""Gives the digests of the artifacts that a lock file names; UsageError where it cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What stays although nobody names it."""

    age: timedelta | None = None
    """All that is younger than this; None: what `PATIENCE` says, and nothing else."""
    runs: int = RUNS

    def younger(self, created: str) -> bool:
        """Was it made within the age that somebody asked for?"""
        return bool(self.age) and is_young(created, self.age or PATIENCE)

    @property
    def patience(self) -> timedelta:
        return PATIENCE if self.age is None else self.age


@dataclass(frozen=True, slots=True)
class Freed:
    """One thing that was freed, or would be."""

    kind: Kind
    name: str
    bytes: int
    node: str = ""
    """Of a computation and its bytes: the node that gave them."""
    created: str = ""
    """When, ISO 8601 in UTC."""
    manifest: str = ""


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


def collect_garbage(
    layout: Layout, presence: Presence, locked: LockedDigests, keeping: Keeping, *, dry_run: bool
) -> GcReport:
    """Free all that no existing manifest or lock names. Raise Transient while another process uses the store,
    UsageError where a lock file cannot be read."""
    layout.refuse_foreign()
    if not layout.there:
        return GcReport(dry_run, (), 0, 0)
    with _alone(layout, presence, dry_run):
        return _Collection(layout, dry_run).collect(locked, keeping)


def remove_artifacts(layout: Layout, presence: Presence, digests: Collection[str], *, dry_run: bool) -> GcReport:
    """Free these artifacts and the records of the computations that gave them, which are then done again where their
    results are asked for; objects that others hold stay. Raise Transient while another process uses the store."""
    with _alone(layout, presence, dry_run):
        return _Collection(layout, dry_run).remove(digests)


def remove_runs(layout: Layout, runs: Sequence[str], *, dry_run: bool) -> tuple[Freed, ...]:
    """Free the records and logs of these runs, which are over: what makes a run one goes first."""
    with explained(layout.runs):
        collection = _Collection(layout, dry_run)
        for run in runs:
            collection.free("run", layout.runs / run, first="run.json")
    return tuple(collection.freed)


@contextmanager
def _alone(layout: Layout, presence: Presence, dry_run: bool) -> Iterator[None]:
    """Within, no other process reads or writes the store, unless nothing is changed anyway."""
    with explained(layout.root):
        layout.refuse_foreign()
        if dry_run:
            yield
            return
        # Nothing new is written before bytes are freed: `gc` is what people call when the disk is full.
        presence.leave()  # whoever enters waits for the lock below, this process too
        with StoreLock(layout.locks / "gc") as entrance, StoreLock(layout.locks / "objects"):
            if not keeps_out(entrance.path):
                raise UsageError(
                    f"the file system of the store keeps no locks, so nobody knows who uses it: {layout.root}",
                    "move the store to a local disk, or remove it when nothing runs",
                )
            if anybody(layout):
                raise Transient(
                    "another run uses the store", "try again when it has ended; `bigpipe ps` lists what runs"
                )
            yield


@dataclass
class _Collection:
    """What names something goes before what it names, so that a crash leaves no name without its bytes."""

    layout: Layout
    dry_run: bool
    freed: list[Freed] = field(default_factory=list)

    def collect(self, locked: LockedDigests, keeping: Keeping) -> GcReport:
        keys, digests = self._roots(locked, keeping)
        made = {record.key for record in all_records(self.layout) if keeping.younger(record.created)}
        held = self._records(lambda record: record.key in keys | made or record.digest in digests, digests)
        self._leftovers(self._unfinished(keys), keeping)
        return self._report(held)

    def remove(self, digests: Collection[str]) -> GcReport:
        others = {record.digest for record in all_records(self.layout) if record.digest} - {*digests}
        there = {*sealed_digests(self.layout.artifacts)} - {*digests}
        return self._report(self._records(lambda record: record.digest not in digests, others | there))

    def _records(self, stays: Callable[[KeyRecord], bool], digests: set[str]) -> list[Artifact]:
        """Free the records that do not stay, the artifacts that neither those nor `digests` name, and the objects that
        no other artifact holds. Return the artifacts that are still there."""
        layout = self.layout
        records = all_records(layout)
        kept = {record.key: record for record in records if stays(record)}
        digests = digests | {record.digest for record in kept.values() if record.digest is not None}
        gone = {record.digest: record for record in records if record.key not in kept}
        for record in records:
            if record.key not in kept:
                self.free("record", layout.key(record.key), record)
        self._free_others("record", layout.partials, _hexes(record.partial for record in kept.values()))
        known = {*sealed_digests(layout.artifacts)}
        owners = {
            sha256: record
            for digest, record in gone.items()
            if digest in known - digests and (artifact := load_artifact(layout, digest))
            for sha256 in artifact.objects
        }
        artifacts = [artifact for digest in digests & known if (artifact := load_artifact(layout, digest))]
        named = {f"{name}.json" for name in _hexes(digests)}
        by_hex = {hex_of(digest): record for digest, record in gone.items() if digest}
        self._free_others("artifact", layout.artifacts, named | _hexes(digests), by_hex)
        self._free_others("record", layout.released, named)
        held = {sha256 for artifact in artifacts for sha256 in artifact.objects}
        self._free_others("object", layout.objects, held, owners)
        return artifacts

    def _report(self, artifacts: Iterable[Artifact]) -> GcReport:
        held = {sha256 for artifact in artifacts for sha256 in artifact.objects}
        kept_artifacts = sum(self.layout.tree(artifact.digest).exists() for artifact in artifacts)
        kept_bytes = sum(_size(self.layout.object(sha256)) for sha256 in held)
        return GcReport(self.dry_run, tuple(self.freed), kept_artifacts, kept_bytes)

    def _roots(self, locked: LockedDigests, keeping: Keeping) -> tuple[set[str], set[str]]:
        """The keys that manifests name, and the digests that existing lock files name."""
        keys: set[str] = set()
        digests: set[str] = set()
        roots = all_roots(self.layout)
        stay = {root.manifest for root in wanting(roots, keeping.patience)}
        for root in roots:
            if root.manifest not in stay:
                self.free("root", root_path(self.layout, root.manifest))
                continue
            keys |= wanted_keys(root, keeping.patience)
            if root.lock is not None and os.path.exists(root.lock):
                digests |= locked(Path(root.lock))
        return keys, digests

    def _unfinished(self, keys: Iterable[str]) -> set[str]:
        """Under which names the work of these keys lies that somebody may go on with, and what was coming from a
        remote store: not where all that it was to give is there."""
        lacking = [key for key in keys if not self._is_there(key)]
        return _hexes([*lacking, *map(fetching_key, lacking)])

    def _is_there(self, key: str) -> bool:
        if (record := load_record(self.layout, key)) is None or record.digest is None:
            return record is not None
        artifact = load_artifact(self.layout, record.digest)
        return artifact is not None and not artifact.dropped

    def _leftovers(self, working: set[str], keeping: Keeping) -> None:
        layout = self.layout
        young = {
            path for folder in (layout.work, layout.runs) for path in _entries(folder) if keeping.younger(_when(path))
        }
        self._free_others("work", layout.work, working | {path.name for path in young})
        parts = [*_files(layout.parts)]
        # A part whose bytes are an artifact's costs nothing, nor what is noted beside it under the same name; one that
        # is only kept for later edits does.
        gone = {(layout.root / item.name).resolve() for item in self.freed if item.kind == "object"}
        linked = [path for path in parts if path.is_symlink() and path.exists()]
        kept = {path.with_suffix("") for path in linked if path.resolve() not in gone}
        for path in parts:
            stays = path.with_suffix("") in kept or keeping.younger(_when(path))
            if not stays or is_partial(path.name):
                self.free("part", path)
        runs = names_in(layout.runs)
        latest = runs[-keeping.runs :] if keeping.runs else []
        self._free_others("run", layout.runs, {*latest, *(path.name for path in young)})
        self._free_others("quarantine", layout.quarantine, ())
        self._free_others("temporary", layout.meetings, ())
        for folder in (layout.keys, layout.roots):
            self._free_others("temporary", folder, [name for name in names_in(folder) if not is_partial(name)])
        others = [name for name in names_in(layout.locks) if not is_hex(name.partition(".")[0])]
        self._free_others("temporary", layout.locks, {*others, *(f"{name}.lock" for name in working)})

    def _free_others(
        self, kind: Kind, folder: Path, kept: Collection[str], owners: Mapping[str, KeyRecord] = NOBODY
    ) -> None:
        """Free what is in a folder under other names than these. owners: what gave it, by name."""
        for name in names_in(folder):
            if name not in kept:
                owner = owners.get(name.removesuffix(".json"))
                self.free("temporary" if is_partial(name) else kind, folder / name, owner)

    def free(self, kind: Kind, path: Path, owner: KeyRecord | None = None, *, first: str = "") -> None:
        """first: what of a folder goes first."""
        size = _size(path)
        kind = "record" if kind == "artifact" and path.suffix == ".json" else kind  # what lies beside its files
        if not self.dry_run:
            if first:
                remove_tree(path / first)
            remove_tree(path)
        told = (owner.node, owner.created, owner.manifest) if owner else ()
        self.freed.append(Freed(kind, str(path.relative_to(self.layout.root)), size, *told))


def _hexes(digests: Iterable[str]) -> set[str]:
    return {digest.partition(":")[2] for digest in digests}


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in names_in(folder)]


def _when(path: Path) -> str:
    """When something was last changed, ISO 8601 in UTC."""
    return datetime.fromtimestamp(path.lstat().st_mtime, UTC).isoformat()


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
