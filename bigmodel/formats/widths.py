"""The names that an estimate takes for what a model's weights would be: plain dtypes, and formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bigpipe.errors import UsageError
from bigpipe.names import SPELLINGS, did_you_mean

from .registry import BUILT_IN, names, packing_of

if TYPE_CHECKING:
    from .format import Packing

PLAIN_DTYPES: Mapping[str, str] = {
    "float64": "float64", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float8": "float8_e4m3fn",
}  # fmt: skip
"""Dtypes of an estimate in which nothing is packed → torch's names."""
PACKED: Mapping[str, str] = {"int8": "int8", "int4": "nf4"} | {name: name for name in BUILT_IN}
"""Those that are formats → the format. `int4` is accelerate's name for any 4-bit format."""
WORTHWHILE = ("float32", "float16", "bfloat16", "int8", "nf4")
"""Those that something here writes and that no other one of their width does better."""
DTYPES = (*PLAIN_DTYPES, *PACKED)


def dtypes() -> list[str]:
    """Return all names, those of formats that other distributions offer too."""
    return [*dict.fromkeys((*DTYPES, *names()))]


def require_dtype(name: str) -> None:
    """Raise UsageError for a name that is neither a dtype nor a format."""
    if name not in DTYPES and name not in names():
        cure = did_you_mean(SPELLINGS.get(name.lower(), name), dtypes(), otherwise="use one of")
        raise UsageError(f"dtype {name!r} is not known to estimate", cure)


def asked(dtype: object) -> str:
    """Return the name that an estimate has for a dtype, which may have been given as torch's own, in 8 bits too."""
    name = str(dtype).removeprefix("torch.")
    return "float8" if name.startswith("float8_") else name


def packing(dtype: str, *, double_quant: bool = False) -> Packing | None:
    """Return how matrices are packed in a dtype of an estimate; None where they are not. Raise as `require_dtype`."""
    require_dtype(dtype)
    if dtype in PLAIN_DTYPES:
        return None
    return packing_of(PACKED.get(dtype, dtype), bnb_4bit_use_double_quant=double_quant)


def has_double_quant(dtype: str) -> bool:
    """Return whether the scales of a dtype of an estimate can be quantized too."""
    found = packing(dtype)
    return found is not None and "bnb_4bit_use_double_quant" in found.takes


def width(dtype: str) -> int:
    """Return the bits per float parameter that the dtype's name promises."""
    from bigpipe.bigmodel.checkpoint import itemsize

    found = packing(dtype)
    return found.bits if found else 8 * itemsize(PLAIN_DTYPES[dtype])
