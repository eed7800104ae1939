"""The models of `peaks.py`, as configs. Calibration and evaluation share none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
SHORT = ((1, 256), (1, 1024), (1, 2048))
"""(sequences, tokens of each)."""


@dataclass(frozen=True, slots=True)
class Case:
    config: Config
    shapes: tuple[tuple[int, int], ...] = SHORT
    pixels: int = 0
    """Per side; 0: the model reads tokens."""


def _decoder(
    model_type: str, prefix: str, hidden: int, inner: int, layers: int, heads: int, groups: int, **more: Any
) -> Config:
    return {
        "model_type": model_type, "architectures": [f"{prefix}ForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "max_position_embeddings": 8192, **more,
    }  # fmt: skip


SMALL: Config = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 160, "head_dim": 16,
    "word_embed_proj_dim": 64, "moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "d_kv": 16,
}  # fmt: skip


def smaller(config: Mapping[str, Any]) -> Config:
    """The same class at a size that takes no memory to speak of, to import and initialise what it needs."""
    small = {**config, **{name: value for name, value in SMALL.items() if config.get(name)}}
    if small.get("num_key_value_heads"):
        small["num_key_value_heads"] = 4 if config["num_key_value_heads"] == config["num_attention_heads"] else 2
    if config.get("model_type") == "deepseek_v3":
        small["head_dim"] = 8
    small.pop("layer_types", None)
    return small


LONG = ((1, 256), (1, 512), (1, 1024))
CALIBRATION: dict[str, Case] = {
    "llama-gqa": Case(_decoder("llama", "Llama", 768, 2048, 10, 12, 4, vocab_size=32000)),
    "gpt2-wide": Case({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 10, "n_head": 12,
        "n_positions": 2048, "vocab_size": 50257,
    }),
    "bert-like": Case(
        {
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 8, "num_attention_heads": 12, "max_position_embeddings": 1024, "vocab_size": 30522,
        },
        ((4, 128), (4, 512), (4, 1024)),
    ),
    "bloom-like": Case({
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 768, "n_layer": 8, "n_head": 12,
        "vocab_size": 64000,
    }),
    "mixtral-like": Case(_decoder(
        "mixtral", "Mixtral", 512, 1024, 8, 8, 4, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2,
    )),
    "qwen3-moe-like": Case(_decoder(
        "qwen3_moe", "Qwen3Moe", 768, 2048, 6, 12, 4, vocab_size=32000, head_dim=64, num_experts=24,
        num_experts_per_tok=4, moe_intermediate_size=384, decoder_sparse_step=1, mlp_only_layers=[],
        norm_topk_prob=True,
    )),
    "gemma2-like": Case(_decoder(
        "gemma2", "Gemma2", 640, 2560, 8, 8, 4, vocab_size=64000, head_dim=128, sliding_window=512,
    )),
    "deepseek-like": Case(_decoder(
        "deepseek_v3", "DeepseekV3", 640, 1920, 8, 8, 8, vocab_size=32000, n_routed_experts=16, num_experts_per_tok=4,
        n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=128, q_lora_rank=256, qk_rope_head_dim=32,
        qk_nope_head_dim=64, v_head_dim=64, head_dim=32, moe_intermediate_size=320, n_shared_experts=1,
    )),
    "t5-like": Case({
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 512, "d_kv": 64, "d_ff": 2048,
        "num_layers": 6, "num_heads": 8, "vocab_size": 32128, "decoder_start_token_id": 0, "pad_token_id": 0,
    }, ((1, 256), (1, 512), (1, 1024))),
    "vit-like": Case({
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12, "image_size": 224,
        "patch_size": 16,
    }, ((1, 1), (8, 1), (32, 1)), pixels=224),
    "opt-125m": Case(
        {
            "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 768, "ffn_dim": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768, "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
        LONG,
    ),
    "pythia-160m": Case(
        _decoder("gpt_neox", "GPTNeoX", 768, 3072, 12, 12, 12, vocab_size=50304), LONG,
    ),
    "mixtral-small": Case(
        _decoder(
            "mixtral", "Mixtral", 640, 1792, 8, 10, 5, vocab_size=32000, num_local_experts=4, num_experts_per_tok=2,
        ),
        LONG,
    ),
    "deepseek-v2-small": Case(
        _decoder(
            "deepseek_v2", "DeepseekV2", 1024, 2816, 6, 8, 8, vocab_size=32000, n_routed_experts=16,
            num_experts_per_tok=6, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=256,
            q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, head_dim=64,
            moe_intermediate_size=352, n_shared_experts=2,
        ),
        LONG,
    ),
    "t5-base": Case(
        {
            "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 768, "d_kv": 64,
            "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128, "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        ((1, 256), (1, 512), (2, 512)),
    ),
    "bart-base": Case(
        {
            "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "d_model": 768,
            "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "vocab_size": 50265, "max_position_embeddings": 1024,
        },
        ((1, 256), (1, 512), (1, 1024)),
    ),
}  # fmt: skip

EVALUATION: dict[str, Case] = {
    "gpt2-medium": Case(
        {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1024, "n_layer": 24, "n_head": 16,
            "n_positions": 1024, "vocab_size": 50257,
        },
        ((1, 256), (1, 512), (1, 1024)),
    ),
    "bloom-560m": Case(
        {
            "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 1024, "n_layer": 24,
            "n_head": 16, "vocab_size": 250880,
        },
        ((1, 128), (1, 512), (1, 1024)),
    ),
    "smollm2-360m": Case(
        _decoder("llama", "Llama", 960, 2560, 32, 15, 5, vocab_size=49152, tie_word_embeddings=True),
        ((1, 256), (1, 512), (1, 1024)),
    ),
    "qwen2.5-0.5b": Case(
        _decoder("qwen2", "Qwen2", 896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
        ((1, 128), (1, 512), (1, 1024)),
    ),
    "qwen3-0.6b": Case(
        _decoder(
            "qwen3", "Qwen3", 1024, 3072, 28, 16, 8, vocab_size=151936, head_dim=128, tie_word_embeddings=True,
        ),
        ((1, 128), (1, 512), (1, 1024)),
    ),
    "gemma-3-270m": Case(
        _decoder(
            "gemma3_text", "Gemma3", 640, 2048, 18, 4, 1, vocab_size=262144, head_dim=256, sliding_window=512,
        ),
        ((1, 256), (1, 512), (1, 1024)),
    ),
    "mistral-window": Case(
        _decoder("mistral", "Mistral", 1024, 3584, 12, 16, 4, vocab_size=32000, sliding_window=1024), LONG,
    ),
    "olmoe-6-layers": Case(
        _decoder(
            "olmoe", "Olmoe", 1024, 512, 6, 16, 16, vocab_size=50304, num_experts=32, num_experts_per_tok=8,
        ),
        LONG,
    ),
    "deepseek-v3-small": Case(
        _decoder(
            "deepseek_v3", "DeepseekV3", 768, 2304, 4, 12, 12, vocab_size=64000, n_routed_experts=8,
            num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=192,
            q_lora_rank=384, qk_rope_head_dim=32, qk_nope_head_dim=96, v_head_dim=96, head_dim=32,
            moe_intermediate_size=768, n_shared_experts=1,
        ),
        LONG,
    ),
    "marian-base": Case(
        {
            "model_type": "marian", "architectures": ["MarianMTModel"], "d_model": 512, "encoder_layers": 6,
            "decoder_layers": 6, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048, "vocab_size": 58101, "max_position_embeddings": 512, "pad_token_id": 1,
            "decoder_start_token_id": 1, "eos_token_id": 0, "bos_token_id": 0, "forced_eos_token_id": 0,
        },
        ((1, 128), (1, 256), (1, 508)),
    ),
    "bert-large": Case(
        {
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 30522,
        },
        ((1, 512), (4, 128), (4, 512)),
    ),
    "roberta-base": Case(
        {
            "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 50265,
            "max_position_embeddings": 514, "type_vocab_size": 1,
        },
        ((1, 512), (4, 128), (4, 512)),
    ),
    "vit-large": Case(
        {
            "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 1024,
            "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224,
            "patch_size": 16,
        },
        ((1, 1), (4, 1), (16, 1)),
        pixels=224,
    ),
}  # fmt: skip
