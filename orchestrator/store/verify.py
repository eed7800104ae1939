"""Reading every byte a store holds, and saying which are not what they were."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bigpipe.files import Damaged, read_sealed

from .artifacts import (
    Absence,
    Artifact,
    Entry,
    artifact_digest,
    dropped_artifact,
    examine,
    files_below,
    let_go,
    load_artifact,
    load_record,
    place_tree,
    save_artifact,
    tree_is_whole,
)
from .hashing import hash_file
from .layout import JOURNAL, Layout, is_hex, names_in, record_path, sealed_digests
from .locks import WORK_LOCK

Shape = Literal["folder", "directory", "file", "lock"]
"""folder: a directory, or a link to one. lock: a file that is opened to be written to."""
_WANTED = {"folder": 0o700, "directory": 0o700, "file": 0o400, "lock": 0o600}
"""What the owner must be allowed."""
Problem = Absence | Literal["error", "writable", "unreadable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    path: Path
    problem: Problem
    """error: it could not be read, so nobody knows. writable: an object that somebody could change. unreadable: its
    owner, whom it is to serve, is not allowed to."""
    detail: str = ""
    repaired: bool = False
    """Set aside, so that the next run makes it again; or put right on the spot."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    artifacts: int
    files: int
    bytes: int
    """Read and hashed."""
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        return not self.findings


@dataclass
class Verification:
    """Hashes every object and every referenced file, and checks every tree and record, and that nothing else stands in
    place of a folder or file of the store.

    `repair` moves what is damaged to quarantine, rebuilds trees, and takes artifacts whose bytes are gone for absent,
    so that the next run makes them again. What the disk cannot read is reported and left alone. Of files that are not
    the store's own the bytes stay as they are.
    """

    layout: Layout
    temporary: Callable[[], Path]
    repair: bool
    findings: list[Finding] = field(default_factory=list)
    examined: dict[Path, Entry | str] = field(default_factory=dict)
    bytes: int = 0

    def verify(self) -> VerifyReport:
        layout = self.layout
        for path, shape in self._shapes():
            self._shape(path, shape)
        folders = (layout.keys, layout.artifacts, layout.roots, layout.released)
        keys, digests, _, _ = [self._readable(folder) for folder in folders]
        for path in self._loose_records():
            self._sealed(path)
        artifacts = [item for digest in digests if (item := self._load(digest))]
        for artifact in artifacts:
            self._artifact(artifact)
        self._unnamed_objects()
        self._promises(keys)
        return VerifyReport(len(artifacts), len(self.examined), self.bytes, tuple(self.findings))

    def _found(self, path: Path, problem: Problem, detail: str = "", *, repaired: bool = False) -> None:
        self.findings.append(Finding(path, problem, detail, repaired and self.repair))

    def _shapes(self) -> Iterator[tuple[Path, Shape]]:
        """Yield what must be a directory or a file where it is there at all: what holds others before those."""
        layout = self.layout
        yield from ((folder, "folder") for folder in layout.folders)  # each may be a link to another disk
        yield from ((layout.partials / name, "file") for name in names_in(layout.partials))
        yield from ((layout.locks / name, "lock") for name in names_in(layout.locks))
        for name in names_in(layout.tmp):
            yield layout.tmp / name, "lock" if name.endswith(".lock") else "directory"
        yield from ((layout.runs / name, "directory") for name in names_in(layout.runs))
        for work in (layout.work / name for name in names_in(layout.work)):
            yield work, "directory"
            yield from ((work / name, "directory") for name in ("out", "scratch"))
            yield work / JOURNAL, "file"
            yield work / WORK_LOCK, "lock"
        for folder in (layout.memo, layout.parts):
            yield from self._below(folder)

    def _below(self, folder: Path) -> Iterator[tuple[Path, Shape]]:
        """A file as soon as it is none of what it may be: parts may be links into objects."""
        for name in names_in(folder):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                yield path, "directory"
                yield from self._below(path)
            elif not (path.is_symlink() and folder.is_relative_to(self.layout.parts)):
                yield path, "file"

    def _shape(self, path: Path, shape: Shape) -> bool:
        """Return whether the right kind of thing is there, readable now."""
        try:
            mode = (path.stat() if shape == "folder" and path.exists() else path.lstat()).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._found(path, "error", str(error))
            return False
        wanted = _WANTED[shape]
        if not (stat.S_ISDIR(mode) if wanted == 0o700 else stat.S_ISREG(mode)):
            self._mismatch(path, "damaged", f"no {'directory' if wanted == 0o700 else 'file'}")
            return False
        if mode & wanted == wanted or os.access(path, wanted >> 6):
            return True
        self._found(path, "unreadable", f"a {shape}", repaired=True)
        if self.repair:
            path.chmod(stat.S_IMODE(mode) | wanted)
        return self.repair

    def _loose_records(self) -> Iterator[Path]:
        """Yield the records that are no other's: of runs, remembered answers, and notes of parts."""
        layout = self.layout
        yield from (path for path in (layout.runs / name / "run.json" for name in names_in(layout.runs)))
        for folder in (layout.memo, layout.parts):
            names = (name for name, _ in files_below(folder)) if folder.is_dir() else ()
            yield from (folder / name for name in sorted(names) if name.endswith(".json"))

    def _readable(self, folder: Path) -> list[str]:
        """Return the digests of the records that are as they were sealed."""
        return [digest for digest in sealed_digests(folder) if self._sealed(record_path(folder, digest))]

    def _sealed(self, path: Path) -> bool:
        if not self._shape(path, "file"):
            return False
        try:
            read_sealed(path)
        except Damaged:
            self._mismatch(path, "damaged", "a record")
            return False
        except OSError as error:
            self._found(path, "error", str(error))
            return False
        return True

    def _load(self, digest: str) -> Artifact | None:
        """Return an artifact whose bytes should be there."""
        artifact = load_artifact(self.layout, digest)
        if artifact is None or artifact.dropped:
            return None
        if digest == artifact_digest({name: (file.sha256, file.size) for name, file in artifact.files.items()}):
            return artifact
        self._mismatch(self.layout.artifact(digest), "damaged", "a record")
        return None

    def _artifact(self, artifact: Artifact) -> None:
        states = {name: self._file(entry) for name, entry in artifact.files.items()}
        entries = {name: state for name, state in states.items() if isinstance(state, Entry)}
        if len(entries) < len(states):
            if self.repair and "error" not in states.values():
                let_go(self.layout, artifact)
            return
        self._open_tree(self.layout.tree(artifact.digest))
        if not tree_is_whole(self.layout, artifact):
            self._found(self.layout.tree(artifact.digest), "damaged", "the tree of links", repaired=True)
            if self.repair:
                place_tree(self.layout, artifact, self.temporary())
        if self.repair and entries != dict(artifact.files):
            save_artifact(self.layout, replace(artifact, files=entries))

    def _open_tree(self, tree: Path) -> None:
        """What stands in place of a folder is seen, and mended, with the rest of the tree."""
        if tree.is_dir() and not tree.is_symlink() and self._shape(tree, "directory"):
            for name in names_in(tree):
                self._open_tree(tree / name)

    def _file(self, entry: Entry) -> Entry | str:
        """Each file is read once, however many artifacts hold it."""
        path = Path(entry.path(self.layout))
        if path not in self.examined:
            self.examined[path] = self._examine(path, entry)
        known = self.examined[path]
        if isinstance(known, Entry) and known.sha256 != entry.sha256:  # a reference under two digests
            return self._mismatch(path, "damaged", "referenced", ours=False)
        return known

    def _examine(self, path: Path, entry: Entry) -> Entry | str:
        ours = entry.reference is None
        if ours and self.repair:
            self._protect(path)
        try:
            state = examine(self.layout, entry, thorough=True)
        except OSError as error:
            self._found(path, "error", str(error))
            return "error"
        self.bytes += entry.size if state != "missing" else 0
        if isinstance(state, str):
            return self._mismatch(path, state, "an object" if ours else "referenced", ours=ours)
        if ours and path.stat().st_mode & 0o222:
            self._found(path, "writable", "an object")
        return state

    def _mismatch(self, path: Path, problem: Absence, detail: str, *, ours: bool = True) -> Absence:
        self._found(path, problem, detail, repaired=True)
        if self.repair and problem == "damaged":
            if ours:
                self.layout.set_aside(path)
            else:
                _make_forgotten(path)
        return problem

    def _protect(self, path: Path) -> None:
        try:
            facts = path.lstat()
        except OSError:
            return
        writable = bool(facts.st_mode & 0o222)
        if stat.S_ISREG(facts.st_mode) and (writable or not facts.st_mode & 0o400):
            path.chmod(0o444)
            self._found(path, "writable" if writable else "unreadable", "an object", repaired=True)

    def _unnamed_objects(self) -> None:
        """Objects that no artifact holds: what a crash left, and what `gc` would free. A stage's parts may use them."""
        there = {self.layout.objects / name for name in names_in(self.layout.objects)}
        for path in sorted(there - self.examined.keys()):
            if not self._shape(path, "file"):
                continue
            try:
                self.bytes += path.lstat().st_size
                if not is_hex(path.name) or hash_file(path) != path.name:
                    self._mismatch(path, "damaged", "an object")
            except OSError as error:
                self._found(path, "error", str(error))

    def _promises(self, keys: list[str]) -> None:
        """Records of computations whose artifact nobody knows any more."""
        for key in keys:
            record = load_record(self.layout, key)
            if record is None or record.digest is None or self.layout.artifact(record.digest).exists():
                continue
            path = self.layout.artifact(record.digest)
            if all(finding.path != path for finding in self.findings):
                self._found(path, "missing", f"what {record.node} gave", repaired=True)
            if self.repair:
                let_go(self.layout, dropped_artifact(record))


def _make_forgotten(path: Path) -> None:
    """Make a file that is not ours be read again by whoever remembers what it held: its ctime becomes another one."""
    with suppress(OSError):
        path.chmod(stat.S_IMODE(path.stat().st_mode))
