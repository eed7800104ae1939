"""Numbers that the dtype asked for has no room for: refused by name, never made infinite without a word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_checkpoint, sample_inputs, tiny_model

import bigpipe
from bigpipe.errors import InvalidCheckpoint, StageFailed

LARGE = 70_000.0
"""More than float16's largest number, 65,504."""
BEYOND = "holds numbers beyond the largest of float16"
UP, NORM, EMBED = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.0.w2.weight"


def checkpoint(folder: Path, name: str, value: float, dtype: str = "bfloat16", kind: str = "llama") -> Path:
    """A model of which one number of one tensor is `value`."""
    make_checkpoint(folder, kind, dtype=dtype, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", [UP, NORM, EMBED])
def test_a_cast_names_the_tensor(tmp_path: Path, name: str, dtype: str) -> None:
    model = checkpoint(tmp_path / "model", name, -LARGE, dtype)
    with pytest.raises(InvalidCheckpoint, match=f"'{name}': {BEYOND}") as error:
        bigpipe.save_checkpoint(model, tmp_path / "half", dtype="float16")
    assert "bfloat16" in error.value.cure
    bigpipe.save_checkpoint(model, tmp_path / "wide", dtype="bfloat16")
    assert load_file(tmp_path / "wide/model.safetensors")[name].view(-1)[3] == torch.tensor(-LARGE).bfloat16()


def test_a_model_in_memory_is_cast_no_further(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = LARGE
    with pytest.raises(InvalidCheckpoint, match=f"'{NORM}': {BEYOND}"):
        bigpipe.save_checkpoint(model, tmp_path / "half", dtype="float16")
    assert bigpipe.save_checkpoint(model, tmp_path / "wide", dtype="bfloat16").shards == 1


def test_the_largest_number_stays(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", UP, 65_504.0, "float32")
    bigpipe.save_checkpoint(model, tmp_path / "half", dtype="float16")
    assert load_file(tmp_path / "half/model.safetensors")[UP].view(-1)[3] == 65_504.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_stored_as_no_number_stays_that(tmp_path: Path, value: float) -> None:
    model = checkpoint(tmp_path / "model", UP, value)
    bigpipe.save_checkpoint(model, tmp_path / "half", dtype="float16")
    found = float(load_file(tmp_path / "half/model.safetensors")[UP].view(-1)[3])
    assert found == value or (math.isnan(found) and math.isnan(value))
    loaded = float(bigpipe.load(model, dtype="float16").state_dict()[UP].view(-1)[3])
    assert loaded == value or (math.isnan(loaded) and math.isnan(value))


def test_a_mask_that_the_class_makes_itself_may_be_infinite(tmp_path: Path) -> None:
    """GPT-Neo and GPT-J were published with −1e9 in each layer."""
    model = make_checkpoint(tmp_path / "model", "gpt2", tokenizer=False)
    masks = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e9) for layer in range(2)}
    save_file({**load_file(model / "model.safetensors"), **masks}, model / "model.safetensors", {"format": "pt"})
    bigpipe.save_checkpoint(model, tmp_path / "half", dtype="float16")
    assert bigpipe.load(tmp_path / "half")(**sample_inputs(tiny_model("gpt2"))).logits.isfinite().all()
    assert bigpipe.quantize_checkpoint(model, tmp_path / "int8", scheme="int8").quantized


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize(("kind", "name"), [("llama", UP), ("llama", NORM), ("llama", EMBED), ("mixtral", EXPERT)])
def test_a_model_is_not_loaded_with_numbers_it_does_not_have(tmp_path: Path, kind: str, name: str, home: str) -> None:
    model = checkpoint(tmp_path / "model", name, LARGE, kind=kind)
    inputs = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    inputs["input_ids"][0] = torch.arange(64)
    with pytest.raises(InvalidCheckpoint, match=f"'{name}': {BEYOND}"), torch.inference_mode():
        bigpipe.load(model, {"": home}, dtype="float16")(**inputs)
    with torch.inference_mode():
        assert bigpipe.load(model, {"": home}, dtype="bfloat16")(**inputs).logits.isfinite().all()


def test_what_fits_is_looked_at_once(tmp_path: Path) -> None:
    model, ids = make_checkpoint(tmp_path / "model", "llama", dtype="bfloat16"), torch.arange(8)[None]
    halves = bigpipe.load(model, {"": "disk"}, dtype="float16")
    wanted = bigpipe.load(model, dtype="float16")(ids).logits
    assert torch.equal(halves(ids).logits, wanted)
    assert torch.equal(halves(ids).logits, wanted)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("name", [UP, NORM])
def test_a_quantization_refuses_what_float16_has_no_room_for(tmp_path: Path, scheme: str, name: str) -> None:
    model = checkpoint(tmp_path / "model", name, LARGE)
    with pytest.raises(InvalidCheckpoint, match=f"'{name}': {BEYOND}"):
        bigpipe.quantize_checkpoint(model, tmp_path / "half", scheme=scheme)


@pytest.mark.parametrize(("scheme", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_quantization_in_bfloat16_has_room(tmp_path: Path, scheme: str, double: bool) -> None:
    model = checkpoint(tmp_path / "model", UP, LARGE)
    options: dict[str, Any] = {"bnb_4bit_use_double_quant": double, "dtype": "bfloat16"}
    with pytest.raises(InvalidCheckpoint, match=f"'{UP}': {BEYOND}") as error:
        bigpipe.quantize_checkpoint(model, tmp_path / "half", scheme=scheme, **options)
    assert "bfloat16 for bnb_4bit_compute_dtype" in error.value.cure
    options["bnb_4bit_compute_dtype"] = "bfloat16"
    bigpipe.quantize_checkpoint(model, tmp_path / scheme, scheme=scheme, **options)
    assert bigpipe.load(tmp_path / scheme)(torch.arange(8)[None]).logits.isfinite().all()


def test_finished_files_of_another_dtype_to_compute_in_are_not_taken(tmp_path: Path) -> None:
    model, parts = checkpoint(tmp_path / "model", UP, LARGE), tmp_path / "parts"
    options: dict[str, Any] = {"scheme": "nf4", "dtype": "bfloat16", "parts": parts}
    bigpipe.quantize_checkpoint(model, tmp_path / "wide", bnb_4bit_compute_dtype="bfloat16", **options)
    with pytest.raises(InvalidCheckpoint, match=f"'{UP}': {BEYOND}"):
        bigpipe.quantize_checkpoint(model, tmp_path / "half", **options)


def test_int8_goes_through_float16_whatever_the_rest_becomes(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", UP, LARGE)
    with pytest.raises(InvalidCheckpoint, match=f"'{UP}': {BEYOND}"):
        bigpipe.quantize_checkpoint(model, tmp_path / "int8", scheme="int8", dtype="bfloat16")


@pytest.mark.parametrize("options", [{"scheme": "int8"}, {"scheme": "nf4"}, {"scheme": "fp4"},
                                     {"scheme": "nf4", "bnb_4bit_use_double_quant": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_quantized(tmp_path: Path, options: dict[str, Any], value: float) -> None:
    """bitsandbytes makes zeros or a code of it, and the row or block is lost."""
    model = checkpoint(tmp_path / "model", UP, value)
    with pytest.raises(InvalidCheckpoint, match=f"'{UP}': holds NaN or infinity"):
        bigpipe.quantize_checkpoint(model, tmp_path / "out", **options)


@pytest.mark.parametrize("read", ["load", "save", "quantize"])
def test_codes_and_scales_whose_product_is_too_large(tmp_path: Path, read: str) -> None:
    """448, the largest of e4m3, times 200."""
    model = make_checkpoint(tmp_path / "model", "llama", dtype="float16", tokenizer=False)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    tensors[UP].view(torch.uint8).view(-1)[3] = 0x7E
    tensors[f"{UP}_scale_inv"][:] = 200.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = (model / "config.json").read_text()
    told = '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},'
    (model / "config.json").write_text(config.replace("{", told, 1))
    does = {
        "load": lambda: bigpipe.load(model),
        "save": lambda: bigpipe.save_checkpoint(model, tmp_path / "out", dtype="float32"),
        "quantize": lambda: bigpipe.quantize_checkpoint(model, tmp_path / "out", scheme="nf4"),
    }
    with pytest.raises(StageFailed, match=f"'{UP}': {BEYOND}"):
        does[read]()
