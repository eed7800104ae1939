"""Models that run over GPUs, RAM and disk: loaded from the files that exist, and streamed where memory ends."""

from .loading import Loaded, compute_dtype, fits_widened, load, loaded
from .probe import forward_once

__all__ = ["Loaded", "compute_dtype", "fits_widened", "forward_once", "load", "loaded"]
