"""How long a text may be: what positions are made for, as transformers has them, and what is said where it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asking import answer_here
from support.models import make_checkpoint, save_model

import bigpipe
from bigpipe.bigmodel.architecture import position_limit, read_limit
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task
from bigpipe.errors import UsageError

LED = {"is_encoder_decoder": True, "max_encoder_position_embeddings": 16384, "max_decoder_position_embeddings": 1024}
PAIR = {
    "is_encoder_decoder": True, "decoder": {"model_type": "bert", "max_position_embeddings": 512},
    "encoder": {"model_type": "longformer", "max_position_embeddings": 4098, "pad_token_id": 1},
}  # fmt: skip
LAYERED = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "linear", "factor": 8.0}}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        # Qwen2.5-7B-Instruct with what its card says for long texts
        ({"max_position_embeddings": 32768, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        # DeepSeek-V3 and Llama-3.1 say the stretched length themselves
        ({"max_position_embeddings": 163840, "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
        ({"max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 8192, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 65536),
        # Phi-3-mini-128k; longrope with a factor of its own
        ({"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
          "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "longrope", "factor": 32.0}}, 131072),
        # med42-70b, vicuna-7b-v1.5-16k
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        # Qwen2-VL's kind stretches nothing
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 32768),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "default", "factor": 4.0}}, 32768),
        # Gemma 3: some layers are not scaled
        ({"max_position_embeddings": 131072, "rope_parameters": LAYERED}, 131072),
        ({"text_config": {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2}}}, 128),
        ({"n_positions": 1024}, 1024),
        ({"model_type": "mpt", "max_seq_len": 2048}, 2048),
        (LED, 1024),
        (PAIR, 512),
        ({"max_target_positions": 448, "max_position_embeddings": 1500}, 448),
        ({"n_positions": 512, "d_kv": 64, "relative_attention_num_buckets": 32}, None),
        ({"model_type": "bloom", "n_layer": 2}, None),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ],
)  # fmt: skip
def test_what_positions_are_made_for(config: dict[str, Any], limit: int | None) -> None:
    assert position_limit(config) == limit


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LED, 16384),
        (PAIR, 4096),
        ({"is_encoder_decoder": True, "max_position_embeddings": 1024}, 1024),
        ({"is_encoder_decoder": True, "encoder": {"model_type": "t5"}, "max_position_embeddings": 512}, None),
        # TrOCR and Speech2Text before a text's decoder: what sees or hears has no positions of texts
        ({**PAIR, "encoder": {"model_type": "vit", "image_size": 224}}, 512),
        ({**PAIR, "encoder": {"model_type": "wav2vec2", "conv_dim": [512], "vocab_size": 32}}, 512),
        ({**PAIR, "encoder": {"num_mel_bins": 80, "max_target_positions": 1024}}, 512),
        ({"max_position_embeddings": 4096}, 4096),
    ],
)
def test_what_an_encoder_reads_has_positions_of_its_own(config: dict[str, Any], limit: int | None) -> None:
    assert read_limit(config) == limit


SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in ("Bert", "Roberta", "XLMRoberta", "XLMRobertaXL", "Camembert", "RobertaPreLayerNorm",
                                  "Data2VecText", "MPNet", "MarkupLM")),
        ("Lilt", {"hidden_size": 24}),
        ("Luke", {"entity_vocab_size": 4, "entity_emb_size": 4}), ("Xmod", {"default_language": "en_XX"}),
    ],
)  # fmt: skip
def test_the_limit_is_where_a_table_of_positions_ends(name: str, more: dict[str, Any]) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more, "max_position_embeddings": 20})
    model = getattr(transformers, f"{name}Model")(config).eval()
    limit = position_limit(config.to_dict())
    assert limit is not None
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


def test_the_limit_of_mpt_is_where_its_biases_end() -> None:
    import transformers

    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=50, max_seq_len=20)
    model = transformers.MptModel(config).eval()
    assert position_limit(config.to_dict()) == 20
    model(torch.full((1, 20), 5))
    with pytest.raises(RuntimeError):
        model(torch.full((1, 21), 5))


def test_an_encoder_decoder_reads_and_makes_as_much_as_each_half_has_positions_for(tmp_path: Path) -> None:
    import transformers

    config = transformers.LEDConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=264, attention_window=8, max_encoder_position_embeddings=48,
        max_decoder_position_embeddings=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    path = save_model(transformers.LEDForConditionalGeneration(config).eval(), tmp_path)
    options = [TaskOptions(arguments={"min_new_tokens": new}, max_new_tokens=new) for new in (19, 20)]
    fits, beyond = (
        find_task("text2text-generation", Sources()).bind(load(path), path, each, Sources()) for each in options
    )
    assert fits([Row(0, "a" * 48, {})])[0].tokens == 19
    with pytest.raises(ValueError, match="49 tokens are more than the model's 48 positions: shorten the prompt"):
        fits([Row(0, "a" * 49, {})])
    with pytest.raises(ValueError, match="1 token and 20 new ones are more than the model's 20 positions"):
        beyond([Row(0, "a", {})])
    task, described = find_task("text2text-generation", Sources()), describe_checkpoint(answer_here(path))
    with pytest.raises(UsageError, match="max_new_tokens is 20, and the model has 20 positions for what it makes"):
        list(task.checked({}, [Row(0, "a", {"prompt": "a"})], described, Sources(), 20))
    read = bigpipe.estimate(path, dtypes=["float32"], sequence_length=500)
    assert read.workload.sequence_length == 48
    keys_and_values, float32 = 2 * config.decoder_layers * config.d_model, 4
    assert read["float32"].cache.bytes == keys_and_values * float32 * (20 + 48)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
         "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_a_scaled_model_is_sized_and_run_at_its_length(tmp_path: Path, scaling: dict[str, Any]) -> None:
    plain = make_checkpoint(tmp_path, "llama", vocab_size=264, max_position_embeddings=32)
    config = json.loads((plain / "config.json").read_bytes())
    config.pop("rope_parameters", None)
    (plain / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 10000.0, **scaling}}))
    sizes = {length: bigpipe.estimate(plain, dtypes=["float32"], sequence_length=length) for length in (32, 128, 500)}
    assert [size.workload.sequence_length for size in sizes.values()] == [32, 128, 128]
    assert sizes[128]["float32"].kv_cache.bytes == 4 * sizes[32]["float32"].kv_cache.bytes
    task = find_task("text-generation", Sources()).bind(load(plain), plain, TaskOptions(max_new_tokens=4), Sources())
    tokens = task([Row(0, "a" * 100, {})])[0].tokens
    assert 0 < tokens <= 4
    with pytest.raises(ValueError, match="are more than the model's 128 positions"):
        task([Row(0, "a" * 126, {})])


def test_a_text_too_long_for_features_is_an_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "bert", max_position_embeddings=32)
    task = find_task("feature-extraction", Sources()).bind(load(path), path, TaskOptions(), Sources())
    with pytest.raises(ValueError, match="are more than the model's 32 positions"):
        task([Row(0, "a" * 40, {})])


def test_a_length_that_is_cut_is_said(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "opt", max_position_embeddings=32)
    said = "4096 tokens are more than the model takes: counted with 32"
    cut, whole = bigpipe.estimate(path, sequence_length=4096), bigpipe.estimate(path, sequence_length=32)
    assert said in cut.notes
    assert said in cut.render()
    assert cut.as_json()["sequence_length"] == 32
    assert "more than the model takes" not in whole.render()
    placed = bigpipe.place(path, sequence_length=4096, max_memory={"cpu": "1GiB"})
    assert f"{said}." in placed.explanation
    assert not any("more than the model" in line for line in bigpipe.place(path, sequence_length=32).explanation)
