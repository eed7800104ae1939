"""Weights that bitsandbytes packed, as the numbers that it unpacks them to: rows at a time, for what is added to them.

Bit for bit `int8_vectorwise_dequant` and `dequantize_4bit` of bitsandbytes 0.50 on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigpipe.bigmodel.checkpoint import Checkpoint, Decoder, Made, TensorInfo
from bigpipe.bigmodel.formats import FourBit, PackedWeight
from bigpipe.bigmodel.formats.encoders import BLOCK, NESTED_BLOCK
from bigpipe.errors import UsageError

from .arithmetic import as_tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """code · scale of its row / 127."""

    columns: int

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        return [(start * self.columns, (stop - start) * self.columns), (4 * start, 4 * (stop - start))]

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        codes = as_tensor(parts[0], "int8", (stop - start, self.columns))
        return _bytes_of(codes * as_tensor(parts[1], "float32", (-1, 1)) * 7.874015718698502e-3)


@dataclass(frozen=True, slots=True)
class FourBitRows:
    """The number of each code times the scale of its block."""

    columns: int
    dtype: str
    offset: float | None
    """Of scales that are codes themselves; None: they are stored as they are."""

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        first, last = start * self.columns, stop * self.columns
        block, behind = first // BLOCK, -(-last // BLOCK)
        size = 4 if self.offset is None else 1
        scales = [(size * block, size * (behind - block))]
        if self.offset is not None:
            group, after = block // NESTED_BLOCK, -(-behind // NESTED_BLOCK)
            scales += [(4 * group, 4 * (after - group)), (0, 4 * 256)]
        return [(first // 2, -(-last // 2) - first // 2), (0, 4 * 16), *scales]

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        import torch

        first, last = start * self.columns, stop * self.columns
        packed = as_tensor(parts[0], "uint8", (-1,))
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[first % 2 :][: last - first]
        numbers = as_tensor(parts[1], "float32", (16,))[codes.int()]
        blocks = torch.arange(first, last) // BLOCK
        values = numbers * self._scales(parts, first // BLOCK)[blocks - first // BLOCK]
        return _bytes_of(values.to(getattr(torch, self.dtype)))

    def _scales(self, parts: Sequence[memoryview], block: int) -> torch.Tensor:
        import torch

        if self.offset is None:
            return as_tensor(parts[2], "float32", (-1,))
        codes = as_tensor(parts[2], "uint8", (-1,)).int()
        groups = torch.arange(block, block + len(codes)) // NESTED_BLOCK - block // NESTED_BLOCK
        return (
            as_tensor(parts[4], "float32", (-1,))[codes] * as_tensor(parts[3], "float32", (-1,))[groups] + self.offset
        )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data)


def unpacked(checkpoint: Checkpoint, module: str, weight: PackedWeight[TensorInfo]) -> TensorInfo:
    """Return a packed weight as a plain tensor that is unpacked as it is read. Raise UsageError for a packing that is
    not bitsandbytes', and InvalidCheckpoint where what is stored of it does not fit."""
    parts, suffixes = weight.parts, weight.packing.suffixes
    name = f"{module}.weight"
    if "SCB" in suffixes:
        codes, scales = parts["weight"], parts["SCB"]
        return _made(name, "float32", codes.shape, Int8Rows(codes.shape[1]), codes, scales)
    if not isinstance(weight.packing, FourBit) or parts["weight"].dtype != "uint8":
        raise UsageError(f"{module} is packed in a way that is not unpacked here", "merge before it is quantized")
    state = weight.packing.state(parts, lambda part: checkpoint.read(part.name))
    nested = state.nested_blocksize is not None
    if state.blocksize != BLOCK or state.nested_blocksize not in (None, NESTED_BLOCK):
        raise UsageError(f"{module} is packed in blocks of {state.blocksize}", "merge before it is quantized")
    if state.nested_dtype not in (None, "float32"):
        raise UsageError(f"{module} is packed with scales in {state.nested_dtype}", "merge before it is quantized")
    decoder = FourBitRows(state.shape[1], state.dtype, state.nested_offset)
    beside = [
        "weight.quant_map",
        "weight.absmax",
        *(["weight.nested_absmax", "weight.nested_quant_map"] if nested else []),
    ]
    return _made(name, state.dtype, state.shape, decoder, parts["weight"], *(parts[each] for each in beside))


def _made(name: str, dtype: str, shape: tuple[int, ...], decoder: Decoder, *parts: TensorInfo) -> TensorInfo:
    return TensorInfo(name, dtype, shape, parts[0].file, -1, made=Made(parts, decoder))
