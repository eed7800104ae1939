"""Sizes that others have published, from configs alone, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
from support.placing import place_architecture
from support.real import describe_here

from bigpipe.bigmodel.architecture import Architecture, known_architecture
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.footprint.grounds import as_accelerate
from bigpipe.bigmodel.footprint.weights import weigh

GIB, TIB = 2**30, 2**40
BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 28996}
BLOOM: dict[str, Any] = {
    "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 14336, "n_layer": 70, "n_head": 112,
    "vocab_size": 250880,
}  # fmt: skip
IDEFICS: dict[str, Any] = {
    "model_type": "idefics", "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80,
    "num_attention_heads": 64, "vocab_size": 32000, "additional_vocab_size": 2, "cross_layer_interval": 4,
    "qk_layer_norms": True, "use_resampler": True,
    "vision_config": {
        "embed_dim": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32,
        "patch_size": 14,
    },
    "perceiver_config": {
        "resampler_depth": 6, "resampler_head_dim": 96, "resampler_n_heads": 16, "resampler_n_latents": 64,
        "qk_layer_norms_perceiver": True,
    },
}  # fmt: skip
FOUND: dict[str, tuple[dict[str, Any], str, int]] = {
    # total_size of the model's own index
    "mixtral-8x7b": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "bytes", 93_405_585_408),
    "gemma-7b": ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "bytes", 17_075_361_792),
    "qwen2-7b": ({
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False}, "bytes", 15_231_233_024),
    "phi-2": ({
        "model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200, "partial_rotary_factor": 0.4},
        "bytes", 5_559_367_680),
    # 13,476,835,328 in Llama-2's own index, which counts 32 rotary tables of 64 float16 that are not saved any more
    "llama-2-7b": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "bytes", 13_476_835_328 - 32 * 64 * 2),
    # Table 1 of arXiv 2304.01373
    "pythia-6.9b": ({
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50432},
        "parameters", 6_857_302_016),
    # Arithmetic on the shapes that their papers give: gpt2 124M and 1,558M, ViT-B/16 as torchvision counts it
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "parameters",
             (50257 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768),
    "gpt2-xl": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_layer": 48,
                 "n_head": 25}, "parameters", 1_557_611_200),
    "vit-base": ({"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_labels": 1000},
                 "parameters", 86_567_656),
}  # fmt: skip


@pytest.fixture(scope="module")
def bloom() -> Architecture:
    architecture = known_architecture(BLOOM)
    return architecture or describe_here(BLOOM)


@pytest.mark.parametrize("name", FOUND)
def test_models_of_our_own_finding(name: str) -> None:
    config, what, size = FOUND[name]
    weights = weigh(describe_here(config), "bfloat16")
    assert (weights.stored if what == "bytes" else weights.parameters) == size


def test_bert_base_as_accelerate_shows_it() -> None:
    """Its documentation says 413.18 MB and 1.61 GB, and 413.68 MB as measured on a GPU."""
    found = Budget(describe_here(BERT, "none"), "float32", Workload())
    shown = as_accelerate(found)
    assert shown["total_size"] == 433_249_280
    assert shown["training_using_adam"] == 4 * 433_249_280
    assert round(4 * 433_249_280 / GIB, 2) == 1.61
    assert found.weights.bytes <= 413.68 * 2**20 <= found.weights.bytes + found.runtime.high


def test_idefics_80b_as_accelerate_shows_it() -> None:
    """297.12 GiB, and 1.16 TiB with Adam, of which 200 MiB were rotary tables of 2,048 positions in each attention; a
    class of today keeps its frequencies twice instead."""
    architecture = describe_here(IDEFICS, "none")
    shown = as_accelerate(Budget(architecture, "float32", Workload()))
    attentions = sum(module.class_name == "IdeficsRotaryEmbedding" for module in architecture.modules)
    assert attentions == 80 + 20
    tables = attentions * (2 * 2048 * 128 * 4 - 64 * 4)
    total, adam = shown["total_size"], shown["training_using_adam"]
    assert total is not None
    assert adam is not None
    assert round((total + tables) / GIB, 2) == 297.12
    assert round((adam + 4 * tables) / TIB, 2) == 1.16


@pytest.mark.parametrize("mode", ["sequential", "auto"])
def test_bloom_over_eight_gpus_with_a_first_that_holds_less(bloom: Architecture, mode: str) -> None:
    """`{0: 30GiB, 1-7: 46GiB}`: embeddings, four blocks and room for a fifth; ten at most on each other; no offload."""
    placement = place_architecture(
        bloom, device_map=mode, max_memory={0: "30GIB", "1-7": "46GIB"}, dtype="bfloat16",
        no_split_module_classes=["BloomBlock"],
    )  # fmt: skip
    blocks = [placement.device_of(f"transformer.h.{number}") for number in range(70)]
    assert set(blocks) == set(placement.weights) == set(range(8))
    assert [blocks.count(gpu) for gpu in range(8)] == [4, 10, 10, 10, 10, 10, 10, 6]  # as accelerate does
    assert placement.device_of("transformer.word_embeddings") == placement.device_of("lm_head") == 0
    assert sum(placement.weights.values()) == 352_494_542_848
    assert placement.weights[0] <= 30 * GIB


def test_those_caps_are_near_ideal(bloom: Architecture) -> None:
    """A GiB less on the first, and it holds one block less; 4 GiB less on each, and the model does not fit them."""
    tight = place_architecture(
        bloom, device_map="sequential", max_memory={0: "29GiB", "1-7": "46GiB"}, dtype="bfloat16"
    )
    assert [tight.device_of(f"transformer.h.{number}") for number in range(70)].count(0) == 3
    spilled = place_architecture(bloom, max_memory={0: "30GiB", "1-7": "42GiB", "cpu": "100GiB"}, dtype="bfloat16")
    assert "cpu" in spilled.weights
