"""LLM.int8() weights (arXiv 2208.07339): each row of a matrix scaled by its largest magnitude to -127..127.

Gives bit for bit what bitsandbytes 0.50.2 gives on the CPU (`Int8Params._quantize` and int8_vectorwise_quant in
`bitsandbytes/backends/default/ops.py`). bitsandbytes goes through fp16 whatever the weight was: a bf16 or fp32 number
beyond 65,504 becomes infinite, its row's scale with it, and the row zeros. We do the same, and whoever writes a
checkpoint refuses such a scale. (Which NaN the scale of a
row with a NaN is, torch leaves to chance; so do we.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .floats import Bits, magnitudes, widen, widen_any

CHUNK = 1 << 18
"""Numbers encoded at a time, in whole rows: the buffers of one chunk stay in a core's own cache."""
_HALF_INFINITY = 0x7C00
_ROUND = np.float32(1.5 * 2**23)
"""Added to a number of magnitude below 2^22 it leaves the number, rounded ties to even, in the low bits of the fp32."""


class Int8Encoder:
    """Reusable buffers for one thread. Encodes chunks of whole rows, up to `size` numbers."""

    def __init__(self, size: int = CHUNK) -> None:
        self._values = np.empty(size, np.float32)
        self._magnitudes = np.empty(size, np.uint16)

    def encode(self, bits: Bits, measured: Any = None) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """(int8[rows, columns], scales fp32[rows]) of the bits of an fp16 matrix: x is about code × scale / 127."""
        sizes = magnitudes(bits, "float16", self._magnitudes[: bits.size].reshape(bits.shape))
        largest = np.max(sizes, axis=1)
        scales = largest.view(np.float16).astype(np.float32)
        values = self._values[: bits.size].reshape(bits.shape)
        finite = bool((largest < _HALF_INFINITY).all())
        (widen if finite else widen_any)(bits.reshape(-1), "float16", values.reshape(-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            # torch computes 127 / x as (1 / x) * 127, with two roundings.
            factors = (np.float32(1) / scales) * np.float32(127)
            np.multiply(values, factors[:, None], out=values)
            np.add(values, _ROUND, out=values)
        return _low_bytes(values), scales


def _low_bytes(values: NDArray[np.float32]) -> NDArray[np.int8]:
    """The low byte of each fp32: the rounded number, or 0 for a NaN (of a zero or infinite row), as torch casts it."""
    codes: NDArray[Any] = values.view(np.int32).astype(np.int8)
    return codes
