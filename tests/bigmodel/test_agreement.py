"""Config and stored tensors are held against each other from headers: used right, named, or refused with the field."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.asking import answer_here
from support.contexts import check_context, forecast_context
from support.layouts.layout import change_config
from support.models import make_checkpoint

import bigpipe
from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import loaded
from bigpipe.bigmodel.footprint import estimate
from bigpipe.bigmodel.formats import Agreement, agree
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.orchestrator.stage import Forecast, Stage
from bigpipe.plugins import dispatch, distributed_infer, quantize

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]
LAYER = "model.layers.1"


def checkpoint(folder: Path, change: Change = dict, architecture: str = "llama", **fields: object) -> Path:
    make_checkpoint(folder, architecture)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    change_config(folder, **fields)
    return answer_here(folder)


def agreed(folder: Path) -> Agreement:
    described = describe_checkpoint(folder)
    return agree(described, describe_architecture(described.config or {}))


def with_extra(name: str, *shape: int) -> Change:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def without(end: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def turned(end: str) -> Change:
    return lambda tensors: {n: t.T.contiguous() if n.endswith(end) else t for n, t in tensors.items()}


def as_codes(end: str) -> Change:
    return lambda tensors: {n: t.to(torch.int8) if n.endswith(end) else t for n, t in tensors.items()}


WRONG = {
    "vocabulary": (dict, {"vocab_size": 270}, r"\.weight is \[264, 32\], and .* is \[270, 32\] \(vocab_size 270 in"),
    "inner width": (dict, {"intermediate_size": 96}, r"\(intermediate_size 96 in its config\)"),
    "heads": (dict, {"num_key_value_heads": 4}, r"k_proj.weight is \[16, 32\], and .* is \[32, 32\]"),
    "a matrix the other way round": (turned("0.mlp.up_proj.weight"), {}, r"up_proj.weight is \[32, 64\]"),
    "codes without scales": (as_codes("1.mlp.up_proj.weight"), {}, "up_proj.weight is stored as int8"),
    "a layer that is missing": (dict, {"num_hidden_layers": 3}, r"no weights are stored for model.layers.2\."),
    "a matrix that is missing": (without("1.mlp.up_proj.weight"), {}, "no weights are stored for .*up_proj.weight of"),
    "a layer beyond the last": (dict, {"num_hidden_layers": 1}, f"{LAYER}.input_layernorm.weight.* belongs to nothing"),
    "a bias that the config leaves out": (with_extra(f"{LAYER}.self_attn.q_proj.bias", 32), {}, "q_proj.bias belongs"),
    "a norm of another family": (with_extra(f"{LAYER}.self_attn.q_norm.weight", 8), {}, "q_norm.weight belongs"),
    "a bias of the head": (with_extra("lm_head.bias", 264), {}, "lm_head.bias belongs to nothing in LlamaForCausalLM"),
    "an adapter that is not merged": (with_extra(f"{LAYER}.mlp.up_proj.lora_A.weight", 8, 32), {}, "lora_A.weight bel"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_the_config_contradicts_are_refused_from_headers(tmp_path: Path, wrong: str) -> None:
    change, fields, said = WRONG[wrong]
    folder = checkpoint(tmp_path / "model", change, **fields)
    with pytest.raises(InvalidCheckpoint, match=said):
        agreed(folder)
    with pytest.raises(InvalidCheckpoint):
        bigpipe.load(folder)


HARMLESS = {
    "frequencies of each layer": f"{LAYER}.self_attn.rotary_emb.inv_freq",
    "scale of a cache": f"{LAYER}.self_attn.k_scale",
    "cosines": f"{LAYER}.self_attn.rotary_emb.cos_cached",
}


@pytest.mark.parametrize("harmless", HARMLESS)
def test_buffers_that_a_class_makes_itself_are_passed_over(tmp_path: Path, harmless: str) -> None:
    folder = checkpoint(tmp_path / "model", with_extra(HARMLESS[harmless], 4))
    assert agreed(folder).notes == ()
    bigpipe.load(folder)


NAMED = {
    "another head": ({}, "score.weight"),
    "heads for guessing ahead": ({}, "talk_head.0.2.weight"),
    "a layer that predicts further tokens": ({"num_nextn_predict_layers": 1}, "model.layers.2.eh_proj.weight"),
    "such layers apart": ({}, "mtp.layers.0.mlp.up_proj.weight"),
    "a tower": ({}, "vision_tower.encoder.layers.0.fc1.weight"),
}


@pytest.mark.parametrize("named", NAMED)
def test_what_the_rest_is_whole_without_is_named(tmp_path: Path, named: str) -> None:
    fields, extra = NAMED[named]
    folder = checkpoint(tmp_path / "model", with_extra(extra, 8, 32), **fields)
    assert agreed(folder).notes == (f"stored, and used by nothing in LlamaForCausalLM: {extra}",)
    assert loaded(bigpipe.load(folder)).unused == (extra,)


def test_a_head_more_than_the_class_has_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", architectures=["LlamaModel"])
    assert agreed(folder).unused == ("lm_head.weight",)


def test_what_a_class_says_it_ignores_is_not_named(tmp_path: Path) -> None:
    """T5's first checkpoints hold a bias that its decoder never used."""
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = checkpoint(tmp_path / "t5", with_extra(name, 32, 4), "t5")
    assert agreed(folder).notes == ()


def test_experts_that_are_stored_one_by_one_are_counted_together(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "whole", architecture="mixtral")
    assert agreed(folder).notes == ()
    cut = checkpoint(tmp_path / "cut", without("experts.2.w1.weight"), "mixtral")
    with pytest.raises(InvalidCheckpoint, match=r"hold .* elements, and MixtralForCausalLM has"):
        agreed(cut)


def test_experts_that_are_packed_one_by_one_are_refused_before_and_when_they_are_loaded(tmp_path: Path) -> None:
    """As transformers 4 and bitsandbytes saved them; the class has held them in one tensor since."""

    def packed(tensors: Tensors) -> Tensors:
        experts = [name for name in tensors if re.search(r"\.w[123]\.weight$", name)]
        codes = {name: tensors[name].to(torch.int8) for name in experts}
        scales = {name.removesuffix("weight") + "SCB": torch.ones(len(tensors[name])) for name in experts}
        return tensors | codes | scales

    folder = checkpoint(tmp_path / "model", packed, "mixtral")
    said = r"holds it in one tensor with others, model.layers.0.mlp.experts\.\w+: nothing here computes"
    for use in (agreed, bigpipe.load):
        with pytest.raises(UsageError, match=said):
            use(folder)


def untied(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] / 2}


def test_what_is_tied_and_stored_beside_is_counted_and_loaded_by_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", untied, "qwen2")
    tied = checkpoint(tmp_path / "tied", architecture="qwen2")
    assert (agreed(folder).untied, agreed(tied).untied) == (("lm_head.weight",), ())
    placement = bigpipe.place(folder, device_map={"": "cpu"}, dtype="float32")
    assert placement.needs["cpu"].weights == sum(loaded(bigpipe.load(folder, placement)).held.values())
    more = 264 * 32 * 4
    sizes = [estimate(each, dtypes=["float32"])["float32"].counts.loaded for each in (folder, tied)]
    assert sizes[0] - sizes[1] == more


@pytest.mark.parametrize("stage", [quantize.STAGE, dispatch.STAGE, distributed_infer.STAGE], ids=lambda s: s.kind)
def test_every_kind_that_needs_shapes_says_so_at_plan(tmp_path: Path, stage: Stage) -> None:
    model = describe_checkpoint(checkpoint(tmp_path / "model", vocab_size=270))
    wired = {"model": (Forecast(output=model),)}
    asked = {"quantize": {"scheme": "nf4"}, "distributed-infer": {"task": "text-generation", "prompts": ["a"]}}
    params = stage.params.model_validate(asked.get(stage.kind, {}))
    early = stage.planning.check if stage.kind == "distributed-infer" else stage.forecast
    make = check_context if stage.kind == "distributed-infer" else forecast_context
    with pytest.raises(InvalidCheckpoint, match="vocab_size 270"):
        early(params, make(tmp_path, inputs=wired))


def test_an_estimate_says_that_config_and_weights_disagree(tmp_path: Path) -> None:
    made = estimate(checkpoint(tmp_path / "model", vocab_size=270), dtypes=["float32"])
    assert any("vocab_size 270" in note for note in made.notes)


def _without(name: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _as(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: {**tensors, name: change(tensors[name])}


PROJECTION = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("options", "change", "told"), [
    ({"scheme": "nf4"}, _without(f"{PROJECTION}.weight.absmax"), "weight.absmax is not stored"),
    ({"scheme": "nf4"}, _without(f"{PROJECTION}.weight.quant_map"), "weight.quant_map is not stored"),
    ({"scheme": "nf4", "bnb_4bit_use_double_quant": True}, _without(f"{PROJECTION}.weight.nested_absmax"),
     "weight.nested_absmax is not stored"),
    ({"scheme": "fp4"}, _as(f"{PROJECTION}.weight.absmax", torch.Tensor.byte),
     "weight.absmax is uint8, not float32"),
    ({"scheme": "nf4"}, _as(f"{PROJECTION}.weight.absmax", lambda scales: scales.view(2, -1).bfloat16()),
     "weight.absmax has 2 dimensions, not 1"),
    ({"scheme": "int8"}, _without(f"{PROJECTION}.weight"), "weight is not stored"),
    ({"scheme": "int8"}, _as(f"{PROJECTION}.weight", torch.Tensor.half), "of float16.* of int8"),
    ({"scheme": "int8"}, _as(f"{PROJECTION}.SCB", lambda scales: scales[:-1].clone()), r"SCB is \[\d+\], not"),
])  # fmt: skip
def test_packed_weights_without_what_belongs_to_them_are_refused(
    options: dict[str, Any], change: Change, told: str, tmp_path: Path
) -> None:
    quantize_checkpoint(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "packed", **options)
    assert agreed(tmp_path / "packed").notes == ()
    file = tmp_path / "packed/model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=f"{PROJECTION}.*{told}"):
        agreed(tmp_path / "packed")


def test_packed_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    quantize_checkpoint(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "int8", scheme="int8")
    assert agreed(tmp_path / "int8").notes == ()
    change_config(tmp_path / "int8", intermediate_size=96)
    with pytest.raises(InvalidCheckpoint, match=r"_proj.weight is \[.*96"):
        agreed(tmp_path / "int8")
