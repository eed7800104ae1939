"""The lock file of a recipe: what it was made of and what came out, for review."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .lockfile import LockFile, locked_digests, read_lock_file
    from .locking import check_lock, enforce, enforce_outputs, record_outputs, write_lock

__getattr__, __all__ = face(__name__)


def lock_path(manifest: Path) -> Path:
    """Return where the lock file of a manifest lies: beside it."""
    return manifest.with_name(manifest.name + ".lock")


def read_lock(manifest: Path) -> LockFile | None:
    """Return the lock beside a manifest, None where there is none. Raise UsageError where it is not a lock file."""
    path = lock_path(manifest)
    if not path.exists():
        return None  # nothing is imported for it
    from .lockfile import read_lock_file

    return read_lock_file(path)
