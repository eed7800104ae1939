"""Changes the number format of floating-point tensors in cache-sized pieces, rounding as torch does, without torch."""

from __future__ import annotations

from bigpipe.bigmodel.checkpoint import CASTABLE, itemsize

BLOCK = 65_536
"""Elements converted at a time: 256 KiB of float32, which stay in a core's second-level cache."""


def is_cast(stored: str, wanted: str | None) -> bool:
    """Whether a stored tensor changes when `wanted` is asked for. Integers and quantized formats never do."""
    return wanted is not None and stored != wanted and stored in CASTABLE


def cast(source: memoryview, stored: str, wanted: str, target: memoryview) -> memoryview:
    """Converts the elements in `source` into `target`; gives the part of `target` that was filled.

    Rounds to nearest even as torch's `.to()` does, through float32 where torch does too (float64 → half formats), bit
    for bit but for the payload of NaNs, where torch's own loops differ among each other. Overflow gives infinity.
    """
    import numpy

    from bigpipe.bigmodel.formats.encoders.floats import BITS, convert

    filled = target[: len(source) // itemsize(stored) * itemsize(wanted)]
    bits, result = numpy.frombuffer(source, BITS[stored]), numpy.frombuffer(filled, BITS[wanted])
    for start in range(0, bits.size, BLOCK):
        result[start : start + BLOCK] = convert(bits[start : start + BLOCK], stored, wanted)
    return filled
