"""Of a mixture of experts only those are read that tokens chose, and nothing that it says changes by that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import DECODERS
from support.models import save_model

from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.placement import place
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task

_MOE = DECODERS["mixtral"]
_LLAMA4 = {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "head_dim": 16, "num_experts_per_tok": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    **{name: DECODERS[name] for name in ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "jamba")},
    **{name: {**_MOE, "model_type": name} for name in ("olmoe", "phimoe", "granitemoe", "jetmoe")},
    "qwen2_moe": {**_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 32},
    "ernie4_5_moe": {**_MOE, "model_type": "ernie4_5_moe"},
    "llama4_text": {**_MOE, **_LLAMA4, "model_type": "llama4_text"},
}


def mixture(folder: Path, name: str, **changes: Any) -> Path:
    """A tiny model of 8 experts in each layer, of which 2 answer a token; bytes are tokens."""
    import transformers

    counts = {"num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8}
    tokens = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fields = {**MIXTURES[name], **counts, **tokens, **changes}
    kind, _ = fields.pop("model_type"), fields.pop("architectures")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return save_model(model.eval(), folder)


def on_disk(path: Path) -> dict[str, str]:
    """All on disk but the table that Llama 4 asks where it lies."""
    return {"": "disk", **({"model.embed_tokens": "cpu"} if "llama4" in (path / "config.json").read_text() else {})}


def rows(count: int) -> list[Row]:
    texts = [f"{'word ' * (1 + 3 * number % 7)}{number}" for number in range(count)]
    return [Row(number, text, {"prompt": text}) for number, text in enumerate(texts)]


def answers(path: Path, placement: Any, together: int) -> tuple[list[object], int]:
    """What is generated for four batches of two, and the bytes that were read."""
    model = load(path, placement, dtype="float32")
    task = find_task("text-generation", Sources()).bind(model, path, TaskOptions(max_new_tokens=4), Sources())
    found: dict[int, object] = {}

    def work(number: int) -> None:
        found[number] = [answer.payload for answer in task(rows(8)[2 * number : 2 * number + 2])]

    stream = loaded(model).stream
    stream.together(model, work, range(4), together)
    return [found[number] for number in range(4)], stream.bytes_read


@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_bits_alone_and_together(tmp_path: Path, name: str) -> None:
    path = mixture(tmp_path, name)
    held = load(path, dtype="float32")
    streamed = load(path, on_disk(path), dtype="float32")
    tokens = torch.randint(3, 264, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(held(tokens).logits, streamed(tokens).logits)
        assert torch.equal(held(tokens[:1, :1]).logits, streamed(tokens[:1, :1]).logits)
    wanted, _ = answers(path, {"": "cpu"}, 1)
    alone, read = answers(path, on_disk(path), 1)
    together, shared = answers(path, on_disk(path), 4)
    assert wanted == alone == together
    assert shared < 0.6 * read


def even(folder: Path, name: str, **changes: Any) -> Path:
    """A mixture whose routers choose evenly and anew for each token: they see little but the token's own vector."""
    import transformers

    path = mixture(folder, name, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    for parameter_name, parameter in model.named_parameters():
        wide = "embed_tokens" in parameter_name or re.search(r"mlp\.gate\.weight|router", parameter_name)
        torch.nn.init.normal_(parameter, std=1.0 if wide else 1e-3)
        if parameter_name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
    return save_model(model, folder)


EVEN = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 12},
    "qwen3_moe": {"num_local_experts": 32, "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 12},
}


@pytest.mark.parametrize("name", EVEN)
def test_bytes_of_a_pass_follow_the_formula(tmp_path: Path, name: str) -> None:
    """dense + Σ over layers of E·(1 − (1 − k/E)^tokens)·expert_bytes, and a row of the table for each token."""
    path = even(tmp_path, name, **EVEN[name])
    model = load(path, {"": "disk"})
    stream = loaded(model).stream
    sizes = {key: tensor.nbytes for key, tensor in load_file(path / "model.safetensors").items()}
    table = sizes.pop("model.embed_tokens.weight") // model.config.vocab_size
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    dense = sum(sizes.values()) - experts
    count, chosen = EVEN[name]["num_local_experts"], EVEN[name]["num_experts_per_tok"]
    for tokens in (1, 4, 16, 48):
        before = stream.bytes_read
        with torch.inference_mode():
            model(torch.randperm(264, generator=torch.Generator().manual_seed(tokens))[None, :tokens])
        formula = dense + experts * (1 - (1 - chosen / count) ** tokens) + tokens * table
        assert stream.bytes_read - before == pytest.approx(formula, rel=0.05)
    placement = place(path, device_map={"": "disk"})
    assert placement.streamed_bytes_per_token == loaded(model).streamed
    assert placement.streamed_bytes_per_token == pytest.approx(dense + experts * chosen / count + table, rel=1e-3)
    assert f"Of {count} experts a token moves {chosen}." in placement.explanation
