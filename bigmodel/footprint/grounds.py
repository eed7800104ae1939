"""What each term of an estimate stands on: the numbers that went in, and where the formula comes from.

Also the same model in the three figures that `accelerate estimate-memory` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.formats import has_double_quant, width

from .budgets import OPTIMIZERS, Budget, Workload, adapters, kv_bytes
from .kvcache import text_config
from .weights import compute_bytes

Inputs = Mapping[str, int | str]

SOURCES: Mapping[str, str] = {
    "kv_cache": "the caches that transformers 5.23 fills (cache_utils), checked against real models",
    "activations": "tensors alive in transformers 5.23's own forwards, counted allocation by allocation",
    "cpu": "forwards and generations measured on a CPU, the calibration set of benchmarks/peaks.py",
    "runtime": "CUDA's lazy loading guide; cuBLAS documentation, CUBLAS_WORKSPACE_CONFIG; PyTorch's caching allocator",
    "quantizing": "bitsandbytes' Int8Params and Params4bit as transformers 5.23 loads them, measured on a CPU",
    "training.adamw": "weights, gradients and two states: Rajbhandari et al., arXiv 1910.02054; "
    "activations: Korthikanti et al., arXiv 2205.05198",
    "training.adamw_8bit": "Dettmers et al., arXiv 2110.02861; activations: arXiv 2205.05198",
    "training.sgd": "no states; activations: arXiv 2205.05198",
    "training.lora": "Hu et al., arXiv 2106.09685: Σ r·(in + out); activations: arXiv 2205.05198",
}


@dataclass(frozen=True, slots=True)
class Ground:
    inputs: Inputs
    source: str

    def as_json(self) -> dict[str, Any]:
        return {"inputs": dict(self.inputs), "source": self.source}


def grounds(architecture: Architecture, found: Budget, workload: Workload) -> dict[str, Ground]:
    """By the names of a budget's terms."""
    tokens = {"batch size": workload.batch_size, "sequence length": workload.sequence_length}
    cached = compute_bytes(found.dtype) if workload.kv_dtype is None else kv_bytes(workload.kv_dtype)
    inputs: dict[str, Inputs] = {
        "weights": _weights(architecture, found, workload),
        "buffers": {"buffers": sum(tensor.buffer for tensor in architecture.tensors())},
        "stored": _weights(architecture, found, workload),
        "kv_cache": tokens | _attention(architecture) | {"bytes per element": cached},
        "activations": tokens | _widths(architecture) | {"bytes per element": compute_bytes(found.dtype)},
        "cpu": tokens | _widths(architecture) | {"bytes per element": compute_bytes(found.dtype)},
        "runtime": {"tensors": sum(len(module.tensors) for module in architecture.modules)},
    }
    sources = {
        **SOURCES,
        "weights": _source(architecture),
        "buffers": _source(architecture),
        "stored": _source(architecture),
    }
    trained = tokens | _widths(architecture) | {"parameters": found.parameters}
    trained["gradient checkpointing"] = "yes" if workload.gradient_checkpointing else "no"
    if found.quantizing:
        inputs["quantizing"] = {"largest matrix": found.largest_matrix}
    inputs |= {f"training.{name}": trained for name in OPTIMIZERS if found.training.get(name)}
    if found.training.get("lora"):
        inputs["training.lora"] = trained | _lora(architecture, workload)
    return {name: Ground(values, sources[name]) for name, values in inputs.items()}


def _source(architecture: Architecture) -> str:
    if architecture.outlined:
        return "names and shapes in the checkpoint's headers; the class itself is not known"
    return f"{architecture.class_name} of {architecture.library}, module by module; checked against the headers"


def _weights(architecture: Architecture, found: Budget, workload: Workload) -> Inputs:
    inputs: dict[str, int | str] = {"parameters": found.parameters, "bits": width(found.dtype)}
    inputs["tied tensors"] = len(architecture.aliases)
    if has_double_quant(found.dtype):
        inputs["double quantization"] = "yes" if workload.double_quant else "no"
    return inputs


def _attention(architecture: Architecture) -> dict[str, int | str]:
    return _numbers(
        architecture,
        {
            "layers": ("num_hidden_layers", "n_layer", "num_layers"),
            "heads": ("num_attention_heads", "n_head", "num_heads"),
            "key-value heads": ("num_key_value_heads",),
            "head dimension": ("head_dim",),
            "latent rank": ("kv_lora_rank",),
            "window": ("sliding_window",),
            "state size": ("state_size", "mamba_d_state", "ssm_state_size"),
        },
    )


def _widths(architecture: Architecture) -> dict[str, int | str]:
    return _numbers(
        architecture,
        {
            "hidden": ("hidden_size", "d_model", "n_embd"),
            "feed-forward": ("intermediate_size", "ffn_dim", "n_inner", "d_ff"),
            "heads": ("num_attention_heads", "n_head", "num_heads"),
            "layers": ("num_hidden_layers", "n_layer", "num_layers"),
            "vocabulary": ("vocab_size",),
        },
    )


def _numbers(architecture: Architecture, names: Mapping[str, tuple[str, ...]]) -> dict[str, int | str]:
    config = text_config(architecture.config)
    found = {label: next((config[name] for name in keys if config.get(name)), None) for label, keys in names.items()}
    return {label: value for label, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}


def _lora(architecture: Architecture, workload: Workload) -> dict[str, int | str]:
    return {
        "rank": workload.lora_rank,
        "targets": ", ".join(workload.lora_targets) or "every linear module but the head",
        "adapter parameters": adapters(architecture, workload.lora_rank, workload.lora_targets),
    }


def as_accelerate(found: Budget) -> dict[str, int | None]:
    """Its columns in bytes: Largest Layer, Total Size, Training using Adam (float32 and 16 bits only).

    Adam is the larger of its stages: four times the float32 model, or twice that model under mixed precision.
    """
    single = found.total * 32 // width(found.dtype)
    factor = {"float32": 4, "float16": 2, "bfloat16": 2}.get(found.dtype)
    return {
        "largest_layer": found.largest_layer,
        "total_size": found.total,
        "training_using_adam": factor * single if factor else None,
    }
