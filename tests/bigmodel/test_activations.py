"""Predicted activations, against what real forwards keep alive. The shapes are published models', two layers deep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.allocations import peak_of_prefill
from support.real import describe_here

from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.formats import PLAIN_DTYPES

DEEP = {"num_hidden_layers": 2}


def llama_like(
    model_type: str, prefix: str, hidden: int, inner: int, heads: int, groups: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "architectures": [f"{prefix}ForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": groups,
        "max_position_embeddings": 8192, **DEEP, **more,
    }  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": llama_like("llama", "Llama", 4096, 14336, 32, 8, vocab_size=128256),
    "llama-2-7b": llama_like("llama", "Llama", 4096, 11008, 32, 32, vocab_size=32000),
    "mistral-7b-window": llama_like("mistral", "Mistral", 4096, 14336, 32, 8, sliding_window=1024),
    "qwen2-7b": llama_like("qwen2", "Qwen2", 3584, 18944, 28, 4, vocab_size=152064),
    "qwen3-0.6b": llama_like("qwen3", "Qwen3", 1024, 3072, 16, 8, head_dim=128, vocab_size=151936),
    "phi-3-mini": llama_like("phi3", "Phi3", 3072, 8192, 32, 32, pad_token_id=0),
    "olmo-2-7b": llama_like("olmo2", "Olmo2", 4096, 11008, 32, 32),
    "gemma-2-9b": llama_like("gemma2", "Gemma2", 3584, 14336, 16, 8, head_dim=256, vocab_size=256000),
    "mixtral": llama_like("mixtral", "Mixtral", 4096, 14336, 32, 8, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-30b-a3b": llama_like(
        "qwen3_moe", "Qwen3Moe", 2048, 6144, 32, 4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, vocab_size=151936,
    ),
    "opt-6.7b": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 4096, "ffn_dim": 16384,
        "num_attention_heads": 32, "word_embed_proj_dim": 4096, "vocab_size": 50272, **DEEP,
    },
    "gpt2-xl": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_layer": 2, "n_head": 25,
        "n_positions": 2048,
    },
    "bloom-7b1": {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 4096, "n_layer": 2, "n_head": 32,
        "vocab_size": 250880,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 6144,
        "intermediate_size": 24576, "num_attention_heads": 64, "vocab_size": 50432, **DEEP,
    },
    "bert-large": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "max_position_embeddings": 2048, **DEEP,
    },
}  # fmt: skip
WORKLOADS = ((1, 512), (1, 2048), (4, 1024))
FAST = ("llama-3-8b", "mistral-7b-window", "gemma-2-9b", "mixtral", "opt-6.7b", "gpt2-xl", "bloom-7b1", "bert-large")
SLOW = tuple(name for name in MODELS if name not in FAST)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("name", ["bloom-7b1", "gemma-2-9b"])
def test_scores_that_are_written_out_are_counted_in_every_dtype(name: str, dtype: str) -> None:
    architecture = describe_here(MODELS[name])
    found = Budget(architecture, dtype, Workload()).activations
    assert found.bytes > 8 * 16 * 2048**2
    if dtype == "float64":
        measured, _ = peak_of_prefill(MODELS[name], 1, 2048, torch.float64)
        assert found.low <= measured - Budget(architecture, dtype, Workload()).kv_cache.bytes <= found.high


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_activations_of_a_prefill(name: str) -> None:
    architecture = describe_here(MODELS[name])
    for dtype in ("bfloat16", "float32"):
        if dtype == "float32" and "experts" in str(MODELS[name]):
            continue  # their grouped products exist in 16 bits only on shape-only tensors
        for batch_size, length in WORKLOADS:
            predicted = Budget(architecture, dtype, Workload(batch_size=batch_size, sequence_length=length))
            measured, _ = peak_of_prefill(MODELS[name], batch_size, length, getattr(torch, dtype))
            counted = measured - predicted.kv_cache.bytes
            assert predicted.activations.basis == "calibrated"
            assert predicted.activations.low <= counted <= predicted.activations.high, (
                dtype, batch_size, length, predicted.activations.bytes / counted,
            )  # fmt: skip
