"""Quantized checkpoints against transformers' and bitsandbytes' own, whole: tensors, names, config, logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from support.architectures import UNUSUAL
from support.asking import answer_here
from support.models import forward, make_checkpoint, tiny_config, tiny_model
from support.real import build

import bigpipe
from bigpipe.bigmodel.architecture import Architecture, read_request
from bigpipe.bigmodel.architecture.instantiation import describe
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.execution import loaded
from bigpipe.bigmodel.quantization import QuantizedCheckpoint, Settings, quantize_checkpoint, torch_threads
from bigpipe.bigmodel.quantization.outline import outline
from bigpipe.bigmodel.writing import SyntheticModel, save_checkpoint
from bigpipe.errors import InvalidCheckpoint, UsageError

_WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
WIDE: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64},
    "bloom": {"hidden_size": 64},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16},
    "bart": {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    **dict.fromkeys(("llama", "gpt_neox", "mistral", "mixtral", "qwen2", "phi", "bert", "roberta"), _WIDTHS),
    "vit": {**_WIDTHS, "num_labels": 32},
}
"""bitsandbytes' CPU kernel needs input widths that are multiples of 64, and output widths of 32."""
SCHEMES = [("int8", False), ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads())
    yield
    torch.set_num_threads(before)


def source_checkpoint(folder: Path, name: str, **options: Any) -> Path:
    return make_checkpoint(folder / name, name, **{"max_shard_size": "150KB", **WIDE[name], **options})


def quantize(source: Path, out: Path, **options: Any) -> QuantizedCheckpoint:
    return quantize_checkpoint(source, out, architecture=architecture_of(source), **options)


def architecture_of(source: Path) -> Architecture:
    """As `describe_architecture` would say, without the child process: these tests have imported torch already."""
    return describe(read_request(source))


def bits_and_bytes(scheme: str, double: bool, **options: Any) -> transformers.BitsAndBytesConfig:
    if scheme == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **options)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=scheme, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float16, **options,
    )  # fmt: skip


def model_class(path: Path) -> Any:
    return getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])


def on_load(source: Path, scheme: str, double: bool, dtype: str = "float16", **options: Any) -> Any:
    config = bits_and_bytes(scheme, double, **options)
    return model_class(source).from_pretrained(source, quantization_config=config, dtype=getattr(torch, dtype)).eval()


def tensors_of(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 not a dict
                tensor = opened.get_tensor(name)
                found[name] = tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def assert_same_files(out: Path, reference: Any, folder: Path) -> None:
    """Same names, dtypes, shapes and bytes as `save_pretrained`, same config."""
    reference.save_pretrained(folder)
    ours, theirs = tensors_of(out), tensors_of(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    config, expected = (json.loads((path / "config.json").read_text()) for path in (out, folder))
    assert config == expected


def assert_as_transformers(source: Path, out: Path, reference: Any, folder: Path) -> None:
    """The same files, which load and compute the same."""
    assert_same_files(out, reference, folder)
    loaded = model_class(source).from_pretrained(out).eval()
    assert torch.equal(forward(loaded), forward(reference))


@pytest.mark.parametrize(("name", "scheme", "double"), [
    ("opt", "nf4", True), ("llama", "int8", False), ("gpt2", "nf4", True), ("bloom", "nf4", False),
    ("gpt_neox", "fp4", True), ("gpt2", "int8", False), ("t5", "int8", False), ("vit", "int8", False),
])  # fmt: skip
def test_equal_to_quantizing_on_load(name: str, scheme: str, double: bool, tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, name)
    quantize(source, tmp_path / "out", scheme=scheme, bnb_4bit_use_double_quant=double)
    reference = on_load(source, scheme, double)
    assert_as_transformers(source, tmp_path / "out", reference, tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "double"), SCHEMES)
@pytest.mark.parametrize("name", sorted(WIDE))
def test_equal_to_quantizing_on_load_for_every_family(name: str, scheme: str, double: bool, tmp_path: Path) -> None:
    test_equal_to_quantizing_on_load(name, scheme, double, tmp_path)


def test_stored_names_that_become_parts_of_one_keep_the_dtype_it_is_pinned_to(tmp_path: Path) -> None:
    """Three convolutions of Bailing's linear attention are loaded as one, which its class keeps in float32."""
    check_unusual("bailing_hybrid", "int8", False, tmp_path)


def test_a_matrix_that_is_pinned_to_float32_is_quantized_from_there(tmp_path: Path) -> None:
    """LongCat's class pins the weight of its router, by a name that does not keep the module from being converted."""
    check_unusual("longcat_flash", "nf4", True, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "double"), [("int8", False), ("nf4", True)])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_families(name: str, scheme: str, double: bool, tmp_path: Path) -> None:
    check_unusual(name, scheme, double, tmp_path)


def check_unusual(name: str, scheme: str, double: bool, folder: Path) -> None:
    source = folder / "source"
    build(UNUSUAL[name]).to(torch.bfloat16).save_pretrained(source)
    quantize(source, folder / "out", scheme=scheme, bnb_4bit_use_double_quant=double)
    assert_same_files(folder / "out", on_load(source, scheme, double), folder / "reference")


def test_a_matrix_that_is_read_the_other_way_round_is_not_taken_from_the_shelf(tmp_path: Path) -> None:
    """A class that was corrected from Linear to Conv1D: of a square matrix, names and shapes stay as they are."""
    source = make_checkpoint(tmp_path / "llama", "llama", num_key_value_heads=4)
    linear, files = architecture_of(source), []
    turned = [replace(m, class_name="Conv1D") if m.name.endswith("q_proj") else m for m in linear.modules]
    for number, architecture in enumerate((linear, replace(linear, modules=tuple(turned)))):
        made = quantize_checkpoint(
            source, tmp_path / str(number), scheme="int8", architecture=architecture, parts=tmp_path / "parts"
        )
        files.append(made.files["model.safetensors"])
    assert files[0] != files[1]


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_what_is_packed_under_older_names_is_placed_as_it_is_stored(scheme: str, tmp_path: Path) -> None:
    """transformers has renamed the modules of ViT since, and stores them as they were called."""
    quantize(source_checkpoint(tmp_path, "vit"), tmp_path / "out", scheme=scheme)
    answer_here(tmp_path / "out")
    placement = bigpipe.place(tmp_path / "out", device_map={"": "cpu"})
    assert placement.weights == loaded(bigpipe.load(tmp_path / "out", placement)).held


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("scheme", "double"), SCHEMES)
@pytest.mark.parametrize("name", ["bart", "bloom", "gpt2", "llama", "opt", "t5"])
def test_every_scheme_from_half_precision(name: str, scheme: str, double: bool, dtype: str, tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, name, dtype=dtype)
    quantize(source, tmp_path / "out", scheme=scheme, bnb_4bit_use_double_quant=double, dtype=dtype)
    reference = on_load(source, scheme, double, dtype)
    assert_as_transformers(source, tmp_path / "out", reference, tmp_path / "reference")


@pytest.mark.parametrize(("scheme", "stored", "dtype"), [
    ("nf4", "bfloat16", "bfloat16"), ("int8", "float16", "bfloat16"), ("fp4", "bfloat16", "float32"),
])  # fmt: skip
def test_other_dtypes_before_and_after(scheme: str, stored: str, dtype: str, tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama", dtype=stored)
    quantize(source, tmp_path / "out", scheme=scheme, dtype=dtype)
    reference = on_load(source, scheme, False, dtype)
    assert_as_transformers(source, tmp_path / "out", reference, tmp_path / "reference")


def test_bin_checkpoints_and_large_matrices(tmp_path: Path) -> None:
    """Several chunks per weight, and enough blocks for torch to sum their scales in several threads."""
    sizes = {"hidden_size": 1472, "ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 1}
    source = make_checkpoint(tmp_path / "opt", "opt", format="bin", max_shard_size="12MB", **sizes)
    quantize(source, tmp_path / "out", scheme="nf4", bnb_4bit_use_double_quant=True)
    reference = on_load(source, "nf4", True)
    reference.save_pretrained(tmp_path / "reference")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "reference")


def test_a_listed_head_is_left_alone_and_nothing_else(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama")
    skipped = ["lm_head", "mlp.gate_proj", "model.layers.1.self_attn"]
    result = quantize(source, tmp_path / "out", scheme="int8", skip_modules=skipped)
    assert set(result.skipped) == {
        "lm_head", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj",
        *(f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"),
    }  # fmt: skip
    reference = on_load(source, "int8", False, llm_int8_skip_modules=skipped)
    assert_as_transformers(source, tmp_path / "out", reference, tmp_path / "reference")


def test_an_empty_list_quantizes_the_head_too(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama")
    result = quantize(source, tmp_path / "out", scheme="int8", skip_modules=[])
    assert result.skipped == ()
    reference = on_load(source, "int8", False, llm_int8_skip_modules=[])
    assert_as_transformers(source, tmp_path / "out", reference, tmp_path / "reference")


def test_a_tied_head_cannot_be_quantized(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "opt")
    with pytest.raises(UsageError, match="tied") as error:
        quantize(source, tmp_path / "out", scheme="int8", skip_modules=[])
    assert "skip_modules: [lm_head]" in error.value.cure


def test_modules_kept_in_float32(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama")
    result = quantize(source, tmp_path / "out", scheme="nf4", keep_in_fp32_modules=["down_proj"])
    assert sorted(result.skipped) == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    kept = tensors_of(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    original = tensors_of(source)["model.layers.0.mlp.down_proj.weight"]
    assert kept == original
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", "down_proj"]
    model_class(source).from_pretrained(tmp_path / "out")
    note = "stored as float32: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj; transformers computes with"
    assert [told for told in result.notes if told.startswith(note)]


def test_weights_of_the_base_model_alone(tmp_path: Path) -> None:
    """As the Hub's gpt2 has them: names without `transformer.`."""
    source = source_checkpoint(tmp_path, "gpt2", max_shard_size="5GB")
    model = tiny_model("gpt2", n_embd=64)
    base = tmp_path / "base"
    model.transformer.save_pretrained(base)
    (base / "config.json").write_bytes((source / "config.json").read_bytes())
    quantize(base, tmp_path / "out", scheme="nf4")
    assert "h.0.attn.c_attn.weight.absmax" in tensors_of(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(forward(loaded), forward(on_load(source, "nf4", False)))


def test_what_was_written_is_told_with_its_digest(tmp_path: Path) -> None:
    import hashlib

    source = source_checkpoint(tmp_path, "llama")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    result = quantize(source, out, scheme="nf4", progress=lambda done, total: seen.append((done, total)))
    for name, (sha256, size) in result.files.items():
        content = (out / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (sha256, size)
    assert result.files.keys() == {path.name for path in out.iterdir()}
    assert result.bytes == sum(len(content) for _, _, content in tensors_of(out).values())
    assert result.source_bytes == open_checkpoint(source).nbytes
    assert seen[-1] == (result.bytes, result.bytes)


def test_one_output_file_per_input_file_cut_at_the_limit(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama", max_shard_size="150KB")
    files = len(open_checkpoint(source).files)
    assert quantize(source, tmp_path / "whole", scheme="int8").shards == files > 1
    cut = quantize(source, tmp_path / "cut", scheme="int8", max_shard_size="20KB")
    assert cut.shards > files
    assert tensors_of(tmp_path / "cut") == tensors_of(tmp_path / "whole")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama")
    quantize(source, tmp_path / "out", scheme="int8")
    with pytest.raises(UsageError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", scheme="int8")


def test_a_checkpoint_is_never_quantized_in_place(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama", max_shard_size="150KB")
    (tmp_path / "link").symlink_to(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    for out in (
        source,
        tmp_path / "link",
        tmp_path / "x" / ".." / source.name,
        source / "int8",
        tmp_path / "link" / "a",
    ):
        for write in (partial(quantize, scheme="int8"), save_checkpoint):
            with pytest.raises(UsageError, match="is where the source is"):
                write(source, out)
    (tmp_path / "around").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "around"):
        for write in (partial(quantize, scheme="int8"), save_checkpoint):
            with pytest.raises(UsageError, match="holds the source"):
                write(source, out)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_files_that_a_checkpoint_links_to_are_never_replaced(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    weights = min(source.glob("*.safetensors"))
    weights.rename(blobs / (40 * "a"))
    weights.symlink_to(blobs / (40 * "a"))
    before = weights.read_bytes()
    for write in (partial(quantize, scheme="int8"), save_checkpoint):
        with pytest.raises(UsageError, match="is where the source is"):
            write(source, blobs)
    assert weights.read_bytes() == before
    quantize(source, blobs / "int8", scheme="int8")  # beside them is in nobody's way


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "llama")
    other = architecture_of(source_checkpoint(tmp_path, "opt"))
    with pytest.raises(InvalidCheckpoint, match="the checkpoint has no"):
        quantize_checkpoint(source, tmp_path / "out", scheme="int8", architecture=other)
    wider = architecture_of(make_checkpoint(tmp_path / "wider", "llama", hidden_size=32))
    with pytest.raises(InvalidCheckpoint, match=r"check that config\.json belongs"):
        quantize_checkpoint(source, tmp_path / "out", scheme="int8", architecture=wider)


@pytest.mark.parametrize("wrong", [{"scheme": "int4"}, {"scheme": "nf4", "dtype": "float8"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="choose one of"):
        Settings(**wrong)


def test_the_outline_is_exact_before_a_byte_is_read(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path, "gpt2")
    checkpoint = open_checkpoint(source)
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    for scheme, double in SCHEMES:
        settings = Settings(scheme=scheme, bnb_4bit_use_double_quant=double)
        planned = outline(stored, {}, architecture_of(source), settings)
        result = quantize(source, tmp_path / f"{scheme}{double}", scheme=scheme, bnb_4bit_use_double_quant=double)
        margin = 4 * len(planned.quantized) if double else 0
        assert abs(planned.nbytes - result.bytes) <= margin


CONSTANT = """
import re, sys
from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.quantization import quantize_checkpoint
import json
source, out, described = sys.argv[1:]
architecture = Architecture.from_json(json.load(open(described)))
quantize_checkpoint(source, out, scheme="nf4", bnb_4bit_use_double_quant=True, architecture=architecture)
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def test_memory_stays_far_below_the_weights_and_torch_is_not_imported(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "ffn_dim": 8192, "word_embed_proj_dim": 2048, "num_hidden_layers": 3}
    tiny_config("opt", architectures=["OPTForCausalLM"], **sizes).save_pretrained(tmp_path)
    architecture = architecture_of(tmp_path)
    SyntheticModel(json.loads((tmp_path / "config.json").read_text()), architecture).write(tmp_path / "opt")
    (tmp_path / "architecture.json").write_text(json.dumps(architecture.as_json()))
    command = [sys.executable, "-c", CONSTANT, *(str(tmp_path / name) for name in ("opt", "out", "architecture.json"))]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout)
    assert open_checkpoint(tmp_path / "opt").nbytes > 300 * 10**6
    assert peak < 160 * 2**20
