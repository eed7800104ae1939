"""Formats with scales beside their codes that are decoded exactly, a run of rows at a time, as if they were plain.

    decoding_of(quantization_config, tensors) -> Decoding | None

fp8 with a scale per tensor, row or block, as DeepSeek, Qwen and Mistral store it; 8-bit floats and integers of
compressed-tensors 0.20 (`float-quantized`, `int-quantized`, `naive-quantized`); MXFP4 as gpt-oss was published.
Held against transformers 5.23 (`integrations/finegrained_fp8.py`, `mxfp4.py`) and compressed-tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import CASTABLE, itemsize
from bigpipe.errors import InvalidCheckpoint

from .format import Decoded, Decoding

if TYPE_CHECKING:
    from .format import Tensors

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
SCALES = frozenset({*CASTABLE, *FLOAT8, "float8_e8m0fnu", "int8"})
"""dtypes that scales and zero points are read from."""
OF_WEIGHTS = ("_scale_inv", "_scale")
"""What the name of a weight's scales adds to that of the weight."""
OF_ACTIVATIONS = r"([kvq]|kv)_(scale|zero_point)|(input|output|activation)_(scale(_inv)?|zero_point|global_scale)"
"""Names of scales of activations and of caches, which are computed with as they are here."""
ACTIVATIONS = re.compile(rf"[._]({OF_ACTIVATIONS})$")
BESIDE = re.compile(rf"[._](weight_scale(_inv)?|weight_zero_point|weight_shape|{OF_ACTIVATIONS})$")
"""Names of what belongs to packed weights and to activations."""
COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats of compressed-tensors whose codes are one number each."""
FP8_BLOCK = (128, 128)
"""What transformers takes where a config of fp8 says nothing of blocks; `null` is none."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """Numbers of 8 bits, less a zero point, times a scale; one of these per block."""

    codes: str
    scales: str
    zeros: str | None
    """Their dtypes; None: no zero points."""
    dtype: str
    """Of the plain numbers."""
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    """How many blocks there are along each dimension."""
    blocks: tuple[int, ...]
    """Their sizes."""

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        width, wide = math.prod(self.shape[1:]), math.prod(self.grid[1:])
        first, last = start // self.blocks[0], (stop - 1) // self.blocks[0] + 1
        sizes = [itemsize(dtype) * wide for dtype in (self.scales, self.zeros) if dtype]
        return (start * width, (stop - start) * width), *((first * size, (last - first) * size) for size in sizes)

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        from .encoders.scaled import multiply, numbers, rounded

        grid = (-1, *self.grid[1:])
        scales = numbers(parts[1], self.scales).reshape(grid)
        zeros = numbers(parts[2], self.zeros).reshape(grid) if self.zeros else None
        first = (start % self.blocks[0], *(0 for _ in self.shape[1:]))
        shape = (stop - start, *self.shape[1:])
        values = multiply(parts[0], self.codes, shape, scales, zeros, first, self.blocks)
        return rounded(values, self.scales, self.dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """MXFP4: blocks of 32 numbers of 4 bits with one exponent; matrices that the class holds the other way round."""

    dtype: str
    shape: tuple[int, int, int]
    """(matrices, columns, rows)."""

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        elements = math.prod(self.shape[1:])
        return [(start * size, (stop - start) * size) for size in (elements // 2, elements // 32)]

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        from .encoders.scaled import turned_blocks

        return turned_blocks(parts[0], parts[1], (stop - start, *self.shape[1:]), self.dtype)


@dataclass(frozen=True, slots=True)
class WithScales(Decoding):
    """Codes called as the weight is, scales as the weight with a word behind it."""

    codes: tuple[str, ...]
    """dtypes."""
    blocks: tuple[tuple[int, int], ...] = ()
    """(rows, columns) that share a scale, of each group of weights where neither a row nor the whole does."""

    def made(self, stored: Tensors, dtype: str) -> Mapping[str, Decoded]:
        found = {}
        for name, (codes, shape) in stored.items():
            scale = next((name + end for end in OF_WEIGHTS if name + end in stored), None)
            if codes not in self.codes or self.dropped(name):
                continue
            if scale is None:
                cause = f"{name} is stored as {codes}, and no scale of it is ({', '.join(OF_WEIGHTS)})"
                raise InvalidCheckpoint(cause, "fetch all files again: its codes are no numbers without it")
            parts = [scale, *(end for end in [f"{name}_zero_point"] if end in stored)]
            dtypes, shapes = [_scales_dtype(stored[part][0]) for part in parts], {stored[part][1] for part in parts}
            grid, blocks = _grid(shape, shapes.pop(), self.blocks)
            if not grid or shapes or not SCALES.issuperset(dtypes):
                told = ", ".join(f"{part} {stored[part][0]} {list(stored[part][1])}" for part in parts)
                cause = f"{name} is {list(shape)}, and its scales are {told}"
                cause += f" in blocks of {' or '.join(str(list(each)) for each in self.blocks)}" if self.blocks else ""
                cure = "check that config.json belongs to these weights, and says how large their blocks are"
                raise InvalidCheckpoint(cause, cure)
            decoder = Scaled(codes, dtypes[0], dtypes[1] if dtypes[1:] else None, dtype, shape, grid, blocks)
            found[name] = Decoded((name, *parts), dtype, shape, decoder)
        return found

    def dropped(self, name: str) -> bool:
        return BESIDE.search(name) is not None


@cache
def _grid(
    shape: tuple[int, ...], scales: tuple[int, ...], blocks: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (blocks along each dimension, their sizes); nothing where the shape of the scales does not tell these.
    blocks: (rows, columns) that share a scale, as the config says. Along a dimension where no block is stated there is
    one scale, or one for each entry: how long others are would be a guess."""
    if math.prod(scales) == 1:
        return (1,) * len(shape), shape
    grid = (*scales, *(1 for _ in shape[len(scales) :]))
    if len(grid) != len(shape) or 0 in grid:
        return (), ()
    whole = tuple(max(1, size) if count == 1 else 1 for size, count in zip(shape, grid, strict=True))
    stated = {(*whole[:-2], *block)[-len(shape) :] for block in blocks}
    found = [
        sizes
        for sizes in dict.fromkeys((whole, *sorted(stated)))
        if tuple(-(-size // each) for size, each in zip(shape, sizes, strict=True)) == grid
    ]
    return (grid, found[0]) if len(found) == 1 or found[:1] == [whole] else ((), ())


@dataclass(frozen=True, slots=True)
class Microscaling(Decoding):
    """`…_blocks` (experts, rows, blocks, 16) and `…_scales` (experts, rows, blocks) of experts."""

    def made(self, stored: Tensors, dtype: str) -> Mapping[str, Decoded]:
        found = {}
        for name, (codes, shape) in stored.items():
            if not name.endswith("_blocks"):
                continue
            plain = name.removesuffix("_blocks")
            scales = stored.get(f"{plain}_scales", ("nothing", ()))
            if (codes, scales) != ("uint8", ("uint8", shape[:-1])) or len(shape) != 4 or shape[-1] != 16:
                cause = f"{name} is {codes} {list(shape)}, and {plain}_scales {scales[0]} {list(scales[1])}"
                raise InvalidCheckpoint(cause, "fetch the files again; MXFP4 has 16 bytes and an exponent per block")
            experts, rows, blocks, _ = shape
            turned = (experts, 32 * blocks, rows)
            found[plain] = Decoded((name, f"{plain}_scales"), dtype, turned, Blocks(dtype, turned))
        return found

    def dropped(self, name: str) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Numbers:
    """8-bit floats that stand for nothing but themselves."""

    codes: str
    dtype: str
    """Of the plain numbers, which hold each of the codes' exactly."""
    width: int
    """Elements of an entry of the outermost dimension."""

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        return [(start * self.width, (stop - start) * self.width)]

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        from .encoders.scaled import numbers, rounded

        return rounded(numbers(parts[0], self.codes), self.dtype, self.dtype)


@dataclass(frozen=True, slots=True)
class WithoutScales(Decoding):
    """8-bit floats of which nothing says that they are codes: no config, and no scale beside them."""

    def made(self, stored: Tensors, dtype: str) -> Mapping[str, Decoded]:
        narrow = [name for name in stored if are_floats(*stored[name])]
        places = {*narrow, *(name.rpartition(".")[0] for name in narrow)}
        scales = (name for name in stored if "scale" in name.rpartition(".")[2].lower())
        if scale := next((name for name in scales if name.rpartition(".")[0] in places), None):
            cause = f"{scale} lies beside 8-bit floats, and nothing says how these are scaled"
            raise InvalidCheckpoint(cause, "bring the quantization_config of these weights, or weights in 16 bits")
        shapes = ((name, *stored[name]) for name in narrow)
        return {
            name: Decoded((name,), dtype, shape, Numbers(codes, dtype, math.prod(shape[1:])))
            for name, codes, shape in shapes
        }

    def dropped(self, name: str) -> bool:
        return False


def are_floats(dtype: str, shape: Sequence[int]) -> bool:
    """Are these several 8-bit floats?"""
    return dtype in FLOAT8 and bool(shape)


def decoding_of(quantization: Mapping[str, Any], tensors: Tensors) -> Decoding | None:
    """Return how a checkpoint with this `quantization_config` is decoded; None where nothing here can."""
    method = str(quantization.get("quant_method", "")).replace("_", "-")
    if method == "mxfp4":
        return Microscaling()
    if method == "fp8":
        packed = any(tensors.get(name.removesuffix("_scale_inv"), ("",))[0] in ("int8", "uint8") for name in tensors)
        block = _pair(quantization.get("weight_block_size", FP8_BLOCK))
        return None if packed else WithScales(FLOAT8, (block,) if block else ())
    return _compressed(quantization) if method == "compressed-tensors" else None


def _compressed(quantization: Mapping[str, Any]) -> Decoding | None:
    groups = [group for group in _mapping(quantization.get("config_groups")).values() if isinstance(group, Mapping)]
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]
    formats = {str(found["format"]) for found in (quantization, *groups) if found.get("format")} - {"mixed-precision"}
    sparse = _mapping(quantization.get("sparsity_config")).get("format", "dense") != "dense"
    if not weights or not formats or not formats.issubset(COMPRESSED) or sparse or quantization.get("transform_config"):
        return None
    unordered = all(found.get("actorder") in (None, False, "static", "weight") for found in weights)
    if not unordered or any(found.get("num_bits") != 8 for found in weights):
        return None
    blocks = {block for found in weights if (block := _shared(found)) is not None}
    return WithScales((*FLOAT8, "int8"), tuple(sorted(blocks)))


def _shared(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) that share a scale in a group of compressed-tensors."""
    block, columns = _pair(weights.get("block_structure")), weights.get("group_size")
    return (1, columns) if block is None and isinstance(columns, int) and columns > 0 else block


def _pair(value: Any) -> tuple[int, int] | None:
    """(rows, columns) of a block, given as a list or as 128x128."""
    sizes = [int(size) for size in re.findall(r"\d{1,9}", value if isinstance(value, str) else repr(value))]
    return (sizes[0], sizes[1]) if len(sizes) == 2 and all(sizes) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _scales_dtype(stored: str) -> str:
    """Bytes beside 8-bit floats are exponents (MXFP8)."""
    return "float8_e8m0fnu" if stored == "uint8" else stored
