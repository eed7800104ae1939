"""Of a mixture of experts only those are read that tokens chose, and nothing that it says changes by that."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import DECODERS
from support.models import save_model

from bigpipe.bigmodel.checkpoint import MappedFiles, open_checkpoint
from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.execution.experts import MostUsed, chosen_experts
from bigpipe.bigmodel.placement import place
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task
from bigpipe.errors import StageFailed

_MOE = DECODERS["mixtral"]
_LLAMA4 = {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "head_dim": 16, "num_experts_per_tok": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    **{name: DECODERS[name] for name in ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "jamba")},
    **{name: {**_MOE, "model_type": name} for name in ("olmoe", "phimoe", "granitemoe", "jetmoe")},
    "qwen2_moe": {**_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 32},
    "ernie4_5_moe": {**_MOE, "model_type": "ernie4_5_moe"},
    "llama4_text": {**_MOE, **_LLAMA4, "model_type": "llama4_text"},
}


def mixture(folder: Path, name: str, max_shard_size: str = "5GB", **changes: Any) -> Path:
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
    return save_model(model.eval(), folder, max_shard_size=max_shard_size)


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


def test_exactly_what_was_chosen_is_read(tmp_path: Path) -> None:
    path = mixture(tmp_path, "qwen3_moe")
    model = load(path, {"": "disk"}, dtype="float32")
    stream, chosen = loaded(model).stream, []
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.register_forward_pre_hook(lambda _, arguments: chosen.append(set(arguments[1].flatten().tolist())))
    sizes = {key: tensor.nbytes for key, tensor in load_file(path / "model.safetensors").items()}
    table = sizes.pop("model.embed_tokens.weight") // model.config.vocab_size
    expert = sum(size for key, size in sizes.items() if ".layers.0.mlp.experts.3." in key)
    dense = sum(size for key, size in sizes.items() if ".experts." not in key)
    with torch.inference_mode():
        model(torch.arange(20, 25)[None])
    assert stream.bytes_read == dense + 5 * table + expert * sum(map(len, chosen))
    assert 0 < sum(map(len, chosen)) < 16


LISTS = {
    "NllbMoe": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_experts": 6, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "vocab_size": 264, "max_position_embeddings": 64, "expert_capacity": 16,
    },
    "SwitchTransformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 6, "vocab_size": 264,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_experts_that_are_modules_are_read_as_they_are_called(tmp_path: Path, name: str) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(**LISTS[name])
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(made.eval(), tmp_path)
    held, streamed = load(tmp_path, dtype="float32"), load(tmp_path, {"": "disk"}, dtype="float32")
    stream = loaded(streamed).stream
    tokens = torch.tensor([[7, 9, 11]])
    found = []

    def work(number: int) -> None:
        batch = tokens + number
        found.append((batch, streamed(batch, decoder_input_ids=batch).logits))

    with torch.inference_mode():
        stream.together(streamed, work, range(3), 3)
        assert all(torch.equal(held(batch, decoder_input_ids=batch).logits, logits) for batch, logits in found)
    everything = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert stream.bytes_read < 0.9 * everything


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return mixture(tmp_path, "mixtral")


class TestStaying:
    @staticmethod
    def passes(path: Path, placement: Any, count: int) -> tuple[list[torch.Tensor], list[int]]:
        """Logits and bytes read of as many forwards over the same tokens."""
        model = load(path, placement, dtype="float32")
        stream, logits, read = loaded(model).stream, [], [0]
        for _ in range(count):
            with torch.inference_mode():
                logits.append(model(torch.arange(20, 24)[None]).logits)
            read.append(stream.bytes_read)
        return logits, [after - before for before, after in pairwise(read)]

    def test_what_has_room_is_read_once(self, path: Path) -> None:
        roomy = place(path, device_map={"": "disk"}, max_memory={"cpu": "1GiB", "disk": "1GiB"}, dtype="float32")
        bare = place(path, device_map={"": "disk"}, dtype="float32")
        experts = sum(t.nbytes for name, t in load_file(path / "model.safetensors").items() if ".experts." in name)
        assert (roomy.kept_experts, bare.kept_experts) == (experts, 0)
        assert bare.streamed_bytes_per_token - roomy.streamed_bytes_per_token == experts // 4
        logits, read = self.passes(path, roomy, 3)
        wanted, again = self.passes(path, bare, 2)
        assert all(torch.equal(found, wanted[0]) for found in logits)
        assert read[0] == again[0] == again[1]
        assert read[1] == read[2] < again[1] / 2

    def test_no_more_stays_than_there_is_room_for(self, path: Path) -> None:
        bare = place(path, device_map={"": "disk"}, dtype="float32")
        one = 4 * 3 * 64 * 96
        cap = bare.needs["cpu"].total + 3 * one
        placement = place(path, device_map={"": "disk"}, max_memory={"cpu": cap, "disk": "1GiB"}, dtype="float32")
        assert placement.kept_experts == 3 * one
        model = load(path, placement, dtype="float32")
        wanted = load(path, dtype="float32")
        experts = loaded(model).stream.experts
        for first in range(3, 200, 16):
            tokens = torch.arange(first, first + 5)[None]
            with torch.inference_mode():
                assert torch.equal(model(tokens).logits, wanted(tokens).logits)
            held = sum(tensor.untyped_storage().nbytes() for kept in experts._kept.values() for tensor in kept)
            assert 0 < held <= 3 * one

    def test_it_is_what_is_used_most(self) -> None:
        used: MostUsed[str] = MostUsed(20)
        assert used.use("a", 10) == used.use("b", 10) == (True, [])
        assert used.use("c", 10) == (False, [])
        assert used.use("b", 10) == (True, [])
        assert used.use("c", 10) == (True, ["a"])
        assert used.use("a", 10) == (False, [])
        assert ("a" in used, "b" in used, "c" in used) == (False, True, True)


def test_how_a_forward_tells_what_it_uses() -> None:
    states, chosen = torch.ones(2, 8), torch.tensor([[1, 3], [3, 4]])
    assert chosen_experts("Experts", 4, [states, chosen, states]) == {1, 3}
    assert chosen_experts("Experts", 4, [states, [2, 0, 1, 0]]) == {0, 2}
    assert chosen_experts("Experts", 4, [states]) == {0, 1, 2, 3}
    by_expert = torch.zeros(4, 2, 8)
    by_expert[2, 1, 5] = -1e-9
    assert chosen_experts("Llama4TextExperts", 4, [by_expert.view(8, 8)]) == {2}
    assert chosen_experts("Experts", 4, [by_expert.view(8, 8)]) == {0, 1, 2, 3}


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("mapped", [False, True], ids=["before it is mapped", "under its map"])
def test_a_cut_expert_is_an_error_with_its_bytes_and_nothing_hangs(tmp_path: Path, together: int, mapped: bool) -> None:
    path = mixture(tmp_path, "mixtral", max_shard_size="20KB")
    file = open_checkpoint(path).tensors["model.layers.1.block_sparse_moe.experts.5.w1.weight"].file
    content, tokens = file.read_bytes(), torch.arange(3, 260).reshape(1, -1)[:, :100]
    model = load(path, {"": "disk"}, dtype="float32")
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.inference_mode():
            found[number] = model(tokens + number).logits

    stream = loaded(model).stream
    if mapped:
        stream.together(model, work, range(3), together)
    os.truncate(file, len(content) // 2)
    with pytest.raises(StageFailed, match=r"safetensors: bytes \d+–\d+ \(model\..*experts\.\d\.w\d.* cannot be read"):
        stream.together(model, work, range(3), together)
    assert all(parameter.is_meta for parameter in model.parameters())
    if not mapped:
        return
    file.write_bytes(content)
    stream.together(model, work, range(3), together)
    held = load(path, dtype="float32")
    with torch.inference_mode():
        assert all(torch.equal(found[number], held(tokens + number).logits) for number in range(3))


def test_an_entry_of_a_view_in_a_torch_file_is_found(tmp_path: Path) -> None:
    stored = torch.arange(60.0).reshape(3, 4, 5)
    torch.save({"turned": stored.transpose(0, 2), "plain": stored}, tmp_path / "pytorch_model.bin")
    tensors, files = open_checkpoint(tmp_path / "pytorch_model.bin").tensors, MappedFiles()
    assert tensors["turned"].view is not None
    for number in range(3):
        assert torch.equal(files.window(tensors["plain"].entry(number)), stored[number : number + 1])
        assert torch.equal(files.window(tensors["turned"].entry(number)), stored.transpose(0, 2)[number : number + 1])


def test_who_comes_while_experts_are_here_finds_those_it_lacks(path: Path) -> None:
    model, held = load(path, {"": "disk"}, dtype="float32"), load(path, dtype="float32")
    stream = loaded(model).stream
    module = model.model.layers[0].mlp.experts
    group = next(group for group in stream._groups if group.module is module)
    for expert in (1, 5):
        stream._choose(group, module, (torch.ones(1, 64), torch.tensor([[expert]])), {})
    for expert in (1, 5):
        assert torch.equal(module.down_proj[expert], held.model.layers[0].mlp.experts.down_proj[expert])
        stream._leave(group, module, (), None)
    assert module.down_proj.is_meta
