"""Letting go of bytes that nobody wants kept: `cache: false`.

A node's artifact is released once its last consumer has published. Its digest, its metrics and the sizes of its files
stay recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .artifacts import load_artifact, remove_tree, save_artifact
from .keyrecord import KeyRecord, all_records, sealed_names
from .layout import Layout
from .locks import StoreLock
from .presence import Presence
from .sealing import Damaged, explained, read_sealed, write_sealed


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
    names = sealed_names(layout.released)
    if not names:
        return 0
    presence.enter()
    # While `gc` is locked nobody enters, so whoever is alone stays alone.
    with explained(layout.released), StoreLock(layout.locks / "gc"):
        if not presence.alone():
            return 0
        with StoreLock(layout.locks / "objects"), StoreLock(layout.locks / "released"):
            records = list(all_records(layout))
            return sum(_drop(layout, digest) for digest in map(_digest, names) if _unwanted(layout, digest, records))


def _digest(name: str) -> str:
    return f"sha256:{name}"


def _unwanted(layout: Layout, digest: str, records: Iterable[KeyRecord]) -> bool:
    return {record.key for record in records if record.digest == digest} <= _released_by(layout, digest)


def _drop(layout: Layout, digest: str) -> int:
    """Removes the tree and those objects that no other artifact holds; what it held stays recorded."""
    artifact = load_artifact(layout, digest)
    if artifact is None or artifact.dropped:
        return 0
    save_artifact(layout, replace(artifact, dropped=True))
    remove_tree(layout.tree(digest))
    held = held_objects(layout, map(_digest, sealed_names(layout.artifacts)))
    ours = {entry.sha256 for entry in artifact.files.values() if entry.reference is None}
    return sum(unlink(layout.object(sha256)) for sha256 in ours - held)


def held_objects(layout: Layout, digests: Iterable[str]) -> set[str]:
    """Return the objects that these artifacts hold."""
    held: set[str] = set()
    for digest in digests:
        artifact = load_artifact(layout, digest)
        if artifact is not None and not artifact.dropped:
            held.update(entry.sha256 for entry in artifact.files.values() if entry.reference is None)
    return held


def unlink(path: Path) -> int:
    """Return the bytes freed: 0 where nothing is there."""
    with suppress(FileNotFoundError):
        size = os.lstat(path).st_size
        path.unlink()
        return size
    return 0
