"""Brings the files of one commit into the Hub cache, and makes sure that each is what the Hub's listing promises.

`huggingface_hub` checks the size of what it fetched, nothing else: bytes garbled on the way, by a proxy or on the disk
are taken. Here every file's digest (sha256 for LFS files, git's sha1 for the others) is computed once after it came and
remembered by (size, mtime, inode, ctime); what does not match is fetched once more and then refused. Files stay where
the cache has them: nothing is copied, moved, linked or deleted there.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.errors import InvalidCheckpoint, Transient
from bigpipe.files import sync_file
from bigpipe.sizes import format_duration

from .connection import downloading, guard_answers, longest_silence
from .errors import hub_errors, of_cache
from .exchange import exchanging
from .heads import is_promised
from .repository import HubFile, Repository

LOOK = 2.0
"""Seconds between looks at whether anything comes."""
WORKERS = 8
WORKERS_IN_ORDER = 2
"""Files that come at a time. One more may be verified meanwhile."""
CHUNK = 1 << 22
PIECE = 1 << 18
"""Bytes that the client takes from the network at once. Its own 10 MiB are fresh memory each time, and most of its time
goes into having the kernel clear that. From loopback 2.6 GB take half as long in these pieces."""

Report = Callable[[int, int, str], None]
"""Bytes done, bytes in all, and of which task: `download` or `verify`."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One file where the Hub cache keeps it."""

    path: Path
    """Absolute, links resolved."""
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    files: dict[str, Fetched]
    fetched_bytes: int
    """Over the network, this time."""


def fetch(
    repository: Repository,
    files: Sequence[HubFile],
    *,
    report: Report = lambda done, total, task: None,
    arrived: Callable[[str, Fetched], None] | None = None,
) -> Snapshot:
    """Return every file of `files` in the Hub cache, whole and verified; those already there are not fetched again.

    arrived: told of each file as soon as it is verified; the files then come roughly in the order given.

    Raise what `hub_errors` knows, Transient where the bytes are wrong twice, Offline where one is missing offline.
    """
    at_once = WORKERS if arrived is None else WORKERS_IN_ORDER
    errands = _Errands(repository, files, report, at_once)
    # The largest first: the last one to finish decides when all have. If somebody takes them one by one, few at a time:
    # side by side all would end together.
    ordered = sorted(files, key=lambda file: -file.size) if arrived is None else files
    fetched: dict[str, Fetched] = {}
    with (
        ThreadPoolExecutor(1, thread_name_prefix="settle") as settling,
        ThreadPoolExecutor(at_once + 1, thread_name_prefix="fetch") as pool,
    ):
        names = {pool.submit(errands.bring, file): file.path for file in ordered}
        settles = []
        try:
            for future in errands.finished(names):
                found = fetched[names[future]] = future.result()
                # While others still come: what is recorded as verified is there after a power cut too.
                settles.append(settling.submit(sync_file, found.path))
                if arrived is not None:
                    arrived(names[future], found)
        except BaseException:
            errands.stop.set()
            _abort_xet()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for settle in settles:
            settle.result()
    for file in files:
        # A file whose name another one was given by mistake may have been replaced after it was verified.
        if errands.verified(fetched[file.path].path, file) is None:
            raise errands.wrong(file)
    return Snapshot({file.path: fetched[file.path] for file in files}, errands.downloaded.done)


def missing_bytes(repository: Repository, files: Iterable[HubFile]) -> int:
    """Return how many bytes `fetch` would have to bring, by the names and sizes of what the cache has."""
    return sum(file.size for file in files if not repository.is_cached(file))


class _Stopped(Exception):
    """Ends the downloads that run beside one that failed."""


@dataclass(slots=True)
class _Count:
    """Bytes of one task, added up over threads."""

    task: str
    total: int
    report: Report
    done: int = 0
    moved: float = 0.0
    """When the last bytes came, of `time.monotonic`."""
    coming: int = 0
    """Files that are being transferred."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size: int) -> None:
        with self.lock:
            self.done += size
            self.moved = time.monotonic()
            self.report(self.done, max(self.total, self.done), self.task)

    def transfers(self, change: int) -> None:
        """One more, one fewer, or none: something came."""
        with self.lock:
            self.coming += change
            self.moved = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds without a byte of what is being transferred. (Waiting for another process's transfer is none.)"""
        return time.monotonic() - self.moved if self.coming else 0.0


class _Errands:
    def __init__(self, repository: Repository, files: Sequence[HubFile], report: Report, at_once: int) -> None:
        self.repository = repository
        self.hub = repository.hub
        self.lines = threading.Semaphore(at_once)
        self.stop = threading.Event()
        self.hashed: dict[Path, dict[str, Any]] = {}
        self.downloaded = _Count("download", missing_bytes(repository, files), report)
        self.hashing = _Count("verify", sum(file.size for file in files if not self._known(file)), report)

    def _known(self, file: HubFile) -> bool:
        path = self.repository.blob(file)
        return path.is_file() and _recalled(self.hub.recall("blob", str(path)), path.stat()) is not None

    def finished(self, futures: Iterable[Future[Fetched]]) -> Iterator[Future[Fetched]]:
        """Each as it ends. Raise Transient where nothing comes any more: Xet waits by rules of its own."""
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=LOOK, return_when=FIRST_COMPLETED)
            yield from done
            if (silence := self.downloaded.silence) > longest_silence():
                cause = f"nothing came of {self.repository.repo} for {format_duration(silence, whole=True)}"
                raise Transient(cause, "run again later, or without Xet: HF_HUB_DISABLE_XET=1")

    def bring(self, file: HubFile) -> Fetched:
        """Fetch and verify; where that fails, once more: what lay in the cache may have rotted, or was garbled."""
        for again in (False, True):
            with self.lines:
                path = self._download(file, again)
            # The client leaves a link to bad bytes as it is; the good ones then lie beside, under their own name.
            for place in dict.fromkeys((path, self.repository.blob(file))):
                if found := self.verified(place, file):
                    return found
            if self.hub.offline:
                cause = f"{path} is damaged: it is not {file.path} of {self.repository.repo}, whose digest is another"
                raise InvalidCheckpoint(cause, "run once with a network, which fetches it again")
        raise self.wrong(file)

    def verified(self, path: Path, file: HubFile) -> Fetched | None:
        """The file, if that is what lies there."""
        if not path.is_file():
            return None
        digests = self._digests(path, file)
        return Fetched(path, digests["sha256"], digests["size"]) if is_promised(file, digests) else None

    def wrong(self, file: HubFile) -> Transient:
        named = f"{file.path} of {self.repository.repo}"
        cause = f"{named} came twice with other bytes than its digest {file.etag} promises"
        cure = f"something between {self.hub.endpoint} and here changes them; run again, or over another network"
        return Transient(cause, cure)

    def _download(self, file: HubFile, again: bool) -> Path:
        from huggingface_hub import constants, hf_hub_download

        guard_answers(self.hub.endpoint)
        constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, PIECE)
        commit, name = self.repository.commit, self.repository.address(file)
        with (
            hub_errors(self.hub.endpoint, self.repository.repo, commit, name),
            exchanging(downloading(name, file.size, commit=commit, digest=file.etag)),
        ):
            found = hf_hub_download(
                self.repository.repo,
                name,
                revision=commit,
                cache_dir=self.hub.cache,
                endpoint=self.hub.endpoint,
                token=self.hub.token,
                library_name="bigpipe",
                local_files_only=self.hub.offline,
                force_download=again,
                tqdm_class=_bar(self.downloaded, self.stop),
            )
        path = Path(os.path.realpath(found))
        if not self._is_of_the_cache(Path(found), path) or not path.is_file():
            cause = f"{found} leads to {path}, outside of the Hub cache {self.hub.cache}"
            raise InvalidCheckpoint(cause, "somebody has changed the cache: delete that link and run again")
        return path

    def _is_of_the_cache(self, found: Path, real: Path) -> bool:
        """The cache, a repository in it, or its blobs may be links of the user's to another disk."""
        folder = self.hub.folder(self.repository.repo)
        places = [place.resolve() for place in (self.hub.cache, folder, folder / "blobs", folder / "snapshots")]
        blob = Path(os.path.normpath(found.parent / os.readlink(found))) if found.is_symlink() else found
        return any(real.is_relative_to(place) for place in places) or blob.parent == folder / "blobs"

    def _digests(self, path: Path, file: HubFile) -> dict[str, Any]:
        """sha256 and size of a cached file, and both sha1 where the Hub tells no other; read once, then remembered."""
        with of_cache(path), path.open("rb", buffering=0) as content:
            stat = os.fstat(content.fileno())
            known = _recalled(self.hashed.get(path), stat) or _recalled(self.hub.recall("blob", str(path)), stat)
            if known is not None:
                return known
            sha256, sha1 = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
            git = hashlib.sha1(b"blob %d\0" % stat.st_size, usedforsecurity=False)
            while chunk := content.read(CHUNK):
                if self.stop.is_set():
                    raise _Stopped
                sha256.update(chunk)
                if file.sha256 is None:
                    git.update(chunk)
                    sha1.update(chunk)
                self.hashing.add(len(chunk))
        digests = {"sha256": sha256.hexdigest(), "blob_id": git.hexdigest(), "sha1": sha1.hexdigest(), **_seen(stat)}
        self.hashed[path] = digests
        self.hub.remember(digests, "blob", str(path))
        return digests


def _recalled(found: Any, stat: os.stat_result) -> dict[str, Any] | None:
    """Digests that were found before, if the file has not been touched since."""
    return found if isinstance(found, dict) and _seen(stat).items() <= found.items() else None


def _seen(stat: os.stat_result) -> dict[str, int]:
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"size": stat.st_size, "inode": stat.st_ino, **times}


def _bar(count: _Count, stop: threading.Event) -> Any:
    """What `hf_hub_download` takes for a progress bar class: it only counts, and ends the download when told to.
    The client tells it twice of the same bytes: as they come in (`update_transfer`, fewer where Xet finds them known)
    and as they are written (`update`). The latter add up to the size of the file."""

    class Bar:
        n = 0

        def __init__(self, *_: Any, total: int | None = None, **settings: Any) -> None:
            self.total = total
            self._open = True
            count.transfers(1)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def close(self) -> None:
            if self._open:
                self._open = False
                count.transfers(-1)

        def update(self, size: float | None = 1) -> None:
            if stop.is_set():
                raise _Stopped
            self.n += int(size or 0)
            count.add(int(size or 0))

        def update_transfer(self, size: float | None = 1) -> None:
            count.transfers(0)

        def _ignore(self, *_: object, **settings: object) -> None: ...

        set_postfix_str = set_transfer_postfix_str = _ignore
        set_description = set_description_str = refresh = _ignore

    return Bar


def _abort_xet() -> None:
    """End what Xet downloads in threads of its own, out of reach of our exceptions; the client does so on Ctrl-C."""
    with suppress(ImportError, AttributeError):
        from huggingface_hub.utils import _xet

        _xet.abort_xet_session()
