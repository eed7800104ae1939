"""Floats as bit patterns: exact widening to fp32, rounding as torch rounds, magnitudes compared as integers.

numpy has no bfloat16 and converts fp16 one element at a time; working on the bit patterns is exact and several
times faster. Buffers hold the stored little-endian bits: uint16 for float16 and bfloat16, uint32 for float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint import reaches

Bits = NDArray[Any]
"""uint16 or uint32: the stored bits of a float array."""
Float32 = NDArray[np.float32]

BITS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<u2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<u4"),
    "float64": np.dtype("<u8"),
}
"""torch dtype name → the integer that holds its bits."""

_SIGN_EXPONENT_MANTISSA = np.int32(0x8FFFE000 - 2**32)
_HALF_TO_SINGLE = np.float32(2.0**112)  # exponent biases: 127 - 15
_HALF_INFINITY = np.uint16(0x7C00)
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}
"""The bits of infinity; those of a NaN are greater, those of finite numbers less."""
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
"""The largest finite number."""
_LARGEST: dict[str, Any] = {
    "float16": np.uint16(0x7FFF),
    "bfloat16": np.uint16(0x7FFF),
    "float32": np.uint32(0x7FFFFFFF),
    "float64": np.uint64(0x7FFFFFFFFFFFFFFF),
}


def magnitudes(bits: Bits, dtype: str, out: Bits) -> Bits:
    """|x| as bits. Their order as integers is the order of the floats, NaN above infinity."""
    np.bitwise_and(bits, _LARGEST[dtype], out=out)
    return out


def widen(bits: Bits, dtype: str, out: Float32) -> Float32:
    """The same numbers as fp32, exactly, written to `out` (same size). For float32 bits that is a view, not a copy."""
    if dtype == "float32":
        return bits.view(np.float32)
    target = out.view(np.int32)
    if dtype == "bfloat16":
        np.left_shift(bits.view(np.int16), 16, out=target, dtype=np.int32)
        return out
    np.left_shift(bits.view(np.int16), 13, out=target, dtype=np.int32)
    # Mantissa and exponent now sit where fp32 has them, with a bias 112 too small; a product by a power of two
    # corrects it, and makes subnormal halves normal. Sign extension left ones between sign and exponent.
    np.bitwise_and(target, _SIGN_EXPONENT_MANTISSA, out=target)
    return np.multiply(out, _HALF_TO_SINGLE, out=out)


def widen_any(bits: Bits, dtype: str, out: Float32) -> Float32:
    """`widen` for values that may be infinite or NaN: the all-ones exponent of fp16 keeps its meaning."""
    values = widen(bits, dtype, out)
    if dtype == "float16":
        special = np.flatnonzero((bits & _HALF_INFINITY) == _HALF_INFINITY)
        values[special] = bits[special].view(np.float16).astype(np.float32)
    return values


def narrow(values: Float32, dtype: str) -> Bits:
    """fp32 rounded to `dtype` (to nearest, ties to even, overflow to infinity), as torch's `.to(dtype)` does."""
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float64":
        return values.astype(np.float64).view(np.uint64)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    # The upper half of float32: half a unit of its last place is added, a little less where that place is even
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    narrowed: Bits = np.right_shift(rounded, 16, out=np.empty(bits.shape, np.uint16), casting="same_kind")
    broken = np.isnan(values)
    if broken.any():
        narrowed[broken] = 0x7FC0  # the carry could have turned a NaN into infinity
    return narrowed


def convert(bits: Bits, source: str, target: str) -> Bits:
    """Bits of `source` floats as bits of `target` floats, rounded as torch does; through fp32, as torch goes."""
    if source == target:
        return bits
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if source == "float64":
            return narrow(bits.view(np.float64).astype(np.float32), target)
        return narrow(widen_any(bits, source, np.empty(bits.shape, np.float32)), target)


def all_finite(bits: Bits, dtype: str) -> bool:
    """Return whether none of the numbers is infinite or NaN."""
    return bool((bits & _LARGEST[dtype]).max(initial=0) < INFINITY[dtype])


def overflows(bits: Bits, source: str, made: Bits, target: str) -> bool:
    """Return whether a finite number of `source` became infinite as `target`, in the same place."""
    if reaches(target, source) or all_finite(made, target):
        return False
    lost = (made & _LARGEST[target]) == INFINITY[target]
    return bool((lost & ((bits & _LARGEST[source]) < INFINITY[source])).any())
