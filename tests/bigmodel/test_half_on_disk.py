"""Half of the layers on disk, and all: every kind of model gives what it gives in memory, alone and beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, make_checkpoint, sample_inputs, save_model

from bigpipe.bigmodel.execution import load, loaded

BATCHES = 8
WIDTHS = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", "ForCausalLM", {
        **WIDTHS, **TOKENS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }),
    "llama4": ("Llama4", "ForCausalLM", {
        **WIDTHS, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 64,
        "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
    }),
    "mamba": ("Mamba", "ForCausalLM", {**WIDTHS, **TOKENS, "state_size": 8}),
    "whisper": ("Whisper", "ForConditionalGeneration", {
        **TOKENS, "vocab_size": 264, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1,
    }),
}  # fmt: skip


def made(folder: Path, architecture: str) -> Path:
    import transformers

    if architecture in ARCHITECTURES:
        return make_checkpoint(folder, architecture)
    name, head, fields = OTHERS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")(**fields)
    model = getattr(transformers, name + head)(config).eval()
    save_model(model, folder)
    return folder


def inputs_of(model: Any, number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    if model.main_input_name == "input_features":
        features = torch.randn(2, 8, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": torch.full((2, 3), 5 + number)}
    return sample_inputs(model, length=4 + number, seed=number)


def outputs(model: Any, together: int) -> list[torch.Tensor]:
    """What the model says to eight batches: its logits, and where it writes what comes of them."""
    found: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        inputs = inputs_of(model, number)
        with torch.inference_mode():
            found[number] = [model(**inputs).logits]
            if "input_ids" in inputs and model.can_generate():
                found[number].append(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False))

    loaded(model).stream.together(model, work, range(BATCHES), together)
    return [tensor for number in range(BATCHES) for tensor in found[number]]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_gives_what_it_gives_in_memory(tmp_path: Path, architecture: str) -> None:
    path = made(tmp_path, architecture)
    whole = load(path, dtype="float32")
    blocks = [name for name, module in whole.named_modules() if type(module).__name__ in whole._no_split_modules]
    half = dict.fromkeys(blocks[1::2], "disk")
    assert half
    wanted, read = outputs(whole, 1), []
    for together in (1, BATCHES):
        model = load(path, {"": "cpu", **half}, dtype="float32")
        found = outputs(model, together)
        assert all(map(torch.equal, found, wanted))
        assert len(found) == len(wanted)
        read.append(loaded(model).stream.bytes_read)
        assert any(parameter.is_meta for parameter in model.parameters())
    assert read[1] < read[0] / 4
    away = load(path, {"": "disk"}, dtype="float32")
    assert all(map(torch.equal, outputs(away, BATCHES), wanted))
    assert all(parameter.is_meta for parameter in away.parameters())
