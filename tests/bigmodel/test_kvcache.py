"""Predicted caches, against those that real models fill."""

from __future__ import annotations

from typing import Any

import pytest
from support.architectures import ALL, DECODERS
from support.real import build, cache_bytes, describe_here

from bigpipe.bigmodel.footprint.kvcache import kv_cache

ENCODER_DECODERS = ("t5", "bart", "whisper")
NAMES = (*DECODERS, *ENCODER_DECODERS, "llava")
LENGTH = 20
"""Longer than the windows of 16 in the small configs."""


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_of_a_real_model(name: str) -> None:
    import torch

    model = build(ALL[name]).to(torch.bfloat16)
    tokens = torch.ones(2, LENGTH, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = tokens
    if name == "whisper":
        inputs["input_features"] = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
        del inputs["input_ids"]
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    cache = output["past_key_values"] if "past_key_values" in output else output["cache_params"]
    architecture = describe_here(ALL[name])
    assert architecture.generates
    predicted = kv_cache(architecture.config, 2, LENGTH, 2)
    assert (predicted.bytes, predicted.exact) == (cache_bytes(cache), True)


def test_deepseek_v3_caches_70272_bytes_per_token() -> None:
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "num_attention_heads": 128, "num_key_value_heads": 128,
    }  # fmt: skip
    cache = kv_cache(config, 1, 1000, 2)
    assert (cache.per_token, cache.bytes, cache.kind) == (70_272, 70_272_000, "61 × MLA")


def test_a_window_stops_the_growth_and_prefill_holds_the_rest_once() -> None:
    config = {
        "model_type": "mistral", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 8, "sliding_window": 16,
    }  # fmt: skip
    short, long = kv_cache(config, 1, 10, 2), kv_cache(config, 1, 100, 2)
    assert short.bytes == 2 * 10 * 2 * 8 * 2
    assert (long.bytes, long.per_token) == (2 * 15 * 2 * 8 * 2, 0)
    assert long.bytes + long.prefill_extra == 10 * short.bytes


def test_an_unknown_kind_of_layer_is_counted_as_full_attention_and_said_to_be_inexact() -> None:
    config = {"num_attention_heads": 2, "hidden_size": 8, "layer_types": ["full_attention", "quantum_attention"]}
    assert not kv_cache(config, 1, 10, 2).exact
