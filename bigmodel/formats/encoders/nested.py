"""Double quantization: the absmax values of a 4-bit weight, themselves quantized to 8 bits in blocks of 256.

Follows bitsandbytes 0.50.2 on the CPU to the last bit: torch's order of summation for the mean, and the kernel's
65,536-entry table of codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import NESTED_BLOCK as BLOCK
from .codes import dynamic_code

_TABLE = 65536

# How torch's CPU kernel sums contiguous fp32 (aten/src/ATen/native/cpu/SumKernel.cpp).
_LANES = 8  # of an AVX2 vector
_ROWS = 4  # vectors that are summed side by side
_LEVELS = 4  # of the cascade
_PARALLEL_FROM = 32768  # elements; shorter sums stay in one thread


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """codes: uint8[n]; absmax: float32[ceil(n / 256)] of the blocks."""

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32]


def quantize_absmax(absmax: NDArray[np.float32], offset: float) -> NestedAbsmax:
    """The offset, their `mean`, taken off, then each block of 256 scaled to [-1, 1] and rounded to the dynamic 8-bit
    code."""
    with np.errstate(invalid="ignore", over="ignore"):
        centred = absmax - np.float32(offset)
        blocks = -(-centred.size // BLOCK)
        padded = np.zeros(blocks * BLOCK, np.float32)
        padded[: centred.size] = centred
        rows = padded.reshape(blocks, BLOCK)
        # The kernel's running maximum passes over NaN.
        largest = np.fmax.reduce(np.abs(rows), axis=1, initial=np.float32(0))
        scaled = rows * (np.float32(1) / np.where(largest == 0, np.float32(1), largest))[:, None]
        index = _table_index(np.clip(scaled, np.float32(-1), np.float32(1)))
    codes = _table()[index]
    codes[largest == 0] = 0
    return NestedAbsmax(codes.reshape(-1)[: centred.size], largest)


def _table_index(scaled: NDArray[np.float32]) -> NDArray[np.int64]:
    """The table's entry for numbers in [-1, 1]; NaN gives 0. The kernel fuses the last product and sum."""
    halved = (scaled + np.float32(1)) * np.float32(0.5)
    index = (halved.astype(np.float64) * (_TABLE - 1) + 0.5).astype(np.float32)
    return np.nan_to_num(index, nan=0.0).astype(np.int64)


@cache
def _table() -> NDArray[np.uint8]:
    """Entry i: the code nearest to -1 + 2 i / 65535, ties to the lower."""
    code = dynamic_code()
    middles = np.float32(0.5) * (code[:-1] + code[1:])
    grid = np.float32(-1) + (np.float32(2) * np.arange(_TABLE, dtype=np.float32)) / np.float32(_TABLE - 1)
    return np.searchsorted(middles, grid, side="left").astype(np.uint8)


def mean(values: NDArray[np.float32], threads: int) -> np.float32:
    """torch's mean of a contiguous fp32 vector, bit for bit.

    threads: how many torch would use; the mean of more than 32,768 values depends on it in the last bit.
    """
    if threads <= 1 or values.size < _PARALLEL_FROM:
        return np.float32(_sum(values) / np.float32(values.size))
    used = min(threads, -(-values.size // _PARALLEL_FROM))
    length = -(-values.size // used)
    partial = np.zeros(threads, np.float32)
    for index in range(used):
        partial[index] = _sum(values[index * length : (index + 1) * length])
    return np.float32(_sum(partial) / np.float32(values.size))


def _sum(values: NDArray[np.float32]) -> np.float32:
    """Sum in torch's order: 4 rows of 8 lanes in a cascade of 4 levels, then rows, tail and lanes in turn."""
    if values.size < _LANES:
        return np.float32(_row_sum(values.reshape(-1, 1))[0])
    vectors = values.size // _LANES
    lanes = _row_sum(values[: vectors * _LANES].reshape(vectors, _LANES))
    total = np.float32(0)
    for value in [*values[vectors * _LANES :], *lanes]:
        total = np.float32(total + value)
    return total


def _row_sum(vectors: NDArray[np.float32]) -> NDArray[Any]:
    """Sum over axis 0, four at a time side by side; what is left over goes to the first of the four."""
    groups = vectors.shape[0] // _ROWS
    rows = _cascade(vectors[: groups * _ROWS].reshape(groups, _ROWS, vectors.shape[1]))
    for vector in [*vectors[groups * _ROWS :], *rows[1:]]:
        rows[0] += vector
    first: NDArray[Any] = rows[0]
    return first


def _cascade(rows: NDArray[np.float32]) -> NDArray[Any]:
    """Sum over axis 0: runs of 2^k are summed in order, and sums of runs climb a level when a level is full."""
    count = rows.shape[0]
    power = max(4, (count - 1).bit_length() // _LEVELS if count > 1 else 0)
    step, mask = 1 << power, (1 << power) - 1
    levels = np.zeros((_LEVELS, *rows.shape[1:]), np.float32)
    done = 0
    while done + step <= count:
        levels[0] = np.add.reduce(rows[done : done + step], axis=0)
        done += step
        for level in range(1, _LEVELS):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if done & (mask << (level * power)):
                break
    for index in range(done, count):
        levels[0] += rows[index]
    for level in range(1, _LEVELS):
        levels[0] += levels[level]
    total: NDArray[Any] = levels[0]
    return total
