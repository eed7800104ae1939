"""Estimates as their users meet them: what comes back, what it is made of, what fits, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.shells import sharded, shell

from bigpipe.bigmodel.architecture import known_architecture, outline
from bigpipe.bigmodel.footprint import Budget, Estimate, Workload, estimate
from bigpipe.bigmodel.footprint.estimates import compare
from bigpipe.bigmodel.formats import DTYPES
from bigpipe.errors import InvalidCheckpoint, NoWeights, Offline, UsageError
from bigpipe.fit import as_options

OPT_13B: dict[str, Any] = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 40,
    "ffn_dim": 20480, "num_attention_heads": 40, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 5120, "activation_function": "relu", "torch_dtype": "float16",
}  # fmt: skip
LLAMA_405B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
TERMS = {
    "parameters", "total", "largest_layer", "weights", "stored", "buffers", "kv_cache", "activations", "runtime",
    "inference", "inference_high", "quantizing", "training", "terms",
}  # fmt: skip
GIB = 2**30
OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "ownkind"

    def __init__(self, width=4, **more):
        super().__init__(**more)
        self.width = width

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width, bias=False)
        self.post_init()
"""


@pytest.fixture
def opt_13b(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OPT_13B))
    return file


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def create(server: LoopbackHub, folder: Path, config: dict[str, Any], dtype: str, limit: int) -> None:
    architecture = known_architecture(config)
    assert architecture is not None
    tensors = [(tensor.name, dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent]
    files = sharded(folder, tensors, limit)
    server.create("org/model", {"config.json": json.dumps(config).encode(), **files})


class TestBareConfig:
    def test_every_term_of_every_dtype(self, opt_13b: Path) -> None:
        data = estimate(opt_13b, dtypes=list(DTYPES), batch_size=4).as_json()
        assert data["schema"] == "bigpipe.estimate/1"
        assert (data["source"], data["fetched_bytes"], data["class"]) == ("config", 0, "OPTForCausalLM")
        assert list(data["dtypes"]) == list(DTYPES)
        for row in data["dtypes"].values():
            assert set(row) == TERMS
            assert row["inference"] == sum(row[name] for name in ("weights", "kv_cache", "activations", "runtime"))
            assert row["inference"] < row["inference_high"] < 1.2 * row["inference"]
            assert {term["basis"] for term in row["terms"].values()} <= {"exact", "calibrated", "bound"}
            assert all(term["low"] <= term["bytes"] <= term["high"] for term in row["terms"].values())
        assert json.loads(json.dumps(data)) == data

    def test_published_and_worked_out_numbers(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["float16", "int8"], batch_size=4)
        half, int8 = made["float16"], made["int8"]
        assert half.counts.parameters == 12_853_473_280
        assert half.weights.bytes == 2 * half.counts.parameters
        assert half.kv_cache.bytes == 40 * 2 * 5120 * 2 * 4 * 2048
        assert half.activations.bytes == 4 * 2048 * (2 * 20480 + 4 * 5120) * 2
        # Every matrix but the tied head, at one byte and a scale per row; everything else as it was
        matrices, rows = 40 * (4 * 5120 * 5120 + 2 * 5120 * 20480), 40 * (5 * 5120 + 20480)
        assert int8.weights.bytes == half.weights.bytes - matrices + 4 * rows
        assert int8.counts.stored == int8.weights.bytes + 40 * 6

    def test_a_dtype_that_nothing_was_estimated_in_is_told(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["bfloat16", "int8"])
        for ask in (made.__getitem__, lambda dtype: made.verdict(dtype, 24 * GIB)):
            with pytest.raises(UsageError, match="nothing was estimated in 'float16'") as caught:
                ask("float16")
            assert (caught.value.field, caught.value.cure) == ("dtypes", "did you mean 'bfloat16'?")

    def test_training_by_optimizer(self, opt_13b: Path) -> None:
        full = estimate(opt_13b, dtypes=["float32", "bfloat16", "nf4"])
        count = full["float32"].counts.parameters
        kept = full["bfloat16"].training["adamw"].bytes - 16 * count  # type: ignore[union-attr]
        assert kept == 2048 * 5120 * 34 * 40 + 2048 * 50272 * 6
        sizes = {name: term.bytes for name, term in full["bfloat16"].training.items() if term}
        assert sizes["lora"] < sizes["sgd"] < sizes["adamw_8bit"] < sizes["adamw"]
        assert round((sizes["adamw_8bit"] - kept) / count, 2) == 10.03
        assert [name for name, term in full["nf4"].training.items() if term] == ["lora"]

    def test_adapters_on_some_modules(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["nf4"], lora_rank=16, lora_targets=["q_proj", "v_proj"])
        whole = estimate(opt_13b, dtypes=["nf4"], lora_rank=16)
        inputs = made.as_json()["dtypes"]["nf4"]["terms"]["training.lora"]["inputs"]
        assert inputs["adapter parameters"] == 16 * 2 * 40 * (5120 + 5120)
        assert made["nf4"].training["lora"].bytes < whole["nf4"].training["lora"].bytes  # type: ignore[union-attr]
        with pytest.raises(UsageError, match="'query' names no linear module") as caught:
            estimate(opt_13b, lora_targets=["query"])
        assert "q_proj" in caught.value.cure

    def test_each_term_can_be_explained(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=list(DTYPES))
        for row in made.as_json()["dtypes"].values():
            for term in row["terms"].values():
                assert term["formula"]
                assert term["inputs"]
                assert term["source"]
        text = made.render(explain=True)
        assert "exact (25,706,946,560 bytes)" in text
        assert "heads 40" in text
        assert "arXiv 2205.05198" in text

    def test_the_length_is_capped_at_the_models(self, opt_13b: Path) -> None:
        assert estimate(opt_13b, sequence_length=5000).as_json()["sequence_length"] == 2048

    def test_head_none_is_accelerates_view(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_405B))
        bare = estimate(tmp_path, head="none", dtypes=["float16"])
        whole = estimate(tmp_path, dtypes=["float16"])
        assert bare.as_json()["class"] == "LlamaModel"
        assert whole["float16"].counts.total - bare["float16"].counts.total == 2 * 16384 * 128256

    def test_it_is_answered_without_torch(self, opt_13b: Path) -> None:
        code = (
            "import sys, bigpipe; "
            f"print(bigpipe.estimate({str(opt_13b)!r}, dtypes=['int8']).render()); "
            "sys.exit(bool({'torch', 'transformers', 'accelerate', 'pydantic'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


class TestFits:
    def test_yes(self, opt_13b: Path) -> None:
        verdict = estimate(opt_13b, dtypes=["nf4"]).verdict("nf4", 24 * GIB)
        assert (verdict.fits, verdict.cure) == (True, None)

    def test_the_largest_batch_that_fits_comes_first(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["int8"], batch_size=4)
        change = made.verdict("int8", 19 * GIB)
        assert change.cure is not None
        assert as_options(change.cure.change) == "--batch-size 3"
        assert change.bytes <= 19 * GIB
        assert change.bytes == Budget(made.architecture, "int8", Workload(batch_size=3)).inference_high
        assert Budget(made.architecture, "int8", Workload(batch_size=4)).inference_high > 19 * GIB

    def test_then_a_shorter_sequence(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["int8"])
        change = made.verdict("int8", int(13.5 * GIB))
        assert change.cure is not None
        name, length = as_options(change.cure.change).split()
        assert name == "--sequence-length"
        longer = Workload(sequence_length=int(length) + 1)
        assert Budget(made.architecture, "int8", longer).inference_high > 13.5 * GIB

    def test_then_a_narrower_dtype(self, opt_13b: Path) -> None:
        change = estimate(opt_13b, dtypes=["float16"], batch_size=2).verdict("float16", 20 * GIB)
        assert change.cure is not None
        assert as_options(change.cure.change) == "--dtypes int8"

    def test_then_quantized_scales(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["nf4"], sequence_length=1)
        single, double = (
            Budget(made.architecture, "nf4", Workload(sequence_length=1, double_quant=twice)).inference_high
            for twice in (False, True)
        )
        change = made.verdict("nf4", (single + double) // 2)
        assert change.cure is not None
        assert (as_options(change.cure.change), change.bytes) == ("--double-quant", double)

    def test_several_together_where_none_does_alone(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["float16"], batch_size=8)
        change = made.verdict("float16", 14 * GIB)
        assert change.cure is not None
        assert as_options(change.cure.change).startswith("--dtypes nf4 --batch-size ")
        batch = int(as_options(change.cure.change).split()[-1])
        fits, not_any_more = (
            Budget(made.architecture, "nf4", Workload(batch_size=size)).inference_high for size in (batch, batch + 1)
        )
        assert fits == change.bytes <= 14 * GIB < not_any_more

    def test_of_a_training_step(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["bfloat16", "nf4"], batch_size=8, train="adamw", memory="80GiB")
        change = made.verdict("bfloat16", 80 * GIB)
        assert change.cure is not None
        assert as_options(change.cure.change) == "--train lora --gradient-checkpointing"
        found = Budget(made.architecture, "bfloat16", Workload(batch_size=8, gradient_checkpointing=True))
        lora = found.training["lora"]
        assert lora is not None
        assert change.bytes == lora.high + found.runtime.high
        more = estimate(opt_13b, dtypes=["bfloat16"], batch_size=8, train="adamw").verdict("bfloat16", 330 * GIB)
        assert more.cure is not None
        assert as_options(more.cure.change) == "--gradient-checkpointing"
        assert "nf4 is not trained so" in made.render()
        with pytest.raises(UsageError, match="'adam'"):
            estimate(opt_13b, train="adam")

    def test_nothing_fits(self, opt_13b: Path) -> None:
        made = estimate(opt_13b, dtypes=["int8"], memory="4GiB")
        assert made.verdict("int8", 4 * GIB).cure is None
        assert "spread it over devices" in made.render()
        assert made.as_json()["dtypes"]["int8"]["smallest_change"] is None

    def test_a_size_that_is_none(self, opt_13b: Path) -> None:
        with pytest.raises(UsageError, match="memory: '24Gb' means bits"):
            estimate(opt_13b, memory="24Gb")


def test_the_table(opt_13b: Path) -> None:
    text = estimate(opt_13b, dtypes=["int8"], batch_size=4, memory="16GiB").render()
    headline, header, row, verdict, legend = text.splitlines()
    assert headline.endswith("OPTForCausalLM, 12,853,473,280 parameters; from config; 4 × 2048 tokens")
    assert header.split("  ")[-1] == "AdamW"
    assert row.split()[:3] == ["int8", "12.2", "GiB"]
    assert row.endswith("exact | exact | ±6 % | bound")
    assert "16.0 GiB GPU: no" in verdict
    assert "Smallest change that fits: --batch-size 1" in verdict
    assert "█ weights" in legend
    assert all(len(line) <= 170 for line in text.splitlines())
    narrow = estimate(opt_13b, dtypes=["int8"]).render(width=60).splitlines()
    assert all(len(line) <= 60 for line in narrow[1:3])
    assert narrow[2].split()[-2:] == ["14.5", "GiB"]


def test_several_models_in_one_table(opt_13b: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(LLAMA_405B))
    made = [
        estimate(path, dtypes=["nf4"], memory="80GiB", sequence_length=4096) for path in (opt_13b, tmp_path / "llama")
    ]
    lines = compare(made).splitlines()
    assert lines[0] == "2 models; 1 × 4096 tokens"
    assert [line.split()[0] for line in lines[2:4]] == ["nf4", "nf4"]
    assert lines[2].endswith("fits 80.0 GiB")
    assert lines[3].endswith("no; nothing that was tried would")
    assert "4096 tokens are more than the model takes: counted with 2048" in lines[4]
    assert lines[5].count("█") < lines[6].count("█")
    assert lines[6].split("▏")[0].endswith("×")
    assert all(len(line) <= 160 for line in compare(made, width=160).splitlines()[1:4])


class TestRepository:
    def test_four_hundred_billion_parameters_from_the_index(self, server: LoopbackHub, tmp_path: Path) -> None:
        architecture = known_architecture(LLAMA_405B)
        assert architecture is not None
        names = [tensor for tensor in architecture.tensors() if tensor.persistent]
        shards = [f"model-{number:05d}-of-00191.safetensors" for number in range(1, 192)]
        index = {
            "metadata": {"total_size": 811_706_777_600},
            "weight_map": {tensor.name: shards[at % 191] for at, tensor in enumerate(names)},
        }
        content = json.dumps(index).encode()
        files = {"config.json": json.dumps(LLAMA_405B).encode(), "model.safetensors.index.json": content}
        counted = {"parameters": {"BF16": 405_853_388_800}, "total": 405_853_388_800}
        weights = dict.fromkeys(shards, b"weights that nobody reads")
        server.create("org/llama-405b", {**files, **weights}, told_counts=counted)
        made = self.ask(server, tmp_path, "org/llama-405b", dtypes=["bfloat16", "nf4"])
        assert made["bfloat16"].counts.stored == 811_706_777_600
        assert made.source == "headers"
        assert made.checkpoint is not None
        assert made.checkpoint["dtypes"] == {"bfloat16": 405_853_388_800}
        assert made.fetched_bytes == server.bytes_sent()
        assert made.fetched_bytes - len(content) <= 100_000
        code = (
            "import sys, bigpipe; bigpipe.estimate('org/llama-405b', dtypes=['nf4']); "
            "sys.exit(bool({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
        )
        environment = {**os.environ, **server.environment(tmp_path / "other home")}
        assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0

    def ask(self, server: LoopbackHub, tmp_path: Path, model: str, **options: Any) -> Estimate:
        return estimate(model, environment=server.environment(tmp_path / "home"), **options)

    @pytest.mark.parametrize("branch", ["main", "refs/pr/1"])
    def test_an_address_does_as_well(self, server: LoopbackHub, tmp_path: Path, branch: str) -> None:
        create(
            server,
            tmp_path,
            {**OPT_13B, "hidden_size": 64, "num_attention_heads": 4, "word_embed_proj_dim": 64},
            "float16",
            10**7,
        )
        server.repositories["org/model"].branches[branch] = server.repositories["org/model"].branches["main"]
        address = f"{server.url}/org/model/tree/{quote(branch, safe='')}"  # as the Hub's own pages are called
        made = self.ask(server, tmp_path, address, dtypes=["float16"])
        assert made.model == "org/model"
        assert made.revision == server.repositories["org/model"].branches["main"]

    def test_offline_goes_on_with_what_is_cached(self, server: LoopbackHub, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "opt", "opt")
        commit = server.create("org/model", files_of(folder))
        snapshot = tmp_path / "home" / "hub" / "models--org--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text(commit)
        made = self.ask(server, tmp_path, "org/model", offline=True, dtypes=["float16"])
        assert (made.model, made.revision, made.source) == ("org/model", commit, "headers")
        assert not server.log
        with pytest.raises(Offline):
            self.ask(server, tmp_path, "org/other", offline=True)

    def test_a_repositorys_own_code_runs_only_where_it_is_trusted_at_a_commit(
        self, server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        config = {"model_type": "ownkind", "width": 6, "auto_map": {
            "AutoConfig": "own_kind.OwnConfig", "AutoModel": "own_kind.OwnModel"}}  # fmt: skip
        commit = server.create(
            "org/own", {"config.json": json.dumps(config).encode(), "own_kind.py": OWN_CODE.encode()}
        )
        options: dict[str, Any] = {"dtypes": ["float32"], "memo": tmp_path / "memo"}
        with pytest.raises(UsageError, match="brings its own code"):
            self.ask(server, tmp_path, "org/own", **options)
        with pytest.raises(UsageError, match="only at a commit"):
            self.ask(server, tmp_path, "org/own", trust_remote_code=True, **options)
        made = self.ask(server, tmp_path, "org/own", trust_remote_code=True, revision=commit, **options)
        assert made.architecture.class_name == "OwnModel"
        assert made["float32"].weights.bytes == 4 * 6 * 6

    def test_nothing_is_fetched_twice(self, server: LoopbackHub, tmp_path: Path) -> None:
        create(
            server,
            tmp_path,
            {**OPT_13B, "hidden_size": 64, "num_attention_heads": 4, "word_embed_proj_dim": 64},
            "float16",
            10**7,
        )
        commit = server.repositories["org/model"].branches["main"]
        options: dict[str, Any] = {"memo": tmp_path / "memo", "revision": commit, "dtypes": ["int8"]}
        first = self.ask(server, tmp_path, "org/model", **options)
        again = self.ask(server, tmp_path, "org/model", **options)
        assert (first.metrics(), again.fetched_bytes) == (again.metrics(), 0)


class TestDirectory:
    @pytest.mark.parametrize("format", ["safetensors", "bin"])
    def test_headers_and_class_agree(self, tmp_path: Path, format: Any) -> None:
        folder = make_checkpoint(tmp_path / "opt", "opt", format=format, max_shard_size="50KB")
        made = estimate(folder, dtypes=["float32"], sequence_length=128, memo=tmp_path / "memo")
        assert (made.source, made.notes) == ("headers", ())
        assert made.checkpoint is not None
        assert made.checkpoint["bytes"] == made["float32"].counts.stored
        assert made.checkpoint["format"] == format

    def test_a_checkpoint_that_lacks_something_is_told_of(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(
            json.dumps({**OPT_13B, "hidden_size": 64, "num_attention_heads": 4, "word_embed_proj_dim": 64})
        )
        shell(tmp_path / "model.safetensors", [("model.decoder.embed_tokens.weight", "float16", (50272, 64))])
        (note,) = estimate(tmp_path).notes
        assert "not in the checkpoint: model.decoder.embed_positions.weight" in note

    def test_an_unknown_class_is_estimated_from_headers_alone(self, tmp_path: Path) -> None:
        config = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "m.M"}, "hidden_size": 64}
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = [("model.embed_tokens.weight", "bfloat16", (100, 64)), ("lm_head.weight", "bfloat16", (100, 64))]
        tensors += [(f"model.layers.{n}.mlp.up.weight", "bfloat16", (256, 64)) for n in range(3)]
        tensors += [(f"model.layers.{n}.norm.weight", "bfloat16", (64,)) for n in range(3)]
        shell(tmp_path / "model.safetensors", tensors)
        made = estimate(tmp_path, dtypes=["bfloat16", "int8"])
        assert "brings its own code" in made.notes[0]
        assert made["bfloat16"].weights.bytes == 2 * (2 * 6400 + 3 * (256 * 64 + 64))
        assert made["bfloat16"].weights.basis == "calibrated"
        assert made["bfloat16"].counts.largest_layer == 2 * (256 * 64 + 64)
        assert made["int8"].weights.bytes == 2 * (2 * 6400 + 3 * 64) + 3 * (256 * 64 + 4 * 256)

    def test_an_unknown_class_with_packed_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery"}))
        shell(tmp_path / "model.safetensors", [("model.layers.0.qweight", "uint8", (10, 10))])
        with pytest.raises(UsageError, match="weights are packed"):
            estimate(tmp_path)

    def test_a_custom_class_needs_trust(self, tmp_path: Path) -> None:
        (tmp_path / "tinynet.py").write_text(
            "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
            "        self.first = torch.nn.Linear(width, width)\n        self.last = torch.nn.Linear(width, 2)\n"
        )
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "bigpipe_architecture.json").write_text('{"class": "tinynet:Net", "config": {"width": 8}}')
        with pytest.raises(UsageError, match="module tinynet is not trusted"):
            estimate(folder, base=tmp_path)
        made = estimate(folder, base=tmp_path, trust=["tinynet"], dtypes=["float32"])
        assert made["float32"].weights.bytes == 4 * (8 * 8 + 8 + 8 * 2 + 2)
        assert made["float32"].kv_cache.bytes == 0


class TestMistakes:
    @pytest.mark.parametrize("model", ["not a model", "/nowhere/at/all", "https://huggingface.co/"])
    def test_what_is_no_model(self, model: str) -> None:
        with pytest.raises(UsageError, match="neither a path that exists nor the name of a repository"):
            estimate(model)

    @pytest.mark.parametrize(
        ("address", "cause"),
        [
            ("https://example.com/a/b", "is no address of the Hub at"),
            ("https://huggingface.co.example.com/a/b", "is no address of the Hub at"),
            ("https://huggingface.co/a/b/discussions/4", "is the address of no model"),
            ("https://huggingface.co/datasets/a", "is the address of no model"),
            ("https://huggingface.co/spaces/a/b", "is the address of no model"),
        ],
    )
    def test_addresses_of_something_else(self, address: str, cause: str) -> None:
        with pytest.raises(UsageError, match=cause):
            estimate(address)

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"holds no weights, no config\.json"):
            estimate(tmp_path)

    def test_a_folder_of_gguf_alone_is_called_so(self, tmp_path: Path) -> None:
        (tmp_path / "model-Q4_K_M.gguf").touch()
        with pytest.raises(NoWeights, match=r"its weights are GGUF \(model-Q4_K_M\.gguf\), which is not read here"):
            estimate(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(OPT_13B))
        made = estimate(tmp_path, dtypes=["int8"])
        assert made.source == "config"
        assert [note.partition(": ")[2] for note in made.notes] == [
            "its weights are GGUF (model-Q4_K_M.gguf), which is not read here; sizes are those of its config"
        ]

    def test_a_dtype_that_is_none(self, opt_13b: Path) -> None:
        with pytest.raises(UsageError, match="'int3' is not known"):
            estimate(opt_13b, dtypes=["int3"])

    def test_a_lying_index(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(OPT_13B))
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
        with pytest.raises(InvalidCheckpoint, match="not a plain file name"):
            estimate(tmp_path)


def test_an_outline_of_a_hostile_name_is_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="modules deep"):
        outline({"a." * 20_000 + "weight": ("float16", (2, 2))})
