"""A store elsewhere that others share, at an address that fsspec opens.

v1/keys/HEX.json     what a computation gave: a `Claim`
v1/objects/HEX       its files, by their sha256

    find(key)     what is said there of a key
    read(sha256)  the bytes of an object, pieces of it side by side, in order. Nobody has compared them yet
    offer(claim)  objects first, then the record; whoever comes first stays

A record or an object that is there is not written again, unless this process has seen that it is not what its name
says. The remote is a help, never a condition: where it is down, slow, refuses or cannot be written, one line says so
and it is not used any more; where what it gave is wrong, one line says so and that key is not taken from there. No name
on it comes from outside: they are made of sha256 digits.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bigpipe.errors import Interrupted, UsageError
from bigpipe.files import (
    copy_file,
    give_free_name,
    lies_in,
    make_folders,
    move,
    only_a_shell_reads,
    partial_name,
    write_file,
)
from bigpipe.filesystems import is_local, is_web, open_address, protocols, require_scheme
from bigpipe.names import begins_address
from bigpipe.redaction import conceal_environment, redact, redact_value

from .claims import LARGEST, Claim, Wrong, read_claim
from .layout import hex_of

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
LOCAL = ("file", "local")
"""Schemes of paths of this machine."""
POLL = 0.2
"""Seconds between two looks whether who waits was interrupted."""
PATIENCE = 30.0
"""Seconds for one exchange: a record, or a piece of an object."""
PIECE, LANES = 2 * 2**20, 4
"""Bytes of a piece that comes, and how many come at a time. Together they are what is in memory, and what a slow line
must bring within `PATIENCE`: 280 kB/s."""
PART, MOST_PARTS, SENT_AT_ONCE = 5 * 2**20, 9000, 2
"""Bytes of a part that is sent, the least that S3 takes, and how many one object may have: S3 takes 10,000."""
WHOLE_AT_ONCE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "hf", "memory"})
"""File systems where an object is there as a whole or not at all; elsewhere it gets another name first."""
Moved = Callable[[int], None]
"""Called with the bytes that came or went since the last call."""


class Away(Exception):
    """A remote store cannot be used now."""


class Late(Away):
    """It does not answer, so there is no use in asking it more."""


@dataclass(eq=False)
class Remote:
    """See the module. Used from several threads."""

    address: str = field(repr=False)
    publishes: bool = True
    """Is what was made here to be offered there?"""
    patience: float = PATIENCE
    tell: Callable[[str], None] = lambda line: None
    """Hears of what goes wrong, a line each."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Nothing is waited for any more: who asked was interrupted."""
    away: str = ""
    """Why it is not used any more."""
    closed: str = ""
    """Why nothing is offered any more."""
    _refused: set[str] = field(default_factory=set)
    """Keys whose records, and sha256 of objects, are not what they should be."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def place(self) -> str:
        """Return what holds all of it: a path where that is a directory here, else an address."""
        scheme, _, rest = self.address.partition("://")
        return f"{(rest if scheme in LOCAL else self.address).rstrip('/')}/v1"

    @property
    def name(self) -> str:
        """The address, to be shown."""
        return redact(self.address)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            system, root = open_address(self.address, skip_instance_cache=True, use_listings_cache=False)
        except UsageError as error:
            raise UsageError(
                f"the remote store {error.cause}", f"{error.cure}; BIGPIPE_REMOTE= goes without"
            ) from error
        return system, root.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._opened[0]

    def _path(self, folder: str, name: str) -> str:
        return f"{self._opened[1]}/v1/{folder}/{name}"

    def _record(self, key: str) -> str:
        return self._path("keys", f"{hex_of(key)}.json")

    @property
    def is_nowhere(self) -> bool:
        """Is there nothing at the address that could be a store? False where that cannot be told, as of a plain web
        server, which lists nothing."""
        if is_web(self._system) or self.away:
            return False
        try:
            return not self._exchange(lambda: self._system.exists(f"{self._opened[1]}/v1"))
        except Away:
            return False

    def find(self, key: str) -> Claim | None:
        """Return what is said of a key; None where nothing is, or nothing that could be right, or it cannot be asked.
        Raise UsageError for an address that fsspec cannot open."""
        if self.away or key in self._refused:
            return None
        try:
            return self._find(key)
        except Away as error:
            self.leave(error)
        except Wrong as error:
            self.refuse(key, f"the record of {key[:19]}…: {error}")
        return None

    def _find(self, key: str) -> Claim | None:
        """Raise Wrong, Away."""
        try:
            content = self._exchange(lambda: self._system.cat_file(self._record(key), start=0, end=LARGEST + 1))
        except FileNotFoundError:
            return None
        except Late:
            raise
        except Away:
            if self._size(self._record(key)) == 0:  # of nothing, no server gives the first bytes
                raise Wrong("it is empty") from None
            raise
        return read_claim(bytes(content), key)

    def refuse(self, name: str, cause: str) -> None:
        """Take nothing under this key, or object, from there any more. What is made in its place replaces it."""
        with self._lock:
            known = name in self._refused
            self._refused.add(name)
        if not known:
            self.tell(f"the remote store {self.name} is not believed: {redact(cause)}")

    def leave(self, error: Exception) -> None:
        """Use it no more: it is down, slow, or refuses."""
        with self._lock:
            first, self.away = not self.away, self.away or redact(str(error))
        if first:
            self.tell(f"the remote store {self.name} is not used any more: {self.away}; going on without it")

    def close(self, error: Exception) -> None:
        """Offer nothing more: it cannot be written."""
        with self._lock:
            first, self.closed = not self.closed, self.closed or redact(str(error))
        if first:
            self.tell(f"nothing is published to the remote store {self.name}: {self.closed}")

    def read(self, sha256: str, size: int, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of an object from `start` on, in order. Raise Wrong where it is not there or has another
        size, Away where it does not come."""
        path = self._path("objects", sha256)
        ends = ((at, min(at + PIECE, size)) for at in range(start, size, PIECE))
        ahead = deque(self._begin(path, *ends_of) for ends_of in islice(ends, LANES))
        while ahead:
            piece = self._piece(ahead.popleft(), path, size)
            if following := next(ends, None):
                ahead.append(self._begin(path, *following))
            yield piece

    def _begin(self, path: str, start: int, end: int) -> tuple[Future[Any], int]:
        return beside(lambda: self._system.cat_file(path, start=start, end=end)), end - start

    def _piece(self, coming: tuple[Future[Any], int], path: str, size: int) -> bytes:
        future, length = coming
        try:
            piece = bytes(self._wait(future))
        except FileNotFoundError:
            raise Wrong("an object of it is not there") from None
        except Late:
            raise
        except Away:
            if self._size(path) not in (size, -1):  # past its end, no server gives anything
                raise Wrong("an object of it has another size") from None
            raise
        if len(piece) != length:
            raise Wrong("an object of it has another size")
        return piece

    def offer(
        self, claim: Claim, files: Mapping[str, Path], scratch: Path, moved: Moved = lambda size: None, *,
        replaces: bool = False,
    ) -> bool:  # fmt: skip
        """Put the objects there that are not, then the record. files: sha256 → where its bytes lie here. scratch: a
        free path. replaces: the record takes the place of one that is there. Return whether there was anything to put.
        Raise Away where it cannot be written, Wrong for what may not be shared: secrets in it, or values that no other
        store would take."""
        sealed = claim.sealed()
        read_claim(sealed, claim.key)
        if redact_value(text := sealed.decode()) != text:
            raise Wrong("what it gave holds a secret")
        objects = [(self._path("objects", sha256), path, sha256) for sha256, path in files.items()]
        sent = [self._put(path, source, sha256, moved, size=source.stat().st_size) for path, source, sha256 in objects]
        write_file(scratch, sealed, durable=False)
        try:
            record = self._record(claim.key)
            return self._put(record, scratch, claim.key, lambda size: None, replaces=replaces) or any(sent)
        finally:
            scratch.unlink(missing_ok=True)

    def _put(
        self, path: str, source: Path, name: str, moved: Moved, *, size: int | None = None, replaces: bool = False
    ) -> bool:
        """Return whether the bytes of `source` were put there; not where something is already, or another was faster.
        size: what is there must have, to stay. replaces: it does not stay."""
        there = self._size(path, strict=True)
        if there is not None and not replaces and name not in self._refused and size in (None, there):
            return False
        beats = Beats(moved)
        try:
            self._wait(beside(partial(self._send, path, source, beats, replaces=there is not None)), beats)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise Away(f"there is no such place: {error}") from None
        self._refused.discard(name)
        return True

    def _send(self, path: str, source: Path, beats: Beats, *, replaces: bool) -> None:
        """Raise FileExistsError where another was faster."""
        system, mode = self._system, "overwrite" if replaces else "create"
        if is_local(system):
            return _place(source, Path(path), beats, replaces=replaces)
        if protocols(system) & WHOLE_AT_ONCE:
            return self._upload(source, path, beats, mode)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        aside = f"{path}.{partial_name(source).name[-21:]}"
        self._upload(source, aside, beats, mode)
        if not replaces and system.exists(path):
            system.rm_file(aside)
            raise FileExistsError(path)
        system.mv(aside, path)

    def _upload(self, source: Path, path: str, beats: Beats, mode: str) -> None:
        from fsspec.callbacks import Callback

        class Told(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                beats(inc)

        put = self._system.put_file
        part = max(PART, -(-source.stat().st_size // MOST_PARTS // 2**20) * 2**20)
        wanted = {"chunksize": part, "max_concurrency": SENT_AT_ONCE}
        known = inspect.signature(getattr(self._system, "_put_file", put)).parameters
        put(str(source), path, callback=Told(), mode=mode, **{key: wanted[key] for key in wanted if key in known})

    def _size(self, path: str, *, strict: bool = False) -> int | None:
        """Return the bytes of what has a path; None where nothing has. strict: raise Away where it cannot be told, else
        return -1."""
        try:
            return int(self._exchange(lambda: self._system.info(path))["size"])
        except FileNotFoundError:
            return None
        except Away:
            if strict:
                raise
            return -1

    def _exchange(self, work: Callable[[], T]) -> T:
        return self._wait(beside(work))

    def _wait(self, future: Future[T], beats: Beats | None = None) -> T:
        """Return what comes of it. Raise Away where nothing has moved for as long as is waited, FileNotFoundError and
        FileExistsError as they are, UsageError for an address that cannot be opened, Interrupted."""
        from concurrent.futures import wait

        seen, moved = 0, time.monotonic()
        while not wait([future], min(POLL, self.patience)).done:
            if self.stopped.is_set():
                raise Interrupted("interrupted while the remote store was waited for", "run the same command again")
            if beats is not None and beats.count > seen:
                seen, moved = beats.count, time.monotonic()
            elif time.monotonic() - moved >= self.patience:
                raise Late(f"nothing came within {self.patience:g} s")
        try:
            return future.result()
        except (FileNotFoundError, FileExistsError, UsageError):
            raise
        except Exception as error:  # foreign code: every file system has errors of its own
            raise Away(f"{type(error).__name__}: {str(error)[:300]}") from error


def open_remote(address: str, base: Path, root: Path, environment: Mapping[str, str]) -> Remote:
    """Return the remote store at an address, or a path that begins at `base`; nothing is asked yet. root: of the store
    that uses it. Credentials in the address, or for it in `environment`, are concealed from now on. Raise UsageError
    for an address that is none, or a directory of the store itself."""
    conceal_environment({**environment, "": address})
    if only_a_shell_reads(address, home=False):
        cause = f"{address[:200]} would be a name with a dollar sign in it: no shell reads it"
        raise UsageError(cause, "write it out, or set BIGPIPE_REMOTE where it differs")
    if "://" not in address:
        if begins_address(address.partition("/")[0]):
            raise UsageError(f"{address[:200]} is no address", "write it as s3://bucket/folder, or give a path")
        address = f"file://{os.path.abspath(base / os.path.expanduser(address))}"
    require_scheme(address)
    scheme, _, rest = address.partition("://")
    if scheme in LOCAL:
        path = Path(rest)
        if lies_in(path, root) or lies_in(root, path):
            raise UsageError(f"{path} is the store itself, or lies in it", "name another directory for what is shared")
    return Remote(address)


class Beats:
    """Counts what moves, so that something slow is told from something that stands still."""

    def __init__(self, moved: Moved) -> None:
        self.count = 0
        self._moved = moved

    def __call__(self, size: int) -> None:
        self.count += 1
        self._moved(size)


def beside(work: Callable[[], T]) -> Future[T]:
    """Do something in a thread of its own, which nobody has to wait for: what a server keeps, it keeps."""
    from concurrent.futures import Future

    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="remote store", daemon=True).start()
    return future


def _place(source: Path, target: Path, beats: Beats, *, replaces: bool) -> None:
    """In a directory of this machine, or one that it shares."""
    make_folders(target.parent)
    aside = partial_name(target)
    try:
        copy_file(source, aside, progress=beats)
        if replaces:
            move(aside, target, durable=True)
        elif not give_free_name(aside, target):
            raise FileExistsError(str(target))
    finally:
        aside.unlink(missing_ok=True)
