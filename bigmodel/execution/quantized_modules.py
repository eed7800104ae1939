"""bitsandbytes' modules around weights that are already quantized.

The checkpoint decides which modules these are: wherever it holds the parts of a quantized weight, the plain linear
layer (or transformers' Conv1D) makes room for bitsandbytes' own, which computes from the parts as they are stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint.naming import QuantizedWeight
from bigpipe.errors import InvalidCheckpoint

if TYPE_CHECKING:
    import torch


BLOCK = 64
"""Elements of a 4-bit weight that share a scale."""
PACKED_ROWS = 32


def replace_linears(
    model: torch.nn.Module, quantized: Mapping[str, QuantizedWeight], settings: Mapping[str, Any]
) -> None:
    """Puts an empty bitsandbytes module wherever `quantized` names one.

    settings: `quantization_config` of the checkpoint, BitsAndBytesConfig's fields as JSON.
    """
    # It says so at every call that activations are cast, which is what int8 means.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    names = dict(model.named_modules())
    for name, weight in quantized.items():
        if name not in names:
            raise InvalidCheckpoint(
                f"{weight.parts['weight'].file} holds a quantized weight for {name}, which the model does not have",
                "check that config.json is the one that was saved with these weights",
            )
        model.set_submodule(name, _empty_module(names[name], weight, settings))


def _empty_module(linear: torch.nn.Module, weight: QuantizedWeight, settings: Mapping[str, Any]) -> torch.nn.Module:
    import bitsandbytes
    import torch

    bias = getattr(linear, "bias", None)
    rows, columns = _shape(linear, weight)
    with torch.device("meta"):
        module = (
            bitsandbytes.nn.Linear4bit(columns, rows, bias is not None, **_four_bit_options(weight, settings))
            if weight.four_bit
            else bitsandbytes.nn.Linear8bitLt(
                columns, rows, bias is not None, has_fp16_weights=False,
                threshold=float(settings.get("llm_int8_threshold", 6.0)),
            )
        )  # fmt: skip
        if bias is not None:
            module.bias = torch.nn.Parameter(torch.empty(rows, dtype=bias.dtype))
    if weight.four_bit and (columns % BLOCK or rows % PACKED_ROWS):
        # bitsandbytes' packing for CPUs with AVX512-BF16 takes whole tiles only, and fails on others
        module.support_avx512bf16_for_cpu = False
    result: torch.nn.Module = module.requires_grad_(False)
    return result


def _shape(linear: Any, weight: QuantizedWeight) -> tuple[int, int]:
    """(out, in): as bitsandbytes stores it, whichever way round the replaced module kept it."""
    if not weight.four_bit:
        rows, columns = weight.parts["weight"].shape
        return rows, columns
    if hasattr(linear, "out_features"):
        return int(linear.out_features), int(linear.in_features)
    columns, rows = linear.weight.shape
    return int(rows), int(columns)


def _four_bit_options(weight: QuantizedWeight, settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return {
        "compute_dtype": getattr(torch, str(settings.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")),
        "compress_statistics": "nested_absmax" in weight.parts,
        "quant_type": next(name[-3:] for name in weight.parts if name.startswith("quant_state.")),
    }


def attach(module: Any, weight: QuantizedWeight, parts: Mapping[str, torch.Tensor]) -> None:
    """Gives the module its weight. `parts`, keyed as in `weight`, are used as they are, without a copy."""
    import bitsandbytes

    data = parts["weight"]
    if not weight.four_bit:
        module.weight = bitsandbytes.nn.Int8Params(
            data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=parts["SCB"]
        )
        return
    statistics = {name: tensor for name, tensor in parts.items() if name != "weight"}
    module.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        data, statistics, requires_grad=False, device=data.device, module=module
    )


def detach(module: Any, weight: QuantizedWeight, placeholder: Any) -> None:
    """Takes the weight out again, with what bitsandbytes derived from it."""
    module.weight = placeholder
    if weight.four_bit:
        module.quant_state = None
    else:
        module.state.CB = module.state.SCB = None
