"""Reading every byte a store holds, and saying which are not what they were."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .artifacts import (
    Absence,
    Artifact,
    Entry,
    artifact_digest,
    dropped_artifact,
    examine,
    let_go,
    load_artifact,
    load_record,
    place_tree,
    save_artifact,
    tree_is_whole,
)
from .hashing import hash_file
from .layout import Damaged, Layout, is_hex, names_in, read_sealed, record_path, sealed_digests

Problem = Absence | Literal["error", "writable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    path: Path
    problem: Problem
    """error: it could not be read, so nobody knows. writable: an object that somebody could change."""
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
    """Hashes every object and every referenced file, and checks every tree and record.

    `repair` moves what is damaged to quarantine, rebuilds trees, and takes artifacts whose bytes are gone for absent,
    so that the next run makes them again. What cannot be read is reported and left alone.
    """

    layout: Layout
    temporary: Callable[[], Path]
    repair: bool
    findings: list[Finding] = field(default_factory=list)
    examined: dict[Path, Entry | str] = field(default_factory=dict)
    bytes: int = 0

    def verify(self) -> VerifyReport:
        layout = self.layout
        folders = (layout.keys, layout.artifacts, layout.roots, layout.released)
        keys, digests, _, _ = [self._readable(folder) for folder in folders]
        artifacts = [item for digest in digests if (item := self._load(digest))]
        for artifact in artifacts:
            self._artifact(artifact)
        self._unnamed_objects()
        self._promises(keys)
        return VerifyReport(len(artifacts), len(self.examined), self.bytes, tuple(self.findings))

    def _found(self, path: Path, problem: Problem, detail: str = "", *, repaired: bool = False) -> None:
        self.findings.append(Finding(path, problem, detail, repaired and self.repair))

    def _readable(self, folder: Path) -> list[str]:
        """Return the digests of the records that are as they were sealed."""
        found = []
        for digest in sealed_digests(folder):
            path = record_path(folder, digest)
            try:
                read_sealed(path)
                found.append(digest)
            except Damaged:
                self._mismatch(path, "damaged", "a record")
            except OSError as error:
                self._found(path, "error", str(error))
        return found

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
        if not tree_is_whole(self.layout, artifact):
            self._found(self.layout.tree(artifact.digest), "damaged", "the tree of links", repaired=True)
            if self.repair:
                place_tree(self.layout, artifact, self.temporary())
        if self.repair and entries != dict(artifact.files):
            save_artifact(self.layout, replace(artifact, files=entries))

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
        if ours and self.repair and problem == "damaged":
            self.layout.set_aside(path)
        return problem

    def _protect(self, path: Path) -> None:
        try:
            facts = path.lstat()
        except OSError:
            return
        if stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o222:
            path.chmod(0o444)
            self._found(path, "writable", "an object", repaired=True)

    def _unnamed_objects(self) -> None:
        """Objects that no artifact holds: what a crash left, and what `gc` would free. A stage's parts may use them."""
        there = {self.layout.objects / name for name in names_in(self.layout.objects)}
        for path in sorted(there - self.examined.keys()):
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
