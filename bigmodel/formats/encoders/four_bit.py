"""nf4 and fp4: blocks of 64 numbers, scaled by their largest magnitude and rounded to the nearest of 16 codes.

Gives bit for bit what bitsandbytes 0.50.2 gives on the CPU (`bitsandbytes/backends/default/ops.py`, quantize_4bit).
The code of a number is counted rather than looked up: 15 comparisons of a whole chunk with one bound each run at
vector speed, about eight times as fast as a table lookup per number in numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import BLOCK
from .codes import decision_bounds
from .floats import BITS, Bits, magnitudes, widen, widen_any

CHUNK = 1 << 18
"""Numbers encoded at a time: the buffers of one chunk stay in a core's own cache."""
_SMALLEST = np.float32(1e-38)


class FourBitEncoder:
    """Reusable buffers for one thread. Encodes chunks of up to `size` numbers."""

    def __init__(self, dtype: str, quant_type: str, size: int = CHUNK) -> None:
        """dtype: of the numbers, float16, bfloat16 or float32; size: a multiple of 64."""
        self.dtype = dtype
        self.bounds, self.codes = decision_bounds(quant_type)
        self._values = np.empty(size, np.float32)
        self._magnitudes = np.empty(size, BITS[dtype])
        self._nibbles = np.empty(size, np.uint8)
        self._mask = np.empty(size, np.bool_)

    def absmax(self, bits: Bits) -> NDArray[np.float32]:
        """Largest magnitude of each block of 64 as fp32[ceil(n / 64)]; the last block may be short."""
        sizes = magnitudes(bits, self.dtype, self._magnitudes[: bits.size])
        largest = np.maximum.reduceat(sizes, np.arange(0, bits.size, BLOCK))
        absmax = widen_any(largest, self.dtype, np.empty(largest.size, np.float32)).copy()
        if bits.size % BLOCK:
            absmax[-1] = np.maximum(absmax[-1], _SMALLEST)
        return absmax

    def encode(self, bits: Bits, measured: Any = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """(packed uint8[ceil(n / 2)], absmax fp32[ceil(n / 64)]); the first number of a pair takes the high four bits.

        All chunks of a tensor but the last must hold a multiple of 64 numbers.
        """
        absmax = self.absmax(bits)
        return self._pack(self._codes_of(self._scaled(bits, absmax))), absmax

    def _scaled(self, bits: Bits, absmax: NDArray[np.float32]) -> NDArray[np.float32]:
        count = bits.size
        full = count - count % BLOCK
        finite = bool(np.isfinite(absmax).all())
        source = (widen if finite else widen_any)(bits, self.dtype, self._values[:count])
        scaled = self._values[:count]
        with np.errstate(invalid="ignore"):
            inverse = np.float32(1) / np.maximum(absmax[: full // BLOCK], _SMALLEST)
            np.multiply(source[:full].reshape(-1, BLOCK), inverse[:, None], out=scaled[:full].reshape(-1, BLOCK))
            if full < count:
                np.divide(source[full:], absmax[-1], out=scaled[full:])
        return scaled

    def _codes_of(self, scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes, one byte each, in `self._nibbles`.

        With the codes in ascending order of their numbers, a number starts with the last; each bound it does not
        exceed, from any side, turns code i + 1 into code i by adding their difference. NaN keeps the last.
        """
        count = scaled.size
        nibbles, mask = self._nibbles[:count], self._mask[:count]
        flags = mask.view(np.uint8)
        nibbles.fill(self.codes[-1])
        for index, bound in enumerate(self.bounds):
            np.less_equal(scaled, bound, out=mask)
            step = np.uint8((int(self.codes[index + 1]) - int(self.codes[index])) % 256)
            if step != 1:
                np.multiply(flags, step, out=flags)
            np.subtract(nibbles, flags, out=nibbles)
        return nibbles

    def _pack(self, nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Two codes to a byte, the first in the high bits; an odd count is padded with the code of zero."""
        if nibbles.size % 2:
            zero = self.codes[int(np.count_nonzero(self.bounds < 0))]
            nibbles = np.append(nibbles, zero)
        pairs = nibbles.view("<u2")
        packed = np.right_shift(pairs, 8)
        np.left_shift(pairs, 4, out=pairs)
        np.bitwise_or(packed, pairs, out=packed)
        packed_bytes: NDArray[np.uint8] = packed.astype(np.uint8)
        return packed_bytes
