"""Codes with scales are read as the plain numbers they mean: bit-equal to the formula in torch, to transformers' own
decoding and to compressed-tensors; in runs of rows, from several files, by whatever reads a checkpoint."""

from __future__ import annotations

import json
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.contexts import check_context, forecast_context, stage_context
from support.layouts.layout import change_config
from support.models import make_checkpoint

import bigpipe
from bigpipe.bigmodel.checkpoint import DECODED, MappedFiles, describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.execution import HostMemory
from bigpipe.bigmodel.footprint import estimate
from bigpipe.bigmodel.formats import decode, decoded, format_of
from bigpipe.bigmodel.formats.encoders.scaled import table
from bigpipe.bigmodel.hub.heads import directory_heads, may_pass
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.writing import Conversion, convert
from bigpipe.errors import BigpipeError, InvalidCheckpoint, UsageError
from bigpipe.orchestrator.stage import Forecast, ForecastContext, Stage
from bigpipe.passing import OpenInlet, OpenOutlet
from bigpipe.plugins import dispatch, distributed_infer, estimate as estimate_kind, quantize, shard

Tensors = dict[str, torch.Tensor]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(kind: str, strategy: str, **weights: Any) -> dict[str, Any]:
    asked = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": asked}
    return {"quant_method": "compressed-tensors", "format": f"{kind}-quantized", "config_groups": {"group_0": group}}


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every code but those that are no number."""
    found = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).mul(37).remainder(256).to(torch.uint8)
    found[(found & 0x7F) == 0x7F] = 0
    return found.view(shape).view(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.linspace(0.003, 0.2, max(1, torch.Size(shape).numel())).view(shape).to(dtype)


def exponents(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(12).add(115).to(torch.uint8).view(shape)


def grid(found: torch.Tensor, shape: tuple[int, ...], *blocks: int) -> torch.Tensor:
    """One entry per block as one per element."""
    for axis, block in enumerate(blocks):
        found = found.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    return found


WIDE = (300, 2100)  # more than one run of rows, which begin within a block
CASES: dict[str, tuple[dict[str, Any], Tensors, Callable[[Tensors], torch.Tensor]]] = {
    "blocks": (
        BLOCK, {"w.weight": codes(WIDE, FP8), "w.weight_scale_inv": scales(3, 17, dtype=torch.float32)},
        lambda t: (t["w.weight"].float() * grid(t["w.weight_scale_inv"], WIDE, 128, 128)).bfloat16(),
    ),
    "blocks of bfloat16, e5m2": (
        BLOCK, {"w.weight": codes(WIDE, FP8).float().to(torch.float8_e5m2), "w.weight_scale_inv": scales(3, 17)},
        lambda t: t["w.weight"].bfloat16() * grid(t["w.weight_scale_inv"], WIDE, 128, 128),
    ),
    "blocks with exponents alone": (
        BLOCK, {"w.weight": codes(WIDE, FP8), "w.weight_scale_inv": exponents(3, 17).view(torch.float8_e8m0fnu)},
        lambda t: (t["w.weight"].float() * grid(t["w.weight_scale_inv"].float(), WIDE, 128, 128)).bfloat16(),
    ),
    "blocks that the config does not state": (
        {"quant_method": "fp8"},
        {"w.weight": codes((192, 128), FP8), "w.weight_scale_inv": scales(2, 1, dtype=torch.float32)},
        lambda t: (t["w.weight"].float() * grid(t["w.weight_scale_inv"], (192, 128), 128, 128)).bfloat16(),
    ),
    "rows, and no blocks": (
        {"quant_method": "fp8", "weight_block_size": None},
        {"w.weight": codes(WIDE, FP8), "w.weight_scale_inv": scales(300, 1)},
        lambda t: t["w.weight"].bfloat16() * t["w.weight_scale_inv"],
    ),
    "experts in one": (
        BLOCK, {"w.weight": codes((3, 256, 384), FP8), "w.weight_scale_inv": scales(3, 2, 3, dtype=torch.float32)},
        lambda t: (t["w.weight"].float() * grid(t["w.weight_scale_inv"], (3, 256, 384), 1, 128, 128)).bfloat16(),
    ),
    "one scale": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"w.weight": codes(WIDE, FP8), "w.weight_scale_inv": scales()[()], "w.activation_scale": scales()},
        lambda t: t["w.weight"].bfloat16() * t["w.weight_scale_inv"],
    ),
    "compressed, one scale": (
        compressed("float", "tensor"), {"w.weight": codes(WIDE, FP8), "w.weight_scale": scales(1)},
        lambda t: t["w.weight"].bfloat16() * t["w.weight_scale"],
    ),
    "compressed, rows": (
        compressed("int", "channel"), {"w.weight": codes(WIDE, INT8), "w.weight_scale": scales(300, 1)},
        lambda t: t["w.weight"].bfloat16() * t["w.weight_scale"],
    ),
    "compressed, rows in float32": (
        compressed("int", "channel"),
        {"w.weight": codes(WIDE, INT8), "w.weight_scale": scales(300, 1, dtype=torch.float32)},
        lambda t: (t["w.weight"].float() * t["w.weight_scale"]).bfloat16(),
    ),
    "compressed, groups with zero points": (
        compressed("int", "group", group_size=100, symmetric=False),
        {"w.weight": codes(WIDE, INT8), "w.weight_scale": scales(300, 21),
         "w.weight_zero_point": codes((300, 21), INT8)},
        lambda t: (t["w.weight"].bfloat16() - grid(t["w.weight_zero_point"], WIDE, 1, 100).bfloat16())
        * grid(t["w.weight_scale"], WIDE, 1, 100),
    ),
    "compressed, groups of two sizes": (
        {**compressed("int", "group"), "config_groups": {
            str(size): {"weights": {"num_bits": 8, "group_size": size}} for size in (100, 128)}},
        {"w.weight": codes(WIDE, INT8), "w.weight_scale": scales(300, 17)},
        lambda t: t["w.weight"].bfloat16() * grid(t["w.weight_scale"], WIDE, 1, 128),
    ),
    "compressed, blocks": (
        compressed("float", "block", block_structure=[128, 128]),
        {"w.weight": codes(WIDE, FP8), "w.weight_scale": scales(3, 17)},
        lambda t: t["w.weight"].bfloat16() * grid(t["w.weight_scale"], WIDE, 128, 128),
    ),
}  # fmt: skip


def write(folder: Path, tensors: Tensors, quantization: Mapping[str, Any], *, files: int = 1, **config: Any) -> Path:
    """Tensors in turn to so many files, so that codes and scales lie apart."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        [f"model-{n + 1:05}-of-{files:05}.safetensors" for n in range(files)] if files > 1 else ["model.safetensors"]
    )
    placed = {name: names[number % files] for number, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file, {"format": "pt"})
    if files > 1:
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    told = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": dict(quantization), **config}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def same(read: bytes, wanted: torch.Tensor) -> bool:
    return read == wanted.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
                                   "float8_e8m0fnu", "int8"])  # fmt: skip
def test_every_code_is_the_number_that_torch_reads(dtype: str) -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).float()
    torch.testing.assert_close(torch.from_numpy(table(dtype).copy()), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_a_decoded_tensor_is_the_formula_to_the_bit(tmp_path: Path, case: str) -> None:
    method, tensors, formula = CASES[case]
    norm = torch.ones(5, dtype=torch.bfloat16)
    folder = write(tmp_path / "model", {**tensors, "norm.weight": norm}, method, files=2)
    plain = decode(open_checkpoint(folder))
    assert set(plain.tensors) == {"w.weight", "norm.weight"}
    assert plain.config is not None
    assert "quantization_config" not in plain.config
    assert same(plain.read("w.weight"), formula(tensors))
    described = decoded(describe_checkpoint(folder))
    assert dict(described.tensors or {}) == {name: (t.dtype, t.shape) for name, t in plain.tensors.items()}
    for dtype in ("bfloat16", "float16"):
        convert(open_checkpoint(folder), tmp_path / dtype, Conversion(max_shard_size=10**9, dtype=dtype))
        made = load_file(tmp_path / dtype / "model.safetensors")
        torch.testing.assert_close(
            made["w.weight"], formula(tensors).to(getattr(torch, dtype)), rtol=0, atol=0, equal_nan=True
        )
        assert "quantization_config" not in json.loads((tmp_path / dtype / "config.json").read_bytes())


@pytest.mark.parametrize("case", ["blocks of bfloat16, e5m2", "experts in one"])
def test_fp8_is_as_transformers_decodes_it(case: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    method, tensors, _ = CASES[case]
    cut = {n: t[..., :256, :256] if t.dim() > 1 and "scale" not in n else t for n, t in tensors.items()}
    cut = {n: t[..., :2, :2].contiguous() if "scale" in n else t.contiguous() for n, t in cut.items()}
    wanted = Fp8Dequantize(None)._dequantize_one(cut["w.weight"], cut["w.weight_scale_inv"]).bfloat16()
    assert same(decode(open_checkpoint(write(tmp_path / "model", cut, method))).read("w.weight"), wanted)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("compressed")])
def test_compressed_tensors_decodes_the_same(case: str) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs

    method, tensors, formula = CASES[case]
    arguments = QuantizationArgs(**method["config_groups"]["group_0"]["weights"])
    parts = [tensors[f"w.weight{end}"] for end in ("", "_scale")]
    found = forward.dequantize(*parts, tensors.get("w.weight_zero_point"), arguments)
    assert torch.equal(found.bfloat16(), formula(tensors))


def blocks(experts: int, rows: int, columns: int) -> Tensors:
    packed = torch.arange(experts * rows * columns // 2).mul(13).remainder(256).to(torch.uint8)
    return {
        "experts.w_blocks": packed.view(experts, rows, columns // 32, 16),
        "experts.w_scales": exponents(experts, rows, columns // 32),
    }


def test_mxfp4_is_as_transformers_decodes_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = blocks(3, 320, 96)
    folder = write(tmp_path / "model", tensors, {"quant_method": "mxfp4"}, files=2)
    plain = decode(open_checkpoint(folder))
    assert plain.tensors["experts.w"].shape == (3, 96, 320)
    assert same(plain.read("experts.w"), convert_moe_packed_tensors(*tensors.values()))


def test_an_expert_of_mxfp4_is_decoded_from_its_own_bytes(tmp_path: Path) -> None:
    tensors = blocks(3, 320, 96)
    folder = write(tmp_path / "model", tensors, {"quant_method": "mxfp4"}, files=2)
    plain, files = decode(open_checkpoint(folder)), MappedFiles()
    whole = plain.tensors["experts.w"]
    for number in range(3):
        entry = whole.entry(number)
        assert torch.equal(files.window(entry), files.window(whole)[number : number + 1])
        assert 3 * sum(part.nbytes for part in entry.stored) == sum(part.nbytes for part in whole.stored)


REFUSED = {
    "no scale": ({"w.weight": codes((8, 8), FP8)}, BLOCK, "w.weight is stored as float8_e4m3fn, and no scale of it is"),
    "another grid": ({"w.weight": codes((300, 300), FP8), "w.weight_scale_inv": scales(7, 3)}, BLOCK,
                     r"w.weight is \[300, 300\], and its scales are .* \[7, 3\] in blocks of \[128, 128\]"),
    "blocks that nobody states": ({"w.weight": codes((192, 128), FP8), "w.weight_scale_inv": scales(2, 1)},
                                  {"quant_method": "fp8", "weight_block_size": None}, r"its scales are .* \[2, 1\]"),
    "parts of a block": ({"w.weight": codes((512, 128), FP8), "w.weight_scale_inv": scales(8, 1)}, BLOCK,
                         r"\[8, 1\] in blocks of \[128, 128\]"),
    "groups of another size": ({"w.weight": codes((8, 300), INT8), "w.weight_scale": scales(8, 5)},
                               compressed("int", "group", group_size=100), r"\[8, 5\] in blocks of \[1, 100\]"),
    "zero points of another shape": (
        {"w.weight": codes((8, 8), INT8), "w.weight_scale": scales(8, 1), "w.weight_zero_point": codes((8, 2), INT8)},
        compressed("int", "channel"), r"w.weight_zero_point int8 \[8, 2\]"),
    "scales that are no numbers": ({"w.weight": codes((8, 8), FP8), "w.weight_scale": torch.ones(1, dtype=torch.bool)},
                                   BLOCK, "w.weight_scale bool"),
    "half of a block": ({"w_blocks": exponents(2, 4, 3, 16), "w_scales": exponents(2, 4, 2)},
                        {"quant_method": "mxfp4"}, r"w_blocks is uint8 .*, and w_scales uint8 \[2, 4, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_scales_that_do_not_fit_are_refused_from_headers(tmp_path: Path, case: str) -> None:
    tensors, method, said = REFUSED[case]
    with pytest.raises(InvalidCheckpoint, match=said):
        decoded(describe_checkpoint(write(tmp_path / "model", tensors, method)))


UNDECODED = {
    "4 bits": compressed("int", "group", num_bits=4),
    "packed": {**compressed("int", "channel"), "format": "pack-quantized"},
    "ordered by activations": compressed("int", "group", actorder="group"),
    "turned": {**compressed("float", "tensor"), "transform_config": {"config_groups": {"r": {}}}},
}


@pytest.mark.parametrize("case", UNDECODED)
def test_what_is_not_decoded_stays_refused_at_plan(tmp_path: Path, case: str) -> None:
    described = describe_checkpoint(write(tmp_path / "model", CASES["compressed, rows"][1], UNDECODED[case]))
    wired = {"model": (Forecast(output=described),)}
    params = shard.STAGE.params.model_validate({"dtype": "bfloat16"})
    assert shard.STAGE.planning.check is not None
    with pytest.raises(UsageError, match="compressed-tensors"):
        shard.STAGE.planning.check(params, check_context(tmp_path, inputs=wired))
    assert format_of(described).decoding is None


ODD: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": "wide"}, {"quant_method": "fp8", "weight_block_size": [0, -1]},
    {"quant_method": "fp8", "weight_block_size": {"a": [1]}}, {"quant_method": "fp8", "weight_block_size": 7},
    {"quant_method": "compressed-tensors", "config_groups": [1]}, {"quant_method": "compressed-tensors", "format": [2]},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": [8]}}}},
    {**compressed("int", "channel"), "sparsity_config": "dense"}, {"quant_method": ["fp8"]}, {"quant_method": "mxfp4"},
]  # fmt: skip


@pytest.mark.parametrize("method", ODD, ids=str)
def test_configs_that_nobody_meant_are_no_crash(tmp_path: Path, method: dict[str, Any]) -> None:
    described = describe_checkpoint(write(tmp_path / "model", CASES["compressed, rows"][1], method))
    with suppress(BigpipeError):
        decoded(described)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(fp8 with scales in other files, the same weights plain)."""
    folder = tmp_path_factory.mktemp("models")
    make_checkpoint(folder / "plain", "llama", dtype="bfloat16", hidden_size=160, intermediate_size=320)
    make_checkpoint(folder / "fp8", "llama", dtype="bfloat16", hidden_size=160, intermediate_size=320)
    tensors = load_file(folder / "plain" / "model.safetensors")
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            shape = tuple(-(-size // 128) for size in tensor.shape)
            scale = scales(*shape, dtype=torch.float32) / 50
            packed |= {name: codes(tuple(tensor.shape), FP8), f"{name}_scale_inv": scale}
            tensors[name] = (packed[name].float() * grid(scale, tuple(tensor.shape), 128, 128)).bfloat16()
        else:
            packed[name] = tensor
    save_file(tensors, folder / "plain" / "model.safetensors", {"format": "pt"})
    (folder / "fp8" / "model.safetensors").unlink()
    config = json.loads((folder / "fp8" / "config.json").read_bytes())
    write(folder / "fp8", dict(reversed(packed.items())), BLOCK, files=3, **config)
    return folder / "fp8", folder / "plain"


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_model_computes_with_what_its_scales_mean(models: tuple[Path, Path], home: str) -> None:
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    with torch.inference_mode():
        given, wanted = (bigpipe.load(m, {"": home}, dtype="float32")(ids).logits for m in models)
    assert torch.equal(given, wanted)


def test_it_is_placed_and_counted_as_what_it_becomes(models: tuple[Path, Path]) -> None:
    packed, plain = (bigpipe.place(model, device_map={"": "cpu"}) for model in models)
    assert packed.weights == plain.weights
    note = estimate(models[0], dtypes=["bfloat16"]).notes[0]
    assert note.startswith("fp8 with a scale per block")
    assert "of bfloat16 are run" in note


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_it_is_quantized_as_the_plain_one_is(models: tuple[Path, Path], tmp_path: Path, scheme: str) -> None:
    packed, plain = (quantize_checkpoint(m, tmp_path / m.name, scheme=scheme, dtype="bfloat16") for m in models)
    given = {k: v for file in (tmp_path / "fp8").glob("*.safetensors") for k, v in load_file(file).items()}
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    assert packed.quantized == plain.quantized
    config = json.loads((tmp_path / "fp8" / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"


def test_a_shard_keeps_the_packed_bytes_unless_it_casts(models: tuple[Path, Path], tmp_path: Path) -> None:
    packed, _ = models
    convert(open_checkpoint(packed), tmp_path / "kept", Conversion(max_shard_size=10**9))
    kept, there = open_checkpoint(tmp_path / "kept"), open_checkpoint(packed)
    assert {name: kept.read(name) for name in kept.tensors} == {name: there.read(name) for name in there.tensors}
    assert kept.config == there.config


def test_a_shard_that_decodes_is_foreseen_to_the_byte(models: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = models
    params = shard.STAGE.params.model_validate({"dtype": "bfloat16", "max_shard_size": 400_000})
    wired = {"model": (Forecast(output=describe_checkpoint(packed)),)}
    told = shard.STAGE.forecast(params, forecast_context(tmp_path, inputs=wired))
    made = shard.STAGE.run(params, stage_context(tmp_path, inputs={"model": (packed,)}))
    assert told.metrics == made.metrics.model_dump()
    for link in [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]:
        link.unlink()  # only a store may hold these
    given, wanted = open_checkpoint(tmp_path / "out"), open_checkpoint(plain)
    assert {name: given.read(name) for name in given.tensors} == {n: wanted.read(n) for n in wanted.tensors}
    assert describe_checkpoint(tmp_path / "out").tensors == told.output.tensors


def test_scales_of_activations_are_not_left_out_without_a_word(models: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models[0], tmp_path / "static")
    save_file({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}, folder / "more.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    index["weight_map"]["model.layers.0.mlp.up_proj.input_scale"] = "more.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    params = shard.STAGE.params.model_validate({"dtype": "bfloat16"})
    wired = {"model": (Forecast(output=describe_checkpoint(folder)),)}
    told = {
        "estimate": estimate(folder, dtypes=["bfloat16"]).notes,
        "place": bigpipe.place(folder, device_map={"": "cpu"}).explanation,
        "quantize": quantize_checkpoint(folder, tmp_path / "int8", scheme="int8").notes,
        "shard": shard.STAGE.forecast(params, forecast_context(tmp_path, inputs=wired)).details,
    }
    for name, words in told.items():
        assert [word for word in words if "up_proj.input_scale" in word and "activations" in word], name
    kept = shard.STAGE.params.model_validate({})
    assert not shard.STAGE.forecast(kept, forecast_context(tmp_path, inputs=wired)).details


@pytest.mark.parametrize("does", ["casts", "quantizes"])
def test_files_that_still_come_are_waited_for(models: tuple[Path, Path], tmp_path: Path, does: str) -> None:
    """Codes are here, their scales come later; both are let go once nothing needs them."""
    packed, plain = models
    for name in ("handover/files", "out"):
        (tmp_path / name).mkdir(parents=True)
    outlet, inlet = OpenOutlet(tmp_path / "handover", tmp_path / "out"), OpenInlet(tmp_path / "handover", "reader")
    for name in ("config.json", "model.safetensors.index.json"):
        (outlet.out / name).write_bytes((packed / name).read_bytes())
    weights = may_pass(path.name for path in packed.iterdir())
    outlet.announce(directory_heads(packed, weights))
    arriving, conversion = open_checkpoint(inlet), Conversion(max_shard_size=400_000, dtype="bfloat16")

    def work() -> None:
        if does == "casts":
            convert(arriving, tmp_path / "made", conversion)
        else:
            quantize_checkpoint(arriving, tmp_path / "made", scheme="int8", dtype="bfloat16")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for name in weights:
        assert thread.is_alive()
        (outlet.out / name).write_bytes((packed / name).read_bytes())
        outlet.finished(name, name, (packed / name).stat().st_size)
        time.sleep(0.1)
    thread.join(60)
    wanted = open_checkpoint(plain)
    if does == "quantizes":
        quantize_checkpoint(plain, tmp_path / "plain", scheme="int8", dtype="bfloat16")
        wanted = open_checkpoint(tmp_path / "plain")
    given = open_checkpoint(tmp_path / "made")
    assert {name: given.read(name) for name in given.tensors} == {n: wanted.read(n) for n in wanted.tensors}
    assert outlet.handover.names("taken/reader") == set(weights)


@pytest.mark.parametrize("change", ["scales", "blocks"])
def test_other_scales_or_blocks_make_another_file(tmp_path: Path, change: str) -> None:
    """What an earlier attempt finished is kept only where the same comes out. Codes stay where they are."""
    square = {"w.weight": codes((300, 300), FP8), "w.weight_scale_inv": scales(3, 3, dtype=torch.float32)}
    folder = write(tmp_path / "model", square, BLOCK, files=2)
    conversion, journal, out = (
        Conversion(max_shard_size=10**9, dtype="bfloat16"),
        tmp_path / "journal",
        tmp_path / "out",
    )
    convert(open_checkpoint(folder), out, conversion, journal=journal)
    first = (out / "model.safetensors").read_bytes()
    if change == "scales":
        save_file({"w.weight_scale_inv": 2 * square["w.weight_scale_inv"]}, folder / "model-00002-of-00002.safetensors")
    else:
        change_config(folder, quantization_config={**BLOCK, "weight_block_size": [100, 100]})
    convert(open_checkpoint(folder), out, conversion, journal=journal)
    assert (out / "model.safetensors").read_bytes() != first


def test_a_product_is_rounded_in_the_dtype_of_its_scales(tmp_path: Path) -> None:
    method, tensors, formula = CASES["compressed, one scale"]
    for dtype in ("float16", "float32"):
        plain = decode(open_checkpoint(write(tmp_path / dtype, tensors, method, dtype=dtype)))
        assert same(plain.read("w.weight"), formula(tensors).to(getattr(torch, dtype)))


def test_decoded_weights_stay_in_memory_only_where_it_has_room(models: tuple[Path, Path]) -> None:
    away = {}
    for room in (0, 2**30):
        model = bigpipe.load(models[0], {"": "cpu"}, dtype="bfloat16", memory=HostMemory(cast=room, widen=0))
        away[room] = model.get_parameter("model.layers.0.mlp.up_proj.weight").is_meta
        assert not model.get_parameter("model.norm.weight").is_meta
    assert away == {0: True, 2**30: False}


def test_decoding_holds_a_run_of_rows_and_not_the_tensor(tmp_path: Path) -> None:
    big = {"w.weight": codes((8192, 4096), FP8), "w.weight_scale_inv": scales(64, 32, dtype=torch.float32)}
    plain = decode(open_checkpoint(write(tmp_path / "model", big, BLOCK)))
    tracemalloc.start()
    try:
        total = sum(len(piece) for piece in plain.chunks("w.weight"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 2 * 8192 * 4096
    assert peak < 12 * DECODED + 4 * 2**20


def test_a_config_without_a_dtype_gets_one(tmp_path: Path) -> None:
    method, tensors, _ = CASES["compressed, one scale"]
    folder = write(tmp_path / "model", {**tensors, "n.weight": torch.ones(3, dtype=torch.float16)}, method)
    change_config(folder, dtype=None)
    described = decoded(describe_checkpoint(folder))
    assert described.config is not None
    assert (described.config["dtype"], (described.tensors or {})["w.weight"][0]) == ("float16", "float16")


FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_of_8_bits_without_scales_are_the_numbers_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(5000).view(5000, 256).view(dtype)
    tensors = {"w.weight": every, "w.bias": torch.ones(5000).to(dtype), "norm.weight": torch.ones(5)}
    for wanted in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        out = tmp_path / str(wanted)
        folder = write(tmp_path / "model", tensors, {}, files=2, dtype=str(wanted).removeprefix("torch."))
        made = decode(open_checkpoint(folder))
        assert made.tensors["norm.weight"].dtype == "float32", "what is stored as it is stays so"
        bigpipe.save_checkpoint(folder, out, dtype=wanted)
        torch.testing.assert_close(
            load_file(out / "model.safetensors"), {name: t.to(wanted) for name, t in tensors.items()},
            rtol=0, atol=0, equal_nan=True,
        )  # fmt: skip


def test_a_model_of_8_bit_floats_is_loaded_placed_and_quantized_as_they_are(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, plain = (make_checkpoint(tmp_path / name, "llama") for name in ("packed", "plain"))
    narrow = {n: t.to(FP8) if t.dim() > 1 else t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(narrow, folder / "model.safetensors", {"format": "pt"})
    save_file({n: t.float() for n, t in narrow.items()}, plain / "model.safetensors", {"format": "pt"})
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        given = bigpipe.load(folder)(ids).logits
        assert torch.equal(given, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert bigpipe.place(folder, device_map="cpu").weights == bigpipe.place(plain, device_map="cpu").weights
    for model in (folder, plain):
        quantize_checkpoint(model, tmp_path / f"{model.name}-int8", scheme="int8")
    made, wanted = (load_file(tmp_path / f"{model.name}-int8" / "model.safetensors") for model in (folder, plain))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert any("8-bit floats without scales" in note for note in bigpipe.estimate(folder).notes)


@pytest.mark.parametrize("name", ["scale_weight", "weight.scale", "weight_scales", "input_scale"])
def test_floats_of_8_bits_beside_what_may_be_their_scales_are_refused(tmp_path: Path, name: str) -> None:
    beside = {"w.weight": codes((8, 8), FP8), f"w.{name}": torch.ones(1)}
    described = describe_checkpoint(write(tmp_path / "model", beside, {}))
    with pytest.raises(BigpipeError, match="scale"):
        Conversion(max_shard_size=10**9, dtype="float16").of(described)


METHODS: list[dict[str, Any]] = [
    {"load_in_8bit": True}, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, BLOCK,
    {"quant_method": "mxfp4"}, compressed("int", "channel"), {"quant_method": "gptq", "bits": 4},
]  # fmt: skip


def foreseen(stage: Stage[Any], params: Any, context: ForecastContext) -> Forecast:
    """As a plan asks it."""
    if stage.planning.check is not None:
        stage.planning.check(params, context)
    return stage.forecast(params, context)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_config_of_packed_weights_over_plain_ones_is_refused_by_all_that_read_them(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    change_config(folder, quantization_config=method)
    described = describe_checkpoint(folder)
    wired = {"model": (Forecast(output=described),)}
    more: dict[str, dict[str, Any]] = {
        "estimate": {}, "shard": {}, "quantize": {"scheme": "int8"}, "dispatch": {},
        "distributed-infer": {"task": "text-generation", "prompts": ["hi"]},
    }  # fmt: skip
    for stage in (s.STAGE for s in (estimate_kind, shard, quantize, dispatch, distributed_infer)):
        params = stage.params.model_validate(more[stage.kind])
        with pytest.raises(InvalidCheckpoint, match=r"quantization_config says .* plain: float32"):
            foreseen(stage, params, forecast_context(tmp_path, inputs=wired))
    for read in (bigpipe.load, bigpipe.estimate, bigpipe.place):
        with pytest.raises(InvalidCheckpoint, match="take quantization_config out of"):
            read(folder)  # type: ignore[operator]
