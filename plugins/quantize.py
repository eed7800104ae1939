"""`quantize`: bitsandbytes' int8, nf4 and fp4 weights on disk, streamed in constant memory and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, model_validator

from bigpipe.orchestrator.stage import Machine, Metrics, Params, Passing, Planning, Port, Stage, late

EIGHT_BIT_FIELDS = ("llm_int8_threshold",)

FOUR_BIT_FIELDS = ("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type")

PASTED: dict[str, Any] = {
    "load_in_8bit": {"type": "boolean"},
    "load_in_4bit": {"type": "boolean"},
    "bnb_4bit_quant_type": {"enum": ["nf4", "fp4"]},
    "llm_int8_skip_modules": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
}
"""BitsAndBytesConfig's own spellings, which mean the same as `scheme` and `skip_modules`; as JSON schema."""


def _without_torch(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


Dtype = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(_without_torch)]


def _accept_pasted(schema: dict[str, Any]) -> None:
    schema["properties"].update(PASTED)
    schema["required"] = [name for name in schema.get("required", ()) if name != "scheme"]


class QuantizeParams(Params):
    model_config = ConfigDict(json_schema_extra=_accept_pasted)

    scheme: Literal["int8", "nf4", "fp4"]
    """`load_in_8bit: true`, or `load_in_4bit: true` with `bnb_4bit_quant_type`, mean the same."""
    llm_int8_threshold: float = 6.0
    """Activations beyond it are computed in 16 bits (int8 only); stored in the config, no weight depends on it."""
    bnb_4bit_use_double_quant: bool = False
    """Quantizes the scales too (nf4 and fp4 only)."""
    bnb_4bit_compute_dtype: Dtype = "float16"
    skip_modules: tuple[str, ...] | None = None
    """Modules to leave as they are; left out, the output head and whatever is tied. A list replaces that."""
    keep_in_fp32_modules: tuple[str, ...] = ()
    """Modules to leave as they are and to store as float32."""
    dtype: Dtype = "float16"
    """Of everything that is not quantized; 4-bit weights pass through it."""

    @model_validator(mode="before")
    @classmethod
    def _read_pasted(cls, values: Any) -> Any:
        """`scheme` from BitsAndBytesConfig's flags, and no field that the scheme has no use for."""
        if not isinstance(values, Mapping):
            return values
        fields = dict(values)
        scheme = _scheme(fields)
        if scheme is None:
            return fields
        fields["scheme"] = scheme
        odd = FOUR_BIT_FIELDS if scheme == "int8" else EIGHT_BIT_FIELDS
        given = [name for name in odd if name in fields]
        if given:
            raise ValueError(f"{', '.join(given)} has no meaning for scheme {scheme}; remove it")
        fields.pop("bnb_4bit_quant_type", None)
        if "llm_int8_skip_modules" in fields:
            if "skip_modules" in fields:
                raise ValueError("llm_int8_skip_modules and skip_modules are the same; write one of them")
            fields["skip_modules"] = fields.pop("llm_int8_skip_modules")
        return fields

    @property
    def four_bit(self) -> bool:
        return self.scheme != "int8"


def _scheme(fields: dict[str, Any]) -> Any:
    """Takes the flags out of `fields`. None where nothing says what is wanted."""
    eight, four = fields.pop("load_in_8bit", False), fields.pop("load_in_4bit", False)
    if not isinstance(eight, bool) or not isinstance(four, bool):
        raise ValueError("load_in_8bit and load_in_4bit are true or false")
    if eight and four:
        raise ValueError("load_in_8bit and load_in_4bit exclude each other; write one of them")
    kind, scheme = fields.get("bnb_4bit_quant_type"), fields.get("scheme")
    if scheme is None:
        return "int8" if eight else (kind or "fp4") if four else None
    if (eight and scheme != "int8") or (four and scheme == "int8"):
        raise ValueError(f"scheme {scheme} contradicts load_in_{8 if eight else 4}bit; write one of them")
    if scheme != "int8" and kind not in (None, scheme):
        raise ValueError(f"scheme {scheme} contradicts bnb_4bit_quant_type {kind}; write one of them")
    return scheme


class QuantizeMetrics(Metrics):
    bytes: int
    """Of all tensors, without file headers, as `estimate` counts weights."""
    ratio: float
    """Bytes before by bytes after."""
    quantized: int
    """Modules converted."""
    skipped: int
    """Linear modules left as they are."""


def facts(params: QuantizeParams, machine: Machine) -> Mapping[str, Any]:
    """Double quantization takes a mean as torch does, whose last bit depends on the number of threads."""
    return {"cpus": machine.cpus} if params.four_bit and params.bnb_4bit_use_double_quant else {}


STAGE = Stage(
    kind="quantize",
    version=2,
    params=QuantizeParams,
    metrics=QuantizeMetrics,
    inputs={"model": Port("checkpoint")},
    output="checkpoint",
    run=late("bigpipe.plugins.quantizing:run"),
    forecast=late("bigpipe.plugins.quantizing:forecast"),
    planning=Planning(check=late("bigpipe.plugins.quantizing:check"), facts=facts),
    passing=Passing(follows="model"),
    packages=("transformers",),
    title="Quantize a checkpoint to bitsandbytes' int8, nf4 or fp4, streaming and without torch",
)
