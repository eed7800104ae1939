"""How a finished `out` becomes an artifact, so that no crash at any point loses it or records what is not there.

collect           what each file of `out` is, its sha256 (read, unless known), fsynced
journal           work/KEY/publish.json: from here on, the next run can finish what this one began
adopt             each file → objects/, read-only, a link left in its place; fsync of objects/. An object that is
                  there already is read first, as is everything that a journal of a run that died names
place_tree        artifacts/HEX/, links; fsync of each directory, rename, fsync
save_artifact     artifacts/HEX.json
save_record       keys/HEX.json: now, and only now, it exists
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from bigpipe.errors import StageFailed, first_few
from bigpipe.files import Damaged, copy_file, give_name, link, move, read_sealed, sync_directory, sync_file

from .artifacts import (
    STILL,
    Artifact,
    Entry,
    KeyRecord,
    files_below,
    place_tree,
    remove_partials,
    save_artifact,
    save_record,
    walk,
)
from .hashing import Fingerprint, StatMemo, fingerprint, hash_file
from .keeping import keep_again
from .layout import JOURNAL, Layout, explained, is_hex, make_directory, write_sealed
from .locks import StoreLock

Known = Mapping[str, tuple[str, int]]
"""Relative path → (sha256 in hex, size) of files whose bytes a stage has hashed itself."""
How = Literal["adopt", "object", "reference"]
PAGE = 4096
"""Bytes that a link or a record takes at least: files themselves are only moved."""


class Origin(NamedTuple):
    """Where the bytes of one file of an artifact come from."""

    sha256: str
    size: int
    how: How
    path: str
    """adopt: the file to move into objects. reference: where it stays."""
    facts: Fingerprint
    """What `stat` said before the bytes were read."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """One publishing."""

    layout: Layout
    temporary: Callable[[], Path]
    """Gives fresh paths in a locked folder on the store's file system."""

    def publish(self, record: KeyRecord, out: Path, known: Known) -> KeyRecord:
        """See the module. `out` is taken apart. Return the record with `digest` and `files`."""
        if not record.artifact_type:
            with explained(self.layout.keys):
                save_record(self.layout, record)
            return record
        with explained(out):
            sources = Collector(self.layout, StatMemo(self.layout.memo), out, known).collect()
            record = record.holding({name: (source.sha256, source.size) for name, source in sources.items()})
            if out.parent.parent == self.layout.work and is_hex(out.parent.name):
                # A key's folder, where the next run looks for it. The names in `out` must be there before.
                for place, _, _ in walk(out):
                    sync_directory(Path(place))
                self._write_journal(out.parent, record, sources)
            try:
                with explained(self.layout.root, needed=PAGE * (len(sources) + 8)):
                    self._place(record, sources)
            except Damaged:
                raise StageFailed(
                    f"files of {record.node} vanished or changed while they were published", "run again"
                ) from None
        return record

    def resume(self, working: Path) -> None:
        """Finish what a run that died had begun to publish from this work folder, if it had. A journal that does not
        hold (a disk that lost what it had synced, bytes that changed since) is dropped with what it is about."""
        with explained(working), suppress(FileNotFoundError, Damaged):
            self._place(*self._read_journal(working), unread=True)

    def _write_journal(self, working: Path, record: KeyRecord, sources: Mapping[str, Origin]) -> None:
        """Of what lies in the store the path within is noted: a copy of it goes on with files of its own."""
        real = os.path.realpath(self.layout.root)
        noted = {
            name: source if source.how == "reference" else source._replace(path=os.path.relpath(source.path, real))
            for name, source in sources.items()
        }
        write_sealed(working / JOURNAL, {"record": record.as_json(), "sources": noted})

    def _read_journal(self, working: Path) -> tuple[KeyRecord, dict[str, Origin]]:
        data, real = read_sealed(working / JOURNAL), os.path.realpath(self.layout.root)
        try:
            return KeyRecord.model_validate(data["record"]), {
                name: Origin(sha256, size, how, os.path.join(real, path), tuple(facts))
                for name, (sha256, size, how, path, facts) in data["sources"].items()
            }
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged from error

    def _place(self, record: KeyRecord, sources: Mapping[str, Origin], *, unread: bool = False) -> None:
        """Idempotent: files that an earlier attempt has moved are found in objects. Nobody may take objects away
        between finding one there and recording that it is used, so `drop` and `gc` exclude this by the same lock.
        unread: this process has not read the bytes itself."""
        layout = self.layout
        make_directory(layout.objects)
        with StoreLock(layout.locks / "objects", shared=True):
            entries = {name: self._settle(source, unread) for name, source in sources.items()}
            sync_directory(layout.objects)
            artifact = Artifact(record.digest or "", record.artifact_type or "", entries)
            make_directory(layout.artifacts)
            keep_again(layout, artifact.digest, record.key)
            place_tree(layout, artifact, self.temporary())
            save_artifact(layout, artifact)
            save_record(layout, record)

    def _settle(self, source: Origin, unread: bool) -> Entry:
        if source.how == "reference":
            return Entry(source.sha256, source.facts, source.path)
        target = self.layout.object(source.sha256)
        if source.how == "adopt":
            self._adopt(Path(source.path), target, source)
        facts = _regular(target, source.size)
        if facts is None:
            raise Damaged
        # Also where somebody wrote to it, or a power loss took its mtime, the bytes decide.
        if (unread or facts.st_mtime_ns != STILL) and hash_file(target) != source.sha256:
            self.layout.set_aside(target)
            raise Damaged
        return Entry(source.sha256, fingerprint(facts))

    def _adopt(self, path: Path, target: Path, source: Origin) -> None:
        try:
            facts = os.lstat(path)
        except FileNotFoundError:
            return  # moved, without hard links, by the attempt whose journal this is
        if not stat.S_ISREG(facts.st_mode):
            return  # a link already: moved by the attempt whose journal this is, or a part of an earlier artifact
        if facts.st_size != source.size:
            raise Damaged
        if not self._is_there(target, source.sha256):
            self._move(path, target, facts)
        # Whoever reads it under its old name finds it there at any moment, until the work folder goes.
        if os.stat(path.parent).st_dev == os.stat(target).st_dev:
            link(os.path.relpath(os.path.realpath(target), os.path.realpath(path.parent)), path)
        else:
            path.unlink()

    def _is_there(self, target: Path, sha256: str) -> bool:
        """Whether the object has its bytes. A file with others stays until it is replaced: where locks mean nothing
        somebody else may just have put the right one there."""
        try:
            if not stat.S_ISREG(os.lstat(target).st_mode):
                self.layout.set_aside(target)
                return False
            right = hash_file(target) == sha256
        except FileNotFoundError:
            return False
        if not right:
            self.layout.set_aside(target, replaced=True)
        return right

    def _move(self, path: Path, target: Path, facts: os.stat_result) -> None:
        # Where another name shares the inode, making that read-only, or trusting that nobody writes to it, is not ours.
        if facts.st_nlink == 1:
            _still(path)
            try:
                return give_name(path, target, self.temporary())
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        copy = self.temporary()
        copy_file(path, copy)
        _still(copy)
        sync_file(copy)
        move(copy, target)


def _still(path: Path) -> None:
    """Read-only, and of a time that tells whether somebody wrote to it since."""
    os.chmod(path, 0o444)
    os.utime(path, ns=(STILL, STILL))


def _regular(path: Path, size: int) -> os.stat_result | None:
    """What `lstat` says of a regular file of this size; None where there is none."""
    with suppress(FileNotFoundError):
        facts = os.lstat(path)
        return facts if stat.S_ISREG(facts.st_mode) and facts.st_size == size else None
    return None


@dataclass
class Collector:
    """Finds out what the files of an `out` are."""

    layout: Layout
    memo: StatMemo
    out: Path
    known: Known

    def collect(self) -> dict[str, Origin]:
        """Return relative path → origin, sorted. Empty directories are not part of it. Raise StageFailed, OSError."""
        self._require_own()
        remove_partials(self.out)  # of an attempt that was killed while it wrote
        names = [name for name, _ in files_below(self.out)]
        if missing := sorted(self.known.keys() - names):
            raise StageFailed(f"the stage reported files it did not write: {first_few(missing)}", "a fault of its kind")
        return {name: self._source(name) for name in sorted(names)}

    def _require_own(self) -> None:
        """What lies in `out` is moved. Through a link that would be somebody's own files."""
        if self.out.is_symlink() or not self.out.is_dir():
            there = "a link" if self.out.is_symlink() else "no directory" if self.out.exists() else "gone"
            cure = "write into the directory that is given, and leave it where it is"
            raise StageFailed(f"the stage's output directory is {there}", cure)

    def _source(self, name: str) -> Origin:
        path = self.out / name
        linked = path.is_symlink()
        try:
            name.encode()
            real = os.path.realpath(path, strict=True) if linked else str(path)
        except UnicodeEncodeError:
            raise StageFailed(f"a file name in the output is not UTF-8: {name!r}", "give it another name") from None
        except FileNotFoundError:
            cure = "copy the file that a link leads to (`cp -L`), or link to it by its absolute path"
            raise StageFailed(f"{name} in the output is a link to nothing: {os.readlink(path)}", cure) from None
        facts = os.stat(real)
        if not stat.S_ISREG(facts.st_mode):
            what = "a link to a directory; link its files" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise StageFailed(f"{name} in the output is {what}", "an artifact holds files and links to files")
        how = self._how(name, real) if linked else "adopt"
        sha256 = self._sha256(name, real, facts, how)
        if how == "adopt":
            sync_file(Path(real))
        return Origin(sha256, facts.st_size, how, real, fingerprint(facts))

    def _how(self, name: str, real: str) -> How:
        if _is_below(real, self.layout.objects) and is_hex(os.path.basename(real)):
            return "object"
        if _is_below(real, self.layout.parts) or _is_below(real, self.out.parent):
            return "adopt"
        if _is_below(real, self.layout.root):
            raise StageFailed(
                f"{name} in the output is a link into the store's own working area: {real}",
                "link to an input's file or to one of its own parts",
            )
        return "reference"

    def _sha256(self, name: str, real: str, facts: os.stat_result, how: str) -> str:
        if how == "object":
            return self._object(name, Path(real))
        if name in self.known:
            sha256, size = self.known[name]
            if not is_hex(sha256) or size != facts.st_size:
                raise StageFailed(
                    f"{name} in the output has {facts.st_size} bytes; the stage reported {size} with sha256 {sha256}",
                    "the file was changed or cut after it was written; run again",
                )
            return sha256
        return self.memo.sha256(real) if how == "reference" else hash_file(Path(real))

    def _object(self, name: str, path: Path) -> str:
        """What is linked to is read, unless the stage has read it. What has rotted is not there for the next run."""
        if self.known.get(name, ("", 0))[0] != path.name and hash_file(path) != path.name:
            self.layout.set_aside(path)
            raise StageFailed(f"{name} in the output is a link to an object that has changed: {path}", "run again")
        return path.name


def _is_below(path: str, folder: Path) -> bool:
    return path.startswith(os.path.realpath(folder).rstrip("/") + "/")
