"""What the snapshot says of a family, against its classes: module by module, tensor by tensor."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.real import describe_here, transformers_quietly

from bigpipe.bigmodel.architecture import Architecture, Head, known_architecture, missing_snapshot
from bigpipe.bigmodel.architecture.snapshot import families
from bigpipe.bigmodel.footprint.kvcache import cache_of, kv_cache

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
    "max_position_embeddings": 128, "hidden_act": "silu",
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    "rope_type": "llama3", "rope_theta": 500000.0,
}  # fmt: skip
OPT: dict[str, Any] = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 64, "ffn_dim": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160, "max_position_embeddings": 128,
    "word_embed_proj_dim": 64, "activation_function": "relu", "do_layer_norm_before": True,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4,
    "vocab_size": 160, "n_positions": 128, "activation_function": "gelu_new",
}  # fmt: skip
BLOOM: dict[str, Any] = {
    "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 64, "n_layer": 2, "n_head": 4,
    "vocab_size": 160,
}  # fmt: skip
NEOX: dict[str, Any] = {
    **LLAMA, "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu",
    "rotary_pct": 0.25,
}  # fmt: skip


def like_llama(model_type: str, prefix: str, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "model_type": model_type, "architectures": [f"{prefix}ForCausalLM"], **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True, "head_dim": 24},
    "llama-biased": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-rope": {**LLAMA, "rope_scaling": LLAMA3_ROPE},
    "llama-old": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "llama-model": {**LLAMA, "architectures": ["LlamaModel"]},
    "mistral": like_llama("mistral", "Mistral", sliding_window=16),
    "mistral-no-window": like_llama("mistral", "Mistral", sliding_window=None),
    "qwen2": like_llama("qwen2", "Qwen2", use_sliding_window=False, sliding_window=16, tie_word_embeddings=True),
    "qwen3": like_llama("qwen3", "Qwen3", head_dim=16, use_sliding_window=False, attention_bias=True),
    "opt": OPT,
    "opt-no-final-norm": {**OPT, "_remove_final_layer_norm": True},
    "gpt2": GPT2,
    "gpt2-inner": {**GPT2, "n_inner": 48, "tie_word_embeddings": False},
    "bloom": BLOOM,
    "gpt_neox": NEOX,
    "gpt_neox-odd": {**NEOX, "rotary_pct": 0.2, "attention_bias": False},
}
HEADS: tuple[Head, ...] = ("auto", "none")


@pytest.fixture(scope="module")
def described() -> dict[tuple[str, Head], Architecture]:
    return {(name, head): describe_here(CONFIGS[name], head) for name in CONFIGS for head in HEADS}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_snapshot_gives_what_the_class_builds(
    described: dict[tuple[str, Head], Architecture], name: str, head: Head
) -> None:
    ours, real = known_architecture(CONFIGS[name], head), described[name, head]
    assert ours is not None
    assert ours.modules == real.modules
    assert replace(ours, config={}) == replace(real, config={}, cache=None)
    assert real.cache
    for length in (20, 40):
        assert cache_of(ours, 2, length, 2) == kv_cache(real.config, 2, length, 2) == cache_of(real, 2, length, 2)


def test_every_family_is_compared() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(families())


@pytest.fixture(scope="module")
def script() -> Any:
    """The script that makes snapshots, as a module."""
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "models" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their own types
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model_type", families())
def test_the_snapshot_is_what_its_script_makes_of_the_installed_transformers(script: Any, model_type: str) -> None:
    """Where this fails after an upgrade: `make snapshot`."""
    transformers_quietly()
    assert set(script.FAMILIES) == set(families())
    learnt = script.learn(model_type, script.FAMILIES[model_type])
    assert json.loads(json.dumps(learnt)) == families()[model_type]


def test_a_transformers_without_a_snapshot_is_told_of(tmp_path: Path) -> None:
    """In a process that sees another version: the class is asked, and the estimate says why that took so long."""
    other = tmp_path / "transformers-4.1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.1.0\n")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    code = "import sys, bigpipe; print(*bigpipe.estimate(sys.argv[1], dtypes='float16').notes)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "transformers 4.1.0 has no snapshot of common architectures (there are 5.23)" in done.stdout
    assert missing_snapshot("llama") is None


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "hidden_act": "gelu"},
        {**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
        {**LLAMA, "rope_scaling": {"rope_type": "longrope"}},
        {**LLAMA, "hidden_size": "64"},
        {**OPT, "word_embed_proj_dim": 32},
        {**OPT, "do_layer_norm_before": False},
        {**GPT2, "add_cross_attention": True},
        like_llama("qwen2", "Qwen2", use_sliding_window=True),
        like_llama("qwen3", "Qwen3"),
        like_llama("mistral", "Mistral", num_key_value_heads=None),
        {**LLAMA, "partial_rotary_factor": 0.5},
        {**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {**LLAMA, "num_hidden_layers": True},
        {**LLAMA, "num_hidden_layers": 10**9},
        {"model_type": "llama"},
        {"model_type": "unheard-of"},
        {},
    ],
)
def test_what_was_not_seen_is_left_to_the_class(config: dict[str, Any]) -> None:
    assert known_architecture(config) is None
