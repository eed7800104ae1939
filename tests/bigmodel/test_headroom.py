"""What is placed without `max_memory` is what the plan's own check accepts, whatever the model and the machine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support.real import describe_here

import bigpipe
from bigpipe.bigmodel.architecture import Architecture, known_architecture, reads_alone
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.formats import named
from bigpipe.bigmodel.placement import Placement, PlacementRequest, find_misfits, place_model
from bigpipe.bigmodel.placement.headroom import headroom_of
from bigpipe.errors import DoesNotFit
from bigpipe.fit import Need, totals
from bigpipe.machine import Gpu, Machine

GIB = 2**30
MODES = ("auto", "balanced", "balanced_low_0", "sequential", "optimal")
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True, "vocab_size": 256000},
    "few big layers": {**LLAMA, "num_hidden_layers": 3, "hidden_size": 8192, "intermediate_size": 53248},
    "many small layers": {**LLAMA, "num_hidden_layers": 48, "hidden_size": 1024, "intermediate_size": 2816},
    "all heads cached": {**LLAMA, "num_key_value_heads": 32},
    "mixture": {
        **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 6,
    },
    "windows": {
        **LLAMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 256,
        "sliding_window": 1024, "query_pre_attn_scalar": 256,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_layer": 48, "n_head": 25,
        "n_positions": 4096, "vocab_size": 50257, "torch_dtype": "float16",
    },
    "encoder and decoder": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 2048, "d_ff": 5120, "d_kv": 64,
        "num_layers": 12, "num_heads": 32, "vocab_size": 32128, "torch_dtype": "bfloat16",
    },
    "encoder deeper than its decoder": {
        "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": 1024,
        "encoder_layers": 12, "decoder_layers": 4, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "torch_dtype": "float16",
    },
    "as deep as its tower": {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        "text_config": {**LLAMA, "num_hidden_layers": 8},
    },
    "an encoder behind a tower": {
        "model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"], "torch_dtype": "float16",
        "vision_config": {"num_hidden_layers": 4}, "qformer_config": {"num_hidden_layers": 4},
        "text_config": {"model_type": "t5", "num_layers": 4, "d_model": 512, "d_kv": 64, "num_heads": 8},
    },
    "encoder": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 30522, "torch_dtype": "float32",
    },
}  # fmt: skip


@lru_cache
def architecture_of(name: str) -> Architecture:
    return describe_here(SHAPES[name])


def described(name: str) -> ModelDescription:
    return ModelDescription(config=SHAPES[name], tensors=None, format=None, tied={}, path=None, custom=None)


def machine_of(*gpus: int, memory: int = 64 * GIB) -> Machine:
    there = tuple(Gpu(index, "GPU", size, size) for index, size in enumerate(gpus))
    return Machine("box", cpus=8, memory=memory, memory_available=memory, disk_free=10**13, gpus=there)


@st.composite
def questions(draw: Any) -> tuple[str, PlacementRequest, Machine]:
    name = draw(st.sampled_from(sorted(SHAPES)))
    request = PlacementRequest(
        device_map=draw(st.sampled_from(MODES)),
        batch_size=draw(st.sampled_from([1, 2, 8, 32])),
        sequence_length=draw(st.sampled_from([64, 2048, 8192, 32768])),
    )
    total = Budget(architecture_of(name), "bfloat16", Workload()).weights.bytes
    sizes = st.integers(GIB // 2, int(total * 1.5) + 2 * GIB)
    gpus = draw(st.one_of(st.lists(sizes, max_size=5), st.builds(lambda size, n: [size] * n, sizes, st.integers(1, 8))))
    return name, request, machine_of(*gpus, memory=draw(st.integers(GIB, 4 * total + GIB)))


@given(questions())
@settings(max_examples=40, deadline=None)
def test_what_is_placed_is_accepted(question: tuple[str, PlacementRequest, Machine]) -> None:
    name, request, machine = question
    architecture = architecture_of(name)

    def attempt(request: PlacementRequest) -> Placement:
        return place_model(described(name), architecture, request, machine)

    try:
        placement = attempt(request)
    except DoesNotFit as error:
        if not error.change:
            return
        request = request.changed(error.change)  # a smaller batch or shorter sequences do fit where they are named
        placement = attempt(request)
    assert find_misfits(request, placement, machine, attempt) == ()
    rooms = {gpu.index: gpu.memory for gpu in machine.gpus} | {"cpu": machine.memory, "disk": 10**18}
    assert all(total <= rooms[device] for device, total in totals(placement.needs).items())
    workload = Workload(batch_size=request.batch_size, sequence_length=request.sequence_length)
    whole = Budget(architecture, "bfloat16" if name != "gpt2" else "float16", workload)
    assert sum(need.kv_cache for need in placement.needs.values()) == whole.kv_cache.bytes
    assert sum(need.weights for need in placement.needs.values()) == sum(placement.weights.values())
    assert all(placement.device_of(tensor.name) is not None for tensor in architecture.tensors())


@pytest.mark.parametrize("name", SHAPES)
def test_a_models_cache_is_divided_to_the_byte(name: str) -> None:
    architecture = architecture_of(name)
    headroom = headroom_of(architecture, "float16", 3, 2000)
    whole = Budget(architecture, "float16", Workload(batch_size=3, sequence_length=2000))
    assert sum(headroom.cache.values()) == whole.kv_cache.bytes
    assert headroom.activations == whole.activations.bytes


@pytest.mark.parametrize("name", SHAPES)
def test_only_layers_that_meet_tokens_that_are_made_keep_any(name: str) -> None:
    architecture = architecture_of(name)
    alone, classes = reads_alone(architecture.config), architecture.no_split
    blocks = [f"{module.name}." for module in architecture.modules if module.class_name in classes]
    meeting = {block for block in blocks if not alone(block)}
    cache = headroom_of(architecture, "float16", 3, 2000).cache
    assert not any(map(alone, cache))
    if cache:
        assert {block for block in blocks if any(tensor.startswith(block) for tensor in cache)} == meeting


def test_keys_and_values_of_an_encoder_decoder_lie_where_its_decoder_does() -> None:
    architecture, request = architecture_of("encoder and decoder"), PlacementRequest(batch_size=16, sequence_length=512)
    placement = place_model(described("encoder and decoder"), architecture, request, machine_of(4 * GIB, 4 * GIB))
    homes = [placement.device_of(f"decoder.block.{index}.layer.0") for index in range(12)]
    cached = Budget(architecture, "bfloat16", Workload(batch_size=16, sequence_length=512)).kv_cache.bytes
    for device, need in placement.needs.items():
        assert need.kv_cache == pytest.approx(cached * homes.count(device) / 12, abs=12)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_what_packed_matrices_are_unpacked_into_is_kept_free(name: str) -> None:
    architecture = architecture_of("llama")
    workload = Workload(batch_size=3, sequence_length=2000)
    plain = headroom_of(architecture, "float16", 3, 2000)
    packed = headroom_of(architecture, "float16", 3, 2000, named(name))
    estimated = (Budget(architecture, dtype, workload).activations.bytes for dtype in (name, "float16"))
    assert packed.activations - plain.activations == next(estimated) - next(estimated) > 0
    assert packed.cache == plain.cache


def test_layers_with_windows_cache_less_than_those_that_see_everything() -> None:
    headroom = headroom_of(architecture_of("windows"), "bfloat16", 1, 8192)
    sliding, full = (headroom.cache[f"model.layers.{index}.self_attn.q_proj.weight"] for index in (0, 1))
    assert sliding < full / 7


@pytest.mark.parametrize("mode", MODES)
def test_a_llama_405b_in_4_bits_fits_eight_gpus(mode: str) -> None:
    """65 GiB of cache and 200 of weights: by shares of weights alone, some GPU would be asked for more than it has."""
    config = {
        **LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128,
    }  # fmt: skip
    architecture = known_architecture(config)
    assert architecture is not None
    model = ModelDescription(
        config=config, tensors={t.name: ("uint8", (t.elements // 2,)) for t in architecture.tensors()},
        format="safetensors", tied={}, path=None, custom=None,
    )  # fmt: skip
    request = PlacementRequest(device_map=mode, batch_size=8, sequence_length=4096)
    placement = place_model(model, architecture, request, machine_of(*[int(79.6 * GIB)] * 8, memory=2048 * GIB))
    assert set(placement.weights) <= set(range(8)) | {"cpu"}
    assert sum(need.kv_cache for need in placement.needs.values()) == 126 * 2 * 1024 * 2 * 8 * 4096
    assert all(need.total <= 79.6 * GIB for gpu, need in placement.needs.items() if gpu != "cpu")


def test_the_function_gives_what_the_stage_gives(tmp_path: Any, workshop: Any) -> None:
    """On this machine, with the same speeds, without `max_memory`; and `load` needs nothing besides."""
    from support.models import make_checkpoint

    model = make_checkpoint(workshop.folder / "model")
    for mode in MODES:
        with_ = f"device_map: {mode}, batch_size: 3, sequence_length: 77, special_dtypes: {{lm_head.weight: float32}}"
        result = workshop.run(
            "version: 1\nname: x\nstages:\n  download: {uses: download, with: {path: model}}\n"
            f"  dispatch: {{uses: dispatch, inputs: download, with: {{{with_}, verify: none}}}}\n",
            store=workshop.folder / "store",
        )
        from bigpipe.plugins.placed import read_placement

        placed = bigpipe.place(
            model, device_map=mode, batch_size=3, sequence_length=77, special_dtypes={"lm_head.weight": "float32"},
            memo=workshop.folder / "store" / "memo",
        )  # fmt: skip
        assert read_placement(result.path("dispatch")) == placed
        assert placed.needs["cpu"] == Need(
            weights=placed.weights["cpu"], kv_cache=placed.needs["cpu"].kv_cache,
            activations=placed.needs["cpu"].activations,
        )  # fmt: skip
