"""Predicted caches, against those that real models fill."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.architectures import ALL, BLIP_2, DECODERS, DEEPSEEK_V4, RECURRENT_GEMMA, UNUSUAL, Config
from support.real import build, cache_bytes, describe_here, storage_bytes

from bigpipe.bigmodel.architecture import outline, read_request
from bigpipe.bigmodel.architecture.caching import late_lengths, observe
from bigpipe.bigmodel.architecture.instantiation import with_empty_parameters
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.footprint.kvcache import cache_of, kv_cache

ENCODER_DECODERS = ("t5", "bart", "whisper", "t5gemma", "dia")
NEED_VALUES = ("longcat_flash", "gemma3n", "jetmoe")
"""Their forwards look into tensors, which the meta device cannot; that of gemma3n does not where peft was imported."""
CONFIGS = {**{name: ALL[name] for name in (*DECODERS, "t5", "bart", "whisper", "llava")}, **UNUSUAL}
LENGTHS = (20, 45)
"""Longer than the windows of 16 in the small configs, and not among those that were looked at."""


def real_cache(config: Config, name: str, length: int) -> Any:
    """What a real model has cached of two sequences, in bfloat16."""
    import torch

    model = build(config).to(torch.bfloat16)
    tokens = torch.ones(2, length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = tokens.unsqueeze(-1).repeat(1, 1, 2) if name == "dia" else tokens
    if name == "whisper":
        inputs["input_features"] = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
        del inputs["input_ids"]
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    return output["past_key_values"] if "past_key_values" in output else output["cache_params"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_of_a_real_model(name: str) -> None:
    architecture = describe_here(CONFIGS[name])
    assert architecture.generates
    assert name in NEED_VALUES or (architecture.cache is None) == (name in ENCODER_DECODERS)
    for length in LENGTHS:
        cache = real_cache(CONFIGS[name], name, length)
        predicted = cache_of(architecture, 2, length, 2)
        assert (predicted.bytes, predicted.exact) == (cache_bytes(cache), True)
        if architecture.cache is not None:
            assert predicted.prefill_extra == storage_bytes(cache) - cache_bytes(cache)


@pytest.mark.parametrize("name", [*DECODERS, "llava"])
def test_formulas_say_what_was_observed(name: str) -> None:
    """The families of the snapshot go by formulas, without a class."""
    architecture = describe_here(CONFIGS[name])
    for length in LENGTHS:
        observed = cache_of(architecture, 3, length, 2)
        assert kv_cache(architecture.config, 3, length, 2) == observed


@pytest.mark.parametrize("name", UNUSUAL)
def test_formulas_answer_for_every_config(name: str) -> None:
    found = kv_cache(describe_here(CONFIGS[name]).config, 1, 20, 2)
    assert found.bytes > 0


def test_what_is_compressed_is_bounded_from_above() -> None:
    """DeepSeek-V4 keeps one vector for 4 or 128 tokens, and up to 127 that wait to be compressed."""
    architecture = describe_here(DEEPSEEK_V4)
    for length in (45, 300, 600):
        real, predicted = (
            cache_bytes(real_cache(DEEPSEEK_V4, "deepseek_v4", length)),
            cache_of(architecture, 2, length, 2),
        )
        assert real <= predicted.bytes < 1.5 * real
        assert not predicted.exact
    long, longer = (cache_of(architecture, 1, length, 2).bytes for length in (100_000, 200_000))
    assert longer - long < 100_000 * architecture.config["num_hidden_layers"] * 2 * 8


def test_where_a_forward_needs_an_image_the_part_that_reads_text_is_observed() -> None:
    predicted = cache_of(describe_here(BLIP_2), 1, 20, 2)
    assert (predicted.bytes, predicted.exact) == (2 * 2 * 2 * 16 * 20 * 2, True)
    assert describe_here(BLIP_2).cache is not None


def test_a_forward_without_end_is_left() -> None:
    """RecurrentGemma goes through its tokens one by one, and has a window of billions here."""
    config = {**RECURRENT_GEMMA, "attention_window_size": 10**9, "max_position_embeddings": 10**9}
    with torch.device("meta"):
        model = with_empty_parameters(read_request(config), torch.bfloat16)
    assert observe(model, seconds=1) is None


def test_windows_and_positions_say_how_far_to_look() -> None:
    assert late_lengths({"sliding_window": None, "use_sliding_window": False, "chunk_size": 256}) == ()
    assert late_lengths({"sliding_window": 4096}) == (8191, 16383)
    assert late_lengths({"sliding_window": 4096, "max_position_embeddings": 6000}) == (2999, 5999)
    assert late_lengths({"compress_rates": {"a": 4}}) == (1023, 2047)
    assert late_lengths({"sliding_window": 10**15}) == (2**19 - 1, 2**20 - 1)


def test_deepseek_v3_caches_70272_bytes_per_token() -> None:
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "num_attention_heads": 128, "num_key_value_heads": 128,
    }  # fmt: skip
    cache = kv_cache(config, 1, 1000, 2)
    assert (cache.bytes, cache.kind) == (70_272_000, "61 × MLA")
    assert kv_cache(config, 1, 1001, 2).bytes - cache.bytes == 70_272


def test_a_window_stops_the_growth_and_prefill_holds_the_rest_once() -> None:
    config = {
        "model_type": "mistral", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 8, "sliding_window": 16,
    }  # fmt: skip
    short, long = kv_cache(config, 1, 10, 2), kv_cache(config, 1, 100, 2)
    assert short.bytes == 2 * 10 * 2 * 8 * 2
    assert long.bytes == kv_cache(config, 1, 101, 2).bytes == 2 * 15 * 2 * 8 * 2
    assert long.bytes + long.prefill_extra == 10 * short.bytes


def test_an_unknown_kind_of_layer_is_counted_as_full_attention_and_said_to_be_inexact() -> None:
    config = {"num_attention_heads": 2, "hidden_size": 8, "layer_types": ["full_attention", "quantum_attention"]}
    assert not kv_cache(config, 1, 10, 2).exact


def linear(folder: str, **shapes: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{folder}.{name}.weight": ("bfloat16", shape) for name, shape in shapes.items()}


CHATGLM = {"model_type": "chatglm", "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16}
BLOCKS = [{"attention": {"n_heads_in_group": 4, "no_op": index % 2 == 1}} for index in range(4)]
EMBEDDED = {"model.embed_tokens.weight": ("bfloat16", (1000, 64))}
OWN_CODE: dict[str, tuple[Config, dict[str, Any], int]] = {
    "groups by another name": (
        CHATGLM | {"multi_query_attention": True, "multi_query_group_num": 2},
        {
            name: found for index in range(4)
            for name, found in linear(
                f"transformer.encoder.layers.{index}.self_attention", query_key_value=(128, 64), dense=(64, 64)
            ).items()
        },
        4 * 2 * 2 * 16,
    ),
    "layers and heads by other names": (
        {"model_type": "openelm", "num_transformer_layers": 4, "model_dim": 64, "num_kv_heads": [1, 1, 2, 2]},
        {
            name: found for index, groups in enumerate((1, 1, 2, 2))
            for name, found in linear(
                f"transformer.layers.{index}.attn", qkv_proj=(4 * groups * 16, 64), out_proj=(64, 2 * groups * 16)
            ).items()
        },
        2 * 16 * (1 + 1 + 2 + 2),
    ),
    "layers without attention": (
        {"model_type": "nemotron-nas", "num_hidden_layers": 4, "num_attention_heads": 4, "block_configs": BLOCKS},
        {
            name: found for index in (0, 2)
            for name, found in linear(
                f"model.layers.{index}.self_attn", q_proj=(64, 64), k_proj=(16, 64), v_proj=(16, 64)
            ).items()
        } | {f"model.layers.{index}.mlp.up_proj.weight": ("bfloat16", (96, 64)) for index in range(4)},
        2 * 2 * 16,
    ),
    "projections by names of their own": (
        {"model_type": "own"},
        EMBEDDED | {f"layers.{index}.attention.mix.weight": ("bfloat16", (99, 64)) for index in range(3)},
        3 * 2 * 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_CODE)
def test_a_class_that_is_unknown_caches_at_most_what_its_projections_make(name: str) -> None:
    config, tensors, elements = OWN_CODE[name]
    term = Budget(outline(tensors, {**config, "architectures": ["OwnForCausalLM"]}), "bfloat16", Workload()).kv_cache
    assert (term.bytes, term.low, term.high, term.basis) == (4096 * elements, 0, 4096 * elements, "bound")


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS, "llava", *UNUSUAL])
def test_what_is_known_without_a_class_is_no_less_than_what_it_caches(name: str) -> None:
    """But for classes that cache more than they project."""
    architecture = describe_here(ALL[name])
    stored = {tensor.name: (tensor.dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent}
    found = cache_of(outline(stored, {**architecture.config, "architectures": ["OwnForCausalLM"]}), 2, 100, 2)
    assert not found.exact
    least = 0.5 if name in ("falcon-40b", "falcon_h1") else 1
    assert found.bytes >= least * cache_of(architecture, 2, 100, 2).bytes > 0


@pytest.mark.slow
def test_formulas_answer_for_every_config_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    answered = 0
    for name in CONFIG_MAPPING_NAMES:
        try:
            config = json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False))
        except Exception:  # noqa: S112  some have no defaults, others need libraries
            continue
        assert kv_cache(config, 2, 300, 2).bytes >= 0
        answered += 1
    assert answered > 700
