"""What is known of computations and of the artifacts they gave, and the trees of links that artifacts are on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bigpipe.files import Damaged, is_partial, let_in, move, sync_directory
from bigpipe.orchestrator.contract import Json
from bigpipe.sizes import counted

from .hashing import Fingerprint, digest_of, fingerprint, hash_and_facts
from .layout import PRIVATE, Layout, make_directory, sealed_digests, write_sealed

STILL = 946_684_800 * 10**9
"""The mtime (ns) every object gets: the year 2000. Whoever writes to an object changes it, whatever the clock says and
however soon after publishing; a time of publishing could equal the time of a write in the same tick."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an artifact, and what `stat` said when its bytes were last known to be right."""

    sha256: str
    facts: Fingerprint
    reference: str | None = None
    """Absolute path of a file that is not ours; None for an object."""

    @property
    def size(self) -> int:
        return self.facts[0]

    def path(self, layout: Layout) -> str:
        return f"{layout.objects}/{self.sha256}" if self.reference is None else self.reference


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory tree by content."""

    digest: str
    type: str
    files: Mapping[str, Entry]
    dropped: bool = False
    """Its bytes were let go on purpose (`cache: false`)."""

    @property
    def objects(self) -> set[str]:
        """The sha256 of each object it holds."""
        return {entry.sha256 for entry in self.files.values() if entry.reference is None and not self.dropped}

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    @property
    def referenced_bytes(self) -> int:
        """Of files that lie where they were found, such as Hub blobs."""
        return sum(entry.size for entry in self.files.values() if entry.reference is not None)

    def as_json(self) -> Json:
        files = {name: [entry.sha256, *entry.facts, entry.reference] for name, entry in self.files.items()}
        return {"digest": self.digest, "type": self.type, "dropped": self.dropped, "files": files}


def artifact_digest(files: Mapping[str, tuple[str, int]]) -> str:
    """Return `sha256:…` of the sorted (relative path, sha256, size) of all files of a tree."""
    return digest_of("artifact", [[name, *files[name]] for name in sorted(files)])


def load_artifact(layout: Layout, digest: str) -> Artifact | None:
    """Return what is recorded of a tree, or None. A damaged record goes to quarantine. Raise BigpipeError."""

    def read(data: Json) -> Artifact:
        files = {
            name: Entry(sha256, (size, mtime, inode, ctime), reference)
            for name, (sha256, size, mtime, inode, ctime, reference) in data["files"].items()
        }
        if data["digest"] != digest:
            raise Damaged
        return Artifact(digest, data["type"], files, data["dropped"])

    return layout.load(layout.artifact(digest), read)


def all_artifacts(layout: Layout) -> list[Artifact]:
    """Return every readable artifact, those without bytes too, in the order of their digests."""
    return [found for digest in sealed_digests(layout.artifacts) if (found := load_artifact(layout, digest))]


def save_artifact(layout: Layout, artifact: Artifact) -> None:
    write_sealed(layout.artifact(artifact.digest), artifact.as_json())


Absence = Literal["missing", "damaged"]
"""What became of a file since it was recorded."""


def examine(layout: Layout, entry: Entry, *, thorough: bool = False) -> Entry | Absence:
    """Return the entry as it is now, its facts up to date where the bytes were read and right; or what became of it.

    The bytes are read where size, mtime, inode or ctime are not those recorded, or if `thorough`. An I/O error is
    raised as the OSError it is.
    """
    path = entry.path(layout)
    try:
        facts = os.lstat(path) if entry.reference is None else os.stat(path)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != entry.size:
            return "damaged"
        if fingerprint(facts) == entry.facts and not thorough:
            return entry
        sha256, before, _ = hash_and_facts(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    # Were it written to meanwhile, the facts from before will not match the next time.
    now = replace(entry, facts=fingerprint(before))
    return now if (sha256, now.size) == (entry.sha256, entry.size) else "damaged"


def link_target(name: str, entry: Entry) -> str:
    """Return where the link of a tree's file leads. Links to objects are relative, so that a store can be moved."""
    if entry.reference is not None:
        return entry.reference
    return "../" * (name.count("/") + 2) + f"objects/{entry.sha256}"


def files_below(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (relative path, entry) of everything below a directory that is none itself; links are not followed."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(f"{folder}/{prefix}") as items:
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    pending.append(f"{prefix}{item.name}/")
                else:
                    yield prefix + item.name, item


def tree_is_whole(layout: Layout, artifact: Artifact) -> bool:
    """Return whether the tree holds exactly the links it must, and nothing else."""
    found, tree = 0, layout.tree(artifact.digest)
    try:
        if not stat.S_ISDIR(os.lstat(tree).st_mode):  # a link to a tree would lead elsewhere
            return False
        for name, item in files_below(tree):
            entry = artifact.files.get(name)
            if entry is None or not item.is_symlink() or os.readlink(item.path) != link_target(name, entry):
                return False
            found += 1
    except (FileNotFoundError, NotADirectoryError):
        return False
    return found == len(artifact.files)


def place_tree(layout: Layout, artifact: Artifact, partial: Path) -> None:
    """Make the tree of links durably: built at `partial`, renamed to its place. A tree that is whole stays."""
    if tree_is_whole(layout, artifact):
        sync_directory(layout.artifacts)  # whoever made it may not have come that far
        return
    partial.mkdir(mode=PRIVATE)
    folders = {partial}
    for name, entry in artifact.files.items():
        link = partial / name
        link.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        folders.update(parent for parent in link.parents if parent.is_relative_to(partial))
        link.symlink_to(link_target(name, entry))
    for folder in folders:
        sync_directory(folder)
    make_directory(layout.artifacts)
    _swap_in(layout, artifact, partial)
    sync_directory(layout.artifacts)


def _swap_in(layout: Layout, artifact: Artifact, partial: Path) -> None:
    tree = layout.tree(artifact.digest)
    while True:
        try:
            return move(partial, tree)
        except OSError:
            if not os.path.lexists(tree):
                raise
        if tree_is_whole(layout, artifact):  # another process was faster
            return remove_tree(partial)
        layout.set_aside(tree)


def let_go(layout: Layout, artifact: Artifact) -> None:
    """Record an artifact without its bytes, and remove its tree."""
    save_artifact(layout, replace(artifact, dropped=True))
    remove_tree(layout.tree(artifact.digest))


def remove_tree(path: Path) -> None:
    """Remove a file or a directory with all it holds; what links lead to stays. Gone already is fine, and so are
    directories below that their owner may not write to."""
    try:
        _remove_all(path)
    except PermissionError:
        let_in(path)
        _remove_all(path)


def _remove_all(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for place, folders, names in walk(path):
            for name in (*names, *folders):
                _remove(os.path.join(place, name))
    _remove(path)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` does, what lies deepest first. Raise OSError where a directory cannot be read."""

    def tell(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    return os.walk(folder, topdown=False, onerror=tell)


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed left below a folder where nobody writes now."""
    for _, item in files_below(folder):
        if is_partial(item.name):
            _remove(item.path)


def _remove(path: str | Path) -> None:
    with suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.unlink(path)


class KeyRecord(BaseModel):
    """One finished computation. Times in seconds, memory in bytes, digests as `sha256:…`."""

    # What is read was sealed by us, so no schema is compiled to read it, only to make a new one.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    key: str
    partial: str
    """The key with the inputs left out."""
    identity: dict[str, Any]
    inputs: dict[str, list[str]] = Field(default_factory=dict)
    kind: str
    node: str
    manifest: str
    digest: str | None = None
    """Of the artifact; None for kinds without output."""
    artifact_type: str | None = None
    """None, or empty, for kinds without output."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, dict[str, str | int]] = Field(default_factory=dict)
    """Relative path → `sha256` (hex) and `size`."""
    pins: dict[str, str] = Field(default_factory=dict)
    asked: list[dict[str, Any]] = Field(default_factory=list)
    """What the pins are the answer to, field path → value as it was written: each of the latest questions."""
    pin_source: str = ""
    seconds: float = 0.0
    peak_rss: int = 0
    created: str = ""
    """ISO 8601 in UTC."""
    run: str = ""
    tools: dict[str, str] = Field(default_factory=dict)
    """Versions of what made it."""

    def __repr__(self) -> str:
        gave = f"{counted(len(self.files), 'file')}, {self.digest[:19]}…" if self.digest else "no artifact"
        return f"<KeyRecord of {self.node}: {gave}>"

    __str__ = __repr__

    def holding(self, files: Mapping[str, tuple[str, int]]) -> KeyRecord:
        """Return the record of an artifact of these files: relative path → (sha256 in hex, size)."""
        listed = {name: {"sha256": sha256, "size": size} for name, (sha256, size) in files.items()}
        return self.model_copy(update={"digest": artifact_digest(files), "files": listed})

    def as_json(self) -> dict[str, Json]:
        return {name: getattr(self, name) for name in type(self).model_fields}


def load_record(layout: Layout, key: str) -> KeyRecord | None:
    """Return the record of a key, None where there is none, as `Layout.load` says."""

    def read(data: Json) -> KeyRecord | None:
        if data["key"] != key:
            raise Damaged
        known = data.keys() <= KeyRecord.model_fields.keys()  # else a later bigpipe wrote it
        return KeyRecord.model_construct(**data) if known else None

    return layout.load(layout.key(key), read)


def save_record(layout: Layout, record: KeyRecord) -> None:
    """Say durably that the computation is done; everything it names must be durable before."""
    make_directory(layout.partials)
    layout.partial(record.partial).touch()
    write_sealed(layout.key(record.key), record.as_json())


def all_records(layout: Layout) -> list[KeyRecord]:
    """Return every readable record, in the order of their keys."""
    return [found for key in sealed_digests(layout.keys) if (found := load_record(layout, key))]


def dropped_artifact(record: KeyRecord) -> Artifact:
    """Return the artifact that a record names, without its bytes."""
    files = {name: Entry(str(file["sha256"]), (int(file["size"]), 0, 0, 0)) for name, file in record.files.items()}
    return Artifact(record.digest or "", record.artifact_type or "", files, dropped=True)
