"""The lock file of a recipe: what it was made of and what came out, for review."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .beside import lock_path, read_lock
    from .lockfile import LockFile, locked_digests, read_lock_file
    from .locking import check_lock, enforce, enforce_outputs, record_outputs, write_lock

__getattr__, __all__ = face(__name__)
