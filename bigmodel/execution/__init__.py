"""Models that run over GPUs, RAM and disk: loaded from the files that exist, and streamed where memory ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .homes import as_placement
    from .loading import Loaded, load, loaded
    from .memory import (
        HostMemory,
        cast_bytes,
        host_memory,
        loading_dtype,
    )
    from .probe import forward_once

__getattr__, __all__ = face(__name__)
