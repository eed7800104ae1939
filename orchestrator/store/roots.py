"""What a store must keep: for every manifest and lock file ever run, the keys its nodes had last."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .hashing import digest_of
from .layout import Layout
from .locks import StoreLock
from .sealing import explained, sealed_digests, write_sealed

HISTORY = 8
"""Keys that are remembered per node."""


@dataclass(frozen=True, kw_only=True)
class Root:
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
    return layout.root_record(digest_of("root", os.path.abspath(manifest)))


def load_root(layout: Layout, path: Path) -> Root | None:
    return layout.load(path, lambda data: Root(**data))


def all_roots(layout: Layout) -> Iterator[Root]:
    for digest in sealed_digests(layout.roots):
        if root := load_root(layout, layout.root_record(digest)):
            yield root


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
        if old is not None and _says(old, new):
            return
        with StoreLock(layout.locks / "roots"):
            write_sealed(path, asdict(_merged(layout, load_root(layout, path), new)))


def _says(old: Root, new: Root) -> bool:
    """Is it all there already? A run that finds everything cached writes nothing."""
    return (old.name, old.lock, old.begun) == (new.name, new.lock, {}) and new.nodes.items() <= old.nodes.items()


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
