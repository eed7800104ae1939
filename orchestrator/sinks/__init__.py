"""Where a run is told of besides: one file per system, behind one table, each fed in a process of its own."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .feeding import Feeds
    from .table import SINKS, Sink, install

__getattr__, __all__ = face(__name__)
