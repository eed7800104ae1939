"""Configs made small: what makes a model the kind that it is stays."""

from __future__ import annotations

from typing import Any

import pytest

from bigpipe.bigmodel.architecture import shrunk

LARGE: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
            "num_attention_heads": 40, "vocab_size": 50272},
    "llama": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 131072},
    "bloom": {"n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 25088},
    "falcon": {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True,
               "vocab_size": 65024},
    "mixtral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    "deepseek_v3": {"vocab_size": 12928},
    "qwen3_next": {"vocab_size": 15193},
    "jamba": {"vocab_size": 6553, "use_mamba_kernels": False},
    "t5": {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_layers": 24, "num_heads": 32, "vocab_size": 32128},
    "whisper": {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
                "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 80},
    "llava": {},
    "qwen2_vl": {},
    "gemma3_text": {"vocab_size": 26214},
}  # fmt: skip
"""Model type → what its configs say at full size, where the class's own defaults are not that."""


def class_of(model_type: str) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return getattr(transformers, next(table[model_type] for table in tables if model_type in table))


def built(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig

    kind = class_of(config["model_type"])
    with torch.device("meta"):
        return kind(AutoConfig.for_model(**config))


@pytest.mark.parametrize("model_type", LARGE)
def test_the_class_builds_a_small_model_of_the_same_parts(model_type: str) -> None:
    from transformers import AutoConfig

    whole = AutoConfig.for_model(model_type, **LARGE[model_type]).to_dict()
    small = built(shrunk(whole))
    assert {type(part).__name__ for part in small.modules()} == {type(part).__name__ for part in built(whole).modules()}
    assert sum(tensor.numel() for tensor in small.parameters()) < 64_000_000
    words = {small.config.get_text_config().vocab_size}
    assert sum(tensor.numel() for tensor in small.parameters() if words.isdisjoint(tensor.shape)) < 2_000_000


def test_what_is_no_size_stays() -> None:
    config = {
        "model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "id2label": {0: "a", 1: "b"}, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 128000,
        "hidden_size": 4096, "num_hidden_layers": 32,
    }  # fmt: skip
    small = shrunk(config)
    changed = {name for name in config if small[name] != config[name]}
    assert changed == {"hidden_size", "num_hidden_layers"}
    assert list(small) == list(config)


def test_equal_widths_stay_equal_and_others_different() -> None:
    small = shrunk({
        "text_config": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        "vision_config": {"hidden_size": 1024, "out_hidden_size": 4096, "num_hidden_layers": 24},
    })  # fmt: skip
    text, vision = small["text_config"], small["vision_config"]
    assert vision["out_hidden_size"] == text["hidden_size"]
    assert len({vision["hidden_size"], text["hidden_size"], text["intermediate_size"]}) == 3
    assert vision["hidden_size"] < text["hidden_size"] < text["intermediate_size"]


@pytest.mark.parametrize(
    ("heads", "keys", "small"), [(32, 32, (4, 4)), (64, 8, (8, 2)), (24, 8, (6, 2)), (71, 1, (4, 1)), (4, 2, (4, 2))]
)
def test_heads_keep_their_ratio_as_far_as_few_can(heads: int, keys: int, small: tuple[int, int]) -> None:
    found = shrunk({"hidden_size": 4096, "num_attention_heads": heads, "num_key_value_heads": keys})
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == small


def test_every_kind_of_layer_stays() -> None:
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    found = shrunk({"num_hidden_layers": 30, "layer_types": layers * 5})
    assert found["num_hidden_layers"] == 6
    assert found["layer_types"] == layers
    mixed = shrunk({"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13]})
    assert (mixed["num_hidden_layers"], mixed["cross_attention_layers"]) == (4, [3])
    dense = shrunk({"num_hidden_layers": 61, "first_k_dense_replace": 3})
    assert (dense["num_hidden_layers"], dense["first_k_dense_replace"]) == (4, 1)


def test_sizes_that_a_config_leaves_out_are_made_small_too() -> None:
    complete = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "rope_theta": 10000.0,
                "text_config": {"model_type": "llama", "hidden_size": 4096, "hidden_act": "silu"}}  # fmt: skip
    assert shrunk({"hidden_size": 4096, "text_config": {"model_type": "llama"}}, complete) == {
        "hidden_size": 64, "intermediate_size": 128, "text_config": {"model_type": "llama", "hidden_size": 64}
    }  # fmt: skip


def test_what_is_small_already_stays() -> None:
    config = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    assert shrunk(config) == config
