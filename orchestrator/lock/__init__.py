"""The lock file of a recipe: what it was made of and what came out, for review."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .lockfile import locked_digests as locked_digests
    from .locking import (
        check_lock as check_lock,
        enforce as enforce,
        enforce_outputs as enforce_outputs,
        read_lock as read_lock,
        record_outputs as record_outputs,
        write_lock as write_lock,
    )
else:
    __getattr__ = face(
        __name__,
        lockfile="locked_digests",
        locking="check_lock enforce enforce_outputs read_lock record_outputs write_lock",
    )
