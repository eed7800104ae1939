"""Digests: of JSON values in one canonical form, and of files, remembered by what `stat` says of them.

Every digest of a value carries a tag, so that two kinds of things that look alike (a key and a tree, say) can never
have the same digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from bigpipe.files import Damaged, LogFile, read_regular, write_file
from bigpipe.orchestrator.contract import Json
from bigpipe.sizes import format_transfer

from .layout import make_directory

CHUNK = 4 * 2**20
"""Bytes read at a time. Large enough that system calls cost nothing, small enough for the second-level cache."""
Fingerprint = tuple[int, int, int, int]
"""Size, mtime_ns, inode, ctime_ns. A write within one tick of the clock changes neither time; see `_settled`."""
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Json) -> bytes:
    """Return the one UTF-8 JSON text of a value: keys sorted, no spaces, tuples as lists.

    Different values have different texts: `1`, `1.0`, `true` and `"1"` stay apart.

    Raise ValueError for NaN and infinities, TypeError for what JSON has no word for (maps with keys that are not
    strings among them: `{1: …}` and `{"1": …}` would look the same).
    """
    _refuse_other_keys(value)
    # File names may hold bytes that are no UTF-8, which Python keeps as lone surrogates; `surrogatepass` keeps them
    # apart from the characters that a pair of `\ud800\udc00` escapes would stand for.
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _refuse_other_keys(value: Json) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} of a map is not a string")
            if isinstance(item, (dict, list, tuple)):
                _refuse_other_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_other_keys(item)


def digest_of(tag: str, value: Json) -> str:
    """Return `sha256:…` of the canonical JSON of `[tag, value]`."""
    return "sha256:" + hashlib.sha256(canonical([tag, value])).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex. Raise OSError; never takes an I/O error for an end of file."""
    return hash_and_facts(path)[0]


def hash_and_facts(path: str | Path) -> tuple[str, os.stat_result, os.stat_result]:
    """Return what `hash_file` does, and what `stat` said of the file before and after it was read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        state, before = hashlib.sha256(), os.fstat(descriptor)
        buffer = memoryview(bytearray(min(CHUNK, max(1, before.st_size))))
        while count := os.readv(descriptor, [buffer]):
            state.update(buffer[:count])
        return state.hexdigest(), before, os.fstat(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(facts: os.stat_result) -> Fingerprint:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_ctime_ns


class StatMemo:
    """path → (size, mtime_ns, inode, ctime_ns) → sha256, kept in a log under `folder`. Each line has a checksum of its
    own; a torn or changed one is skipped. Processes append side by side."""

    COMPACT_FROM = 10_000
    """Lines from which a log that is mostly outdated is rewritten."""

    LARGE = 2**30
    """Bytes from which reading a file takes so long that it is announced."""

    SILENT = 5.0
    """Seconds of reading small files after which that is announced."""

    def __init__(self, folder: Path, announce: Callable[[str], None] | None = None) -> None:
        """announce: called with what is about to be read, where that takes long."""
        self._log = folder / "files.jsonl"
        self._announce = announce
        self._unsaid = 0.0
        self._usable = True

    def sha256(self, path: str | Path) -> str:
        """Return the hex sha256 of a regular file, read only where `stat` says it may have changed. Raise OSError."""
        facts = os.stat(path)
        name = os.path.abspath(path)
        known = self._known.get(name)
        if known is not None and known[0] == fingerprint(facts):
            return known[1]
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is not a regular file")
        if facts.st_size >= self.LARGE:
            self._say(f"{os.path.basename(name)}, {format_transfer(facts.st_size)}")
        elif self._unsaid >= self.SILENT:
            self._say(f"the files in {os.path.dirname(name)}")
        started = time.time_ns()
        digest, before, after = hash_and_facts(path)
        self._unsaid += (time.time_ns() - started) / 1e9
        if fingerprint(before) == fingerprint(after) and _settled(before, started):
            self._remember(name, fingerprint(after), digest)
        return digest

    def _say(self, what: str) -> None:
        self._unsaid = 0.0
        if self._announce is not None:
            self._announce(what)

    @cached_property
    def _known(self) -> dict[str, tuple[Fingerprint, str]]:
        known: dict[str, tuple[Fingerprint, str]] = {}
        try:
            lines = read_regular(self._log).split(b"\n")
            parts = (line.partition(b" ") for line in lines)
            whole = b",".join(body for check, _, body in parts if check == _checksum(body))
            for name, size, mtime, inode, ctime, digest in json.loads(b"[" + whole + b"]"):
                known[name] = (size, mtime, inode, ctime), digest
            if len(lines) > self.COMPACT_FROM and len(lines) > 2 * len(known):
                # What another process appends meanwhile is lost, and hashed again.
                write_file(self._log, b"".join(_line(*entry) for entry in known.items()), durable=False)
        except Damaged:  # a FIFO, say, which would be waited for
            self._usable = False
        except OSError:
            pass
        return known

    def _remember(self, name: str, facts: Fingerprint, digest: str) -> None:
        self._known[name] = facts, digest
        if not self._usable:
            return
        with suppress(OSError):  # a store that cannot be written costs another hashing, no more
            make_directory(self._log.parent)
            with LogFile(self._log, mode=0o600) as log:
                log.append(_line(name, (facts, digest)))


def _settled(facts: os.stat_result, now: int) -> bool:
    """Would a write from `now` on (ns) change the file's mtime? Not within the tick of the clock it was written in.
    Kernels tick every 1 to 10 ms; file systems that count whole seconds, or two, show it by a round mtime."""
    tick = 2_000_000_000 if facts.st_mtime_ns % 1_000_000_000 == 0 else 50_000_000
    return abs(now - max(facts.st_mtime_ns, facts.st_ctime_ns)) > tick


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _line(name: str, entry: tuple[Fingerprint, str]) -> bytes:
    facts, digest = entry
    body = json.dumps([name, *facts, digest], separators=(",", ":")).encode()
    return _checksum(body) + b" " + body + b"\n"
