"""The lock file beside a manifest. Nothing else of locks is imported where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lockfile import LockFile


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
