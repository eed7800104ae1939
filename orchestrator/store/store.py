"""The store: what computations gave, by key, and their bytes, by content.

    find(key)        the record of a computation, if it was ever done
    intact(record)   are its bytes still there and still those?
    lock(key)        the right to do the work, and the folders to do it in
    publish(record)  the work is done: durable before it is recorded
    drop, gc         letting bytes go
    verify           reading every byte

Several processes, and several threads of one process, may use one store. Nothing is created before it is needed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import BigpipeError
from bigpipe.files import existing, move, write_file
from bigpipe.orchestrator.contract import Json

from .artifacts import (
    Artifact,
    Entry,
    KeyRecord,
    all_artifacts,
    all_records,
    dropped_artifact,
    examine,
    load_artifact,
    load_record,
    place_tree,
    remove_partials,
    remove_tree,
    save_artifact,
    save_record,
    tree_is_whole,
)
from .hashing import digest_of
from .keeping import keep_again, named_roots, release, remember, sweep
from .layout import FAMILY, JOURNAL, Layout, explained, hex_of, is_hex, make_directory, names_in, record_path
from .locks import WORK_LOCK, Presence, StoreLock, if_free

if TYPE_CHECKING:
    from .garbage import Freed, GcReport, Keeping, LockedDigests
    from .publish import Known, Publisher
    from .remote import Remote
    from .verify import VerifyReport
    from .work import Work


QUESTIONS = 8
"""How many questions a record remembers that had its pins as their answer."""


class Store:
    """See the module. All methods raise BigpipeErrors: DoesNotFit for a full disk, UsageError where the store cannot be
    written or its file system has no locks, StageFailed for I/O errors."""

    def __init__(self, root: Path, *, memo: Path | None = None) -> None:
        """memo: where answers are kept; by default in the store."""
        self.root = Path(os.path.abspath(root))
        self.layout = Layout(self.root)
        self.memo, self.parts, self.runs = memo or self.layout.memo, self.layout.parts, self.layout.runs
        self._presence = Presence(self.layout)
        self._tidied = threading.Event()
        self._close = weakref.finalize(self, self._presence.leave)

    def __repr__(self) -> str:
        return f"<Store {self.root}>"

    @property
    def _publisher(self) -> Publisher:
        from .publish import Publisher  # of what has run

        return Publisher(self.layout, self._presence.temporary)

    @property
    def there(self) -> bool:
        """Is it there? It is made by what runs."""
        return self.layout.there

    def refuse_foreign(self) -> None:
        """Raise UsageError where the directory is somebody else's, or none."""
        with explained(self.root):
            self.layout.refuse_foreign()

    def on_disk_of(self, place: Path) -> bool:
        """Return whether the bytes there and the store's lie on one file system. Neither need exist yet."""
        return existing(place).stat().st_dev == existing(self.root).stat().st_dev

    @property
    def keeps_others_out(self) -> bool:
        """False where the file system keeps no locks: every process then works in folders of its own."""
        self.enter()
        return self._presence.locks_work

    def find(self, key: str) -> KeyRecord | None:
        """Return the record of a key. One small read; a damaged record goes to quarantine and is none."""
        return load_record(self.layout, key)

    def note_asked(self, record: KeyRecord, asked: Mapping[str, Json]) -> None:
        """Remember that the pins of a record were the answer to this too. A store that cannot be written forgets it."""
        with suppress(BigpipeError), explained(self.layout.keys):
            self.enter()
            save_record(self.layout, record.model_copy(update={"asked": [*record.asked, dict(asked)][-QUESTIONS:]}))

    def with_partial(self, partial: str) -> bool:
        """Return whether any record shares the key with the input digests left out."""
        return os.path.exists(os.path.join(self.layout.partials, hex_of(partial)))

    def artifact_path(self, digest: str) -> Path:
        """Return the directory of an artifact: links, to be read as it is."""
        return self.layout.tree(digest)

    def let_go(self, digest: str) -> bool:
        """Return whether the store itself dropped the bytes of an artifact that it knows."""
        artifact = load_artifact(self.layout, digest)
        return artifact is not None and artifact.dropped

    def intact(self, record: KeyRecord) -> bool:
        """Return whether the bytes of a record are there, unchanged. Size, mtime, inode and ctime are trusted
        where all are as recorded, else it is read. A changed object goes to quarantine; a damaged tree is rebuilt."""
        if record.digest is None:
            return True
        with explained(self.layout.tree(record.digest)):
            artifact = load_artifact(self.layout, record.digest)
            if artifact is None or artifact.dropped:
                return False
            entries: dict[str, Entry] = {}
            for name, entry in artifact.files.items():
                state = examine(self.layout, entry)
                if isinstance(state, str):
                    if state == "damaged" and entry.reference is None:
                        self.layout.set_aside(self.layout.object(entry.sha256))
                    return False
                entries[name] = state
            current = replace(artifact, files=entries)
            if entries != artifact.files:
                with suppress(OSError):  # a store that cannot be written is read again the next time
                    save_artifact(self.layout, current)
            if not tree_is_whole(self.layout, current):
                self.enter()
                place_tree(self.layout, current, self._presence.temporary())
        return True

    def enter(self) -> Store:
        """Say that this process is going to read what it found: from now on nobody else frees it. Whoever wants to use
        anything calls it before it looks for hits; `lock` and `publish` imply it. Also tidies up after dead runs.
        Return the store, to be left as a context."""
        with explained(self.root):
            self.layout.check()
        self._presence.enter()
        if not self._tidied.is_set():
            self._tidied.set()
            self._finish_interrupted()
            sweep(self.layout, self._presence)
        return self

    def _finish_interrupted(self) -> None:
        """Complete what a run that died was publishing, so that not even a run of another recipe can lose it."""
        if not self._presence.locks_work:
            return
        with explained(self.layout.work):
            for name in names_in(self.layout.work):
                key = f"sha256:{name}"
                if not is_hex(name) or not (self.layout.work / name / JOURNAL).exists():
                    continue
                with if_free(self.layout.working_lock(key)) as free, suppress(BigpipeError):
                    if free:  # where it fails (a full disk), it is said when that key is asked for
                        self._resume(self.layout.working(key))

    def _resume(self, folder: Path) -> None:
        """Under the key's lock: complete an interrupted publishing, or drop one that cannot be completed."""
        if (folder / JOURNAL).exists():
            self._publisher.resume(folder)
            remove_tree(folder)

    def publish(self, record: KeyRecord, out: Path, known: Known | None = None) -> KeyRecord:
        """Move what `out` holds into the store and record it, durably, in this order. `out` is taken apart.

        Links in `out` that lead out of the store are kept as references, those into it share the object; `known` holds
        what the stage has hashed itself: it is not read again. Return the record with `digest` and `files`.

        Raise StageFailed for what an artifact cannot hold (links to nothing or to directories, sockets…).
        """
        self.enter()
        return self._publisher.publish(record, out, known or {})

    def receive(
        self,
        record: KeyRecord,
        remote: Remote,
        *,
        kept: bool,
        cancelled: threading.Event,
        waiting: Callable[[str], None] | None = None,
        moved: Callable[[int], None] = lambda size: None,
    ) -> KeyRecord:
        """Take what a remote store has under a key, every byte compared with its sha256, and record it as `publish`
        does. Whoever calls it holds the key. kept: its files come too; else they count as dropped. moved: called with
        the bytes done since the last call. Raise Wrong, Away, DoesNotFit, Interrupted."""
        from .fetching import Fetching, listed
        from .work import fetching_key

        files = listed(record)
        if not kept:
            return self.publish_forgone(record, files) if record.digest else self.publish(record, self.root)
        with self.lock(fetching_key(record.key), cancelled=cancelled, waiting=waiting) as work:
            Fetching(self.layout, remote, work.out, work.scratch, cancelled, moved).fetch(files)
            made = self.publish(record, work.out, files)
            work.done()
        return made

    def publish_forgone(self, record: KeyRecord, files: Mapping[str, tuple[str, int]]) -> KeyRecord:
        """Record an artifact whose bytes were let go while it was made, as `publish` and `drop` after it would. files:
        relative path → (sha256 in hex, size) of all its files."""
        self.enter()
        record = record.holding(files)
        with explained(self.root), StoreLock(self.layout.locks / "objects", shared=True):
            if load_artifact(self.layout, record.digest or "") is None:  # one of the same digest stays as it is
                save_artifact(self.layout, dropped_artifact(record))
            save_record(self.layout, record)
        self.drop(record.digest or "", record.key)
        return record

    def temporary(self) -> Path:
        """Return a free path on the store's file system; what is put there goes with this process."""
        return self._presence.temporary()

    def resume_work(self, key: str, work: Work) -> None:
        """Go on with what was done under another key, where nothing has been done under this one. Both are held."""
        folder = self.layout.working(key)
        if not self._presence.locks_work or not folder.is_dir() or names_in(work.out):
            return
        with explained(folder), if_free(folder / WORK_LOCK) as abandoned:
            if not abandoned:
                return
            self._resume(folder)
            for name in ("out", "scratch"):
                if (folder / name).is_dir():  # a crash may have come between the two
                    remove_tree(work.folder / name)
                    move(folder / name, work.folder / name)
            remove_tree(folder)

    def resume_alike(self, family: str, key: str, work: Work) -> None:
        """Go on with what was begun under another key of the same `family`, where nothing was under this one, which is
        held; what it had written of its output is dropped. From now on others find this one so."""
        if not self._presence.locks_work:
            return
        with explained(work.folder):
            if not names_in(work.out) and not names_in(work.scratch):
                others = (f"sha256:{name}" for name in names_in(self.layout.work) if is_hex(name))
                any(self._adopt(other, work) for other in others if other != key and self._is_of(other, family))
            if not self._is_of(key, family):
                write_file(work.folder / FAMILY, family)

    def _is_of(self, key: str, family: str) -> bool:
        try:
            return (self.layout.working(key) / FAMILY).read_text() == family
        except (OSError, UnicodeDecodeError):
            return False

    def _adopt(self, key: str, work: Work) -> bool:
        """Take what was begun under a key that nobody holds. Return whether something was."""
        folder = self.layout.working(key)
        with if_free(self.layout.working_lock(key)) as free, if_free(folder / WORK_LOCK) as abandoned:
            if not (free and abandoned) or (folder / JOURNAL).exists() or not (folder / "scratch").is_dir():
                return False
            remove_tree(work.scratch)
            move(folder / "scratch", work.scratch, durable=True)
            remove_tree(folder)
        return True

    @contextmanager
    def hold(
        self, key: str, *, cancelled: threading.Event | None = None, waiting: Callable[[str], None] | None = None
    ) -> Iterator[None]:
        """Keep others from a key, without folders to work in. Waits as `lock` does, but for no workers."""
        self.enter()
        lock = StoreLock(self.layout.working_lock(key))
        lock.acquire(cancelled, waiting)
        with lock:
            yield

    def held(self, key: str) -> bool:
        """Return whether somebody keeps others from a key."""
        self.enter()
        with if_free(self.layout.working_lock(key)) as free:
            return not free

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Keep others that use this store from a file that lies elsewhere, while it is read and written anew. Nobody is
        kept out where there is no store, or it cannot be written: then nobody runs over it."""
        with ExitStack() as held:
            if self.there:
                with suppress(BigpipeError):
                    name = hex_of(digest_of("file", os.path.abspath(path)))
                    held.enter_context(StoreLock(self.layout.locks / f"file-{name}"))
            yield

    @contextmanager
    def lock(
        self, key: str, *, cancelled: threading.Event | None = None, waiting: Callable[[str], None] | None = None
    ) -> Iterator[Work]:
        """Hold the right to do the work of a key. Whoever waited for another run must `find` the key once more.

        Waits for another run that holds it, then for workers that outlived such a run; `waiting` hears who that is.
        Frees itself when this process dies. Raise Interrupted when `cancelled` is set meanwhile.
        """
        from .work import Work  # of what runs

        with self.hold(key, cancelled=cancelled, waiting=waiting):
            folder = self._work_folder(key)
            with explained(folder):
                make_directory(folder)
                orphans = StoreLock(folder / WORK_LOCK)
                orphans.acquire(cancelled, waiting, "processes that an earlier run left behind")
                orphans.release()
                if self._presence.locks_work:
                    self._resume(folder)
                work = Work(folder)
                if work.out.is_symlink() or work.out.is_file():  # an attempt replaced it: no later one goes on there
                    work.out.unlink()
                make_directory(work.out, durable=False)
                make_directory(work.scratch)  # syncs the folder, and with it what was made in there before
                remove_partials(work.out)
            yield work

    def _work_folder(self, key: str) -> Path:
        folder = self.layout.working(key)
        if self._presence.locks_work:
            return folder
        # Nobody is kept out, so everybody works in a folder of their own: the work is done twice, never mixed.
        return folder.with_name(f"{folder.name}.{self._presence.enter().name}.{threading.get_ident()}")

    def drop(self, digest: str, key: str) -> int:
        """Let the bytes of an artifact go that `key` does not need kept; return how many were freed. Its digest stays
        recorded. What another artifact holds, or another recipe keeps, stays; while another process uses the store all
        stays, for it to free."""
        self.enter()
        return release(self.layout, self._presence, digest, key)

    def keep(self, digest: str, key: str) -> None:
        """Keep the bytes of an artifact that `key` once let go, if they are still there."""
        if record_path(self.layout.released, digest).exists():
            with explained(self.layout.released), StoreLock(self.layout.locks / "objects", shared=True):
                keep_again(self.layout, digest, key)

    def remember(
        self, recipe_path: Path, lock_path: Path | None, name: str, node_keys: Mapping[str, str], variant: str = "",
        known: Collection[str] | None = None, lets_go: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Keep these keys from `gc`, with what is known, as long as the manifest or its lock file exists. A key may be
        given before it has a record: its unfinished work is then kept. variant: names the `-p` values of these keys.
        known: all nodes that the recipe has with them; what it had besides is kept no longer. lets_go: the nodes whose
        bytes it does not need once they were taken."""
        remember(self.layout, recipe_path, lock_path, name, node_keys, variant, known, lets_go)

    def last_keys(self, manifest: Path, name: str) -> dict[str, str]:
        """Return node → the key of its last record under this manifest path, else the latest manifest of this name."""
        found: dict[str, str] = {}
        for root in named_roots(self.layout, manifest, name):
            for variant in root.variants.values():  # those used last at the end
                found |= variant["keys"]
            found |= root.nodes
        return found

    def history(self, manifest: Path, name: str, node: str) -> list[KeyRecord]:
        """Return the node's latest records that are still there, oldest first; found as `last` finds it."""
        roots = [root for root in named_roots(self.layout, manifest, name) if node in root.history]
        keys = roots[-1].history.get(node, []) if roots else []
        return [record for key in keys if (record := self.find(key)) is not None]

    def gc(self, locked: LockedDigests, keeping: Keeping | None = None, *, dry_run: bool = False) -> GcReport:
        """Free all that no existing manifest or lock file names. Raise Transient while another run uses the store."""
        from .garbage import Keeping, collect_garbage

        return collect_garbage(self.layout, self._presence, locked, keeping or Keeping(), dry_run=dry_run)

    def remove(self, digests: Collection[str], *, dry_run: bool = False) -> GcReport:
        """Free these artifacts, and forget the computations that gave them. Raise Transient as `gc` does."""
        from .garbage import remove_artifacts

        return remove_artifacts(self.layout, self._presence, digests, dry_run=dry_run)

    def remove_runs(self, runs: Sequence[str], *, dry_run: bool = False) -> tuple[Freed, ...]:
        """Free what these runs, which are over, left behind: their records and logs."""
        from .garbage import remove_runs

        return remove_runs(self.layout, runs, dry_run=dry_run)

    def take_out(self, digest: str, directory: Path) -> dict[str, int]:
        """Copy an artifact to a directory as real files; see `takeout`. Return relative path → bytes."""
        from .takeout import take_out

        self.enter()
        return take_out(self.layout, digest, directory)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Read every byte. `repair` sets aside what is damaged, so that the next run makes it again."""
        from .verify import Verification, VerifyReport

        self.refuse_foreign()
        if not self.there:
            return VerifyReport(0, 0, 0, ())
        with suppress(BigpipeError):  # a store on a read-only file system can be verified too
            self.enter()
        with explained(self.root):
            return Verification(self.layout, self._presence.temporary, repair).verify()

    def ls(self) -> list[tuple[Artifact, KeyRecord]]:
        """Return every artifact with the newest record that gave it, the newest first."""
        with explained(self.layout.artifacts):
            newest = {item.digest: item for item in sorted(all_records(self.layout), key=lambda item: item.created)}
            listed = [(item, newest[item.digest]) for item in all_artifacts(self.layout) if item.digest in newest]
        return sorted(listed, key=lambda item: item[1].created, reverse=True)

    def close(self) -> None:
        """Leave the store: free what was released meanwhile, remove temporary files. It may be used again."""
        if self._tidied.is_set():
            sweep(self.layout, self._presence)
            self._tidied.clear()
        self._presence.leave()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
