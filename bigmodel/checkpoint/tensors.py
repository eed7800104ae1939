"""Stored tensors as named byte ranges, and the names that torch and the file formats give to number formats."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from bigpipe.errors import InvalidCheckpoint

SAFETENSORS_DTYPES: Mapping[str, str] = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
    "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
}  # fmt: skip
"""Name in a safetensors header → torch name."""

SAFETENSORS_NAMES: Mapping[str, str] = {torch_name: name for name, torch_name in SAFETENSORS_DTYPES.items()}

DTYPES: Mapping[str, float] = {
    "float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16, "complex32": 4,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
}  # fmt: skip
"""torch dtype name → bytes per element. An element of float4_e2m1fn_x2 is a pair, as torch counts."""

CASTABLE = frozenset({"float32", "float16", "bfloat16", "float64"})
"""What a change of dtype changes. Integers, booleans and quantized formats keep theirs."""

EXPONENT: Mapping[str, int] = {"float16": 5, "bfloat16": 8, "float32": 8, "float64": 11}
"""dtype → bits of its exponent, which tell how far it reaches."""

STORAGE_DTYPES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
"""Typed storage class in a torch pickle → torch dtype name."""

STORAGE_CLASSES: Mapping[str, str] = {dtype: name for name, dtype in STORAGE_DTYPES.items()}


def itemsize(dtype: str) -> int:
    """Return the bytes of one element. Raise KeyError for a name torch does not have."""
    return int(DTYPES[dtype])


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype that may have been given as torch's own: `float16` of `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a contiguous tensor; `shape` is torch's, () a scalar."""
    return math.prod(shape) * itemsize(dtype)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that is not one contiguous range: where its elements lie. Strides and offset as torch counts them."""

    offset: int
    """Of the first element, in bytes from the start of the file."""
    strides: tuple[int, ...]
    """In elements."""


DECODED = 2**20
"""Bytes decoded at a time: float32 beside them takes several times as much."""


class Decoder(Protocol):
    """How rows of a tensor come of the bytes of stored ones; equal to others of its kind and settings."""

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        """Return (first byte, bytes) of each stored tensor that the entries start:stop of the outermost dimension
        are made from."""

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        """Return the bytes of those entries, in memory of its own. parts: the bytes of `ranges`.
        Raise OverflowError where a finite number would become infinite."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is not stored as it is: codes, and what they are multiplied with."""

    parts: tuple[TensorInfo, ...]
    """Stored; the codes first."""
    decoder: Decoder


@dataclass(frozen=True, slots=True)
class OneEntry:
    """Decodes one entry of the outermost dimension from the bytes that it alone is made from."""

    whole: Decoder
    index: int

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        return [(0, size) for _, size in self.whole.ranges(self.index, self.index + 1)]

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        return self.whole.decode(self.index, self.index + 1, parts)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: contiguous, row-major, little-endian bytes at `file[offset:offset + nbytes]`.
    A `.bin` file may also hold a tensor as a strided view; it then has a `view`, and `offset` is -1 so that nobody
    reads a wrong range by mistake: `Checkpoint.chunks` gives the contiguous bytes of either."""

    name: str
    dtype: str
    """torch's name: `float16`."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    view: View | None = None
    made: Made | None = None
    """What it is decoded from; it is then nowhere itself, and `offset` is -1."""

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        """As `Decoder.decode`, of a tensor that is made. Raise InvalidCheckpoint for what its dtype has no room for."""
        assert self.made is not None  # noqa: S101
        try:
            return self.made.decoder.decode(start, stop, parts)
        except OverflowError:
            raise beyond(self.name, self.dtype, self.made.parts[0].file) from None

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What is stored of it: itself, or what it is decoded from."""
        return (self,) if self.made is None else self.made.parts

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(part.file for part in self.stored)

    def entry(self, index: int) -> TensorInfo:
        """Return one entry of the outermost dimension, as a tensor with one such entry."""
        item, one = itemsize(self.dtype), (1, *self.shape[1:])
        if self.made is not None:
            ranges = self.made.decoder.ranges(index, index + 1)
            parts = [
                TensorInfo(part.name, "uint8", (size,), part.file, part.offset + first)
                for part, (first, size) in zip(self.made.parts, ranges, strict=True)
            ]
            return replace(self, shape=one, made=Made(tuple(parts), OneEntry(self.made.decoder, index)))
        if self.view is not None:
            first = self.view.offset + index * self.view.strides[0] * item
            return replace(self, shape=one, view=replace(self.view, offset=first))
        return replace(self, shape=one, offset=self.offset + index * tensor_nbytes(self.dtype, self.shape[1:]))

    def runs(self, size: int) -> Iterator[tuple[int, int]]:
        """Give (start, stop) of its outermost dimension, of at most `size` bytes each but at least one entry. A single
        number, of shape (), is one entry."""
        entries = math.prod(self.shape[:1]) if self.nbytes else 0
        step = max(1, size * entries // max(1, self.nbytes))
        yield from ((start, min(start + step, entries)) for start in range(0, entries, step))


Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored name → (torch dtype name, shape), in the order of their bytes or of the state dict."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What one or several weight files hold, by their headers."""

    tensors: dict[str, TensorInfo]
    """By name, in the order of their bytes or of the state dict."""
    tied: dict[str, str] = field(default_factory=dict)
    """Alias → the stored name it shares its bytes with. Only torch files can hold these."""
    metadata: dict[str, str] = field(default_factory=dict)
    """`__metadata__` of the safetensors files, merged."""

    @property
    def outline(self) -> Tensors:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}


def find_aliases(places: Mapping[str, Hashable]) -> dict[str, str]:
    """Return alias → the first name at the same place. What has no place (None) is nobody's alias."""
    first: dict[Hashable, str] = {}
    kept = {name: first.setdefault(place, name) for name, place in places.items() if place is not None}
    return {name: stored for name, stored in kept.items() if stored != name}


def invalid(
    file: Path | str, cause: str, cure: str, *, tensor: str | None = None, offset: int | None = None
) -> InvalidCheckpoint:
    """Return the error for bytes that are not what they should be: file, tensor, byte offset, cause, cure."""
    where = str(file)
    if tensor is not None:
        where += f": tensor {tensor[:200]!r}"
    if offset is not None:
        where += f" at byte {offset}"
    return InvalidCheckpoint(f"{where}: {cause}", cure)


ROOMY = "take bfloat16, which reaches as far as float32, or leave it in the dtype that it has"


def reaches(dtype: str, stored: str) -> bool:
    """Return whether every finite number of `stored` stays finite in `dtype`; but for half a step at the very end of
    float32, which bfloat16 does not have."""
    return EXPONENT.get(dtype, 0) >= EXPONENT.get(stored, 0)


def beyond(tensor: str, dtype: str, file: Path | str, cure: str = ROOMY) -> InvalidCheckpoint:
    """Return the error for a tensor with numbers that would become infinite in `dtype`."""
    cause = f"holds numbers beyond the largest of {dtype}, which would become infinite"
    return invalid(file, cause, cure, tensor=tensor)


FETCH_AGAIN = "the file is damaged or was made by hand; fetch it again or save the model anew"
OUR_LIMIT = "bigpipe reads no more, and no model that it knows has more; if this file is as it should be, report it"
