"""What bitsandbytes' formats have in common: BitsAndBytesConfig, as it is saved and as people paste it, and modules.

Checked against bitsandbytes 0.50 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

METHOD = "bitsandbytes"
PASTED: Mapping[str, Any] = {
    "load_in_8bit": {"type": "boolean", "description": "`scheme: int8`."},
    "load_in_4bit": {"type": "boolean", "description": "`scheme: nf4`, or what `bnb_4bit_quant_type` says."},
    "bnb_4bit_quant_type": {"enum": ["nf4", "fp4"], "description": "Of `load_in_4bit`."},
    "llm_int8_skip_modules": {
        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
        "description": "`skip_modules`.",
    },
}
"""BitsAndBytesConfig's own spellings, which mean the same as `scheme` and `skip_modules`; as JSON schema."""


def config(skipped: list[str] | None, **changes: Any) -> dict[str, Any]:
    """Return `quantization_config` as transformers saves it; changes: what differs from its defaults."""
    known = {
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "quant_method": METHOD,
        **changes,
    }
    return {"_load_in_4bit": known["load_in_4bit"], "_load_in_8bit": known["load_in_8bit"], **known}


def scheme_of(quantization: Mapping[str, Any]) -> str | None:
    """Return the format that a `quantization_config` of BitsAndBytesConfig means; None for any other."""
    four = quantization.get("load_in_4bit", False)
    flagged = four or quantization.get("load_in_8bit", False)
    if quantization.get("quant_method", METHOD if flagged else None) != METHOD:
        return None
    return str(quantization.get("bnb_4bit_quant_type", "fp4")) if four else "int8"


def read_pasted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with BitsAndBytesConfig's spellings turned into `scheme` and `skip_modules`.

    Raise ValueError where they contradict each other.
    """
    read = dict(fields)
    scheme = _scheme(read)
    if scheme is not None:
        read["scheme"] = scheme
    if "llm_int8_skip_modules" in read:
        if "skip_modules" in read:
            raise ValueError("llm_int8_skip_modules and skip_modules are the same; write one of them")
        read["skip_modules"] = read.pop("llm_int8_skip_modules")
    return read


def _scheme(fields: dict[str, Any]) -> Any:
    """Take the flags out of `fields`. None where nothing says what is wanted."""
    eight, four = fields.pop("load_in_8bit", False), fields.pop("load_in_4bit", False)
    if not isinstance(eight, bool) or not isinstance(four, bool):
        raise ValueError("load_in_8bit and load_in_4bit are true or false")
    if eight and four:
        raise ValueError("load_in_8bit and load_in_4bit exclude each other; write one of them")
    kind, scheme = fields.get("bnb_4bit_quant_type"), fields.get("scheme")
    if scheme is None:
        scheme = "int8" if eight else (kind or "fp4") if four else None
    elif (eight and scheme != "int8") or (four and scheme not in ("nf4", "fp4")):
        raise ValueError(f"scheme {scheme} contradicts load_in_{8 if eight else 4}bit; write one of them")
    if scheme in ("nf4", "fp4") and fields.pop("bnb_4bit_quant_type", None) not in (None, scheme):
        raise ValueError(f"scheme {scheme} contradicts bnb_4bit_quant_type {kind}; write one of them")
    return scheme


def module(
    linear: torch.nn.Module, rows: int, columns: int, make: Callable[..., torch.nn.Module], **options: Any
) -> torch.nn.Module:
    """Return bitsandbytes' own empty module in the place of `linear`, its bias included."""
    import logging

    import torch

    # It says so at every call that activations are cast, which is what int8 means.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    bias = getattr(linear, "bias", None)
    with torch.device("meta"):
        made = make(columns, rows, bias is not None, **options)
        if bias is not None:
            made.bias = torch.nn.Parameter(torch.empty(rows, dtype=bias.dtype))
    return made.requires_grad_(False)
