"""Models that run over GPUs, RAM and disk: loaded from the files that exist, and streamed where memory ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .homes import HostMemory, as_placement, cast_bytes, host_memory, loading_dtype
    from .loading import Loaded, load, loaded
    from .probe import forward_once

__getattr__, __all__ = face(__name__)
