"""The lock file of a recipe: what it was made of and what came out, for review."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .answers import read_answers, refuse
    from .lockfile import (
        LockFile,
        check_lock,
        enforce,
        enforcing_outputs,
        lock_differences,
        locked_digests,
        read_lock,
        record_outputs,
        write_lock,
    )

__getattr__, __all__ = face(__name__)
