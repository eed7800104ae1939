"""What a store must keep, and what it need not.

For every manifest and lock file ever run it remembers the keys that the nodes had last. Bytes that nobody wants kept
(`cache: false`) are released once the last consumer of a node's artifact has published; its digest, its metrics and the
sizes of its files stay recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .artifacts import all_artifacts, all_records, let_go, load_artifact
from .hashing import digest_of
from .layout import Layout, explained, record_path, sealed_digests, write_sealed
from .locks import Presence, StoreLock

HISTORY = 8
"""Keys that are remembered per node."""


@dataclass(frozen=True, kw_only=True)
class Root:
    """What a manifest has run: its nodes' keys, which `gc` keeps."""

    manifest: str
    """Absolute path."""
    lock: str | None
    name: str
    serial: int = 0
    """Counts up over all roots of a store: the largest was remembered last, whatever the clock says."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Node → key of its last record."""
    history: Mapping[str, list[str]] = field(default_factory=dict)
    """Node → its latest keys, the last one included, oldest first. `gc` may have freed all but the last."""
    begun: Mapping[str, str] = field(default_factory=dict)
    """Node → key that it has begun to work on and has no record of yet."""

    @property
    def exists(self) -> bool:
        """Whether the manifest or its lock file is still there."""
        return any(path is not None and os.path.exists(path) for path in (self.manifest, self.lock))

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.nodes.values()) | frozenset(self.begun.values())


def root_path(layout: Layout, manifest: str | Path) -> Path:
    return record_path(layout.roots, digest_of("root", os.path.abspath(manifest)))


def load_root(layout: Layout, path: Path) -> Root | None:
    return layout.load(path, lambda data: Root(**data))


def all_roots(layout: Layout) -> list[Root]:
    paths = (record_path(layout.roots, digest) for digest in sealed_digests(layout.roots))
    return [root for path in paths if (root := load_root(layout, path))]


def named_roots(layout: Layout, manifest: Path, name: str) -> list[Root]:
    """Return the roots of manifests of this name, that of this path last and the latest of the others before it."""
    named = sorted((root for root in all_roots(layout) if root.name == name), key=lambda root: root.serial)
    own = load_root(layout, root_path(layout, manifest))
    return [*named, own] if own else named


def remember(layout: Layout, manifest: Path, lock: Path | None, name: str, nodes: Mapping[str, str]) -> None:
    """Merge nodes → keys into the root of a manifest. A key without a record counts as begun."""
    path = root_path(layout, manifest)
    beside = None if lock is None else os.path.abspath(lock)
    new = Root(manifest=os.path.abspath(manifest), lock=beside, name=name, nodes=nodes)
    with explained(path):
        old = load_root(layout, path)
        known = old is not None and (old.name, old.lock, old.begun) == (name, new.lock, {})
        if old is not None and known and nodes.items() <= old.nodes.items():
            return  # a run that finds everything cached writes nothing
        with StoreLock(layout.locks / "roots"):
            write_sealed(path, asdict(_merged(layout, load_root(layout, path), new)))


def _merged(layout: Layout, old: Root | None, new: Root) -> Root:
    old = old or replace(new, nodes={})
    done = {node: key for node, key in new.nodes.items() if layout.key(key).exists()}
    history = {node: [known for known in old.history.get(node, []) if known != key] for node, key in done.items()}
    return replace(
        new,
        serial=1 + max((root.serial for root in all_roots(layout)), default=0),
        nodes={**old.nodes, **done},
        history={**old.history, **{node: [*history[node], key][-HISTORY:] for node, key in done.items()}},
        begun={node: key for node, key in {**old.begun, **new.nodes}.items() if node not in done},
    )


def release(layout: Layout, presence: Presence, digest: str, key: str) -> int:
    """Note that `key` does not need the bytes kept, and free what can be freed now; return the bytes freed.

    They go once every record of this artifact has released it and no other process is in the store, which may be about
    to read them; else the next to leave or enter does it.
    """
    with explained(layout.released), StoreLock(layout.locks / "released"):
        write_sealed(record_path(layout.released, digest), sorted({key} | _released_by(layout, digest)))
    return sweep(layout, presence)


def keep_again(layout: Layout, digest: str, key: str) -> None:
    """The artifact is published anew: what `key` released before counts no more. Under the lock of `objects`, so
    that no `sweep` comes between."""
    path = record_path(layout.released, digest)
    if not path.exists():
        return
    with explained(path), StoreLock(layout.locks / "released"):
        if remaining := _released_by(layout, digest) - {key}:
            write_sealed(path, sorted(remaining))
        else:
            path.unlink(missing_ok=True)


def _released_by(layout: Layout, digest: str) -> set[str]:
    found: set[str] | None = layout.load(record_path(layout.released, digest), set)
    return found or set()


def sweep(layout: Layout, presence: Presence) -> int:
    """Free what was released and nobody needs. Return the bytes freed."""
    with explained(layout.released):
        digests = sealed_digests(layout.released)
    if not digests:
        return 0
    presence.enter()
    # While `gc` is locked nobody enters, so whoever is alone stays alone.
    with explained(layout.released), StoreLock(layout.locks / "gc"):
        if not presence.alone():
            return 0
        with StoreLock(layout.locks / "objects"), StoreLock(layout.locks / "released"):
            released = {digest: _released_by(layout, digest) for digest in digests}
            records = [(item.key, item.digest or "") for item in all_records(layout)]
            wanted = {digest for key, digest in records if key not in released.get(digest, ())}
            return sum(_drop(layout, digest) for digest in digests if digest not in wanted)


def _drop(layout: Layout, digest: str) -> int:
    """Remove the tree and those objects that no other artifact holds; what it held stays recorded."""
    artifact = load_artifact(layout, digest)
    if artifact is None or artifact.dropped:
        return 0
    let_go(layout, artifact)
    held = {sha256 for other in all_artifacts(layout) for sha256 in other.objects}
    freed = 0
    for path in map(layout.object, artifact.objects - held):
        with suppress(FileNotFoundError):
            size = os.lstat(path).st_size
            path.unlink()
            freed += size
    return freed
