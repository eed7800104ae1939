"""`quantize`: weights in a narrower format on disk, streamed in constant memory and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, model_validator

from bigpipe.bigmodel.formats import BUILT_IN, PASTED, names, packing_of, read_options, require_known, version_of
from bigpipe.orchestrator.stage import Bytes, Machine, Metrics, OneOf, Params, Passing, Planning, Port, Stage, late


def _without_torch(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


Dtype = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(_without_torch)]


def _accept_pasted(schema: dict[str, Any]) -> None:
    schema["properties"].update(PASTED)
    schema["required"] = [name for name in schema.get("required", ()) if name != "scheme"]


class QuantizeParams(Params):
    model_config = ConfigDict(json_schema_extra=_accept_pasted)

    scheme: Annotated[str, OneOf(names, require_known)]
    """A format: those of bitsandbytes, or one that another distribution offers. `load_in_8bit: true`, or
    `load_in_4bit: true` with `bnb_4bit_quant_type`, mean the same."""
    llm_int8_threshold: float = 6.0
    """Activations beyond it are computed in 16 bits (int8 only); stored in the config, no weight depends on it."""
    bnb_4bit_use_double_quant: bool = False
    """Quantizes the scales too (nf4 and fp4 only)."""
    bnb_4bit_compute_dtype: Dtype = "float16"
    """What 4-bit layers compute in; stored in the config, no weight depends on it."""
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
        return read_options(values) if isinstance(values, Mapping) else values


class QuantizeMetrics(Metrics):
    bytes: Bytes
    """Of all tensors, without file headers, as `estimate` counts weights."""
    ratio: float
    """Bytes before by bytes after."""
    quantized: int
    """Modules converted."""
    skipped: int
    """Linear modules left as they are."""


def facts(params: QuantizeParams, machine: Machine) -> Mapping[str, Any]:
    """Double quantization takes a mean as torch does, whose last bit depends on the number of threads."""
    if params.scheme in BUILT_IN and not params.bnb_4bit_use_double_quant:
        return {}  # known without the format
    packing = packing_of(params.scheme, bnb_4bit_use_double_quant=params.bnb_4bit_use_double_quant)
    version = version_of(params.scheme)
    return ({"cpus": machine.cpus} if packing.measures else {}) | ({"format": version} if version else {})


STAGE = Stage(
    kind="quantize",
    version=6,
    params=QuantizeParams,
    metrics=QuantizeMetrics,
    inputs={"model": Port("checkpoint")},
    output="checkpoint",
    run=late("bigpipe.plugins.quantizing:run"),
    forecast=late("bigpipe.plugins.quantizing:forecast"),
    planning=Planning(
        check=late("bigpipe.plugins.quantizing:check"),
        facts=facts,
        heeds_code=True,
        extras=late("bigpipe.plugins.extras:of_quantization"),
    ),
    passing=Passing(follows="model"),
    packages=("transformers",),
    smoke=late("bigpipe.plugins.smoking:quantize"),
    title="Quantize a checkpoint to int8, nf4, fp4 or another format, streaming and without torch",
)
