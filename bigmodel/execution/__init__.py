"""Models that run over GPUs, RAM and disk: loaded from the files that exist, and streamed where memory ends."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .homes import as_placement as as_placement
    from .loading import Loaded as Loaded, load as load, loaded as loaded
    from .memory import (
        HostMemory as HostMemory,
        cast_bytes as cast_bytes,
        host_memory as host_memory,
        loading_dtype as loading_dtype,
    )
    from .probe import forward_once as forward_once
else:
    __getattr__ = face(
        __name__,
        homes="as_placement",
        loading="Loaded load loaded",
        memory="HostMemory cast_bytes host_memory loading_dtype",
        probe="forward_once",
    )
