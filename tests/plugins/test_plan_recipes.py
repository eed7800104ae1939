"""The shipped recipes with a matrix and an offload, planned against a loopback Hub from full-size headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import LoopbackHub
from support.shells import nbytes, sharded
from support.workshop import Workshop

from bigpipe.bigmodel.architecture import known_architecture

MANIFESTS = Path(__file__).parents[2] / "manifests"
GIB = 2**30
OPT: dict[str, Any] = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 24,
    "ffn_dim": 8192, "num_attention_heads": 32, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 2048, "activation_function": "relu", "torch_dtype": "float16",
}  # fmt: skip
PARAMETERS = 1_315_758_080
MATRICES, ROWS, COUNT = 24 * (4 * 2048 * 2048 + 2 * 2048 * 8192), 24 * (5 * 2048 + 8192), 24 * 6
WIDTH, LAYERS = 1600, 48
BLOCK = {
    "ln_1": (WIDTH,), "attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH), "ln_2": (WIDTH,),
    "mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH),
}  # fmt: skip


def gpt2_xl() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """As minGPT names them, in float32."""
    yield "transformer.wte.weight", "float32", (50257, WIDTH)
    yield "transformer.wpe.weight", "float32", (1024, WIDTH)
    for layer in range(LAYERS):
        for name, shape in BLOCK.items():
            yield f"transformer.h.{layer}.{name}.weight", "float32", shape
            yield f"transformer.h.{layer}.{name}.bias", "float32", shape[:1]
    yield "transformer.ln_f.weight", "float32", (WIDTH,)
    yield "transformer.ln_f.bias", "float32", (WIDTH,)
    yield "lm_head.weight", "float32", (50257, WIDTH)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    architecture = known_architecture(OPT)
    assert architecture is not None
    tensors = [(tensor.name, "float16", tensor.shape) for tensor in architecture.tensors()]
    for name in ("opt", "gpt"):
        (tmp_path / name).mkdir()
    with LoopbackHub() as hub:
        files = {"config.json": json.dumps(OPT).encode(), "tokenizer.json": b"{}"}
        hub.create("facebook/opt-1.3b", {**files, **sharded(tmp_path / "opt", tensors, 10**10)})
        hub.create("marcsun13/gpt2-xl-linear-sharded", sharded(tmp_path / "gpt", list(gpt2_xl()), 10**9))
        hub.create("openai-community/gpt2-xl", {"config.json": b"{}", "tokenizer.json": b"{}"})
        yield hub


@pytest.fixture
def plan(
    server: LoopbackHub, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    for name, value in server.environment(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    machine = {
        "name": "box", "cpus": 16, "memory": 64 * GIB, "memory_available": 60 * GIB, "disk_free": 10**12,
        "gpus": [{"index": 0, "name": "GPU", "memory": 24 * GIB, "free": 24 * GIB}],
    }  # fmt: skip
    file = tmp_path / "box.json"
    file.write_text(json.dumps({"schema": "bigpipe.doctor/1", "machine": machine}))

    def planned(recipe: str, *options: str) -> dict[str, Any]:
        done = workshop.command("plan", str(MANIFESTS / recipe), "--machine", str(file), "--json", *options)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return {name: node["forecast"] for name, node in found["nodes"].items()}

    return planned


def test_the_matrix(plan: Callable[..., dict[str, Any]], server: LoopbackHub) -> None:
    found = plan("matrix_int8_nf4.yaml")
    int8, nf4 = (found[f"quantize@scheme={scheme}"] for scheme in ("int8", "nf4"))
    assert int8["metrics"]["bytes"] == 2 * PARAMETERS - MATRICES + 4 * ROWS + COUNT
    # A byte for two elements, a float32 for 64, a table of 64 bytes and a state in JSON
    codes = 2 * PARAMETERS - 2 * MATRICES + MATRICES // 2 + 4 * MATRICES // 64
    assert 64 * COUNT < nf4["metrics"]["bytes"] - codes < 200 * COUNT
    for scheme, forecast in (("int8", int8), ("nf4", nf4)):
        assert found[f"estimate@scheme={scheme}"]["metrics"][scheme]["stored"] == forecast["metrics"]["bytes"]
    assert server.bytes_sent() < 400_000


def test_the_offload(plan: Callable[..., dict[str, Any]], server: LoopbackHub) -> None:
    whole = nbytes(gpt2_xl())
    found = plan("gpt2xl_offload.yaml")
    assert whole < found["download"]["download_bytes"] < whole + 2**20
    predicted = found["dispatch"]["metrics"]["predicted"]
    assert set(predicted) == {"0", "cpu"}
    assert predicted["0"] <= 2 * GIB
    less = plan("gpt2xl_offload.yaml", "-p", "memory={0: 1GiB, cpu: 1GiB, disk: 20GiB}")["dispatch"]["metrics"]
    assert set(less["predicted"]) == {"0", "cpu", "disk"}
    assert sum(less["predicted"].values()) == sum(predicted.values())
    assert max(less["predicted"]["0"], less["predicted"]["cpu"]) <= GIB
    assert server.bytes_sent() < 400_000
