"""Brings the files of one commit into the Hub cache, and makes sure that each is what the Hub's listing promises.

`huggingface_hub` checks the size of what it fetched, nothing else: bytes garbled on the way, by a proxy or on the disk
are taken. Here every file's digest (sha256 for LFS files, git's sha1 for the others) is computed once after it came and
remembered by (size, mtime, inode); what does not match is fetched once more and then refused. Files stay where the
cache has them: nothing is copied, moved, linked or deleted there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.errors import InvalidCheckpoint, Transient
from bigpipe.files import sync_file

from .errors import hub_errors
from .repository import Hub, HubFile, Repository

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
    hub: Hub,
    memo: Path | None = None,
    report: Report = lambda done, total, task: None,
    arrived: Callable[[str, Fetched], None] | None = None,
) -> Snapshot:
    """Every file of `files` in the Hub cache, whole and verified; those already there are not fetched again.

    arrived: told of each file as soon as it is verified; the files then come roughly in the order given.

    Raises what `hub_errors` knows, Transient where the bytes are wrong twice, Offline where one is missing offline.
    """
    at_once = WORKERS if arrived is None else WORKERS_IN_ORDER
    errands = _Errands(repository, hub, memo, report, files, threading.Semaphore(at_once))
    # The largest first: the last one to finish decides when all have. If somebody takes them one by one, few at a time:
    # side by side all would end together.
    ordered = sorted(files, key=lambda file: -file.size) if arrived is None else files
    with (
        ThreadPoolExecutor(1, thread_name_prefix="settle") as settling,
        ThreadPoolExecutor(at_once + 1, thread_name_prefix="fetch") as pool,
    ):
        pending = {file.path: pool.submit(errands.bring, file) for file in ordered}
        paths = {future: path for path, future in pending.items()}
        settles = []
        try:
            for future in as_completed(paths):
                found = future.result()
                # While others still come: what is recorded as verified is there after a power cut too.
                settles.append(settling.submit(sync_file, found.path))
                if arrived is not None:
                    arrived(paths[future], found)
        except BaseException:
            errands.stop.set()
            _abort_xet()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for settle in settles:
            settle.result()
    fetched = {file.path: pending[file.path].result() for file in files}
    for file in files:
        if not errands.still_right(file, fetched[file.path]):
            raise errands.wrong(file)
    return Snapshot(fetched, errands.downloaded.done)


def missing_bytes(repository: Repository, files: Iterable[HubFile], hub: Hub) -> int:
    """How many bytes `fetch` would have to bring, by the names and sizes of what the cache has."""
    return sum(file.size for file in files if not _is_cached(repository, file, hub))


def _is_cached(repository: Repository, file: HubFile, hub: Hub) -> bool:
    folder = hub.folder(repository.repo)
    places = (folder / "blobs" / file.etag, folder / "snapshots" / repository.commit / file.path)
    return any(place.is_file() and place.stat().st_size == file.size for place in places)


class _Stopped(Exception):
    """Ends the downloads that run beside one that failed."""


class _Count:
    """Bytes of one task, added up over threads."""

    def __init__(self, task: str, total: int, report: Report) -> None:
        self.done = 0
        self._task, self._total, self._report = task, total, report
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size
            self._report(self.done, max(self._total, self.done), self._task)


@dataclass(slots=True)
class _Errands:
    repository: Repository
    hub: Hub
    memo: Path | None
    report: Report
    files: Sequence[HubFile]
    lines: threading.Semaphore
    stop: threading.Event = field(default_factory=threading.Event)
    hashed: dict[tuple[object, ...], dict[str, Any]] = field(default_factory=dict)
    downloaded: _Count = field(init=False)
    verified: _Count = field(init=False)

    def __post_init__(self) -> None:
        self.downloaded = _Count("download", missing_bytes(self.repository, self.files, self.hub), self.report)
        unknown = sum(file.size for file in self.files if not self._known(file))
        self.verified = _Count("verify", unknown, self.report)

    def _known(self, file: HubFile) -> bool:
        path = self._blob(file)
        return path.is_file() and _recalled(path, self.memo) is not None

    def bring(self, file: HubFile) -> Fetched:
        """Fetch and verify; where that fails, once more: what lay in the cache may have rotted, or was garbled."""
        with self.lines:
            path = self._download(file)
        if found := self._verified(path, file):
            return found
        if self.hub.offline:
            raise InvalidCheckpoint(
                f"{path} is damaged: it should be {file.path} of {self.repository.repo}, and its digest is another",
                "run once with a network, which fetches it again",
            )
        if found := self._verified(self._download(file, again=True), file):
            return found
        raise self.wrong(file)

    def still_right(self, file: HubFile, fetched: Fetched) -> bool:
        """A file whose name another one was given by mistake may have been replaced after it was verified."""
        return fetched.path.is_file() and _is_right(file, self._digests(fetched.path, file))

    def _verified(self, path: Path, file: HubFile) -> Fetched | None:
        # The client leaves a link to bad bytes as it is; the good ones then lie beside, under their own name.
        for place in dict.fromkeys((path, self._blob(file))):
            if place.is_file() and _is_right(file, digests := self._digests(place, file)):
                return Fetched(place, digests["sha256"], digests["size"])
        return None

    def wrong(self, file: HubFile) -> Transient:
        return Transient(
            f"{file.path} of {self.repository.repo} came twice with other bytes than its digest {file.etag} promises",
            f"something between {self.hub.endpoint} and here changes them; run again, or over another network",
        )

    def _blob(self, file: HubFile) -> Path:
        return Path(os.path.realpath(self.hub.folder(self.repository.repo) / "blobs" / file.etag))

    def _download(self, file: HubFile, *, again: bool = False) -> Path:
        from huggingface_hub import constants, hf_hub_download

        constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, PIECE)
        with hub_errors(self.hub.endpoint, self.repository.repo, self.repository.commit, file.path):
            found = hf_hub_download(
                self.repository.repo,
                file.path,
                revision=self.repository.commit,
                cache_dir=self.hub.cache,
                endpoint=self.hub.endpoint,
                token=self.hub.token,
                library_name="bigpipe",
                local_files_only=self.hub.offline,
                force_download=again,
                tqdm_class=_bar(self.downloaded, self.stop),
            )
        path = Path(os.path.realpath(found))
        if not path.is_relative_to(self.hub.cache.resolve()) or not path.is_file():
            raise InvalidCheckpoint(
                f"{found} leads to {path}, outside of the Hub cache {self.hub.cache}",
                "somebody has changed the cache: delete that link and run again",
            )
        return path

    def _digests(self, path: Path, file: HubFile) -> dict[str, Any]:
        """sha256 and size of a cached file, and git's sha1 where the Hub tells no other; read once, then remembered."""
        with path.open("rb", buffering=0) as content:
            stat = os.fstat(content.fileno())
            known = self.hashed.get(_fingerprint(path, stat)) or _recalled(path, self.memo)
            if known is not None:
                return known
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % stat.st_size, usedforsecurity=False)
            while chunk := content.read(CHUNK):
                if self.stop.is_set():
                    raise _Stopped
                sha256.update(chunk)
                if file.sha256 is None:
                    git.update(chunk)
                self.verified.add(len(chunk))
        digests = {"sha256": sha256.hexdigest(), "blob_id": git.hexdigest(), "size": stat.st_size}
        self.hashed[_fingerprint(path, stat)] = digests
        if self.memo is not None:
            seen = {"mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino, "path": str(path)}
            remember(_memo_file(path, self.memo), {**digests, **seen})
        return digests


def _is_right(file: HubFile, digests: dict[str, Any]) -> bool:
    """Without a git sha1 (a mirror may name its blobs otherwise) the size has to do."""
    if digests["size"] != file.size:
        return False
    if file.sha256:
        return bool(digests["sha256"] == file.sha256)
    return len(file.blob_id) != 40 or bool(digests["blob_id"] == file.blob_id)


def _memo_file(path: Path, memo: Path) -> Path:
    return memo / "hub-blobs" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _fingerprint(path: Path, stat: os.stat_result) -> tuple[object, ...]:
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ino


def _recalled(path: Path, memo: Path | None) -> dict[str, Any] | None:
    """The remembered digests of a file that has not been touched since."""
    found = recall(_memo_file(path, memo)) if memo is not None else None
    if not isinstance(found, dict):
        return None
    stat = path.stat()
    seen = (found.get("size"), found.get("mtime_ns"), found.get("inode"))
    return found if seen == (stat.st_size, stat.st_mtime_ns, stat.st_ino) else None


def _bar(count: _Count, stop: threading.Event) -> Any:
    """What `hf_hub_download` takes for a progress bar class: it only counts, and ends the download when told to.

    The client tells it twice of the same bytes: as they come in (`update_transfer`, fewer where Xet finds them known)
    and as they are written (`update`). The latter add up to the size of the file.
    """

    class Bar:
        n = 0

        def __init__(self, *_: Any, total: int | None = None, **settings: Any) -> None:
            self.total = total

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, size: float | None = 1) -> None:
            if stop.is_set():
                raise _Stopped
            self.n += int(size or 0)
            count.add(int(size or 0))

        def _ignore(self, *_: object, **settings: object) -> None: ...

        update_transfer = set_postfix_str = set_transfer_postfix_str = _ignore
        set_description = set_description_str = refresh = close = _ignore

    return Bar


def _abort_xet() -> None:
    """End what Xet downloads in threads of its own, out of reach of our exceptions; the client does so on Ctrl-C."""
    with suppress(ImportError, AttributeError):
        from huggingface_hub.utils import _xet

        _xet.abort_xet_session()
