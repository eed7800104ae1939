"""nf4 and fp4 (QLoRA, arXiv 2305.14314) as bitsandbytes 0.50 stores and loads them: two codes to a byte.

64 numbers share a float32 scale; under double quantization it is a code of 8 bits, and 256 of those share a scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from bigpipe.bigmodel.checkpoint import invalid
from bigpipe.errors import InvalidCheckpoint
from bigpipe.files import parse_json

from . import bitsandbytes
from .encoders import BLOCK, NESTED_BLOCK
from .format import Format, MeasuringEncoder, Packing, Shape, Shapes, StoredTensor

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import TensorInfo

    from .format import Scales

COMPUTES = frozenset({"float16", "half", "bfloat16", "float32", "float", "float64", "double"})
STATE = "weight.quant_state.bitsandbytes__"
NESTED = frozenset({"weight.nested_absmax", "weight.nested_quant_map"})
"""Stored beside a double-quantized weight alone."""
NESTED_DTYPES = ("float32", "float16", "bfloat16")
"""What double-quantized scales are unpacked to. Of a weight that had computed on a CPU with AVX512-BF16, bitsandbytes
saves another than the first."""
TYPICAL_OFFSET = 0.12345678901234568
"""Stands in for the mean absmax of a weight that was not read yet: as text it has 17 to 20 characters mostly."""
FEWEST_DIGITS, MOST_DIGITS = 3, 22
"""Characters of that mean: `0.5` at the least, at the most 17 significant digits with `0.000` before them or `e-05`
behind."""
LARGEST_STATE = 10_000
"""Bytes of what is said beside a weight; it has a hundred or two."""
PACKED_ROWS = 32
"""Rows of a tile of bitsandbytes' packing for CPUs with AVX512-BF16."""


@dataclass(frozen=True)
class FourBit(Packing):
    quant_type: str
    bnb_4bit_use_double_quant: bool = False
    """Are the scales quantized too?"""
    bnb_4bit_compute_dtype: str = "float16"

    bits: ClassVar[int] = 4
    takes: ClassVar[tuple[str, ...]] = ("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    quantizing: ClassVar[tuple[int, int, int]] = (2, 11, 12)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "weight", "weight.absmax", "weight.quant_map", *sorted(NESTED), STATE + self.quant_type

    @property
    def computes_in(self) -> str:
        return self.bnb_4bit_compute_dtype

    @property
    def measures(self) -> bool:
        return self.bnb_4bit_use_double_quant

    def stored(self, shape: Shape, dtype: str, measured: Any = None) -> tuple[StoredTensor, ...]:
        return _stored(self, shape, dtype, measured)

    def as_stored(self, parts: Collection[str]) -> FourBit:
        return replace(self, bnb_4bit_use_double_quant=not NESTED.isdisjoint(parts))

    def spread(self) -> tuple[int, int]:
        typical = len(repr(TYPICAL_OFFSET))
        return (typical - FEWEST_DIGITS, MOST_DIGITS - typical) if self.bnb_4bit_use_double_quant else (0, 0)

    def transient(self, tokens: int, hidden: int, inner: int, largest: int) -> tuple[int, str]:
        return 2 * largest, "the largest matrix unpacked"

    def learning(self, largest: int, itemsize: int) -> int:
        """In 16 bits first (bitsandbytes 0.50, `MatMul4Bit.backward`)."""
        return 2 * largest + (itemsize * largest if itemsize != 2 else 0)

    def config(self, skipped: list[str] | None) -> dict[str, Any]:
        return bitsandbytes.config(
            skipped,
            load_in_4bit=True,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
        )

    def encoder(self, dtype: str, size: int, device: str | None = None) -> MeasuringEncoder:
        if device is None:
            from .encoders.four_bit import FourBitEncoder

            return FourBitEncoder(dtype, self.quant_type, size)
        from .encoders.devices import DeviceFourBitEncoder

        return DeviceFourBitEncoder(device, dtype, self.quant_type, size)

    def measure(self, absmax: Scales, threads: int) -> float:
        from .encoders.nested import mean

        return float(mean(absmax, threads))

    def beside(self, shape: Shape, dtype: str, scales: Scales, measured: Any, threads: int) -> dict[str, bytes]:
        from .encoders.codes import dynamic_code, four_bit_code

        found = {
            STATE + self.quant_type: quant_state(self.quant_type, dtype, shape, measured),
            "weight.quant_map": four_bit_code(self.quant_type).tobytes(),
        }
        if not self.bnb_4bit_use_double_quant:
            return found | {"weight.absmax": scales.tobytes()}
        from .encoders.nested import quantize_absmax

        nested = quantize_absmax(scales, measured)
        return found | {
            "weight.absmax": nested.codes.tobytes(),
            "weight.nested_absmax": nested.absmax.tobytes(),
            "weight.nested_quant_map": dynamic_code().tobytes(),
        }

    def wrong(self, config: Mapping[str, Any]) -> str | None:
        compute = config.get("bnb_4bit_compute_dtype")
        fits = compute is None or (isinstance(compute, str) and compute.removeprefix("torch.") in COMPUTES)
        return None if fits else f"bnb_4bit_compute_dtype is {compute!r:.80}, and no dtype to compute in"

    def refuse_misstated(
        self, linear: torch.nn.Module, parts: Mapping[str, TensorInfo], read: Callable[[TensorInfo], bytes]
    ) -> None:
        state, wanted = self.state(parts, read), _features(linear)
        if state.shape != wanted:
            raise _misstated(parts[STATE + self.quant_type], f"shape is {list(state.shape)}, not {list(wanted)}")

    def state(self, parts: Mapping[str, TensorInfo], read: Callable[[TensorInfo], bytes]) -> State:
        """Return what is said beside the codes of a weight. parts: by suffix; read: gives the bytes of one. Raise
        InvalidCheckpoint, naming file and tensor, where that is nothing, or not of so many codes and scales."""
        tensor = parts[STATE + self.quant_type]
        if tensor.nbytes > LARGEST_STATE:
            raise _misstated(tensor, f"it has {tensor.nbytes:,} bytes")
        try:
            state = _state_of(parse_json(read(tensor)), self.quant_type, nested="weight.nested_absmax" in parts)
            state.require(parts)
        except ValueError as error:
            raise _misstated(tensor, str(error)) from error
        return state

    def module(self, linear: torch.nn.Module, shapes: Shapes, config: Mapping[str, Any]) -> torch.nn.Module:
        import torch
        from bitsandbytes.nn import Linear4bit

        rows, columns = _features(linear)
        compute = str(config.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        made = bitsandbytes.module(
            linear, rows, columns, Linear4bit, compute_dtype=getattr(torch, compute),
            compress_statistics="weight.nested_absmax" in shapes, quant_type=self.quant_type,
        )  # fmt: skip
        if columns % BLOCK or rows % PACKED_ROWS:
            # bitsandbytes' packing for CPUs with AVX512-BF16 takes whole tiles only, and fails on others
            made.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if made.support_avx512bf16_for_cpu:
            made.register_state_dict_pre_hook(self._unpack)  # type: ignore[no-untyped-call]
            made.register_forward_pre_hook(self._unpack_for_gradients)
        return made

    def attach(self, module: Any, parts: Mapping[str, torch.Tensor]) -> None:
        from bitsandbytes.nn import Params4bit

        codes = parts["weight"]
        statistics = {suffix.removeprefix("weight."): part for suffix, part in parts.items() if suffix != "weight"}
        module.weight = Params4bit.from_prequantized(
            codes, statistics, requires_grad=False, device=codes.device, module=module
        )
        if module.support_avx512bf16_for_cpu and codes.device.type == "cpu":
            module.quant_state.stored = dict(parts)

    def detach(self, module: Any) -> None:
        module.quant_state = None

    def _unpack(self, module: Any, *_: Any) -> None:
        """Give a module back what is stored, where bitsandbytes packed it for this CPU at a forward: scales are rounded
        to bfloat16 for that, and its own way back leaves them so, and turned round."""
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and hasattr(state, "stored"):
            self.attach(module, state.stored)

    def _unpack_for_gradients(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """The product with a packed weight has no gradient."""
        if module.training or any(getattr(tensor, "requires_grad", False) for tensor in inputs):
            self._unpack(module)


@lru_cache(1024)
def _stored(packing: FourBit, shape: Shape, dtype: str, measured: float | None) -> tuple[StoredTensor, ...]:
    elements, double = math.prod(shape), packing.bnb_4bit_use_double_quant
    blocks = -(-elements // BLOCK)
    tensors = [
        StoredTensor("weight", "uint8", (-(-elements // 2), 1)),
        StoredTensor("weight.absmax", "uint8" if double else "float32", (blocks,)),
        StoredTensor("weight.quant_map", "float32", (16,)),
    ]
    if double:
        tensors.append(StoredTensor("weight.nested_absmax", "float32", (-(-blocks // NESTED_BLOCK),)))
        tensors.append(StoredTensor("weight.nested_quant_map", "float32", (256,)))
        measured = TYPICAL_OFFSET if measured is None else measured
    length = len(quant_state(packing.quant_type, dtype, shape, measured))
    mean = 4 if double else 0  # all that stays of the state is a float32
    return *tensors, StoredTensor(STATE + packing.quant_type, "uint8", (length,), loaded=mean)


def quant_state(quant_type: str, dtype: str, shape: Shape, offset: float | None) -> bytes:
    """Return the JSON that bitsandbytes stores as a uint8 tensor beside a 4-bit weight (QuantState.as_dict, packed).

    dtype, shape (out, in): of the weight before; offset: of a double-quantized absmax.
    """
    state: dict[str, Any] = {"quant_type": quant_type, "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


@dataclass(frozen=True, slots=True)
class State:
    """What a `quant_state` says."""

    dtype: str
    """Of the weight before."""
    shape: tuple[int, int]
    """(out, in)."""
    blocksize: int
    nested_blocksize: int | None = None
    nested_offset: float | None = None
    nested_dtype: str | None = None
    """All three of scales that are codes themselves; the last is what they are unpacked to."""

    def require(self, parts: Mapping[str, TensorInfo]) -> None:
        """Raise ValueError unless there are the codes and scales of a matrix of this shape."""
        elements = math.prod(self.shape)
        blocks = -(-elements // self.blocksize)
        wanted = {"weight.absmax": blocks}
        if self.nested_blocksize is not None:
            wanted["weight.nested_absmax"] = -(-blocks // self.nested_blocksize)
        if "weight" not in parts:
            raise ValueError("there are no codes beside it")
        if parts["weight"].nbytes != -(-elements // 2):
            raise ValueError(f"shape is {list(self.shape)}, and there are {2 * parts['weight'].nbytes:,} codes")
        for suffix, count in wanted.items():
            found = parts[suffix].shape if suffix in parts else (0,)
            if found != (count,):
                raise ValueError(f"{suffix} is {list(found)}, and {count:,} blocks need a scale each")


def _state_of(said: Any, quant_type: str, *, nested: bool) -> State:
    """Raise ValueError, naming the field, for what bitsandbytes would not say."""
    if not isinstance(said, dict):
        raise ValueError("it is no JSON object")
    shape, offset = said.get("shape"), said.get("nested_offset")
    fits = {
        "quant_type": said.get("quant_type") == quant_type,
        "dtype": isinstance(said.get("dtype"), str) and said["dtype"] in COMPUTES,
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape)),
        "blocksize": _is_count(said.get("blocksize")),
    }
    if nested:
        fits["nested_dtype"] = said.get("nested_dtype") in NESTED_DTYPES
        fits["nested_blocksize"] = _is_count(said.get("nested_blocksize"))
        fits["nested_offset"] = isinstance(offset, float) and math.isfinite(offset)
    for name in (name for name, right in fits.items() if not right):
        raise ValueError(f"{name} is {said.get(name)!r:.80}")
    beside = (said["nested_blocksize"], offset, said["nested_dtype"]) if nested else ()
    rows, columns = said["shape"]
    return State(said["dtype"], (rows, columns), said["blocksize"], *beside)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _misstated(tensor: TensorInfo, why: str) -> InvalidCheckpoint:
    cause = f"is no state of a weight that bitsandbytes packed: {why}"
    return invalid(tensor.file, cause, "fetch the model again, or quantize it anew", tensor=tensor.name)


def rounded_weights(model: torch.nn.Module) -> list[str]:
    """Return the names of 4-bit weights whose scales bitsandbytes rounded when it packed them for this CPU, where
    nothing keeps what they were: in models that others loaded, once they have computed."""
    states = {name: getattr(weight, "quant_state", None) for name, weight in model.named_parameters()}
    return [
        name
        for name, state in states.items()
        if hasattr(state, "packing_format_for_cpu") and not hasattr(state, "stored")
    ]


def stored_offset(state: bytes) -> float | None:
    """Return the offset that a `quant_state` names; None where it names none."""
    try:
        offset = parse_json(state)["nested_offset"]
    except (ValueError, KeyError, TypeError):
        return None
    return offset if isinstance(offset, float) and math.isfinite(offset) else None


def _features(linear: Any) -> tuple[int, int]:
    """(out, in), whichever way round the replaced module keeps its weight."""
    if hasattr(linear, "out_features"):
        return int(linear.out_features), int(linear.in_features)
    columns, rows = linear.weight.shape
    return int(rows), int(columns)


def _format(quant_type: str) -> Format:
    return Format(
        name=quant_type,
        title=f"bitsandbytes {quant_type}",
        method=bitsandbytes.METHOD,
        tensors=(".weight", f".bitsandbytes__{quant_type}"),
        packing=FourBit(quant_type),
    )


NF4 = _format("nf4")
FP4 = _format("fp4")
