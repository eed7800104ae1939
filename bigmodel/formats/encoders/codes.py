"""The code books of bitsandbytes: which number each 4-bit and 8-bit code stands for.

nf4: quantiles of the normal distribution, QLoRA (arXiv 2305.14314), appendix E. fp4: sign, two exponent bits, one
mantissa bit. dynamic: the 8-bit dynamic type for absmax values, "8-Bit Approximations" (arXiv 1511.04561).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

DYNAMIC_EXPONENTS = 7


@cache
def four_bit_code(quant_type: str) -> NDArray[np.float32]:
    """The 16 numbers of `nf4` or `fp4` in code order, fp32, largest 1. Read-only."""
    if quant_type == "nf4":
        values = np.array(_NF4, np.float32)
    else:
        magnitudes = np.array(_FP4_MAGNITUDES, np.float32) / np.float32(max(_FP4_MAGNITUDES))
        # The code of minus zero stands for plus zero in bitsandbytes' table.
        values = np.concatenate([magnitudes, np.float32(0.0) - magnitudes])
    values.flags.writeable = False
    return values


@cache
def decision_bounds(code: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(15 bounds, 16 codes): a number x with bounds[i-1] < x <= bounds[i] gets codes[i]; NaN gets the last."""
    values = four_bit_code(code)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return (ordered[:-1] + ordered[1:]) / np.float32(2), order.astype(np.uint8)


@cache
def dynamic_code() -> NDArray[np.float32]:
    """The 256 numbers of the signed dynamic type, ascending from -0.9929688 to 1, fp32. Read-only."""
    numbers = [0.0, 1.0]
    for exponent in range(DYNAMIC_EXPONENTS):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = (np.float32(10.0 ** (exponent - DYNAMIC_EXPONENTS + 1)) * means).tolist()
        numbers += scaled + [-number for number in scaled]
    values = np.array(sorted(numbers), np.float32)
    values.flags.writeable = False
    return values


def _linspace(start: float, stop: float, count: int) -> NDArray[np.float32]:
    """torch.linspace in fp32: from the start for the lower half, back from the end for the upper half.

    torch fuses product and sum into one rounding; fp64 holds both exactly enough to round once.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count, dtype=np.float64)
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)
