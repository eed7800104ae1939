"""The flagship recipe planned against a loopback Hub that holds OPT-13B as headers alone: sizes through every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import LoopbackHub
from support.shells import sharded
from support.workshop import Workshop

from bigpipe.bigmodel.architecture import known_architecture

MANIFEST = Path(__file__).parents[2] / "manifests/opt13b_int8.yaml"
GIB = 2**30
OPT_13B: dict[str, Any] = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 40,
    "ffn_dim": 20480, "num_attention_heads": 40, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 5120, "activation_function": "relu", "torch_dtype": "float16",
}  # fmt: skip
PARAMETERS = 12_853_473_280
MATRICES, ROWS = 40 * (4 * 5120 * 5120 + 2 * 5120 * 20480), 40 * (5 * 5120 + 20480)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    architecture = known_architecture(OPT_13B)
    assert architecture is not None
    tensors = [(tensor.name, "float16", tensor.shape) for tensor in architecture.tensors()]
    (tmp_path / "opt").mkdir()
    with LoopbackHub() as hub:
        files = {"config.json": json.dumps(OPT_13B).encode(), "tokenizer.json": b"{}"}
        hub.create("facebook/opt-13b", {**files, **sharded(tmp_path / "opt", tensors, 10 * 10**9)})
        yield hub


@pytest.fixture
def plan(
    server: LoopbackHub, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    for name, value in server.environment(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)

    def planned(gpus: int, memory: int, *options: str) -> Any:
        gpu = {"name": "GPU", "memory": memory * GIB, "free": memory * GIB}
        machine = {
            "name": "box", "cpus": 32, "memory": 256 * GIB, "memory_available": 250 * GIB, "disk_free": 10**12,
            "gpus": [{"index": index, **gpu} for index in range(gpus)],
        }  # fmt: skip
        file = tmp_path / "box.json"
        file.write_text(json.dumps({"schema": "bigpipe.doctor/1", "machine": machine}))
        return workshop.command("plan", str(MANIFEST), "--machine", str(file), *options)

    return planned


def test_every_stage_from_headers_alone(plan: Callable[..., Any], server: LoopbackHub, workshop: Workshop) -> None:
    done = plan(1, 24, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    forecasts = {name: node["forecast"] for name, node in found["nodes"].items()}
    commit = server.repositories["facebook/opt-13b"].commits[found["nodes"]["download"]["pins"]["revision"]]
    listed = sum(file.size for file in commit.values())
    assert forecasts["download"]["download_bytes"] == listed
    assert listed > 2 * PARAMETERS
    assert found["download_bytes"] == listed
    stored = 2 * PARAMETERS - MATRICES + 4 * ROWS + 40 * 6
    assert forecasts["quantize"]["metrics"]["bytes"] == stored
    assert forecasts["dispatch"]["metrics"]["predicted"] == {"0": stored}
    # Keys and values of 4 × 2048 tokens lie where the layers are, with activations and the runtime
    vram = forecasts["dispatch"]["vram"]["0"]
    assert stored + 40 * 2 * 5120 * 2 * 4 * 2048 < vram < 21 * GIB
    assert forecasts["generate"]["vram"] == {"0": vram}
    assert all(forecasts[name]["ram"] for name in ("estimate", "shard", "quantize", "dispatch", "generate"))
    assert any("(all of it)" in line for line in forecasts["dispatch"]["details"])
    written = [forecasts[name]["write_bytes"] for name in forecasts]
    assert found["write_bytes"] is None  # nobody knows the size of texts that are not written
    assert found["at_least"]["write_bytes"] == sum(size or 0 for size in written)
    assert server.bytes_sent() < 400_000
    assert not list(workshop.folder.rglob("architectures"))


def test_what_does_not_fit_comes_with_a_change_that_does(plan: Callable[..., Any]) -> None:
    done = plan(1, 16)
    assert done.returncode == 4
    assert " GiB of weights, 6.2 GiB of KV cache, " in done.stderr
    assert "at 4 × 2048 tokens" in done.stderr
    assert "-p batch=1 fits" in done.stderr
    assert plan(1, 16, "-p", "batch=1").returncode == 0
    done = plan(1, 12)
    assert done.returncode == 4
    [cure] = [line for line in done.stderr.splitlines() if " fits (" in line]
    change = cure.split("'")[1]
    assert change.startswith("memory={0: ")
    assert plan(1, 12, "-p", change).returncode == 0


def test_what_is_not_known_is_never_a_number(plan: Callable[..., Any]) -> None:
    done = plan(1, 24, "--offline")  # nothing was ever asked of the Hub
    assert "; unknown bytes down, at least 65.5 kB written\n" in done.stdout  # the report of estimate
    found = json.loads(plan(1, 24, "--offline", "--json").stdout)
    sums = ("download_bytes", "write_bytes", "peak_disk_bytes")
    assert [found[name] for name in sums] == [None, None, None]
    assert found["at_least"] == {"download_bytes": 0, "write_bytes": 65536, "peak_disk_bytes": 65536}
    forecasts = {name: node["forecast"] for name, node in found["nodes"].items()}
    assert all(each["unknown"] for each in forecasts.values())
    assert {name for name, each in forecasts.items() if each["write_bytes"] is not None} == {"estimate"}
    assert {name for name, each in forecasts.items() if each["vram"] is None} == {"dispatch", "generate"}
    assert {name for name, each in forecasts.items() if each["ram"] is not None} == {"estimate"}
