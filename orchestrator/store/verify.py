"""Reading every byte a store holds, and saying which are not what they were."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .artifacts import (
    DAMAGED,
    MISSING,
    Artifact,
    Entry,
    artifact_digest,
    examine,
    load_artifact,
    place_tree,
    remove_tree,
    save_artifact,
    tree_is_whole,
)
from .hashing import hash_file, is_hex
from .keyrecord import KeyRecord, load_record, sealed_names
from .layout import Layout
from .sealing import Damaged, explained, read_sealed

Problem = Literal["damaged", "missing", "error", "writable"]


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


def verify(
    layout: Layout,
    temporary: Callable[[], Path],
    *,
    repair: bool,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Hash every object and every referenced file, and check every tree and record.

    `repair` moves what is damaged to quarantine, rebuilds trees, and takes artifacts whose bytes are gone for absent,
    so that the next run makes them again. What cannot be read is reported and left alone. `progress` hears
    (done, total) bytes.
    """
    with explained(layout.root):
        return _Verification(layout, temporary, repair, progress).verify()


class _Verification:
    def __init__(
        self,
        layout: Layout,
        temporary: Callable[[], Path],
        repair: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.layout = layout
        self.temporary = temporary
        self.repair = repair
        self.progress = progress
        self.findings: list[Finding] = []
        self.reported: set[Path] = set()
        self.examined: dict[Path, Entry | str] = {}
        self.bytes = 0
        self.total = 0

    def verify(self) -> VerifyReport:
        for folder in (self.layout.keys, self.layout.artifacts, self.layout.roots, self.layout.released):
            self._records(folder)
        artifacts = self._artifacts()
        self.total = sum(
            {entry.path(self.layout): entry.size for item in artifacts for entry in item.files.values()}.values()
        )
        for artifact in artifacts:
            self._artifact(artifact)
        self._unnamed_objects()
        self._promises()
        return VerifyReport(len(artifacts), len(self.examined), self.bytes, tuple(self.findings))

    def _found(self, path: Path, problem: Problem, detail: str = "", *, repaired: bool = False) -> None:
        self.reported.add(path)
        self.findings.append(Finding(path, problem, detail, repaired and self.repair))

    def _records(self, folder: Path) -> None:
        for name in sealed_names(folder):
            path = folder / f"{name}.json"
            try:
                read_sealed(path)
            except Damaged:
                self._record(path)
            except OSError as error:
                self._found(path, "error", str(error))

    def _record(self, path: Path) -> None:
        self._found(path, "damaged", "a record", repaired=True)
        if self.repair:
            self.layout.set_aside(path)

    def _artifacts(self) -> list[Artifact]:
        """Those whose bytes should be there."""
        artifacts = []
        for name in sealed_names(self.layout.artifacts):
            path = self.layout.artifacts / f"{name}.json"
            if path in self.reported:
                continue
            artifact = load_artifact(self.layout, f"sha256:{name}")
            if artifact is None or artifact.dropped:
                continue
            if artifact.digest == artifact_digest(
                {key: (item.sha256, item.size) for key, item in artifact.files.items()}
            ):
                artifacts.append(artifact)
            else:
                self._record(path)
        return artifacts

    def _artifact(self, artifact: Artifact) -> None:
        states = {name: self._file(entry) for name, entry in artifact.files.items()}
        entries = {name: state for name, state in states.items() if isinstance(state, Entry)}
        if len(entries) < len(states):
            if self.repair and "error" not in states.values():
                self._forget(artifact)
            return
        if not tree_is_whole(self.layout, artifact):
            self._found(self.layout.tree(artifact.digest), "damaged", "the tree of links", repaired=True)
            if self.repair:
                place_tree(self.layout, artifact, self.temporary())
        if self.repair and entries != dict(artifact.files):
            save_artifact(self.layout, replace(artifact, files=entries))

    def _forget(self, artifact: Artifact) -> None:
        save_artifact(self.layout, replace(artifact, dropped=True))
        remove_tree(self.layout.tree(artifact.digest))

    def _file(self, entry: Entry) -> Entry | str:
        """Each file is read once, however many artifacts hold it."""
        path = Path(entry.path(self.layout))
        if path not in self.examined:
            self.examined[path] = self._examine(path, entry)
        known = self.examined[path]
        if isinstance(known, Entry) and known.sha256 != entry.sha256:  # a reference under two digests
            return self._mismatch(path, DAMAGED, "referenced")
        return known

    def _examine(self, path: Path, entry: Entry) -> Entry | str:
        if entry.reference is None and self.repair:
            self._protect(path)
        try:
            state = examine(self.layout, entry, thorough=True, progress=self._read)
        except OSError as error:
            self._found(path, "error", str(error))
            return "error"
        if isinstance(state, str):
            return self._mismatch(path, state, "an object" if entry.reference is None else "referenced")
        if entry.reference is None and path.stat().st_mode & 0o222:
            self._found(path, "writable", "an object")
        return state

    def _mismatch(self, path: Path, state: str, detail: str) -> str:
        ours = path.parent == self.layout.objects
        problem: Problem = "missing" if state == MISSING else "damaged"
        self._found(path, problem, detail, repaired=True)
        if ours and self.repair and state == DAMAGED:
            self.layout.set_aside(path)
        return state

    def _protect(self, path: Path) -> None:
        try:
            facts = path.lstat()
        except OSError:
            return
        if stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o222:
            path.chmod(0o444)
            self._found(path, "writable", "an object", repaired=True)

    def _read(self, count: int) -> None:
        self.bytes += count
        if self.progress is not None:
            self.progress(self.bytes, self.total)

    def _unnamed_objects(self) -> None:
        """Objects that no artifact holds: what a crash left, and what `gc` would free. A stage's parts may use them."""
        try:
            names = os.listdir(self.layout.objects)
        except FileNotFoundError:
            return
        for name in sorted(names):
            path = self.layout.objects / name
            if path in self.examined:
                continue
            try:
                whole = is_hex(name) and hash_file(path, self._read) == name
            except OSError as error:
                self._found(path, "error", str(error))
                continue
            if not whole:
                self._mismatch(path, DAMAGED, "an object")

    def _promises(self) -> None:
        """Records of computations whose artifact nobody knows any more."""
        for name in sealed_names(self.layout.keys):
            if self.layout.keys / f"{name}.json" in self.reported:
                continue
            record = load_record(self.layout, f"sha256:{name}")
            if record is None or record.digest is None or self.layout.artifact(record.digest).exists():
                continue
            path = self.layout.artifact(record.digest)
            if path not in self.reported:
                self._found(path, "missing", f"what {record.node} gave", repaired=True)
            if self.repair:
                self._forget(_as_dropped(record.digest, record))


def _as_dropped(digest: str, record: KeyRecord) -> Artifact:
    files = {name: Entry(str(file["sha256"]), (int(file["size"]), 0, 0, 0)) for name, file in record.files.items()}
    return Artifact(digest, record.artifact_type or "", files, dropped=True)
