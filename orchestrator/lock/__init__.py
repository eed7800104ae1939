"""The lock file of a recipe: what it was made of and what came out, for review."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .answers import read_answers
    from .lockfile import check_lock, enforce, enforce_outputs, locked_digests, read_lock, record_outputs, write_lock

__getattr__, __all__ = face(__name__)
