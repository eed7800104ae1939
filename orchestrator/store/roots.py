"""What a store must keep: for every manifest and lock file ever run, the keys its nodes had last."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .hashing import digest_of, hex_of
from .keyrecord import sealed_names
from .layout import Layout
from .locks import StoreLock
from .sealing import Damaged, explained, read_sealed, write_sealed

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


def root_path(layout: Layout, manifest: Path) -> Path:
    return layout.roots / f"{hex_of(digest_of('root', os.path.abspath(manifest)))}.json"


def load_root(layout: Layout, path: Path) -> Root | None:
    """Return None where there is none; a damaged one goes to quarantine."""
    with explained(path):
        try:
            return Root(**read_sealed(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (Damaged, TypeError):
            layout.set_aside(path)
    return None


def all_roots(layout: Layout) -> Iterator[tuple[Path, Root]]:
    for name in sealed_names(layout.roots):
        path = layout.roots / f"{name}.json"
        root = load_root(layout, path)
        if root is not None:
            yield path, root


def remember(layout: Layout, manifest: Path, lock: Path | None, name: str, nodes: Mapping[str, str]) -> None:
    """Merge nodes → keys into the root of a manifest. A key without a record counts as begun."""
    path = root_path(layout, manifest)
    with explained(path):
        old = load_root(layout, path)
        if old is not None and _says(layout, old, lock, name, nodes):
            return
        with StoreLock(layout.locks / "roots"):
            write_sealed(path, asdict(_merged(layout, path, manifest, lock, name, nodes)))


def _says(layout: Layout, root: Root, lock: Path | None, name: str, nodes: Mapping[str, str]) -> bool:
    """Is it all there already? A run that finds everything cached writes nothing."""
    known = root.name == name and root.lock == _absolute(lock)
    return known and not root.begun and all(root.nodes.get(node) == key for node, key in nodes.items())


def _merged(layout: Layout, path: Path, manifest: Path, lock: Path | None, name: str, nodes: Mapping[str, str]) -> Root:
    roots = dict(all_roots(layout))
    old = roots.get(path)
    done = {node: key for node, key in nodes.items() if layout.key(key).exists()}
    begun = {node: key for node, key in (dict(old.begun) if old else {}).items() if node not in nodes}
    begun |= {node: key for node, key in nodes.items() if node not in done}
    return Root(
        manifest=os.path.abspath(manifest),
        lock=_absolute(lock),
        name=name,
        serial=1 + max((root.serial for root in roots.values()), default=0),
        nodes={**(old.nodes if old else {}), **done},
        history=_history(old, done),
        begun=begun,
    )


def _history(old: Root | None, done: Mapping[str, str]) -> dict[str, list[str]]:
    history = {node: list(keys) for node, keys in old.history.items()} if old else {}
    for node, key in done.items():
        earlier = [known for known in history.get(node, []) if known != key]
        history[node] = [*earlier, key][-HISTORY:]
    return history


def _absolute(path: Path | None) -> str | None:
    return None if path is None else os.path.abspath(path)
