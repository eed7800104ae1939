"""What each term of an estimate stands on: the numbers that went in, and where the formula comes from.

Also the same model in the three figures that `accelerate estimate-memory` shows.
"""

from __future__ import annotations

from collections.abc import Mapping

from bigpipe.bigmodel.architecture import Architecture, text_config
from bigpipe.bigmodel.formats import has_double_quant, width

from .budgets import OPTIMIZERS, Budget

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


ATTENTION: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "key-value heads": ("num_key_value_heads",),
    "head dimension": ("head_dim",),
    "latent rank": ("kv_lora_rank",),
    "window": ("sliding_window",),
    "state size": ("state_size", "mamba_d_state", "ssm_state_size"),
}
"""What an input is called → the fields of a config that have it."""
WIDTHS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "d_model", "n_embd"),
    "feed-forward": ("intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "vocabulary": ("vocab_size",),
}


def grounds(found: Budget) -> dict[str, tuple[Inputs, str]]:
    """(numbers that went in, source) by the names of a budget's terms."""
    architecture, workload = found.architecture, found.workload
    tokens: dict[str, int | str] = {"batch size": workload.batch_size, "sequence length": workload.sequence_length}
    computed = tokens | _numbers(architecture, WIDTHS) | {"bytes per element": found.itemsize}
    weights = _weights(found)
    trained: dict[str, int | str] = tokens | _numbers(architecture, WIDTHS) | {"parameters": found.counts.parameters}
    trained["gradient checkpointing"] = "yes" if workload.gradient_checkpointing else "no"
    adapters: dict[str, int | str] = {
        "rank": workload.lora_rank,
        "targets": ", ".join(workload.lora_targets) or "every linear module but the head",
        "adapter parameters": found.adapters,
    }
    inputs: dict[str, Inputs] = {
        "weights": weights,
        "buffers": {"buffers": sum(tensor.buffer for tensor in architecture.tensors())},
        "stored": weights,
        "kv_cache": tokens | _numbers(architecture, ATTENTION) | {"bytes per element": found.cached},
        "activations": computed,
        "cpu": computed,
        "runtime": {"tensors": sum(len(module.tensors) for module in architecture.modules)},
        "quantizing": {"largest matrix": found.counts.largest_matrix},
        **{f"training.{name}": trained for name in OPTIMIZERS},
        "training.lora": trained | adapters,
    }
    sources = {**SOURCES, **dict.fromkeys(("weights", "buffers", "stored"), _source(architecture))}
    return {name: (inputs[name], sources[name]) for name in found.terms()}


def _source(architecture: Architecture) -> str:
    if architecture.outlined:
        return "names and shapes in the checkpoint's headers; the class itself is not known"
    return f"{architecture.class_name} of {architecture.library}, module by module; checked against the headers"


def _weights(found: Budget) -> Inputs:
    inputs: dict[str, int | str] = {"parameters": found.counts.parameters, "bits": width(found.dtype)}
    inputs["tied tensors"] = len(found.architecture.aliases)
    if has_double_quant(found.dtype):
        inputs["double quantization"] = "yes" if found.workload.double_quant else "no"
    return inputs


def _numbers(architecture: Architecture, names: Mapping[str, tuple[str, ...]]) -> dict[str, int | str]:
    config = text_config(architecture.config)
    found = {label: next((config[name] for name in keys if config.get(name)), None) for label, keys in names.items()}
    return {label: value for label, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}


def as_accelerate(found: Budget) -> dict[str, int | None]:
    """Its columns in bytes: Largest Layer, Total Size, Training using Adam (float32 and 16 bits only).

    Adam is the larger of its stages: four times the float32 model, or twice that model under mixed precision.
    """
    single = found.counts.total * 32 // width(found.dtype)
    factor = {"float32": 4, "float16": 2, "bfloat16": 2}.get(found.dtype)
    return {
        "largest_layer": found.counts.largest_layer,
        "total_size": found.counts.total,
        "training_using_adam": factor * single if factor else None,
    }
