"""Names that share their bytes in a torch file: one tensor where the class ties them, else one of each name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from support.adapters import merged_by_peft, tuned
from support.models import forward, tiny_model
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

import bigpipe
from bigpipe.bigmodel.adapters import Merge, merge_adapter
from bigpipe.bigmodel.architecture import untied
from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint, open_adapter, open_checkpoint
from bigpipe.bigmodel.quantization import Settings, quantize_checkpoint, understand
from bigpipe.bigmodel.writing import Conversion, planned_bytes, save_checkpoint
from bigpipe.errors import UsageError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def shared(folder: Path, **changes: Any) -> Any:
    """A Llama whose head has the numbers of its embedding, as a torch file in which both share a storage."""
    model = tiny_model("llama", **changes)
    model.lm_head.weight = model.model.embed_tokens.weight
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_head_that_is_not_tied_keeps_its_weight(tmp_path: Path) -> None:
    model = shared(tmp_path / "source")
    described = describe_checkpoint(tmp_path / "source")
    assert described.tied == {HEAD: EMBEDDING}
    save_checkpoint(tmp_path / "source", tmp_path / "resharded")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resharded", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(forward(loaded), forward(model))
    save_checkpoint(model, tmp_path / "of-memory")
    assert torch.equal(load_file(tmp_path / "of-memory" / "model.safetensors")[HEAD], model.lm_head.weight)
    quantize_checkpoint(tmp_path / "source", tmp_path / "quantized", scheme="int8")
    assert {HEAD, EMBEDDING} <= names(tmp_path / "quantized")
    assert bigpipe.reproduce(tmp_path / "quantized", tmp_path / "source").equal
    save_checkpoint(tmp_path / "source", tmp_path / "bin", format="bin")
    assert open_checkpoint(tmp_path / "bin").tied == {HEAD: EMBEDDING}


def test_a_head_that_is_tied_is_stored_once(tmp_path: Path) -> None:
    model = shared(tmp_path / "source", tie_word_embeddings=True)
    save_checkpoint(tmp_path / "source", tmp_path / "resharded")
    save_checkpoint(model, tmp_path / "of-memory")
    quantize_checkpoint(tmp_path / "source", tmp_path / "quantized", scheme="int8")
    for folder in ("resharded", "of-memory", "quantized"):
        assert HEAD not in names(tmp_path / folder), folder


def test_a_plan_counts_the_head_that_is_written(tmp_path: Path) -> None:
    shared(tmp_path / "source")
    described = describe_checkpoint(tmp_path / "source")
    saved = save_checkpoint(tmp_path / "source", tmp_path / "resharded")
    plans, _ = Conversion(max_shard_size=10**9).of(described)
    assert planned_bytes(plans) == saved.bytes
    made = quantize_checkpoint(tmp_path / "source", tmp_path / "quantized", scheme="int8")
    assert understand(described, Settings(scheme="int8"))[0].nbytes == made.bytes


@pytest.mark.filterwarnings("ignore")  # peft asks transformers in a way that is going out
def test_an_adapter_of_an_embedding_leaves_a_head_with_its_bytes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = shared(tmp_path / "source")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "apart")
    whole = {"target_modules": ["q_proj"]}
    kinds: tuple[dict[str, Any], ...] = (
        {"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]},
        {**whole, "modules_to_save": ["embed_tokens"]}, {**whole, "modules_to_save": ["lm_head"]},
    )  # fmt: skip
    for number, kind in enumerate(kinds):
        adapter = tuned(tmp_path / "apart", tmp_path / f"lora-{number}", r=4, **kind)
        saved = merge_adapter(tmp_path / "source", adapter, out := tmp_path / f"out-{number}")
        wanted, found = merged_by_peft(tmp_path / "apart", adapter).state_dict(), load_file(out / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        merge, described = Merge(max_shard_size=10**9), describe_checkpoint(tmp_path / "source")
        plans, _ = merge.of(described, merge.changes(described, [open_adapter(adapter).described]))
        assert planned_bytes(plans) == saved.bytes


BOTH = ("float32", (4, 2))
T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("config", "stored", "own"),
    [
        ({"model_type": "phi", "tie_word_embeddings": False}, (EMBEDDING, HEAD), {HEAD}),
        ({"model_type": "phi", "tie_word_embeddings": True}, (EMBEDDING, HEAD), set()),
        ({"model_type": "phi"}, (EMBEDDING, HEAD), set()),
        ({"model_type": "t5", "tie_word_embeddings": False}, T5, {"lm_head.weight"}),
        ({"model_type": "x", "text_config": {"tie_word_embeddings": False}}, (EMBEDDING, HEAD), {HEAD}),
        (
            {"model_type": "x", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
            (EMBEDDING, HEAD),
            set(),
        ),
        (None, (EMBEDDING, HEAD), {HEAD}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_class_that_nobody_here_knows_is_taken_at_its_configs_word(
    config: dict[str, Any] | None, stored: tuple[str, ...], own: set[str]
) -> None:
    kept, *aliases = stored
    described = ModelDescription(config=config, tensors={kept: BOTH}, tied=dict.fromkeys(aliases, kept))
    found = untied(described)
    assert set(found.tensors or {}) == {kept, *own}
    assert set(found.tied) == set(aliases) - own


OWN = """
import torch

class Two(torch.nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.online, self.target = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        if tie:
            self.target.weight = self.online.weight
        self.other = torch.nn.Linear(64, 64)

    def forward(self, numbers):
        return self.other(self.target(self.online(numbers)))
"""


@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
def test_names_of_an_own_class_that_share_storage_are_all_there(tmp_path: Path, tie: bool) -> None:
    """As those of a target network that began as a copy: nobody but the class could say that they are tied."""
    (tmp_path / "ownties.py").write_text(OWN)
    weights = {name: torch.full((64, 64), float(number)) for number, name in enumerate(("other", "online"))}
    biases = {f"{name}.bias": torch.ones(64) for name in ("online", "target", "other")}
    state = {f"{name}.weight": weight for name, weight in weights.items()} | biases
    (folder := tmp_path / "bin").mkdir()
    torch.save({**state, "target.weight": weights["online"]}, folder / "pytorch_model.bin")
    (folder / "bigpipe_architecture.json").write_text(json.dumps({"class": "ownties:Two", "config": {"tie": tie}}))
    trusted: dict[str, Any] = {"trust": ["ownties"], "base": tmp_path}
    save_checkpoint(folder, tmp_path / "sharded")
    skipped = ["online", "target"]
    quantize_checkpoint(folder, tmp_path / "int8", scheme="int8", dtype="float32", skip_modules=skipped, **trusted)
    for each in ("bin", "sharded", "int8"):
        model = bigpipe.load(tmp_path / each, **trusted)
        assert torch.equal(model.target.weight, weights["online"]), each
    assert ("target.weight" in names(tmp_path / "int8")) != tie


class Wrapping(torch.Tensor):
    """As those of quantization libraries: what it stands for lies in other tensors."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*(each.inner if isinstance(each, cls) else each for each in arguments), **(options or {}))


def test_tensors_without_memory_of_their_own_are_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'a' has no data here"):
        save_checkpoint({"a": Wrapping(torch.ones(2)), "b": Wrapping(torch.zeros(2))}, tmp_path / "out")
    with FunctionalTensorMode(), pytest.raises(UsageError, match="'a' has no data here"):  # one without a pointer
        save_checkpoint({"a": FunctionalTensor.to_functional(torch.ones(2))}, tmp_path / "out")


def test_a_conjugate_is_no_alias(tmp_path: Path) -> None:
    number = torch.tensor([1 + 2j])
    save_checkpoint({"a": number, "b": number.conj()}, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], number.conj().resolve_conj())


def test_a_negative_view_is_no_alias(tmp_path: Path) -> None:
    number = torch.tensor([1 + 2j])
    save_checkpoint({"a": number.imag, "b": number.conj().imag}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert (found["a"].tolist(), found["b"].tolist()) == ([2.0], [-2.0])


def test_what_torchao_says_in_headers_is_not_lost(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"a.weight_qdata": torch.zeros(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(2)},
        tmp_path / "model.safetensors",
        {"format": "pt", "a.weight": '{"_type": "Int8Tensor"}'},
    )
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    with pytest.raises(UsageError, match="stands in the headers of their own files alone"):
        save_checkpoint(tmp_path, tmp_path.with_name("out"))
