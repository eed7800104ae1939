"""Remembers the sha256 of files that were hashed before, by what `stat` says of them."""

from __future__ import annotations

import json
import os
import stat
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from bigpipe.files import LogFile, write_file

from .hashing import hash_and_facts
from .sealing import make_directory

Fingerprint = tuple[int, int, int, int]
"""Size, mtime_ns, inode, ctime_ns. A write within one tick of the clock changes neither time; see `_settled`."""


def fingerprint(facts: os.stat_result) -> Fingerprint:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_ctime_ns


class StatMemo:
    """path → (size, mtime_ns, inode, ctime_ns) → sha256, kept in a log under `folder`.

    Each line has a checksum of its own; a torn or changed one is skipped. Processes append side by side.
    """

    COMPACT_FROM = 10_000
    """Lines from which a log that is mostly outdated is rewritten."""

    LARGE = 2**30
    """Bytes from which reading a file takes so long that it is announced."""

    def __init__(self, folder: Path, announce: Callable[[Path, int], None] | None = None) -> None:
        """announce: called with a large file and its size before it is read."""
        self._log = folder / "files.jsonl"
        self._announce = announce

    def sha256(self, path: str | Path) -> str:
        """Return the hex sha256 of a regular file, read only where `stat` says it may have changed. Raise OSError."""
        facts = os.stat(path)
        name = os.path.abspath(path)
        known = self._known.get(name)
        if known is not None and known[0] == fingerprint(facts):
            return known[1]
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is not a regular file")
        if self._announce is not None and facts.st_size >= self.LARGE:
            self._announce(Path(path), facts.st_size)
        started = time.time_ns()
        digest, before, after = hash_and_facts(path)
        if fingerprint(before) == fingerprint(after) and _settled(before, started):
            self._remember(name, fingerprint(after), digest)
        return digest

    @cached_property
    def _known(self) -> dict[str, tuple[Fingerprint, str]]:
        known: dict[str, tuple[Fingerprint, str]] = {}
        with suppress(OSError):
            lines = self._log.read_bytes().split(b"\n")
            parts = (line.partition(b" ") for line in lines)
            whole = b",".join(body for check, _, body in parts if check == _checksum(body))
            for name, size, mtime, inode, ctime, digest in json.loads(b"[" + whole + b"]"):
                known[name] = (size, mtime, inode, ctime), digest
            if len(lines) > self.COMPACT_FROM and len(lines) > 2 * len(known):
                # What another process appends meanwhile is lost, and hashed again.
                write_file(self._log, b"".join(_line(*entry) for entry in known.items()), durable=False)
        return known

    def _remember(self, name: str, facts: Fingerprint, digest: str) -> None:
        self._known[name] = facts, digest
        with suppress(OSError):  # a store that cannot be written costs another hashing, no more
            make_directory(self._log.parent)
            with LogFile(self._log, mode=0o600) as log:
                log.append(_line(name, (facts, digest)))


def _settled(facts: os.stat_result, now: int) -> bool:
    """Would a write from `now` on (ns) change the file's mtime? Not within the tick of the clock it was written in.

    Kernels tick every 1 to 10 ms; file systems that count whole seconds, or two, show it by a round mtime.
    """
    tick = 2_000_000_000 if facts.st_mtime_ns % 1_000_000_000 == 0 else 50_000_000
    return abs(now - max(facts.st_mtime_ns, facts.st_ctime_ns)) > tick


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _line(name: str, entry: tuple[Fingerprint, str]) -> bytes:
    facts, digest = entry
    body = json.dumps([name, *facts, digest], separators=(",", ":")).encode()
    return _checksum(body) + b" " + body + b"\n"
