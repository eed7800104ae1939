"""Architectures learnt from configs, against the classes themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.architectures import UNUSUAL
from support.real import describe_here

from bigpipe.bigmodel.architecture import (
    Architecture,
    describe_architecture,
    read_request,
    request_key,
    with_empty_parameters,
)
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.trust import Trust

OPT_13B = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 40,
    "ffn_dim": 20480, "num_attention_heads": 40, "vocab_size": 50272, "word_embed_proj_dim": 5120,
}  # fmt: skip
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 1}
T5 = {"model_type": "t5", "num_layers": 1}
DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 4,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip

GPT = """
import torch

print("code of the model speaks")

class Settings:
    model_type, vocab_size, block_size, width = "gpt", None, None, 8

class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = torch.nn.Linear(width, 3 * width)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)), persistent=False)

class GPT(torch.nn.Module):
    @staticmethod
    def get_default_config():
        return Settings()

    def __init__(self, config):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 2)]
        self.wte = torch.nn.Embedding(config.vocab_size, config.width)
        self.blocks = torch.nn.ModuleList(Block(config.width) for _ in range(2))
        self.lm_head = torch.nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

class Stubborn(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = float(torch.ones(width).sum())
        self.projection = torch.nn.Linear(width, width)
"""


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memo")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, memo: Path) -> dict[str, Architecture]:
    base = tmp_path_factory.mktemp("base")
    (base / "tinygpt.py").write_text(GPT)
    custom = {"class": "tinygpt:GPT", "config": {"vocab_size": 11}, "no_split_module_classes": ["Block"]}
    stubborn = {"class": "tinygpt:Stubborn", "config": {"width": 4}}
    sources = Sources(trust=Trust(("tinygpt",)), base=base, memo=memo)
    return {
        "opt": describe_architecture(OPT_13B, sources=sources),
        "opt-none": describe_architecture(OPT_13B, head="none", sources=sources),
        "bert": describe_architecture(BERT, sources=sources),
        "t5": describe_architecture(T5, sources=sources),
        "deepseek": describe_architecture(DEEPSEEK, sources=sources),
        "custom": describe_architecture({}, custom=custom, sources=sources),
        "stubborn": describe_architecture({}, custom=stubborn, sources=sources),
    }


def parameters(architecture: Architecture) -> int:
    return sum(tensor.elements for tensor in architecture.tensors() if not tensor.buffer)


def test_opt_13b_has_its_published_parameters_and_counts_the_tied_head_once(described: dict[str, Architecture]) -> None:
    opt = described["opt"]
    assert parameters(opt) == 12_853_473_280
    assert opt.class_name == "OPTForCausalLM"
    assert opt.no_split == ("OPTDecoderLayer",)
    assert opt.tied == (("model.decoder.embed_tokens.weight", "lm_head.weight"),)
    assert (opt.input_embedding, opt.output_embedding) == ("model.decoder.embed_tokens", "lm_head")
    assert opt.config["activation_function"] == "relu", "defaults of the config class are filled in"


def test_linear_modules_are_the_exact_ones(described: dict[str, Architecture]) -> None:
    linear = {module.name for module in described["opt"].modules if module.linear}
    assert "model.decoder.layers.39.fc2" in linear
    assert "model.decoder.embed_positions" not in linear
    assert len(linear) == 40 * 6 + 1


def test_head_none_is_the_bare_model(described: dict[str, Architecture]) -> None:
    bare = described["opt-none"]
    assert bare.class_name == "OPTModel"
    assert bare.output_embedding is None
    assert bare.tied == ()


def test_modules_come_parents_first_with_their_own_tensors_only(described: dict[str, Architecture]) -> None:
    opt = described["opt"]
    assert opt.modules[0].name == ""
    assert opt.modules[0].children == ("model", "lm_head")
    layer = opt.by_name["model.decoder.layers.0"]
    assert layer.tensors == ()
    assert [tensor.name for tensor in opt.by_name["model.decoder.layers.0.fc1"].tensors] == [
        "model.decoder.layers.0.fc1.weight",
        "model.decoder.layers.0.fc1.bias",
    ]


def test_buffers_say_whether_they_are_saved_and_whether_their_dtype_is_fixed(
    described: dict[str, Architecture],
) -> None:
    tensors = {tensor.name: tensor for tensor in described["bert"].tensors()}
    positions = tensors["bert.embeddings.position_ids"]
    assert (positions.buffer, positions.persistent, positions.dtype, positions.fixed) == (True, False, "int64", True)
    rotary = next(t for t in described["deepseek"].tensors() if t.name == "model.rotary_emb.inv_freq")
    assert (rotary.buffer, rotary.dtype, rotary.fixed) == (True, "float32", True)
    assert not tensors["bert.embeddings.word_embeddings.weight"].fixed


def test_t5_keeps_wo_in_float32_when_loaded_as_float16(described: dict[str, Architecture]) -> None:
    t5 = described["t5"]
    tensors = {tensor.name: tensor for tensor in t5.tensors()}
    kept = tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    assert (t5.dtype_of(kept, "float16"), t5.dtype_of(kept, "bfloat16")) == ("float32", "bfloat16")
    assert t5.dtype_of(tensors["shared.weight"], "float16") == "float16"
    assert t5.tied[0][0] == "shared.weight"
    assert len(t5.tied[0]) == 4


def test_a_native_type_is_built_natively_whatever_auto_map_says(described: dict[str, Architecture]) -> None:
    assert described["deepseek"].class_name == "DeepseekV3ForCausalLM"


def test_a_custom_class_updates_its_default_config_and_keeps_its_tie(described: dict[str, Architecture]) -> None:
    custom = described["custom"]
    assert custom.class_name == "GPT"
    assert custom.no_split == ("Block",)
    assert custom.tied == (("wte.weight", "lm_head.weight"),)
    assert parameters(custom) == 11 * 8 + 2 * (8 * 24 + 24)
    assert parameters(described["stubborn"]) == 4 * 4 + 4


def test_json_round_trip(described: dict[str, Architecture]) -> None:
    for architecture in described.values():
        assert Architecture.from_json(json.loads(json.dumps(architecture.as_json()))) == architecture


def test_the_answer_is_remembered(
    described: dict[str, Architecture], memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no child could answer
    assert describe_architecture(BERT, sources=Sources(memo=memo)) == described["bert"]


def test_an_untrusted_module_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "bigpipe_architecture.json").write_text('{"class": "os:system"}')
    with pytest.raises(UsageError, match="module os is not trusted") as caught:
        describe_architecture(tmp_path)
    assert "trust: {modules: [os]}" in caught.value.cure


def test_remote_code_is_refused_with_cause_and_cure() -> None:
    config = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "modeling_mystery.Mystery"}}
    with pytest.raises(UsageError, match="brings its own code") as caught:
        describe_architecture(config)
    assert "remote_code" in caught.value.cure


@pytest.mark.parametrize(
    ("text", "cause"),
    [("[1]", "is not a JSON object"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpoint, match=cause):
        describe_architecture(tmp_path)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        describe_architecture(tmp_path)


def test_the_calling_process_imports_no_torch(described: dict[str, Architecture], memo: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from bigpipe.bigmodel.architecture import describe_architecture as d; "
        "from bigpipe.bigmodel.sources import Sources; "
        f"d({T5!r}, sources=Sources(memo=Path({str(memo)!r}))); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_damaged_memory_is_asked_again(described: dict[str, Architecture], memo: Path) -> None:
    for answer in (memo / "architectures").glob("*.json"):
        answer.write_text('{"key": "anoth')
    assert describe_architecture(BERT, sources=Sources(memo=memo)) == described["bert"]


def test_how_weights_are_stored_is_no_other_question() -> None:
    """A plan with another scheme must not build the class again."""
    config = {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "hidden_size": 64}
    plain = request_key(read_request(config))
    for change in ({"quantization_config": {"quant_method": "bitsandbytes"}}, {"dtype": "bfloat16"}):
        assert request_key(read_request({**config, **change})) == plain
    assert request_key(read_request({**config, "hidden_size": 32})) != plain
    pipeline = {"_class_name": "UNet2DConditionModel", "quantization_config": {}}
    assert request_key(read_request(pipeline)) != request_key(read_request({"_class_name": "UNet2DConditionModel"}))


def test_an_infinite_number_as_transformers_writes_it_into_json() -> None:
    limit = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert describe_here({**UNUSUAL["falcon_h1"], **limit}) == describe_here(
        {**UNUSUAL["falcon_h1"], "time_step_limit": [0.0, float("inf")]}
    )


OWN = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "ownseveral"

class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()

class OwnForCausalLM(Own):
    pass

class OwnForSequenceClassification(Own):
    pass
"""


@pytest.mark.parametrize("saved", ["Own", "OwnForCausalLM", "OwnForSequenceClassification"])
def test_of_several_classes_in_auto_map_the_one_that_was_saved_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    import torch

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM", "AutoModel": "Own"}
    classes["AutoModelForSequenceClassification"] = "OwnForSequenceClassification"
    mapped = {name: f"own.{value}" for name, value in classes.items()}
    config = {"model_type": "ownseveral", "architectures": [saved], "auto_map": mapped}
    (folder := tmp_path / "model").mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "config.json").write_text(json.dumps(config))
    request = read_request(folder, sources=Sources(trust_remote_code=True))
    assert type(with_empty_parameters(request, torch.float32)).__name__ == saved
