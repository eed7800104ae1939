"""Checkpoints that are quantized already, with tensors as each tool names and shapes them: sized as they are stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import make_checkpoint
from support.shells import nbytes, shell

from bigpipe.bigmodel.footprint import estimate
from bigpipe.bigmodel.placement import Placement, place
from bigpipe.bigmodel.quantization import quantize_checkpoint

Entry = tuple[str, str, tuple[int, ...]]
HIDDEN, INNER, VOCABULARY, LAYERS, GROUP = 128, 256, 512, 2, 64
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "torch_dtype": "float16",
}  # fmt: skip
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
"""(out, in) of a layer's matrices."""


def around(dtype: str, layers: int = LAYERS) -> Iterator[Entry]:
    """What quantizing leaves as it was."""
    yield from ((f"{name}.weight", dtype, (VOCABULARY, HIDDEN)) for name in ("model.embed_tokens", "lm_head"))
    yield "model.norm.weight", dtype, (HIDDEN,)
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", dtype, (HIDDEN,)


def gptq() -> Iterator[Entry]:
    """4 bits, packed eight to an int32 down the input side; the order of activations in g_idx."""
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEAR.items():
            module = f"model.layers.{layer}.{name}"
            yield f"{module}.qweight", "int32", (columns // 8, rows)
            yield f"{module}.qzeros", "int32", (columns // GROUP, rows // 8)
            yield f"{module}.scales", "float16", (columns // GROUP, rows)
            yield f"{module}.g_idx", "int32", (columns,)


def awq() -> Iterator[Entry]:
    """4 bits, packed eight to an int32 across the output side."""
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEAR.items():
            module = f"model.layers.{layer}.{name}"
            yield f"{module}.qweight", "int32", (columns, rows // 8)
            yield f"{module}.qzeros", "int32", (columns // GROUP, rows // 8)
            yield f"{module}.scales", "float16", (columns // GROUP, rows)


def fp8(module: str, rows: int, columns: int) -> Iterator[Entry]:
    """A float32 scale per block of 128 × 128."""
    yield f"{module}.weight", "float8_e4m3fn", (rows, columns)
    yield f"{module}.weight_scale_inv", "float32", (-(-rows // 128), -(-columns // 128))


def fp8_dense() -> Iterator[Entry]:
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEAR.items():
            yield from fp8(f"model.layers.{layer}.{name}", rows, columns)


QWEN_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
    "intermediate_size": INNER, "moe_intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def fp8_experts() -> Iterator[Entry]:
    """Experts are stored one by one; the class holds them together."""
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in LINEAR.items():
            if name.startswith("self_attn"):
                yield from fp8(f"{at}.{name}", *shape)
        yield from ((f"{at}.self_attn.{name}.weight", "bfloat16", (32,)) for name in ("q_norm", "k_norm"))
        yield f"{at}.mlp.gate.weight", "bfloat16", (4, HIDDEN)
        for expert in range(4):
            yield from fp8(f"{at}.mlp.experts.{expert}.gate_proj", 64, HIDDEN)
            yield from fp8(f"{at}.mlp.experts.{expert}.up_proj", 64, HIDDEN)
            yield from fp8(f"{at}.mlp.experts.{expert}.down_proj", HIDDEN, 64)


GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_local_experts": 4, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def mxfp4() -> Iterator[Entry]:
    """Blocks of 32 values in 16 bytes, each with an exponent of one byte."""
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, (rows, columns) in LINEAR.items():
            if name.startswith("self_attn"):
                yield f"{at}.{name}.weight", "bfloat16", (rows, columns)
                yield f"{at}.{name}.bias", "bfloat16", (rows,)
        yield f"{at}.self_attn.sinks", "bfloat16", (4,)
        yield f"{at}.mlp.router.weight", "bfloat16", (4, HIDDEN)
        yield f"{at}.mlp.router.bias", "bfloat16", (4,)
        for name, rows, columns in (("gate_up_proj", 2 * 64, HIDDEN), ("down_proj", HIDDEN, 64)):
            yield f"{at}.mlp.experts.{name}_blocks", "uint8", (4, rows, columns // 32, 16)
            yield f"{at}.mlp.experts.{name}_scales", "uint8", (4, rows, columns // 32)
            yield f"{at}.mlp.experts.{name}_bias", "bfloat16", (4, rows)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[Entry]]] = {
    "gptq": (LLAMA, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}, [
        *around("float16"), *gptq()]),
    "awq": (LLAMA, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, [
        *around("float16"), *awq()]),
    "fp8": (LLAMA, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, [
        *around("float16"), *fp8_dense()]),
    "fp8-experts": (QWEN_MOE, {"quant_method": "fp8", "weight_block_size": [128, 128]}, [
        *around("bfloat16"), *fp8_experts()]),
    "mxfp4": (GPT_OSS, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, [
        *around("bfloat16"), *mxfp4()]),
}  # fmt: skip


def as_run(entries: list[Entry], dtype: str) -> list[Entry]:
    """What is computed with: codes with scales are decoded, and others stay."""
    run = []
    for name, stored, shape in entries:
        if name.endswith("_blocks"):
            run.append((name.removesuffix("_blocks"), dtype, (*shape[:-1], 2 * shape[-1])))
        elif not name.endswith(("_scale_inv", "_scales")):
            run.append((name, dtype if stored.startswith("float8") else stored, shape))
    return run


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memo")


@pytest.mark.parametrize("name", CASES)
def test_sized_as_stored_and_placed_as_run(tmp_path: Path, memo: Path, name: str) -> None:
    config, method, entries = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    shell(tmp_path / "model.safetensors", entries)
    found = estimate(tmp_path, dtypes=["bfloat16"], memo=memo)
    assert found.checkpoint is not None
    assert found.checkpoint["bytes"] == nbytes(entries)
    assert found.checkpoint["quantization"] == method["quant_method"]
    made = {
        tensor.name: tensor.elements * 4 for tensor in found.architecture.tensors() if not tensor.persistent
    }  # rotary tables: float32, and in no file
    placements = [
        place(tmp_path, dtype=dtype, max_memory={0: "1GB"}, memo=memo) for dtype in (None, config["torch_dtype"])
    ]
    run = as_run(entries, config["torch_dtype"])
    for placement in placements:
        assert placement.weights == {0: nbytes(run) + sum(made.values())}
        if run == entries:
            said = f"({method['quant_method']}), which cannot be computed with here."
            assert placement.explanation[-1].endswith(said)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_goes_where_its_bytes_have_room(tmp_path: Path, memo: Path, name: str) -> None:
    config, method, entries = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    shell(tmp_path / "model.safetensors", entries)
    layer = nbytes(entry for entry in as_run(entries, config["torch_dtype"]) if entry[0].startswith("model.layers.1."))
    embedding = 2 * VOCABULARY * HIDDEN

    def room(size: int) -> Placement:
        return place(
            tmp_path, device_map="sequential", max_memory={0: size, 1: "1GB"}, memo=memo
        )  # accelerate's rule: the first GPU keeps room for its largest layer

    largest = max(layer, embedding)
    placement = room(embedding + layer + largest)
    assert [placement.device_of(f"model.layers.{n}.mlp") for n in range(2)] == [0, 1]
    placement = room(embedding + layer + largest - 1)
    assert [placement.device_of(f"model.layers.{n}.mlp") for n in range(2)] == [1, 1]


@pytest.mark.parametrize(("scheme", "double"), [("int8", False), ("nf4", False), ("nf4", True), ("fp4", False)])
def test_bitsandbytes(tmp_path: Path, memo: Path, scheme: Any, double: bool) -> None:
    model, quantized = make_checkpoint(tmp_path / "opt", "opt"), tmp_path / "quantized"
    quantize_checkpoint(model, quantized, scheme=scheme, bnb_4bit_use_double_quant=double)
    found = estimate(quantized, dtypes=["float16"], memo=memo)
    [file] = quantized.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert found.checkpoint is not None
    assert (found.checkpoint["bytes"], found.checkpoint["quantization"]) == (
        file.stat().st_size - header, "bitsandbytes")  # fmt: skip
    placement = place(quantized, max_memory={0: "1GB"}, memo=memo)
    assert "computed" not in placement.explanation[-1]
    plain = place(model, dtype="float16", max_memory={0: "1GB"}, memo=memo)
    assert placement.needs[0].activations > plain.needs[0].activations
    assert placement.weights == {0: file.stat().st_size - header}
