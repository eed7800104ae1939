"""The Hub's own counts as a cross-check: what they add to headers and index, and that they are never trusted more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.shells import sharded, shell

from bigpipe.bigmodel.architecture import known_architecture
from bigpipe.bigmodel.footprint import estimate
from bigpipe.bigmodel.hub import Choice, Hub
from bigpipe.bigmodel.hub.remote import RemoteModel, describe_repository

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
    "max_position_embeddings": 128, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
MODEL = "org/model"
SOME = [
    ("norm.weight", "float32", (3,)), ("layer.weight", "bfloat16", (4, 5)), ("ids", "int64", ()),
    ("none", "bfloat16", (0, 7)),
]  # fmt: skip


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def look(server: LoopbackHub, tmp_path: Path) -> Any:
    hub = Hub.from_environment(server.environment(tmp_path / "home"))

    def describe(**options: Any) -> RemoteModel:
        return describe_repository(MODEL, hub=hub, **options)

    return describe


def llama(folder: Path, dtype: str) -> dict[str, bytes | Path]:
    architecture = known_architecture(LLAMA)
    assert architecture is not None
    tensors = [(tensor.name, dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent]
    return {"config.json": json.dumps(LLAMA).encode(), **sharded(folder, tensors, 60_000)}


def dtypes(found: RemoteModel) -> set[str]:
    return {dtype for dtype, _ in (found.description.tensors or {}).values()}


def test_counts_of_the_same_files_agree(server: LoopbackHub, look: Any, tmp_path: Path) -> None:
    server.create(MODEL, {"model.safetensors": shell(tmp_path / "model.safetensors", SOME)})
    found = look()
    assert found.repository.elements == {"F32": 3, "BF16": 20, "I64": 1}
    assert found.difference is None


@pytest.mark.parametrize("kind", ["opt", "bert", "llama"])
def test_they_agree_with_what_transformers_writes(server: LoopbackHub, look: Any, tmp_path: Path, kind: Any) -> None:
    folder = make_checkpoint(tmp_path / kind, kind, format="safetensors", max_shard_size="50KB")
    server.create(MODEL, files_of(folder))
    found = look()
    assert sum((found.repository.elements or {}).values()) > 1000
    assert found.difference is None


def test_they_find_the_dtype_that_index_and_config_both_have_wrong(
    server: LoopbackHub, look: Any, tmp_path: Path
) -> None:
    """float16 files under a config that says bfloat16: names and total agree, so that only headers tell."""
    server.create(MODEL, llama(tmp_path, "float16"))
    found = look(need="sizes")
    assert found.source == "headers"
    assert {dtype for dtype, _ in found.description.tensors.values()} == {"float16"}
    assert found.difference is None


@pytest.mark.parametrize("told", [{}, {"parameters": {}}], ids=str)
def test_where_nothing_is_counted_the_headers_tell_the_dtype(
    server: LoopbackHub, look: Any, tmp_path: Path, told: dict[str, Any]
) -> None:
    """As behind a mirror: names and sums of bytes are the same in both formats of 16 bits."""
    server.create(MODEL, llama(tmp_path, "float16"), told_counts=told)
    found = look(need="sizes")
    assert (found.source, dtypes(found)) == ("headers", {"float16"})


def test_a_variant_in_shards_has_its_own_dtype(server: LoopbackHub, look: Any, tmp_path: Path) -> None:
    """The config and what the Hub counts are those of the plain weights beside it, of as many bytes."""
    for name in ("plain", "half"):
        (tmp_path / name).mkdir()
    half = llama(tmp_path / "half", "float16")
    renamed = {name: name.replace(".safetensors", ".fp16.safetensors") for name in half}
    index = json.loads(Path(str(half.pop("model.safetensors.index.json"))).read_text())
    index["weight_map"] = {tensor: renamed[file] for tensor, file in index["weight_map"].items()}
    variant = {renamed[name]: content for name, content in half.items() if name != "config.json"}
    variant["model.safetensors.index.fp16.json"] = json.dumps(index).encode()
    server.create(MODEL, {**llama(tmp_path / "plain", "bfloat16"), **variant})
    assert dtypes(look(need="sizes")) == {"bfloat16"}
    for need in ("sizes", "layout"):
        found = look(need=need, choice=Choice(variant="fp16"))
        assert (dtypes(found), found.difference) == ({"float16"}, None)


def test_an_index_that_they_confirm_suffices(server: LoopbackHub, look: Any, tmp_path: Path) -> None:
    server.create(MODEL, llama(tmp_path, "bfloat16"))
    assert look(need="sizes").source == "index"
    assert not server.requests("/cdn/")


def test_a_hub_that_counts_otherwise_is_told_of_and_not_believed(
    server: LoopbackHub, look: Any, tmp_path: Path
) -> None:
    told = {"parameters": {"BF16": 7, "F8_E4M3": 1_000}, "total": 1_007}
    server.create(MODEL, llama(tmp_path, "bfloat16"), told_counts=told)
    made = [
        estimate(
            MODEL,
            dtypes=["bfloat16"],
            sequence_length=128,
            environment=server.environment(tmp_path / "home"),
            memo=tmp_path / "memo",
        )
        for _ in range(2)
    ]
    held = sum(tensor.elements for tensor in made[0].architecture.tensors() if tensor.persistent)
    for one in made:
        assert one["bfloat16"].counts.stored == 2 * held
        assert one.notes == (
            f"the Hub counts 7 elements of BF16 and 1,000 elements of F8_E4M3, and the files hold {held:,} elements "
            "of BF16; the files are believed",
        )
    assert made[1].fetched_bytes < made[0].fetched_bytes  # the headers were read once


def test_the_command_shows_it(server: LoopbackHub, tmp_path: Path) -> None:
    server.create(MODEL, llama(tmp_path, "bfloat16"), told_counts={"parameters": {"BF16": 7}})
    result = subprocess.run(
        [sys.executable, "-m", "bigpipe", "estimate", MODEL],
        cwd=tmp_path, env={**os.environ, **server.environment(tmp_path / "home")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "note: the Hub counts 7 elements of BF16, and the files hold" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "told",
    [
        [], "many", 7, {}, {"total": 5}, {"parameters": None}, {"parameters": [1]}, {"parameters": {"BF16": "7"}},
        {"parameters": {"BF16": -1}}, {"parameters": {"BF16": True}}, {"parameters": {"BF16": 1.5}},
        {"parameters": {"\x1b[2J": 1}}, {"parameters": {"B" * 10_000: 1}},
    ],
)  # fmt: skip
def test_counts_that_are_none_are_passed_over(server: LoopbackHub, look: Any, tmp_path: Path, told: Any) -> None:
    server.create(MODEL, {"model.safetensors": shell(tmp_path / "model.safetensors", SOME)}, told_counts=told)
    found = look()
    assert (found.repository.elements or None, found.difference) == (None, None)
    assert len(found.description.tensors or {}) == len(SOME)


def test_what_the_hub_does_not_count_is_not_compared(server: LoopbackHub, look: Any, tmp_path: Path) -> None:
    told = {"parameters": {"BF16": 7}}
    server.create(MODEL, files_of(make_checkpoint(tmp_path / "opt", "opt", format="bin")), told_counts=told)
    assert look().difference is None
    packed = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file = shell(tmp_path / "model.safetensors", SOME)
    server.create(MODEL, {"model.safetensors": file, "config.json": json.dumps(packed).encode()}, told_counts=told)
    assert look().difference is None
    server.create(MODEL, {"pytorch_model.safetensors": file}, told_counts=told)
    assert look().difference is None
