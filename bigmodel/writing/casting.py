"""Changes the number format of floating-point tensors in cache-sized pieces, rounding as torch does, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import CASTABLE, itemsize

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

BLOCK = 65_536
"""Elements converted at a time: 256 KiB of float32, which stays in a core's second-level cache."""


def is_cast(stored: str, wanted: str | None) -> bool:
    """Whether a stored tensor changes when `wanted` is asked for. Integers and quantized formats never do."""
    return wanted is not None and stored != wanted and stored in CASTABLE


def cast(source: memoryview, stored: str, wanted: str, target: memoryview) -> memoryview:
    """Converts the elements in `source` into `target`; gives the part of `target` that was filled.

    Rounds to nearest even as torch's `.to()` does, through float32 where torch does too (float64 → half formats), bit
    for bit but for the payload of NaNs, where torch's own loops differ among each other. Overflow gives infinity.
    """
    import numpy

    count = len(source) // itemsize(stored)
    filled = target[: count * itemsize(wanted)]
    values = numpy.frombuffer(source, dtype=_numpy_name(stored))
    result = numpy.frombuffer(filled, dtype=_numpy_name(wanted))
    scratch = numpy.empty((2, min(BLOCK, count)), dtype=numpy.uint32)
    with numpy.errstate(over="ignore", invalid="ignore"):
        for start in range(0, count, BLOCK):
            block = values[start : start + BLOCK]
            _store(_as_float32(block, stored, wanted, scratch[0]), wanted, result[start : start + BLOCK], scratch[1])
    return filled


def _numpy_name(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _as_float32(block: Array, stored: str, wanted: str, scratch: Array) -> Array:
    import numpy

    if stored == "float32" or (stored == "float64" and wanted == "float64"):
        return block
    wide = scratch[: len(block)]
    if stored == "bfloat16":
        numpy.left_shift(block, 16, out=wide, dtype=numpy.uint32)
        return wide.view(numpy.float32)
    floats = wide.view(numpy.float32)
    numpy.copyto(floats, block, casting="same_kind")
    return floats


def _store(block: Array, wanted: str, result: Array, scratch: Array) -> None:
    import numpy

    if wanted != "bfloat16":
        numpy.copyto(result, block, casting="same_kind")
        return
    # bfloat16 is the upper half of float32: add half a unit of its last place, a little less where that place is even.
    bits = block.view(numpy.uint32)
    rounded = scratch[: len(block)]
    numpy.right_shift(bits, 16, out=rounded)
    numpy.bitwise_and(rounded, 1, out=rounded)
    numpy.add(rounded, 0x7FFF, out=rounded)
    numpy.add(rounded, bits, out=rounded)
    numpy.right_shift(rounded, 16, out=rounded)
    numpy.copyto(result, rounded, casting="same_kind")
    broken = numpy.isnan(block)
    if broken.any():
        result[broken] = 0x7FC0  # the carry could have turned a NaN into infinity
