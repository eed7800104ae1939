"""What a store must keep, and what it need not.

For every manifest and lock file ever run it remembers the keys that the nodes had last, with each set of `-p` values,
and which file of which repository the manifest is: a checkout may move, or have another branch checked out. Bytes that
nobody wants kept (`cache: false`) are released once the last consumer of a node's artifact has published; its digest,
its metrics and the sizes of its files stay recorded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from bigpipe.errors import BigpipeError
from bigpipe.git import origin_of

from .artifacts import all_artifacts, all_records, let_go, load_artifact
from .hashing import digest_of
from .layout import Layout, explained, record_path, sealed_digests, write_sealed
from .locks import Presence, StoreLock

HISTORY = 8
"""Keys that are remembered per node."""
VARIANTS = 256
"""Sets of `-p` values that are remembered per manifest."""
PATIENCE = timedelta(days=30)
"""How long after its last run a manifest that is not where it was counts as there, if it lay in a checkout or never was
a file, and what ran with other `-p` values than those used last stays."""
FRESH = timedelta(days=1)
"""How far the time of the last use may lie behind: a run that finds everything there writes nothing."""


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
    lets_go: Sequence[str] = ()
    """The keys among these whose bytes it does not need once they were taken (`cache: false`)."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per set of `-p` values, those used last at the end: the `keys` that the nodes had with them, those that they have
    `begun` to work on and have no record of yet, and when they were `used`, as far as `FRESH`."""
    written: bool = True
    """Was there a file? A command without a recipe runs one that is not."""
    remote: str = ""
    inside: str = ""
    top: str = ""
    """Its `git.Origin`, where it lay in a checkout."""

    @property
    def used(self) -> str:
        """When it ran last, ISO 8601 in UTC; empty where that is not known."""
        return max((str(variant["used"]) for variant in self.variants.values()), default="")

    @property
    def exists(self) -> bool:
        """Whether the manifest or its lock file is still there."""
        return any(path is not None and os.path.exists(path) for path in (self.manifest, self.lock))

    @property
    def keys(self) -> frozenset[str]:
        last = [*self.variants.values()][-1:]
        return frozenset(chain(self.nodes.values(), *map(begun_keys, last)))


def begun_keys(variant: Mapping[str, Any]) -> Collection[str]:
    """Return the keys that nodes have begun to work on with a set of `-p` values."""
    begun: Mapping[str, str] = variant.get("begun", {})
    return begun.values()


def root_path(layout: Layout, manifest: str | Path) -> Path:
    return record_path(layout.roots, digest_of("root", os.path.abspath(manifest)))


def load_root(layout: Layout, path: Path) -> Root | None:
    known = {each.name for each in fields(Root)}  # what another version of bigpipe wrote may say more
    return layout.load(path, lambda data: Root(**{name: value for name, value in data.items() if name in known}))


def all_roots(layout: Layout) -> list[Root]:
    paths = (record_path(layout.roots, digest) for digest in sealed_digests(layout.roots))
    return [root for path in paths if (root := load_root(layout, path))]


def named_roots(layout: Layout, manifest: Path, name: str) -> list[Root]:
    """Return the roots of manifests of this name, that of this path last and the latest of the others before it. An
    empty name: that of this path alone."""
    others = all_roots(layout) if name else []
    named = sorted((root for root in others if root.name == name), key=lambda root: root.serial)
    own = load_root(layout, root_path(layout, manifest))
    return [*named, own] if own else named


def is_wanted(used: str, patience: timedelta = PATIENCE) -> bool:
    """Return whether it is too early to say that something used then is not wanted any more."""
    return bool(patience) and is_young(used, patience + FRESH)


def wanting(roots: Sequence[Root], patience: timedelta = PATIENCE) -> list[Root]:
    """Return the roots that still want what they name: those that live, and for a while those that lay in a checkout or
    never were a file."""
    there = {root.manifest for root in living(roots)}
    return [
        root
        for root in roots
        if root.manifest in there or ((root.top or not root.written) and is_wanted(root.used, patience))
    ]


def wanted_keys(root: Root, patience: timedelta = PATIENCE) -> set[str]:
    """Return the keys that a root names: those of its nodes, and of other `-p` values for a while."""
    others = [_variant_keys(variant) for variant in root.variants.values() if is_wanted(variant["used"], patience)]
    return {*root.keys, *chain.from_iterable(others)}


def _variant_keys(variant: Mapping[str, Any]) -> Iterator[str]:
    yield from variant["keys"].values()
    yield from begun_keys(variant)


def remember(
    layout: Layout, manifest: Path, lock: Path | None, name: str, nodes: Mapping[str, str], variant: str = "",
    known: Collection[str] | None = None, lets_go: Collection[str] = (),
) -> None:  # fmt: skip
    """Merge nodes → keys into the root of a manifest. A key without a record counts as begun. variant: names the `-p`
    values that the nodes have these keys with. known: all nodes that the manifest has with them: what it had besides
    it names no more. None: that is not known. lets_go: those of `nodes` whose bytes it does not need kept."""
    path = root_path(layout, manifest)
    beside = None if lock is None else os.path.abspath(lock)
    kept = {key for node, key in nodes.items() if node not in lets_go}
    gone = {key for node, key in nodes.items() if node in lets_go} - kept
    new = Root(manifest=os.path.abspath(manifest), lock=beside, name=name, nodes=nodes, lets_go=sorted(gone))
    with explained(path):
        old = load_root(layout, path)
        same = old is not None and (old.name, old.lock) == (name, new.lock)
        same = same and old is not None and not begun_keys(old.variants.get(variant, {}))
        if old is not None and same and nodes.items() <= old.nodes.items() and gone == {*old.lets_go} & (kept | gone):
            if is_young(_used(old, variant), FRESH) and (known is None or old.nodes.keys() <= {*known}):
                return  # a run that finds everything cached writes nothing
            unneeded: tuple[type[Exception], ...] = (OSError, BigpipeError)  # nothing but the time: not worth failing
        else:
            unneeded = ()
        with suppress(*unneeded), StoreLock(layout.locks / "roots"):
            write_sealed(path, asdict(_merged(layout, load_root(layout, path), new, variant, known)))


def _used(root: Root, variant: str) -> str:
    return str(root.variants.get(variant, {}).get("used", ""))


def is_young(used: str, age: timedelta) -> bool:
    """Return whether a time (ISO 8601) lies less than `age` back. What has no time is old."""
    return bool(used) and datetime.fromisoformat(used) + age > datetime.now(UTC)


def living(roots: Sequence[Root]) -> list[Root]:
    """Return the roots whose manifest or lock is there: where it was, or, of the last root of a repository's file, in
    another checkout of it that is known."""
    here = [root for root in roots if root.exists]
    latest = {(root.remote, root.inside): root for root in sorted(roots, key=lambda root: (root in here, root.serial))}
    moved = [
        root
        for root in latest.values()
        if root not in here
        and any(
            root.remote == other.remote and os.path.exists(Path(other.top, root.inside)) for other in roots if root.top
        )
    ]
    return here + moved


def _merged(layout: Layout, old: Root | None, new: Root, variant: str, known: Collection[str] | None) -> Root:
    old = old or replace(new, nodes={})
    done = {node: key for node, key in new.nodes.items() if layout.key(key).exists()}
    history = {node: [known for known in old.history.get(node, []) if known != key] for node, key in done.items()}
    others = {name: used for name, used in old.variants.items() if name != variant}
    before = old.variants.get(variant, {})
    keys = _named({**before.get("keys", {}), **done}, known)
    begun = {node: key for node, key in {**before.get("begun", {}), **new.nodes}.items() if node not in done}
    own = {"used": datetime.now(UTC).isoformat(timespec="seconds"), "keys": keys, "begun": _named(begun, known)}
    origin = origin_of(Path(new.manifest))
    gone = {*old.lets_go} - {*new.nodes.values()} | {*new.lets_go}
    merged = replace(
        new,
        written=os.path.exists(new.manifest),
        serial=1 + max((root.serial for root in all_roots(layout)), default=0),
        nodes=_named({**old.nodes, **done}, known),
        history={**old.history, **{node: [*history[node], key][-HISTORY:] for node, key in done.items()}},
        variants=dict([*others.items(), (variant, own)][-VARIANTS:]),
        **(asdict(origin) if origin else {}),
    )
    named = [*merged.keys, *chain.from_iterable(map(_variant_keys, merged.variants.values()))]
    return replace(merged, lets_go=sorted(gone & {*named}))


def _named(keys: Mapping[str, str], known: Collection[str] | None) -> dict[str, str]:
    return {node: key for node, key in keys.items() if known is None or node in known}


def release(layout: Layout, presence: Presence, digest: str, key: str) -> int:
    """Note that `key` does not need the bytes kept, and free what can be freed now; return the bytes freed.

    They go once every record of this artifact has released it, no recipe wants it kept, and no other process is in the
    store, which may be about to read them; else the next to leave or enter does it.
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
        digests = [digest for digest in sealed_digests(layout.released) if _is_there(layout, digest)]
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
            if left := [digest for digest in digests if digest not in wanted]:
                keys = _kept_keys(layout)
                wanted = {digest for key, digest in records if key in keys}
            return sum(_drop(layout, digest) for digest in left if digest not in wanted)


def _kept_keys(layout: Layout) -> set[str]:
    """The keys whose bytes a recipe wants kept: a key does not say `cache: false`, so another may have let them go."""
    return {key for root in wanting(all_roots(layout)) for key in wanted_keys(root) - {*root.lets_go}}


def _is_there(layout: Layout, digest: str) -> bool:
    """Has it bytes to free? What was released stays noted after these are gone."""
    artifact = load_artifact(layout, digest)
    return artifact is not None and not artifact.dropped


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
