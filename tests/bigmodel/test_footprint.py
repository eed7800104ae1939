"""Sizes of weights, against published numbers and against what real models hold and write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.architectures import ALL
from support.real import build, describe_here, held_bytes, stored_bytes

from bigpipe.bigmodel.architecture import Architecture, Head
from bigpipe.bigmodel.footprint.weights import weigh
from bigpipe.bigmodel.formats import DTYPES, converted_modules
from bigpipe.bigmodel.formats.four_bit import TYPICAL_OFFSET
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.writing import save_checkpoint
from bigpipe.errors import UsageError

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
BLOOM: dict[str, Any] = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 250880}
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert-base-cased": {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 28996},
    "bloom-176b": {**BLOOM, "hidden_size": 14336, "n_layer": 70, "n_head": 112},
    "bloom-1b7": {**BLOOM, "hidden_size": 2048, "n_layer": 24, "n_head": 16},
    "mistral-7b": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "llama-3.1-8b": LLAMA,
    "llama-3.1-405b": {
        **LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "roberta-base": {
        "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 50265,
        "max_position_embeddings": 514, "type_vocab_size": 1,
    },
    "opt-13b": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 40,
        "ffn_dim": 20480, "num_attention_heads": 40, "vocab_size": 50272, "word_embed_proj_dim": 5120,
    },
}  # fmt: skip

FAST = (
    "llama", "llama-tied", "gemma2", "gpt2", "bloom", "mixtral", "deepseek_v3", "mamba2", "bert", "vit", "t5",
    "marian", "llava",
)  # fmt: skip
SLOW = tuple(name for name in ALL if name not in FAST)


@pytest.fixture(scope="module")
def published() -> dict[str, Architecture]:
    named = {**PUBLISHED, **{name: ALL[name] for name in FAST}}
    bare = {"bert-bare": PUBLISHED["bert-base-cased"], "llama-bare": PUBLISHED["llama-3.1-8b"]}
    return {
        **{name: describe_here(config) for name, config in named.items()},
        **{name: describe_here(config, "none") for name, config in bare.items()},
    }


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("bert-base-cased", "float32", 433_363_216),
        ("mistral-7b", "bfloat16", 14_483_464_192),
        ("llama-3.1-8b", "bfloat16", 16_060_522_496),
        ("llama-3.1-405b", "bfloat16", 811_706_777_600),
        ("bloom-176b", "bfloat16", 352_494_542_848),
    ],
)
def test_stored_bytes_are_the_published_ones(
    published: dict[str, Architecture], name: str, dtype: str, size: int
) -> None:
    assert weigh(published[name], dtype).stored == size


def test_parameters_are_the_published_ones(published: dict[str, Architecture]) -> None:
    assert weigh(published["opt-13b"], "float16").parameters == 12_853_473_280
    assert weigh(published["roberta-base"], "float32").parameters == 124_697_433


def test_bert_base_in_accelerates_view(published: dict[str, Architecture]) -> None:
    bare = weigh(published["bert-bare"], "float32")
    assert (bare.total, bare.largest_layer) == (433_249_280, 90_669_056)
    assert weigh(published["bert-base-cased"], "float32").total == 433_371_408


def test_accelerates_view_of_llama_lacks_the_head(published: dict[str, Architecture]) -> None:
    assert weigh(published["llama-bare"], "float16").total == 15_009_849_600
    assert weigh(published["llama-3.1-8b"], "float16").parameters * 2 == 16_060_522_496


def test_int4_is_not_an_eighth_of_float32(published: dict[str, Architecture]) -> None:
    llama = weigh(published["llama-3.1-8b"], "nf4", double_quant=True)
    assert round(llama.loaded / 1e9, 2) == 5.70
    assert round(weigh(published["llama-bare"], "int4").total / 1e9, 2) == 3.75


def test_bloom_1b7_shrinks_by_the_ratios_that_transformers_tests(published: dict[str, Architecture]) -> None:
    half, int8, nf4 = (weigh(published["bloom-1b7"], dtype) for dtype in ("float16", "int8", "nf4"))
    # get_memory_footprint counts codes, not their scales
    assert half.loaded / (nf4.loaded - nf4.scales) == pytest.approx(2.109659552692574, abs=1e-15)
    assert half.loaded / (int8.loaded - int8.scales) == pytest.approx(1.540025, abs=1e-6)


def test_the_head_and_tied_embeddings_are_not_converted(published: dict[str, Architecture]) -> None:
    names = {module.name for module in converted_modules(published["bert-base-cased"])}
    assert "cls.predictions.decoder" not in names
    assert "bert.encoder.layer.0.attention.self.query" in names
    assert converted_modules(published["t5"], skip_modules=["decoder"])[0].name.startswith("encoder.block.0")
    assert not any("wo" in module.name for module in converted_modules(published["t5"]))


@pytest.mark.parametrize("head", ["auto", "none"])
def test_resnet50_of_timm(head: Head) -> None:
    """accelerate builds timm's models with their classifier, so that is its figure."""
    pytest.importorskip("timm", exc_type=Exception)
    config = {"architecture": "resnet50", "num_classes": 1000, "pretrained_cfg": {"tag": "a1_in1k"}}
    weights = weigh(describe_here(config, head), "float32")
    assert (weights.parameters, weights.total, weights.largest_layer) == (25_557_032, 102_441_032, 9_437_184)


def test_the_largest_layer_of_idefics_80b_less_its_old_rotary_tables() -> None:
    """accelerate's tests say 3,240,165,632: each attention still kept cosines and sines of 2,048 positions then."""
    config: dict[str, Any] = {
        "model_type": "idefics", "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 4,
        "num_attention_heads": 64, "vocab_size": 32000, "cross_layer_interval": 4, "qk_layer_norms": True,
    }  # fmt: skip
    frequencies, tables = 64 * 4, 2 * 2048 * 128 * 4
    layer = weigh(describe_here(config, "none"), "float32").largest_layer
    assert layer - 2 * frequencies + frequencies + tables == 3_240_165_632


def test_an_unknown_dtype(published: dict[str, Architecture]) -> None:
    with pytest.raises(UsageError, match="int3"):
        weigh(published["bloom-176b"], "int3")


SCHEMES: tuple[tuple[str, bool], ...] = (
    ("int8", False), ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True),
)  # fmt: skip
"""(scheme, double quantization)."""
FAST_SCHEMES = (SCHEMES[0], SCHEMES[1], SCHEMES[4])


def longer_offsets(checkpoint: Path) -> int:
    """By how many characters the means of double-quantized weights, written as text, are longer than foreseen."""
    from safetensors import safe_open

    longer = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            names = [name for name in sorted(opened.keys()) if "bitsandbytes__" in name]
            states = [json.loads(bytes(opened.get_tensor(name))) for name in names]
        offsets = [state["nested_offset"] for state in states if "nested_offset" in state]
        longer += sum(len(json.dumps(offset)) - len(json.dumps(TYPICAL_OFFSET)) for offset in offsets)
    return longer


def check_against_real(
    name: str, architecture: Architecture, folder: Path, schemes: Sequence[tuple[str, bool]] = SCHEMES
) -> None:
    import torch
    import transformers

    model = build(ALL[name])
    model.save_pretrained(folder / "source")
    assert stored_bytes(folder / "source") == weigh(architecture, "float32").stored
    for dtype in ("float32", "float16", "bfloat16"):
        loaded = type(model).from_pretrained(folder / "source", dtype=getattr(torch, dtype))
        save_checkpoint(folder / "source", folder / dtype, dtype=dtype)
        predicted = weigh(architecture, dtype)
        assert (dtype, held_bytes(loaded)) == (dtype, predicted.loaded)
        assert (dtype, stored_bytes(folder / dtype)) == (dtype, predicted.stored)
        assert predicted.buffers == sum(
            buffer.untyped_storage().nbytes() for buffer in loaded.buffers() if buffer.device.type == "cpu"
        )
    check_float8(model, architecture, folder)
    for dtype, double_quant in schemes:
        width: dict[str, Any] = {"load_in_8bit": True}
        if dtype != "int8":
            width = {"load_in_4bit": True, "bnb_4bit_quant_type": dtype, "bnb_4bit_use_double_quant": double_quant}
        config = transformers.BitsAndBytesConfig(**width)
        source, target = folder / "source", folder / f"quantized-{dtype}-{double_quant}"
        quantized = type(model).from_pretrained(source, dtype=torch.float16, quantization_config=config)
        quantized.save_pretrained(target)
        predicted = weigh(architecture, dtype, double_quant=double_quant)
        assert (dtype, held_bytes(quantized)) == (dtype, predicted.loaded)
        ours = folder / f"ours-{dtype}-{double_quant}"
        if not converted_modules(architecture):  # Falcon's layers are of a class of their own, which is left alone
            with pytest.raises(UsageError, match="no linear modules but lm_head, left as they are by default"):
                quantize_checkpoint(source, ours, scheme=dtype, architecture=architecture)
            assert (dtype, stored_bytes(target)) == (dtype, predicted.stored)
            continue
        written = quantize_checkpoint(
            source, ours, scheme=dtype, bnb_4bit_use_double_quant=double_quant, architecture=architecture
        )
        assert (dtype, written.bytes) == (dtype, stored_bytes(target))
        assert (dtype, stored_bytes(target)) == (dtype, predicted.stored + longer_offsets(target))


def check_float8(model: Any, architecture: Architecture, folder: Path) -> None:
    """No loader casts to 8-bit floats by itself: torch does it here, to all floats but those the class pins."""
    import torch

    pinned = {tensor.name for tensor in architecture.tensors() if tensor.fixed}
    for module_name, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                full_name = f"{module_name}.{name}".lstrip(".")
                if tensor is not None and tensor.is_floating_point() and full_name not in pinned:
                    tensor.data = tensor.data.to(torch.float8_e4m3fn)
    predicted = weigh(architecture, "float8")
    assert held_bytes(model) == predicted.loaded
    model.save_pretrained(folder / "float8")
    # `stored` is of a checkpoint that is cast throughout; this one keeps in float32 what the class pins
    saved = [tensor for tensor in architecture.tensors() if tensor.persistent and tensor.floating]
    kept = sum(3 * tensor.elements for tensor in saved if tensor.name in pinned)
    assert stored_bytes(folder / "float8") == predicted.stored + kept


@pytest.mark.parametrize("name", FAST)
def test_predicted_bytes_are_those_of_the_real_model(
    published: dict[str, Architecture], name: str, tmp_path: Path
) -> None:
    check_against_real(name, published[name], tmp_path, FAST_SCHEMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_all_architectures(name: str, tmp_path: Path) -> None:
    check_against_real(name, describe_here(ALL[name]), tmp_path)


@pytest.mark.slow
def test_accelerates_own_columns(tmp_path: Path) -> None:
    """`calculate_maximum_sizes` on the models that `AutoModel` builds."""
    import torch
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in ALL:
        architecture = describe_here(ALL[name], "none")
        config = CONFIG_MAPPING[ALL[name]["model_type"]].from_dict(dict(ALL[name]))
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32)
        total, (layer, _) = calculate_maximum_sizes(model)
        ours = weigh(architecture, "float32")
        # accelerate counts a bool as one bit; torch stores a byte
        bools = sum(tensor.elements for tensor in architecture.tensors() if tensor.dtype == "bool")
        assert (name, ours.total, ours.largest_layer) == (name, total + bools * 7 / 8, layer)


def test_every_dtype_weighs_less_than_the_wider_one(published: dict[str, Architecture]) -> None:
    sizes = [weigh(published["bloom-176b"], dtype).total for dtype in DTYPES]
    assert sizes == sorted(sizes, reverse=True)
