"""Models that run over GPUs, RAM and disk: loaded from the files that exist, and streamed where memory ends."""

from .homes import as_placement
from .loading import Loaded, load, loaded
from .memory import HostMemory, cast_bytes, host_memory, loading_dtype
from .probe import forward_once

__all__ = [
    "HostMemory", "Loaded", "as_placement", "cast_bytes", "forward_once", "host_memory", "load", "loaded",
    "loading_dtype",
]  # fmt: skip
