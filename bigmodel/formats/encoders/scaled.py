"""Codes times scales as plain numbers, exact to the bit: what transformers and compressed-tensors compute, by numpy.

    plain = round(round(code · scale → the scale's dtype) → the plain dtype)

A product of an 8-bit code and a 16-bit scale is exact in float32: one rounding gives what a product in the scale's
dtype would.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .floats import BITS, Float32, convert, narrow, overflows, widen_any

Bytes = NDArray[np.uint8]
FLOATS = {
    "float8_e4m3fn": (4, 3, 7, 0x7F), "float8_e5m2": (5, 2, 15, None), "float8_e4m3fnuz": (4, 3, 8, None),
    "float8_e5m2fnuz": (5, 2, 16, None),
}  # fmt: skip
"""torch name → bits of exponent and mantissa, bias of the exponent, magnitude that means NaN (OCP 8-bit floating point
specification; arXiv 2206.02915 for those without negative zero, whose code is their NaN)."""
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""e2m1 (OCP Microscaling Formats)."""
FP4_PAIRS = np.stack([np.tile(FP4, 16), np.repeat(FP4, 16)], axis=-1)
"""The two numbers of each byte, the lower half first."""
ROWS = 256
"""Of a block matrix, turned at a time."""


@cache
def table(dtype: str) -> Float32:
    """Return the numbers that the 256 codes of an 8-bit dtype are."""
    codes = np.arange(256, dtype=np.uint8)
    if dtype == "int8":
        return np.asarray(codes.view(np.int8), np.float32)
    if dtype == "float8_e8m0fnu":  # the exponent of float32, whose smallest is no normal number
        values: Float32 = np.ldexp(np.float32(1), np.minimum(codes, 254).astype(np.int32) - 127).astype(np.float32)
        values[255] = np.nan
        return values
    exponent_bits, mantissa_bits, bias, nan = FLOATS[dtype]
    magnitude = (codes & 0x7F).astype(np.int32)
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & (1 << mantissa_bits) - 1
    fraction = mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)
    values = np.ldexp(fraction.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits).astype(np.float32)
    if dtype == "float8_e5m2":  # as in IEEE 754
        top = exponent == (1 << exponent_bits) - 1
        values[top] = np.where(mantissa[top] > 0, np.float32(np.nan), np.float32(np.inf))
    elif nan is not None:
        values[magnitude == nan] = np.nan
    values[codes >= 0x80] *= -1
    if dtype.endswith("fnuz"):
        values[0x80] = np.nan
    return values


def numbers(stored: memoryview, dtype: str) -> Float32:
    """Return stored numbers as float32, exactly but for float64."""
    if dtype in BITS:
        bits = np.frombuffer(stored, BITS[dtype])
        if dtype == "float64":
            return bits.view(np.float64).astype(np.float32)
        return widen_any(bits, dtype, np.empty(bits.shape, np.float32))
    return table(dtype)[np.frombuffer(stored, np.uint8)]


def multiply(
    codes: memoryview,
    codes_dtype: str,
    shape: Sequence[int],
    scales: Float32,
    zeros: Float32 | None,
    first: Sequence[int],
    blocks: Sequence[int],
) -> Float32:
    """Return codes of `shape`, less their zero points, times their scales. scales, zeros: one per block, those of the
    blocks that the codes lie in; first: where in its block the first code lies, by dimension."""
    values = np.take(table(codes_dtype), np.frombuffer(codes, np.uint8)).reshape(shape)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if zeros is not None:
            values -= spread(zeros, shape, first, blocks)
        values *= spread(scales, shape, first, blocks)
    return values


def spread(grid: Float32, shape: Sequence[int], first: Sequence[int], blocks: Sequence[int]) -> Float32:
    """Return one entry per block as one per element; what is the same along a whole dimension is left to numpy."""
    for axis in reversed(range(len(shape))):  # whole rows are copied last, which is fastest
        if grid.shape[axis] > 1:
            grid = np.take(grid, (np.arange(shape[axis]) + first[axis]) // blocks[axis], axis)
    return grid


def rounded(values: Float32, through: str, dtype: str) -> memoryview:
    """Return the bytes of float32 numbers, rounded to one dtype and then to another. Raise OverflowError where one that
    is finite would become infinite."""
    between = through if through in ("float16", "bfloat16") else "float32"
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        flat = np.ascontiguousarray(values).reshape(-1)
        bits = convert(narrow(flat, between), between, dtype)
    if overflows(flat.view(np.uint32), "float32", bits, dtype):
        raise OverflowError(dtype)
    return memoryview(bits.view(np.uint8).data)


def turned_blocks(codes: memoryview, exponents: memoryview, shape: tuple[int, int, int], dtype: str) -> memoryview:
    """Return matrices of `shape` (how many, columns, rows) from blocks of 32 values of 4 bits along the columns, the
    lower half of each byte first, times 2 to the exponent of the block less 127."""
    count, columns, rows = shape
    blocks = np.frombuffer(codes, np.uint8).reshape(count, rows, columns // 32, 16)
    powers = np.take(table("float8_e8m0fnu"), np.frombuffer(exponents, np.uint8)).reshape(count, rows, -1, 1)
    made: NDArray[Any] = np.empty(shape, BITS[dtype])
    for matrix in range(count):
        for start in range(0, rows, ROWS):
            part = blocks[matrix, start : start + ROWS]
            values = np.take(FP4_PAIRS, part, 0).reshape(*part.shape[:2], 32)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                values *= powers[matrix, start : start + ROWS]
            bits = np.frombuffer(rounded(values, "bfloat16", dtype), BITS[dtype])
            made[matrix, :, start : start + ROWS] = bits.reshape(-1, columns).T
    return memoryview(made.reshape(-1).view(np.uint8).data)
