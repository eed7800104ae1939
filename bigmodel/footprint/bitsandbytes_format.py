"""What bitsandbytes converts, and what a converted matrix is stored as, told from shapes alone.

Checked against bitsandbytes 0.50 and transformers 5.23: the rules by which `from_pretrained` picks modules
(`quantizers/base.py`, `quantizers_utils.py`), and the tensors that a quantized module puts into a state dict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, TensorSpec
from bigpipe.errors import UsageError

Scheme = Literal["int8", "nf4", "fp4"]
BLOCK = 64
"""Elements that share one absmax in the 4-bit formats."""
NESTED_BLOCK = 256
"""Absmax values that share one absmax under double quantization."""
OFFSET_DIGITS, FEWEST_DIGITS, MOST_DIGITS = 19, 3, 22
"""Characters of the mean absmax in a double-quantized state's JSON: mostly 17 to 20; `0.5` at the least, at the most
17 significant digits with `0.000` before them or `e-05` behind."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a converted weight. `suffix` follows the module's name and a dot."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def converted_modules(
    architecture: Architecture, *, skip_modules: Sequence[str] | None = None, keep: Sequence[str] = ()
) -> tuple[ModuleSpec, ...]:
    """The modules whose weight bitsandbytes converts, in `named_modules()` order.

    skip_modules: names or patterns to leave alone; None means transformers' default: whatever is tied, the output
    embedding, and the module of the last parameter. keep: more of them, such as those kept in float32.
    """
    usual = skip_modules is None and not keep
    if usual and "converted" in architecture.derived:
        known: tuple[ModuleSpec, ...] = architecture.derived["converted"]
        return known
    skipped = [*(default_skips(architecture) if skip_modules is None else skip_modules)]
    left_alone = name_matcher([*skipped, *architecture.keep_in_fp32, *keep])
    found = tuple(module for module in architecture.modules if module.linear and not left_alone(module.name))
    if usual:
        architecture.derived["converted"] = found
    return found


def name_matcher(entries: Sequence[str]) -> Callable[[str], bool]:
    """Whether a module's name is meant by one of these, as transformers reads them: a prefix or a regular expression,
    up to a dot or the end, or any suffix. Raises UsageError for what is no regular expression."""
    try:
        rules = [(re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))"), entry) for entry in entries]
    except re.error as error:
        raise UsageError(f"{error.pattern!r} names no modules: {error}", "give module names, such as lm_head") from None
    return lambda name: any(rule.match(name) or name.endswith(entry) for rule, entry in rules)


def default_skips(architecture: Architecture) -> list[str]:
    names = {name for group in architecture.tied for name in group}
    parameters = [tensor.name for module in architecture.modules for tensor in module.tensors if not tensor.buffer]
    names.update(parameters[-1:])
    if architecture.output_embedding is not None:
        names.add(architecture.output_embedding)
    return sorted({name.removesuffix(".weight") for name in names})


def weight_of(module: ModuleSpec) -> TensorSpec:
    """The matrix of a linear module."""
    return next(tensor for tensor in module.tensors if tensor.name.rpartition(".")[2] == "weight")


def matrix_shape(module: ModuleSpec) -> tuple[int, int]:
    """(out, in) features; `Conv1D` holds its weight the other way round."""
    rows, columns = weight_of(module).shape
    return (columns, rows) if module.class_name == "Conv1D" else (rows, columns)


@cache
def stored_tensors(
    shape: tuple[int, int], scheme: Scheme, *, double_quant: bool = False, dtype: str = "float16"
) -> tuple[StoredTensor, ...]:
    """What a weight of `shape` (out, in), of `dtype` before conversion, is stored as.

    Under double quantization the length of the JSON is a guess within a few bytes: it holds a number from the data.
    """
    elements = math.prod(shape)
    if scheme == "int8":
        return (
            StoredTensor("weight", "int8", shape, elements),
            StoredTensor("SCB", "float32", shape[:1], 4 * shape[0]),
            StoredTensor("weight_format", "uint8", (), 1),
        )
    packed, blocks = -(-elements // 2), -(-elements // BLOCK)
    scale = ("uint8", 1) if double_quant else ("float32", 4)
    tensors = [
        StoredTensor("weight", "uint8", (packed, 1), packed),
        StoredTensor("weight.absmax", scale[0], (blocks,), scale[1] * blocks),
        StoredTensor("weight.quant_map", "float32", (16,), 64),
    ]
    if double_quant:
        nested = -(-blocks // NESTED_BLOCK)
        tensors.append(StoredTensor("weight.nested_absmax", "float32", (nested,), 4 * nested))
        tensors.append(StoredTensor("weight.nested_quant_map", "float32", (256,), 1024))
    state = _state_length(shape, scheme, double_quant, dtype)
    tensors.append(StoredTensor(f"weight.quant_state.bitsandbytes__{scheme}", "uint8", (state,), state))
    return tuple(tensors)


def stored_interval(size: int, matrices: int, *, double_quant: bool) -> tuple[int, int]:
    """(low, high) of a predicted size with so many converted matrices: each state's JSON holds a number of the data."""
    if not double_quant:
        return size, size
    return size - matrices * (OFFSET_DIGITS - FEWEST_DIGITS), size + matrices * (MOST_DIGITS - OFFSET_DIGITS)


def _state_length(shape: tuple[int, int], scheme: Scheme, double_quant: bool, dtype: str) -> int:
    state: dict[str, object] = {"quant_type": scheme, "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    if double_quant:
        state.update(nested_blocksize=NESTED_BLOCK, nested_dtype="float32", nested_offset=0)
    return len(json.dumps(state)) + (OFFSET_DIGITS - 1 if double_quant else 0)


@cache
def loaded_bytes(shape: tuple[int, int], scheme: Scheme, *, double_quant: bool = False) -> tuple[int, int]:
    """Bytes a loaded module holds for its weight: (codes, scales and tables)."""
    # The JSON and the format marker become Python values; the mean absmax becomes a float32 scalar
    tensors = [t for t in stored_tensors(shape, scheme, double_quant=double_quant) if not _is_marker(t.suffix)]
    scales = sum(tensor.nbytes for tensor in tensors[1:])
    return tensors[0].nbytes, scales + (4 if double_quant else 0)


def _is_marker(suffix: str) -> bool:
    return suffix == "weight_format" or ".quant_state." in suffix
