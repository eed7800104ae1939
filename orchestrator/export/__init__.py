"""A recipe as other systems run it: CI, schedulers of tasks, images. One file per target, behind one table."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .targets import TARGETS, Exported, export

__getattr__, __all__ = face(__name__)
