"""Weights that are packed, or have scales beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .families import family
from .layout import LAYOUTS, Layout, Tensors, Verdict, change_config, layout, llama, take, write


def _bitsandbytes(**options: Any) -> Callable[[Path], None]:
    """As transformers quantizes and saves."""

    def make(folder: Path) -> None:
        import transformers

        llama(folder, dtype="float16", hidden_size=64, intermediate_size=128)
        asked = transformers.BitsAndBytesConfig(**options)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.float16)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)

    return make


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "int8 but for two modules": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
LAYOUTS |= {
    f"bitsandbytes {name}": Layout(make=_bitsandbytes(**options), verdict="equal", dtype=None)
    for name, options in BITSANDBYTES.items()
}


def _with_scales(method: Mapping[str, Any], change: Callable[[str, torch.Tensor], Tensors]) -> Callable[[Path], None]:
    """Every linear weight of the layers as `change(module, weight)` stores it."""

    def make(folder: Path) -> None:
        stored: Tensors = {}
        for name, tensor in llama(folder, hidden_size=128, intermediate_size=256, dtype="bfloat16").items():
            module = name.removesuffix(".weight")
            stored |= change(module, tensor) if module.endswith("_proj") else {name: tensor}
        write(folder, stored)
        change_config(folder, quantization_config=method)

    return make


def _fp8_blocks(module: str, weight: torch.Tensor) -> Tensors:
    """A float32 scale per block of 128 × 128, as DeepSeek stores them."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.linspace(0.01, 0.02, rows * columns).view(rows, columns)
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    packed = (weight.float() / wide).to(torch.float8_e4m3fn)
    return {f"{module}.weight": packed, f"{module}.weight_scale_inv": scales}


def _fp8_tensor(module: str, weight: torch.Tensor) -> Tensors:
    """One scale per tensor, as compressed-tensors and ModelOpt store them."""
    scale = weight.float().abs().max() / 448
    return {
        f"{module}.weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        f"{module}.weight_scale": scale.to(torch.bfloat16).reshape(1),
    }


def _fp8_inverse(module: str, weight: torch.Tensor) -> Tensors:
    """One scale per tensor, as Mistral stores it."""
    stored = _fp8_tensor(module, weight)
    return {
        f"{module}.weight": stored[f"{module}.weight"],
        f"{module}.weight_scale_inv": stored[f"{module}.weight_scale"][0],
    }


def _gptq(module: str, weight: torch.Tensor) -> Tensors:
    """Of 4 bits: eight to an int32, down the inputs."""
    rows, columns = weight.shape
    return {
        f"{module}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(columns // 64, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(columns // 64, rows, dtype=torch.float16),
        f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // 64,
    }


def _awq(module: str, weight: torch.Tensor) -> Tensors:
    """Of 4 bits: eight to an int32, along the outputs."""
    rows, columns = weight.shape
    return {
        f"{module}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(columns // 64, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(columns // 64, rows, dtype=torch.float16),
    }


_FLOAT8 = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}}},
}  # fmt: skip
WITH_SCALES: dict[str, tuple[Verdict, Mapping[str, Any], Callable[[str, torch.Tensor], Tensors]]] = {
    "fp8 with a scale per block": ("equal", {"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8_blocks),
    "fp8 with a scale per tensor": ("equal", {"quant_method": "fp8", "weight_block_size": None}, _fp8_inverse),
    "gptq": ("both refuse", {"quant_method": "gptq", "bits": 4, "group_size": 64}, _gptq),
    "awq": ("both refuse", {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, _awq),
}


@layout("bigpipe reads", because="transformers asks for compressed-tensors to be installed")
def compressed_tensors_float8(folder: Path) -> Any:
    """The model that is returned holds what the formula gives."""
    import transformers

    _with_scales(_FLOAT8, _fp8_tensor)(folder)
    saved = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder, quantization_config=None))
    stored = load_file(folder / "model.safetensors")
    scales = {name.removesuffix("_scale"): stored.pop(name) for name in list(stored) if name.endswith("_scale")}
    saved.load_state_dict({n: t.to(torch.bfloat16) * scales[n] if n in scales else t for n, t in stored.items()})
    return saved


LAYOUTS |= {
    name: Layout(make=_with_scales(method, change), verdict=verdict, dtype="bfloat16")
    for name, (verdict, method, change) in WITH_SCALES.items()
}


@layout("equal", dtype="bfloat16")
def mxfp4(folder: Path) -> None:
    """Experts in blocks of 32 values of 4 bits with one exponent, as gpt-oss was published."""
    family("gpt_oss", dtype=torch.bfloat16)(folder)
    stored: Tensors = {}
    for name, tensor in take(folder).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, rows, columns = tensor.shape
            blocks = torch.arange(experts * columns * rows // 2, dtype=torch.uint8)
            stored[f"{name}_blocks"] = blocks.view(experts, columns, rows // 32, 16)
            stored[f"{name}_scales"] = torch.arange(118, 126, dtype=torch.uint8).repeat(experts * columns * rows // 256)
            stored[f"{name}_scales"] = stored[f"{name}_scales"].view(experts, columns, rows // 32)
        else:
            stored[name] = tensor
    write(folder, stored)
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


@layout("bigpipe refuses", because="transformers reads the codes as if they were the weights", dtype=None)
def scales_that_the_config_does_not_speak_of(folder: Path) -> None:
    _with_scales({}, _fp8_blocks)(folder)
    change_config(folder, quantization_config=None)
