"""Quantizes checkpoints to bitsandbytes' formats as a stream: tensor by tensor, in constant memory, without torch.

    quantize_checkpoint("opt-13b", "opt-13b-nf4", scheme="nf4")

`outline` says what each stored tensor becomes; `encoding` runs the encoders of its format over threads; `stream` writes
the files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .encoding import usable_device
    from .outline import (
        Converted,
        Kept,
        Outline,
        Settings,
        model_names,
        refuse_quantized,
        torch_threads,
        understand,
    )
    from .quantizing import QuantizedCheckpoint, quantize_checkpoint, quantize_described, requantize
    from .stream import largest_magnitudes, recompute

__getattr__, __all__ = face(__name__)
