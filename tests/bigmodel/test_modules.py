"""Models in memory, saved and loaded back by the libraries people use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from support.models import forward, make_checkpoint, tiny_model

import bigpipe
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.writing import save_checkpoint
from bigpipe.errors import UsageError


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(30, 20)
        self.second = torch.nn.Linear(30, 20)
        self.second.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(20)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", ["1KB", "5GB"])
def test_a_plain_module_goes_through_accelerate_both_ways(tmp_path, form, limit):
    torch.manual_seed(0)
    net = Net()
    save_checkpoint(net, tmp_path / "ours", max_shard_size=limit, format=form)
    loaded = Net()
    load_checkpoint_in_model(loaded, str(tmp_path / "ours"))
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    Accelerator(cpu=True).save_model(net, tmp_path / "theirs", max_shard_size=limit, safe_serialization=form != "bin")
    ours, theirs = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "theirs")
    assert ours.tied == theirs.tied
    assert {name: ours.read(name) for name in ours.tensors} == {name: theirs.read(name) for name in theirs.tensors}
    assert {file.name for file in ours.files} == {file.name for file in theirs.files}


def test_a_transformers_model_is_saved_with_its_config(tmp_path):
    import transformers

    model = tiny_model("opt")
    saved = save_checkpoint(model, tmp_path, dtype="float16", max_shard_size="20KB")
    assert saved.shards > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert torch.equal(forward(loaded), forward(tiny_model("opt").half()))
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors


def test_a_state_dict_with_views_is_saved_contiguously(tmp_path):
    state = {
        "t": torch.arange(6.0).reshape(2, 3).t(), "e": torch.zeros(0, 2), "layout": "row",
        "s": torch.arange(6.0)[::6],
    }  # fmt: skip
    save_checkpoint(state, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("t") == state["t"].contiguous().numpy().tobytes()
    assert checkpoint.read("s") == bytes(4)
    assert set(checkpoint.tensors) == {"t", "e", "s"}


def test_what_is_not_in_memory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="'weight' has no data here"):
        save_checkpoint(torch.nn.Linear(2, 2, device="meta"), tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", ["20KB", "5GB"])
def test_a_tied_model_goes_both_ways_between_accelerates_loaders_and_ours(tmp_path, form, limit):
    model = tiny_model("opt")
    save_checkpoint(model, tmp_path / "ours", max_shard_size=limit, format=form)
    with init_empty_weights():
        empty = tiny_model("opt")
    empty.tie_weights()
    dispatched = load_checkpoint_and_dispatch(empty, str(tmp_path / "ours"), device_map={"": "cpu"}).eval()
    dispatched.tie_weights()
    assert torch.equal(forward(dispatched), forward(model))

    Accelerator(cpu=True).save_model(model, tmp_path / "theirs", max_shard_size=limit, safe_serialization=form != "bin")
    model.config.save_pretrained(tmp_path / "theirs")
    with init_empty_weights():
        shell = tiny_model("opt")
    assert torch.equal(forward(load(tmp_path / "theirs", model=shell)), forward(model))
    save_checkpoint(tmp_path / "theirs", tmp_path / "again", max_shard_size="30KB")
    assert torch.equal(forward(load(tmp_path / "again")), forward(model))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_plain_module_is_loaded_from_what_accelerate_saved(tmp_path, form):
    net = Net().eval()
    Accelerator(cpu=True).save_model(net, tmp_path, max_shard_size="1KB", safe_serialization=form != "bin")
    loaded = load(tmp_path, model=Net())
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.second.weight is loaded.first.weight


PACKED: dict[str, dict[str, Any]] = {
    "int8": {"llm_int8_threshold": 3.0}, "nf4": {"bnb_4bit_compute_dtype": "bfloat16"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("scheme", PACKED)
def test_a_quantized_model_is_saved_with_its_settings_which_transformers_loads(tmp_path: Path, scheme: str) -> None:
    import transformers

    widths = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes on some CPUs: a multiple of a block
    source = make_checkpoint(tmp_path / "base", "llama", dtype="float16", **widths)
    bigpipe.quantize_checkpoint(source, tmp_path / "packed", scheme=scheme, **PACKED[scheme])
    model = load(tmp_path / "packed")
    save_checkpoint(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "ours", "theirs")]
    assert said[0]["quantization_config"] == said[1]["quantization_config"] == said[2]["quantization_config"]
    expected = forward(model)
    for name in ("ours", "theirs"):
        assert torch.equal(forward(load(tmp_path / name)), expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained
    assert torch.equal(forward(theirs(tmp_path / "ours").eval()), forward(theirs(tmp_path / "packed").eval()))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(("scheme", "layer"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
def test_peft_puts_its_own_layer_for_the_format_into_a_quantized_model(tmp_path: Path, scheme: str, layer: str) -> None:
    import peft

    source = make_checkpoint(tmp_path / "base", "llama", dtype="float16")
    bigpipe.quantize_checkpoint(source, tmp_path / "packed", scheme=scheme)
    adapted = peft.get_peft_model(load(tmp_path / "packed"), peft.LoraConfig(target_modules=["q_proj"]))
    assert {type(module).__name__ for name, module in adapted.named_modules() if name.endswith("q_proj")} == {layer}
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("scheme", PACKED)
def test_a_quantized_model_is_not_cast_while_it_is_saved(tmp_path: Path, scheme: str) -> None:
    source = make_checkpoint(tmp_path / "base", "llama", dtype="float16")
    bigpipe.quantize_checkpoint(source, tmp_path / "packed", scheme=scheme)
    with pytest.raises(UsageError, match="would change the scales of quantized weights"):
        save_checkpoint(load(tmp_path / "packed"), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft asks for it
def test_a_model_with_an_adapter_beside_or_in_it_is_not_saved_as_the_model_alone(tmp_path: Path) -> None:
    import peft

    source = make_checkpoint(tmp_path / "base", "llama")
    adapted = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match=r"(?s)lora stands beside .*merge_adapter"):
        save_checkpoint(load(source, adapter=tmp_path / "lora"), tmp_path / "out")
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(UsageError, match=r"(?s)holds an adapter of peft.*merge_adapter"):
            save_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = forward(adapted)
    save_checkpoint(adapted.merge_and_unload(), tmp_path / "out")
    torch.testing.assert_close(forward(load(tmp_path / "out")), expected)


def test_a_model_in_memory_is_saved_though_what_it_was_loaded_from_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "base", "llama")
    monkeypatch.chdir(tmp_path)
    model = load("base", dtype="float64")  # a copy of its own: the file is not its memory
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        save_checkpoint(model, source)
    save_checkpoint(model, "out")
    shutil.rmtree(source)
    save_checkpoint(model, "again")
    assert torch.equal(forward(load("again", dtype="float64")), forward(model))


def test_the_config_of_a_packed_model_has_the_dtype_of_what_is_plain(tmp_path):
    """Its first parameter is packed, and transformers makes no model of such numbers."""
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction as Series

    small = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    times = {"prediction_length": 4, "context_length": 8, "num_time_features": 1, "lags_sequence": [1, 2]}
    Series(TimeSeriesTransformerConfig(**small, **times)).half().save_pretrained(tmp_path / "plain")
    bigpipe.quantize_checkpoint(tmp_path / "plain", tmp_path / "packed", scheme="nf4")
    model = bigpipe.load(tmp_path / "packed")
    assert next(model.parameters()).dtype == torch.uint8
    before = model.config.to_dict()
    save_checkpoint(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_bytes())["dtype"] == "float16"
    assert model.config.to_dict() == before
