"""An adapter beside a model, wherever its weights lie and however they are stored: what peft's own model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import tuned, with_adapter
from support.models import make_checkpoint

import bigpipe
from bigpipe.bigmodel.execution import loaded as state_of
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.errors import UsageError

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "every linear module": ("llama", "float32", {"target_modules": "all-linear", "use_rslora": True}),
    "Conv1D": ("gpt2", "bfloat16", {"target_modules": ["c_attn", "c_proj"]}),
    "fused qkv": ("gpt_neox", "float16", {"target_modules": ["query_key_value"]}),
    "an embedding and a whole head": ("llama", "float32", {
        "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"],
    }),
    "an embedding that was tied": ("qwen2", "float32", {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
    }),
    "biases": ("opt", "float32", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "some tokens": ("llama", "bfloat16", {"target_modules": ["q_proj"], "trainable_token_indices": [6, 20]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_its_adapter_computes_what_peft_computes(tmp_path: Path, kind: str) -> None:
    """In RAM and streamed from disk, to the bit."""
    architecture, dtype, config = KINDS[kind]
    base = make_checkpoint(tmp_path / "base", architecture, dtype=dtype)
    adapter = tuned(base, tmp_path / "lora", r=4, **config)
    wanted = logits(with_adapter(base, adapter))
    for placement in ("cpu", "disk"):
        model = bigpipe.load(base, {"": placement}, adapter=adapter, dtype=dtype)
        assert torch.equal(logits(model), wanted), placement
        assert not torch.equal(logits(bigpipe.load(base, {"": placement}, dtype=dtype)), wanted)


def test_dora_is_put_into_the_weights_as_they_are_read(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    adapter = tuned(base, tmp_path / "lora", r=4, target_modules=["q_proj"], use_dora=True)
    wanted = logits(with_adapter(base, adapter))
    found = logits(bigpipe.load(base, {"": "disk"}, adapter=adapter))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
def test_an_adapter_beside_a_quantized_model_computes_what_peft_computes(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    source = make_checkpoint(tmp_path / "base", "llama", dtype="float32", hidden_size=64, intermediate_size=128)
    options = {} if scheme == "int8" else {"bnb_4bit_compute_dtype": "float32"}
    quantize_checkpoint(source, tmp_path / "packed", scheme=scheme, dtype="float32", **options)
    adapter = tuned(source, tmp_path / "lora", r=4, target_modules=["q_proj", "down_proj"])
    wanted = logits(with_adapter(tmp_path / "packed", adapter))
    for placement in ("cpu", "disk"):
        model = bigpipe.load(tmp_path / "packed", {"": placement}, adapter=adapter)
        assert torch.equal(logits(model), wanted), placement


def test_dora_on_a_quantized_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "base", "llama", dtype="float16", hidden_size=64)
    quantize_checkpoint(source, tmp_path / "packed", scheme="nf4")
    adapter = tuned(source, tmp_path / "lora", r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UsageError, match="use_dora") as error:
        bigpipe.load(tmp_path / "packed", adapter=adapter)
    assert "before it was quantized" in error.value.cure


def test_the_bytes_of_an_adapter_are_counted_where_they_lie(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    adapter = tuned(base, tmp_path / "lora", r=4, target_modules=["q_proj"])
    held = [state_of(bigpipe.load(base, {"": "disk"}, **each)).held for each in ({}, {"adapter": adapter})]
    assert held[1]["cpu"] - held[0]["cpu"] == 2 * 4 * 4 * (32 + 32)
    assert held[1]["disk"] == held[0]["disk"]


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    wide = make_checkpoint(tmp_path / "wide", "llama", hidden_size=48)
    adapter = tuned(wide, tmp_path / "lora", r=4, target_modules=["q_proj"])
    with pytest.raises(UsageError, match="made for another model"):
        bigpipe.load(base, adapter=adapter)
