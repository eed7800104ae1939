"""Small configs of many architectures: real classes of transformers at sizes that build in milliseconds."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 128,
}  # fmt: skip
_BERT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160,
    "max_position_embeddings": 128,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_MOE = {**_LLAMA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    **_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
    "head_dim": 8,
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 160,
    "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip


def _config(model_type: str, class_name: str, *parts: Config, **more: Any) -> Config:
    merged: Config = {"model_type": model_type, "architectures": [class_name]}
    for part in parts:
        merged.update(part)
    return {**merged, **more}


DECODERS: dict[str, Config] = {
    "llama": _config("llama", "LlamaForCausalLM", _LLAMA),
    "llama-tied": _config("llama", "LlamaForCausalLM", _LLAMA, tie_word_embeddings=True, head_dim=24),
    "mistral": _config("mistral", "MistralForCausalLM", _LLAMA, sliding_window=16),
    "qwen2": _config("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": _config("qwen3", "Qwen3ForCausalLM", _LLAMA, head_dim=16),
    "gemma2": _config("gemma2", "Gemma2ForCausalLM", _LLAMA, head_dim=16, sliding_window=16),
    "gemma3": _config("gemma3_text", "Gemma3ForCausalLM", _LLAMA, head_dim=16, sliding_window=16),
    "phi3": _config("phi3", "Phi3ForCausalLM", _LLAMA, pad_token_id=0),
    "opt": _config(
        "opt", "OPTForCausalLM", hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=160, max_position_embeddings=128, word_embed_proj_dim=64,
    ),
    "gpt2": _config("gpt2", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=128),
    "bloom": _config("bloom", "BloomForCausalLM", hidden_size=64, n_layer=2, n_head=4, vocab_size=160),
    "gpt_neox": _config("gpt_neox", "GPTNeoXForCausalLM", _LLAMA),
    "falcon": _config("falcon", "FalconForCausalLM", _LLAMA, multi_query=True),
    "falcon-40b": _config(
        "falcon", "FalconForCausalLM", _LLAMA, new_decoder_architecture=True, num_kv_heads=2,
    ),
    "gpt_bigcode": _config(
        "gpt_bigcode", "GPTBigCodeForCausalLM", n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=128,
    ),
    "olmo2": _config("olmo2", "Olmo2ForCausalLM", _LLAMA),
    "cohere": _config("cohere", "CohereForCausalLM", _LLAMA),
    "mixtral": _config("mixtral", "MixtralForCausalLM", _MOE),
    "qwen3_moe": _config("qwen3_moe", "Qwen3MoeForCausalLM", _MOE, head_dim=16),
    "deepseek_v2": _config("deepseek_v2", "DeepseekV2ForCausalLM", _MLA),
    "deepseek_v3": _config("deepseek_v3", "DeepseekV3ForCausalLM", _MLA),
    "gpt_oss": _config("gpt_oss", "GptOssForCausalLM", _MOE, head_dim=16, sliding_window=16),
    "mamba": _config("mamba", "MambaForCausalLM", hidden_size=64, num_hidden_layers=2, vocab_size=160),
    "mamba2": _config(
        "mamba2", "Mamba2ForCausalLM", hidden_size=64, num_hidden_layers=2, vocab_size=160, num_heads=8, head_dim=16,
        n_groups=2, state_size=16,
    ),
    "qwen3_next": _config(
        "qwen3_next", "Qwen3NextForCausalLM", _MOE, head_dim=16, shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        num_hidden_layers=4,
    ),
    "jamba": _config(
        "jamba", "JambaForCausalLM", _MOE, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
    ),
}  # fmt: skip

ENCODERS: dict[str, Config] = {
    "bert": _config("bert", "BertForMaskedLM", _BERT),
    "roberta": _config("roberta", "RobertaForMaskedLM", _BERT, max_position_embeddings=130, type_vocab_size=1),
    "distilbert": _config(
        "distilbert", "DistilBertForMaskedLM", dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=160,
        max_position_embeddings=128,
    ),
    "electra": _config("electra", "ElectraForMaskedLM", _BERT, embedding_size=32),
    "deberta-v2": _config("deberta-v2", "DebertaV2ForMaskedLM", _BERT),
    "modernbert": _config("modernbert", "ModernBertForMaskedLM", _BERT, pad_token_id=0),
    "vit": _config("vit", "ViTForImageClassification", _VISION),
    "dinov2": _config("dinov2", "Dinov2Model", _VISION),
    "swin": _config(
        "swin", "SwinForImageClassification", embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=32,
        window_size=4, patch_size=4,
    ),
    "convnext": _config("convnext", "ConvNextForImageClassification", depths=[1] * 4, hidden_sizes=[16, 16, 32, 32]),
    "resnet": _config(
        "resnet", "ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
    ),
    "wav2vec2": _config(
        "wav2vec2", "Wav2Vec2ForCTC", _BERT, conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    ),
    "clip": _config(
        "clip", "CLIPModel", projection_dim=32, vision_config=_VISION,
        text_config={**_BERT, "projection_dim": 32, "eos_token_id": 2},
    ),
}  # fmt: skip

OTHERS: dict[str, Config] = {
    "t5": _config(
        "t5", "T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=160,
        decoder_start_token_id=0, pad_token_id=0,
    ),
    "bart": _config("bart", "BartForConditionalGeneration", _SEQ2SEQ),
    "marian": _config("marian", "MarianMTModel", _SEQ2SEQ),
    "whisper": _config(
        "whisper", "WhisperForConditionalGeneration", _SEQ2SEQ, max_source_positions=64, max_target_positions=64,
        num_mel_bins=8,
    ),
    "llava": _config(
        "llava", "LlavaForConditionalGeneration", vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config={**_LLAMA, "model_type": "llama"}, image_token_index=5,
    ),
    "qwen2_vl": _config(
        "qwen2_vl", "Qwen2VLForConditionalGeneration", text_config={**_LLAMA, "model_type": "qwen2_vl_text"},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 4},
    ),
}  # fmt: skip

_GEMMA = {**_LLAMA, "head_dim": 16, "sliding_window": 16, "model_type": "t5_gemma_module"}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
UNUSUAL: dict[str, Config] = {
    "minimax": _config("minimax", "MiniMaxForCausalLM", _MOE, num_hidden_layers=4),
    "deepseek_v32": _config("deepseek_v32", "DeepseekV32ForCausalLM", _MLA, _INDEXED),
    "glm_moe_dsa": _config("glm_moe_dsa", "GlmMoeDsaForCausalLM", _MLA, _INDEXED),
    "gemma4": _config(
        "gemma4_text", "Gemma4ForCausalLM", _LLAMA, num_hidden_layers=6, sliding_window=16, head_dim=16,
        global_head_dim=32,
    ),
    "falcon_h1": _config(
        "falcon_h1", "FalconH1ForCausalLM", _LLAMA, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
        head_dim=16,
    ),
    "bailing_hybrid": _config(
        "bailing_hybrid", "BailingHybridForCausalLM", _MLA, num_hidden_layers=6, layer_group_size=3, linear_head_dim=16,
        linear_num_heads=4, num_experts_per_token=2, num_shared_experts=1, num_expert_group=1, qk_head_dim=24,
        pad_token_id=0, eos_token_id=1,
    ),
    "kimi_linear": _config(
        "kimi_linear", "KimiLinearForCausalLM", _MLA, num_hidden_layers=4, pad_token_id=0,
        linear_attn_config={
            "kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    ),
    "mimo": _config(
        "mimo_v2_flash", "MiMoV2FlashForCausalLM", _MOE, num_hidden_layers=4, sliding_window=16, head_dim=16,
        v_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, swa_v_head_dim=8,
        n_routed_experts=4,
    ),
    "longcat_flash": _config(
        "longcat_flash", "LongcatFlashForCausalLM", {**_MLA, "num_hidden_layers": 4}, num_layers=2,
        ffn_hidden_size=96, expert_ffn_hidden_size=32, zero_expert_num=2, moe_topk=2, qk_head_dim=24,
    ),
    "gemma3n": _config(
        "gemma3n_text", "Gemma3nForCausalLM", _LLAMA, num_hidden_layers=6, head_dim=16, sliding_window=16,
        num_kv_shared_layers=2, vocab_size_per_layer_input=160, hidden_size_per_layer_input=8, laurel_rank=4,
        intermediate_size=[96] * 6, activation_sparsity_pattern=[0.9] * 6,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "jetmoe": _config("jetmoe", "JetMoeForCausalLM", _MOE, kv_channels=16),
    "t5gemma": _config("t5gemma", "T5GemmaForConditionalGeneration", encoder=_GEMMA, decoder=_GEMMA, vocab_size=160),
    "dia": _config(
        "dia", "DiaForConditionalGeneration", encoder_config={**_LLAMA, "head_dim": 16}, delay_pattern=[0, 1],
        decoder_config={
            **_LLAMA, "head_dim": 16, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4,
            "cross_head_dim": 16, "cross_hidden_size": 64, "num_channels": 2, "pad_token_id": 1, "eos_token_id": 2,
            "bos_token_id": 3,
        },
    ),
}  # fmt: skip
"""Kinds of attention of which no formula knows; classes whose forward needs values, so that only formulas answer; and
two whose decoder has a config of its own."""

DEEPSEEK_V4 = _config("deepseek_v4", "DeepseekV4ForCausalLM", _MLA, num_hidden_layers=5, max_position_embeddings=4096)
RECURRENT_GEMMA = _config(
    "recurrent_gemma", "RecurrentGemmaForCausalLM", _LLAMA, num_hidden_layers=3, lru_width=64, head_dim=16,
)  # fmt: skip
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BLIP_2 = _config(
    "blip-2", "Blip2ForConditionalGeneration", vision_config={**_SMALL, "image_size": 32, "patch_size": 8},
    qformer_config={**_SMALL, "encoder_hidden_size": 32}, text_config={**_LLAMA, "model_type": "llama"},
)  # fmt: skip

ALL: dict[str, Config] = {
    **DECODERS, **ENCODERS, **OTHERS, **UNUSUAL, "deepseek_v4": DEEPSEEK_V4, "blip-2": BLIP_2,
}  # fmt: skip
