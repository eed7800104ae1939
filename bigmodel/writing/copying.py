"""Copies of files that share no bytes with what they were made from, with their digest."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from bigpipe.errors import StageFailed

CHUNK = 1 << 22
FICLONE = 0x40049409
"""linux/fs.h: let a file share its blocks with another until one of them is written to."""


def copy_file(source: Path, target: Path, *, progress: Callable[[int], None] = lambda size: None) -> tuple[str, int]:
    """Copy and sync one regular file; its (hex sha256, size). On file systems that can, no block is written.

    progress: called with the number of bytes done since the last call.
    Raises StageFailed where the source changed meanwhile, and OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with source.open("rb") as reading, partial.open("wb") as writing:
        before = os.fstat(reading.fileno())
        cloned = _clone(reading, writing)
        digest, size = hashlib.sha256(), 0
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if not cloned:
                writing.write(chunk)
            progress(len(chunk))
        writing.flush()
        os.fsync(writing.fileno())
        after = os.fstat(reading.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or size != after.st_size:
        partial.unlink()
        raise StageFailed(f"{source} changed while it was copied", "run again when nothing writes to it")
    os.replace(partial, target)
    return digest.hexdigest(), size


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clone(source: BinaryIO, target: BinaryIO) -> bool:
    """Make `target` share the blocks of `source`. False where the file system, or the platform, cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
    except OSError:
        return False
    return True
