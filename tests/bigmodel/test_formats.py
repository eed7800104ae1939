"""Formats are recognised by config and by tensors, and those that nothing here computes with are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contexts import check_context, forecast_context
from support.models import make_checkpoint
from support.shells import shell

import bigpipe
from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.formats import (
    BUILT_IN,
    DTYPES,
    EIGHT_BITS,
    PLAIN,
    WORTHWHILE,
    castable,
    computable,
    format_of,
    named,
    packing,
    packing_of,
    recognise,
)
from bigpipe.bigmodel.formats.recognition import FOREIGN
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.dispatch import STAGE as DISPATCH, DispatchParams
from bigpipe.plugins.distributed_infer import STAGE as INFER, InferParams
from bigpipe.plugins.quantize import STAGE as QUANTIZE, QuantizeParams
from bigpipe.plugins.shard import STAGE as SHARD, ShardParams

Q = "model.layers.0.self_attn.q_proj"
Entry = tuple[str, str, tuple[int, ...]]
STORED: dict[str, tuple[Entry, ...]] = {
    "gptq": ((f"{Q}.qweight", "int32", (16, 128)), (f"{Q}.qzeros", "int32", (1, 16)),
             (f"{Q}.scales", "float16", (1, 128)), (f"{Q}.g_idx", "int32", (128,))),
    "awq": ((f"{Q}.qweight", "int32", (128, 16)), (f"{Q}.qzeros", "int32", (1, 16)),
            (f"{Q}.scales", "float16", (1, 128))),
    "fp8": ((f"{Q}.weight", "float8_e4m3fn", (128, 128)), (f"{Q}.weight_scale_inv", "float32", (1, 1))),
    "modelopt": ((f"{Q}.weight", "uint8", (128, 64)), (f"{Q}.weight_scale", "float8_e4m3fn", (128, 8)),
                 (f"{Q}.weight_scale_2", "float32", ()), (f"{Q}.input_scale", "float32", ())),
    "compressed-tensors": ((f"{Q}.weight_packed", "int32", (128, 16)), (f"{Q}.weight_scale", "bfloat16", (128, 1)),
                           (f"{Q}.weight_shape", "int64", (2,))),
    "eetq": ((f"{Q}.weight", "int8", (128, 128)), (f"{Q}.weight_scales", "float16", (128,))),
    "hqq": ((f"{Q}.W_q", "uint8", (64, 128)), (f"{Q}.scale", "float16", (128, 1))),
    "aqlm": ((f"{Q}.codes", "int8", (128, 16, 1)), (f"{Q}.codebooks", "float16", (1, 256, 1, 8)),
             (f"{Q}.scales", "float16", (128, 1, 1, 1))),
    "mxfp4": (("model.layers.0.mlp.experts.down_proj_blocks", "uint8", (4, 128, 2, 16)),
              ("model.layers.0.mlp.experts.down_proj_scales", "uint8", (4, 128, 2))),
    "mlx": ((f"{Q}.weight", "uint32", (128, 16)), (f"{Q}.scales", "bfloat16", (128, 2)),
            (f"{Q}.biases", "bfloat16", (128, 2))),
    "quanto": ((f"{Q}.weight._data", "int8", (128, 128)), (f"{Q}.weight._scale", "bfloat16", (128, 1))),
    "vptq": ((f"{Q}.indices", "int32", (1, 128, 8)), (f"{Q}.centroids.weight", "float16", (1, 8)),
             (f"{Q}.centroids", "float16", (1, 8))),
    "int8": ((f"{Q}.weight", "int8", (128, 128)), (f"{Q}.SCB", "float32", (128,))),
    "nf4": ((f"{Q}.weight", "uint8", (8192, 1)), (f"{Q}.weight.quant_state.bitsandbytes__nf4", "uint8", (90,))),
    "fp4": ((f"{Q}.weight", "uint8", (8192, 1)), (f"{Q}.weight.quant_state.bitsandbytes__fp4", "uint8", (90,))),
}  # fmt: skip
"""What each tool's own modules store of one matrix."""
ROW_SCALES = ((f"{Q}.weight", "int8", (128, 128)), (f"{Q}.weight_scale", "bfloat16", (128, 1)))


def tensors(entries: Iterable[Entry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, shape) for name, dtype, shape in entries}


@pytest.mark.parametrize("name", STORED)
def test_tensors_tell(name: str) -> None:
    around = (("model.norm.weight", "float16", (128,)), ("model.position_ids", "int64", (1, 64)))
    found = recognise(None, tensors((*around, *STORED[name])))
    assert (found.name, found.computes) == (name, name in BUILT_IN)


@pytest.mark.parametrize("method", sorted({found.method for found in FOREIGN}))
def test_a_config_tells(method: str) -> None:
    found = recognise({"quant_method": method, "bits": 4}, {})
    assert (found.method, found.computes) == (method, False)
    assert recognise({"quant_method": method.replace("-", "_").upper()}, {}).method == method


@pytest.mark.parametrize(("config", "name"), [
    ({"load_in_8bit": True}, "int8"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ({"quant_method": "of-tomorrow"}, "of-tomorrow"),
    ({"group_size": 64, "bits": 4}, "plain"),
])  # fmt: skip
def test_configs_are_written_in_several_ways(config: dict[str, Any], name: str) -> None:
    assert recognise(config, {}).name == name


@pytest.mark.parametrize("config", [
    {"quantization_config": {"quant_method": "fp8"}},
    {"compression_config": {"quant_method": "fp8"}},
    {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
])  # fmt: skip
def test_a_config_says_it_in_several_places(config: dict[str, Any]) -> None:
    described = ModelDescription(config=config, tensors=None, format=None, tied={}, path=None, custom=None)
    assert format_of(described).name == "fp8"


def test_floats_that_are_called_so_are_no_scales() -> None:
    names = ("scales", "g_idx", "qweight", "weight_scale", "weight_scale_inv", "absmax", "codes", "codebooks")
    found = {f"layers.0.{name}": ("float32", (4,)) for name in names} | {"layers.0.weight": ("float16", (4, 4))}
    assert recognise(None, found) is PLAIN
    assert recognise(None, {"weight": ("float8_e4m3fn", (4, 4))}) is EIGHT_BITS, "fp8 by itself is numbers"


def test_names_of_formats_are_all_that_is_offered() -> None:
    assert list(BUILT_IN) == ["int8", "nf4", "fp4"]
    assert DTYPES == ("float64", "float32", "float16", "bfloat16", "float8", "int8", "int4", "nf4", "fp4")
    assert packing("int4") == packing("nf4")
    with pytest.raises(UsageError, match="'nf5' is not known"):
        named("nf5")


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_that_is_stored_is_found_again(name: str) -> None:
    packing = named(name).packing
    assert packing is not None
    stored = packing.stored((64, 128), "float16")
    assert stored[0].suffix == packing.suffixes[0] == "weight"
    assert {tensor.suffix for tensor in stored} <= set(packing.suffixes)
    others = {suffix for other in map(named, BUILT_IN) if other.name != name for suffix in other.packing.suffixes}  # type: ignore[union-attr]
    assert packing.suffixes[-1] not in others


@pytest.mark.parametrize(("name", "double", "stored", "held", "spread", "product", "quantizing"), [
    ("int8", False, 8192 + 256 + 1, 8192 + 256, (0, 0), 10 * (8 + 4 * 32), (2, 4, 5)),
    ("int8", True, 8192 + 256 + 1, 8192 + 256, (0, 0), 10 * (8 + 4 * 32), (2, 4, 5)),
    ("nf4", False, 4096 + 512 + 64 + 78, 4096 + 512 + 64, (0, 0), 2 * 8192, (2, 11, 12)),
    ("fp4", True, 4096 + 128 + 64 + 4 + 1024 + 168, 4096 + 128 + 64 + 4 + 1024 + 4, (16, 3), 2 * 8192, (2, 11, 12)),
])  # fmt: skip
def test_what_a_matrix_takes(
    name: str, double: bool, stored: int, held: int, spread: tuple[int, int], product: int, quantizing: tuple[int, ...]
) -> None:
    """A matrix of 64 × 128: on disk, in memory, how much that may differ, in a product, while it is quantized."""
    packing = packing_of(name, bnb_4bit_use_double_quant=double, llm_int8_threshold=6.0)
    tensors = packing.stored((64, 128), "float16")
    assert (sum(tensor.nbytes for tensor in tensors), sum(tensor.held for tensor in tensors)) == (stored, held)
    assert (packing.spread(), packing.quantizing) == (spread, quantizing)
    assert packing.transient(10, 8, 32, 8192)[0] == product


def test_a_search_offers_what_is_worth_it() -> None:
    assert WORTHWHILE == ("float32", "float16", "bfloat16", "int8", "nf4")


@pytest.fixture(params=["gptq", "fp8", "rows"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint whose tensors alone tell what it is."""
    config = json.loads((make_checkpoint(tmp_path / "llama", "llama") / "config.json").read_text())
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    entries = ROW_SCALES if request.param == "rows" else STORED[request.param]
    shell(folder / "model.safetensors", [("model.norm.weight", "float16", (128,)), *entries])
    return folder


def planned(kind: Any, params: Any) -> Callable[[Path, Path], object]:
    def plan(model: Path, base: Path) -> object:
        inputs = {"model": (Forecast(output=describe_checkpoint(model)),)}
        kind.forecast(params, forecast_context(base, inputs=inputs))
        return kind.planning.check(params, check_context(base, inputs=inputs)) if kind.planning.check else None

    return plan


USES: dict[str, Callable[[Path, Path], object]] = {
    "quantize": planned(QUANTIZE, QuantizeParams(scheme="int8")),
    "shard with a dtype": planned(SHARD, ShardParams(dtype="bfloat16")),
    "dispatch": planned(DISPATCH, DispatchParams(device_map={"": "cpu"})),
    "infer": planned(INFER, InferParams(task="text-generation", prompts=["a"])),
    "load": lambda model, base: bigpipe.load(model),
    "save as another dtype": lambda model, base: bigpipe.save_checkpoint(model, base / "out", dtype="float32"),
    "quantize_checkpoint": lambda model, base: bigpipe.quantize_checkpoint(model, base / "out", scheme="nf4"),
}


@pytest.mark.parametrize("use", USES)
def test_what_would_compute_with_it_refuses_and_names_it(foreign: Path, tmp_path: Path, use: str) -> None:
    with pytest.raises(UsageError, match=r"GPTQ|fp8 with a scale per block|weights with scales beside them") as raised:
        USES[use](foreign, tmp_path)
    assert raised.value.cure


def test_sharding_it_as_it_is_goes_on(foreign: Path, tmp_path: Path) -> None:
    planned(SHARD, ShardParams())(foreign, tmp_path)
    saved = bigpipe.save_checkpoint(foreign, tmp_path / "out")
    assert saved.shards == 1


def test_plain_weights_are_refused_nothing(tmp_path: Path) -> None:
    described = describe_checkpoint(make_checkpoint(tmp_path / "llama", "llama"))
    computable(described)
    castable(described, "float32")


ODD_SETTINGS: list[tuple[str, str, Any]] = [
    *(("nf4", "bnb_4bit_compute_dtype", odd) for odd in (5, "float15", "int8", [1], {"a": 1}, True)),
    *(("int8", "llm_int8_threshold", odd) for odd in ("6.0", [6.0], None, True, float("nan"))),
]


@pytest.mark.parametrize(("scheme", "name", "odd"), ODD_SETTINGS, ids=str)
def test_settings_that_no_module_is_made_from_are_told_from_the_config(
    tmp_path: Path, scheme: str, name: str, odd: Any
) -> None:
    bigpipe.quantize_checkpoint(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "out", scheme=scheme)
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"][name] = odd
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    for read in (bigpipe.load, bigpipe.estimate, lambda path: bigpipe.place(path, max_memory={"cpu": "1GiB"})):
        with pytest.raises(InvalidCheckpoint, match=f"{tmp_path / 'out'}: quantization_config: {name} is"):
            read(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["torch.float16", "half", None, "bfloat16"])
def test_a_compute_dtype_may_be_written_as_torch_does(tmp_path: Path, dtype: str | None) -> None:
    bigpipe.quantize_checkpoint(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "out", scheme="nf4")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = dtype
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    wanted = {"torch.float16": torch.float16, "half": torch.float16, None: torch.float32, "bfloat16": torch.bfloat16}
    loaded: Any = bigpipe.load(tmp_path / "out")
    assert loaded.model.layers[0].mlp.up_proj.compute_dtype == wanted[dtype]


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_may_be_stored_as_wider_numbers(tmp_path: Path, storage: str, scheme: str) -> None:
    """`bnb_4bit_quant_storage`, which FSDP needs: 405B models are published so. As transformers writes and reads it."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes takes whole tiles alone
    plain = make_checkpoint(tmp_path / "model", "llama", dtype="bfloat16", **sizes)
    told: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme}
    for name, dtype in (("bytes", "uint8"), ("wide", storage)):
        asked = transformers.BitsAndBytesConfig(**told, bnb_4bit_quant_storage=getattr(torch, dtype))
        model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked)
        model.save_pretrained(tmp_path / name)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        logits = [bigpipe.load(tmp_path / name)(ids).logits for name in ("bytes", "wide")]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")(ids).logits
        streamed = bigpipe.load(tmp_path / "wide", {"": "disk"})(ids).logits
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], theirs)
    assert torch.equal(streamed, theirs)
    room = {"cpu": "1GiB"}
    assert bigpipe.place(tmp_path / "wide", max_memory=room).weights == (
        bigpipe.place(tmp_path / "bytes", max_memory=room).weights
    )
    config = json.loads((tmp_path / "wide/config.json").read_text())
    (tmp_path / "wide/config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(InvalidCheckpoint, match="would be"):
        bigpipe.place(tmp_path / "wide", max_memory=room)
