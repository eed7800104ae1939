"""Letting go of bytes that nobody wants kept: `cache: false`.

A node's artifact is released once its last consumer has published. Its digest, its metrics and the sizes of its files
stay recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .artifacts import Artifact, Entry, all_artifacts, load_artifact, remove_tree, save_artifact
from .keyrecord import KeyRecord, all_records, save_record
from .layout import Layout
from .locks import StoreLock
from .presence import Presence
from .sealing import Damaged, explained, read_sealed, sealed_digests, write_sealed


def release(layout: Layout, presence: Presence, digest: str, key: str | None) -> int:
    """Note that `key` (None: whoever has it) does not need the bytes kept, and free what can be freed now.

    The bytes go once every record of this artifact has released it and no other process is in the store, which may be
    about to read them; else the next to leave or enter does it. Return the bytes freed.
    """
    with explained(layout.released), StoreLock(layout.locks / "released"):
        keys = {item.key for item in all_records(layout) if item.digest == digest} if key is None else {key}
        write_sealed(layout.release(digest), sorted(keys | _released_by(layout, digest)))
    return sweep(layout, presence)


def keep_again(layout: Layout, digest: str, key: str) -> None:
    """The artifact is published anew: what `key` released before counts no more. Under the lock of `objects`, so
    that no `sweep` comes between."""
    if not layout.release(digest).exists():
        return
    with explained(layout.released), StoreLock(layout.locks / "released"):
        remaining = _released_by(layout, digest) - {key}
        if remaining:
            write_sealed(layout.release(digest), sorted(remaining))
        else:
            layout.release(digest).unlink(missing_ok=True)


def _released_by(layout: Layout, digest: str) -> set[str]:
    try:
        return set(read_sealed(layout.release(digest)))
    except (FileNotFoundError, Damaged):
        return set()


def sweep(layout: Layout, presence: Presence) -> int:
    """Free what was released and nobody needs. Return the bytes freed."""
    digests = sealed_digests(layout.released)
    if not digests:
        return 0
    presence.enter()
    # While `gc` is locked nobody enters, so whoever is alone stays alone.
    with explained(layout.released), StoreLock(layout.locks / "gc"):
        if not presence.alone():
            return 0
        with StoreLock(layout.locks / "objects"), StoreLock(layout.locks / "released"):
            records = list(all_records(layout))
            return sum(_drop(layout, digest) for digest in digests if _unwanted(layout, digest, records))


def _unwanted(layout: Layout, digest: str, records: Iterable[KeyRecord]) -> bool:
    return {record.key for record in records if record.digest == digest} <= _released_by(layout, digest)


def _drop(layout: Layout, digest: str) -> int:
    """Removes the tree and those objects that no other artifact holds; what it held stays recorded."""
    artifact = load_artifact(layout, digest)
    if artifact is None or artifact.dropped:
        return 0
    save_artifact(layout, replace(artifact, dropped=True))
    remove_tree(layout.tree(digest))
    held = {sha256 for other in all_artifacts(layout) for sha256 in other.objects}
    return sum(_unlink(layout.object(sha256)) for sha256 in artifact.objects - held)


def dropped_artifact(record: KeyRecord) -> Artifact:
    """Return the artifact that a record names, without its bytes."""
    files = {name: Entry(str(file["sha256"]), (int(file["size"]), 0, 0, 0)) for name, file in record.files.items()}
    return Artifact(record.digest or "", record.artifact_type or "", files, dropped=True)


def record_forgone(layout: Layout, record: KeyRecord, files: Mapping[str, tuple[str, int]]) -> KeyRecord:
    """Record an artifact of which no bytes are kept. One of the same digest that is there stays as it is."""
    record = record.holding(files)
    with explained(layout.root), StoreLock(layout.locks / "objects", shared=True):
        if load_artifact(layout, record.digest or "") is None:
            save_artifact(layout, dropped_artifact(record))
        save_record(layout, record)
    return record


def _unlink(path: Path) -> int:
    """Return the bytes freed: 0 where nothing is there."""
    with suppress(FileNotFoundError):
        size = os.lstat(path).st_size
        path.unlink()
        return size
    return 0
