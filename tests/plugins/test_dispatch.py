"""What was planned is what the run gives: the same placement, and the bytes that the loaded model holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.asking import answer_here
from support.contexts import forecast_context, stage_context
from support.launching import MACHINE
from support.measured import HERE, NO_HALVES, knowing
from support.models import make_checkpoint
from support.tinygpt import GPT

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.placement import Speeds
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract.events import LogLine
from bigpipe.orchestrator.stage import (
    Forecast,
    Gpu,
    Machine,
    StageContext,
    StageResult,
    Trust,
)
from bigpipe.plugins.dispatch import STAGE, DispatchMetrics, DispatchParams
from bigpipe.plugins.placed import read_placement

TESTS = Path(__file__).parents[1]


class Reports(list[Any]):
    report = list.append


def quantized(out: Path, **options: Any) -> Path:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = make_checkpoint(out / "plain", "llama", dtype="float16", hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(out / "quantized")
    return out / "quantized"


def custom_checkpoint(out: Path, *no_split: str) -> Path:
    from safetensors.torch import save_file

    config = GPT.get_default_config()
    config.vocab_size, config.block_size = 256, 64
    out.mkdir()
    save_file(GPT(config).state_dict(), out / "model.safetensors")
    described = {"class": "support.tinygpt:GPT", "config": {"vocab_size": 256, "block_size": 64}}
    described |= {"no_split_module_classes": list(no_split)} if no_split else {}
    (out / "bigpipe_architecture.json").write_text(json.dumps(described))
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    double = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {
        **{name: make_checkpoint(folder / name, name, dtype="float16") for name in ("opt", "llama", "t5", "bert")},
        "int8": quantized(folder / "int8", load_in_8bit=True),
        "nf4": quantized(folder / "nf4", **double),
        "gpt": custom_checkpoint(folder / "gpt"),
        "gpt-blocks": custom_checkpoint(folder / "gpt-blocks", "Block"),
    }


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """The answers about all architectures."""
    memo = tmp_path_factory.mktemp("memo")
    sources = Sources(trust=Trust(("support",)), base=TESTS, memo=memo)
    for path in models.values():
        model = describe_checkpoint(answer_here(path, sources))
        describe_architecture(dict(model.config or {}), custom=model.custom, sources=sources)
    return memo


def forecast(model: Path, memo: Path, machine: Machine = MACHINE, **fields: Any) -> Forecast:
    wired = {"model": (Forecast(output=describe_checkpoint(model)),)}
    ctx = forecast_context(
        memo, inputs=wired, base=TESTS, machine=machine, memo=memo, trust=Trust(modules=("support",))
    )
    return STAGE.forecast(DispatchParams(**fields), ctx)


def context(out: Path, model: Path, memo: Path, machine: Machine = MACHINE) -> StageContext:
    out.mkdir(exist_ok=True)
    return stage_context(
        out, node="dispatch", inputs={"model": (model,)}, out=out, scratch=out, parts=out, memo=memo, base=TESTS,
        machine=machine, trust=Trust(modules=("support",)), reporter=Reports(),
    )  # fmt: skip


def run(out: Path, model: Path, memo: Path, **fields: Any) -> tuple[DispatchMetrics, dict[str, Any]]:
    ctx = context(out, model, memo)
    result = STAGE.run(DispatchParams(**fields), ctx)
    assert isinstance(result, StageResult)
    assert isinstance(result.metrics, DispatchMetrics)
    assert not [event for event in ctx.reporter if isinstance(event, LogLine) and not event.detail]  # type: ignore[attr-defined]
    for name, (_, size) in result.files.items():
        assert (out / name).stat().st_size == size
    return result.metrics, json.loads((out / "placement.json").read_bytes())


MAPS: list[dict[str, Any]] = [
    {"max_memory": {"cpu": "1GiB"}},
    {"max_memory": {"cpu": 50_000, "disk": "1GiB"}},
    {"device_map": {"": "disk"}},
    {"device_map": "sequential", "max_memory": {"cpu": 150_000, "disk": "1GiB"}, "dtype": "bfloat16"},
    {},
]


def without_passing(found: Forecast) -> int:
    assert found.ram is not None
    return found.ram - 2 * max(found.output.streaming.values(), default=0)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": "cpu", "model.decoder.layers.0": "disk"}], ids=str)
def test_weights_that_are_cast_to_be_held_are_in_the_memory(
    models: dict[str, Path], memo: Path, device_map: dict[str, str]
) -> None:
    stored, same, cast = (
        forecast(models["opt"], memo, device_map=device_map, dtype=dtype) for dtype in (None, "float16", "float32")
    )
    assert stored.ram is not None
    assert same.ram == stored.ram, "these are windows into their file"
    held = cast.metrics["predicted"]["cpu"]
    assert without_passing(cast) == without_passing(stored) + held
    assert held > 80_000
    asked = {"device_map": device_map, "dtype": "float32"}
    little = forecast(models["opt"], memo, replace(MACHINE, memory_available=100_000), **asked).ram
    assert little is not None
    assert stored.ram < little < stored.ram + 100_000, "what is over is cast at each use"
    assert forecast(models["opt"], memo, verify="none", **asked).ram is None


def test_a_tied_head_with_a_place_of_its_own_counts_there_as_the_run_holds_it(
    tmp_path: Path, memo: Path, models: dict[str, Path]
) -> None:
    size = 2 * 264 * 32
    fields: dict[str, Any] = {"device_map": {"": "cpu", "lm_head": "disk"}, "verify": "load"}
    metrics, _ = run(tmp_path / "out", models["opt"], memo, **fields)
    assert metrics.predicted["disk"] == size
    assert metrics.measured == metrics.predicted == forecast(models["opt"], memo, **fields).metrics["predicted"]
    caps = {"cpu": "1GiB", "disk": size}
    assert not forecast(models["opt"], memo, **fields, max_memory=caps).misfits
    assert forecast(models["opt"], memo, **fields, max_memory={**caps, "disk": size - 1}).misfits


@pytest.mark.parametrize("name", ["lm_head.weight", "model.decoder.embed_tokens.weight"])
def test_one_name_of_a_tied_weight_with_a_dtype_of_its_own_is_a_weight_of_its_own(
    tmp_path: Path, memo: Path, models: dict[str, Path], name: str
) -> None:
    fields: dict[str, Any] = {"special_dtypes": {name: "float64"}, "verify": "load"}
    tied = forecast(models["opt"], memo, max_memory={"cpu": "1GiB"}).metrics["predicted"]["cpu"]
    caps = {"cpu": tied + 8 * 264 * 32}
    metrics, _ = run(tmp_path / "out", models["opt"], memo, **fields, max_memory=caps)
    assert metrics.measured == metrics.predicted == caps
    assert forecast(models["opt"], memo, **fields, max_memory={"cpu": caps["cpu"] - 1}).misfits


@pytest.mark.parametrize("fields", MAPS, ids=["cpu", "mixed", "disk", "cast", "detected"])
@pytest.mark.parametrize("architecture", ["opt", "llama", "t5", "bert"])
def test_gives_what_was_forecast(
    tmp_path: Path, memo: Path, models: dict[str, Path], architecture: str, fields: dict[str, Any]
) -> None:
    model = models[architecture]
    planned = forecast(model, memo, **fields)
    assert planned.misfits == ()
    assert planned.unknown == ()
    metrics, content = run(tmp_path / "out", model, memo, **fields)
    assert planned.metrics["predicted"] == metrics.predicted
    assert planned.metrics["streamed_bytes_per_token"] == metrics.streamed_bytes_per_token
    assert metrics.measured == metrics.predicted
    assert planned.metrics["compute_dtype"] == metrics.compute_dtype
    placement = read_placement(tmp_path / "out")
    assert placement.device_map == planned.output.device_map == content["device_map"]
    assert content["measured"] == metrics.measured
    assert placement.dtype == fields.get("dtype")


def test_says_what_bounds_a_step_where_layers_are_streamed(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "opt", dtype="float16")
    memo = knowing(tmp_path / "memo", NO_HALVES, Speeds(disk=1e5, ram=1e12))
    ctx = context(tmp_path / "out", model, memo, HERE)
    fields: dict[str, Any] = {"device_map": {"": "cpu", "model.decoder.layers.1": "disk"}, "verify": "none"}
    metrics = STAGE.run(DispatchParams(batch_size=8, **fields), ctx).metrics  # type: ignore[union-attr]
    assert isinstance(metrics, DispatchMetrics)
    assert (metrics.compute_dtype, metrics.bound_by) == ("float32", "bandwidth")
    step = metrics.streamed_bytes_per_token / 1e5
    assert metrics.limit_tokens_per_second == pytest.approx(8 / step, rel=0.01)
    written = json.loads((tmp_path / "out" / "placement.json").read_bytes())
    assert not written.keys() & {"bound_by", "limit_tokens_per_second"}  # measured, and the placement is in keys
    assert written["compute_dtype"] == "float32"
    whole = STAGE.run(DispatchParams(device_map={"": "cpu"}, verify="none"), ctx).metrics  # type: ignore[union-attr]
    assert isinstance(whole, DispatchMetrics)
    assert whole.bound_by == ""


@pytest.mark.parametrize(
    "fields", [{"device_map": {"": "cpu", "model.decoder.layers.1": "disk"}}, {"device_map": "optimal"}]
)
def test_the_artifact_is_the_same_whatever_was_measured_that_leads_to_it(tmp_path: Path, fields: Any) -> None:
    model = make_checkpoint(tmp_path / "model", "opt", dtype="float16")
    params = DispatchParams(
        batch_size=8, sequence_length=16, verify="none", max_memory={"cpu": "100kB", "disk": "1GiB"}, **fields
    )
    artifacts, told = set(), set()
    for times in (1.0, 1.1):
        figures = {dtype: tuple(times * rate for rate in found) for dtype, found in NO_HALVES.items()}
        memo = knowing(tmp_path / f"memo{times}", figures, Speeds(disk=times * 1e5, ram=times * 1e12))
        ctx = context(tmp_path / f"out{times}", model, memo, HERE)
        result = STAGE.run(params, ctx)
        assert isinstance(result, StageResult)
        artifacts.add(tuple(sorted(result.files.items())))
        told.add(tuple(event.line for event in ctx.reporter if isinstance(event, LogLine)))  # type: ignore[attr-defined]
    assert len(artifacts) == 1
    assert len(told) == 2


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({}, True),  # the key says whose memory it is
        ({"max_memory": {0: "1GiB", "disk": "1GiB"}}, True),
        ({"max_memory": {"cpu": "1GiB", "disk": "1GiB"}}, False),
        ({"max_memory": {0: 0, "cpu": "1GiB"}}, False),
        ({"max_memory": {"cpu": "1GiB"}, "compute_dtype": "stored"}, True),
        ({"max_memory": {"cpu": "1GiB"}, "dtype": "float16"}, True),
        ({"device_map": {"": "cpu", "lm_head": 0}}, True),
        ({"device_map": {"": "disk"}}, False),
        ({"device_map": "optimal"}, False),
    ],
)
def test_what_may_be_decided_by_measurements_is_not_held_against_a_lock(fields: Any, same: bool) -> None:
    assert STAGE.with_params(DispatchParams(**fields)).reproducible is same


@pytest.mark.parametrize(("asked", "computed"), [("float32", "float32"), ("stored", "float16")])
def test_what_is_computed_in_is_told_and_weights_are_held_as_stored(
    tmp_path: Path, memo: Path, models: dict[str, Path], asked: str, computed: str
) -> None:
    fields = {"device_map": {"": "cpu", "model.layers.1": "disk"}, "compute_dtype": asked}
    planned = forecast(models["llama"], memo, **fields)
    metrics, _ = run(tmp_path / "out", models["llama"], memo, **fields)
    assert planned.metrics["compute_dtype"] == metrics.compute_dtype == computed
    assert metrics.measured == metrics.predicted
    assert read_placement(tmp_path / "out").compute_dtype == (None if asked == "stored" else asked)
    assert ("Computed in float32: as asked." in planned.details) == (asked == "float32")


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized_models_count_as_they_are_stored(
    tmp_path: Path, memo: Path, models: dict[str, Path], scheme: str, home: str
) -> None:
    model = models[scheme]
    metrics, _ = run(tmp_path / "out", model, memo, device_map={"": home})
    assert metrics.measured == metrics.predicted
    assert sum(metrics.measured.values()) == describe_checkpoint(model).nbytes + 64  # type: ignore[operator]
    planned = forecast(model, memo, device_map={"": home})
    assert planned.metrics["streamed_bytes_per_token"] == metrics.streamed_bytes_per_token


def test_some_weights_in_a_dtype_of_their_own(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["llama"]
    special = {"lm_head.weight": "float32"}
    metrics, content = run(tmp_path / "out", model, memo, special_dtypes=special)
    plain, _ = run(tmp_path / "plain", model, memo)
    assert metrics.measured == metrics.predicted
    assert metrics.measured["cpu"] - plain.measured["cpu"] == 264 * 32 * 2
    assert content["special_dtypes"] == special


def test_writes_a_picture(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["opt"]
    run(tmp_path / "out", model, memo, max_memory={"cpu": 50_000, "disk": "1GiB"})
    picture = (tmp_path / "out" / "placement.txt").read_text()
    assert "cpu" in picture
    assert "disk" in picture
    assert "layers" in picture


def test_verifies_as_much_as_asked_for(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["opt"]
    assert run(tmp_path / "none", model, memo, verify="none")[0].measured == {}
    assert run(tmp_path / "load", model, memo, verify="load")[0].measured != {}


def test_a_class_of_ones_own(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["gpt-blocks"]
    for name, device_map in (("cpu", {"": "cpu"}), ("disk", {"": "disk"}), ("mixed", {"": "cpu", "blocks.1": "disk"})):
        metrics, _ = run(tmp_path / name, model, memo, device_map=device_map)
        assert metrics.measured == metrics.predicted


def test_says_which_block_must_stay_whole(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["gpt"]
    with pytest.raises(UsageError, match=r"is streamed(.|\n)*no_split_module_classes"):
        run(tmp_path / "out", model, memo, device_map={"": "disk"})
    run(tmp_path / "out", model, memo, device_map={"": "disk"}, no_split_module_classes=["Block"])


def test_a_gpu_that_is_not_there(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["opt"]
    fits = forecast(model, memo, max_memory={0: "22GiB", "cpu": "48GiB"})
    assert [misfit.cause for misfit in fits.misfits] == ["max_memory names GPU 0; test has no GPU"]
    assert str(fits.misfits[0].cure) == "set max_memory.0 to 0; the model fits on the CPU"
    assert fits.misfits[0].change == {"max_memory.0": 0}
    alone = forecast(model, memo, max_memory={"0-7": "46GiB"})
    assert str(alone.misfits[0].cure).startswith("set max_memory.0-7 to 0, and")
    custom = forecast(model, memo, device_map={"": "cpu", "model.decoder.layers.1": 1})
    assert custom.misfits[0].cause == "device_map names GPU 1; test has no GPU"
    assert custom.misfits[0].cure == "map model.decoder.layers.1 to cpu or disk"
    there = replace(MACHINE, gpus=(Gpu(0, "L4", 24 * 2**30, 20 * 2**30),))
    placed = forecast(model, memo, there, max_memory={0: "22GiB", "cpu": "48GiB"})
    assert placed.misfits == ()
    assert set(placed.metrics["predicted"]) == {"0"}
    assert placed.vram[0] > placed.metrics["predicted"]["0"] + 500 * 2**20
    assert "cuda:0" in placed.summary


def test_more_than_the_caps_or_the_memory(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["opt"]
    small = forecast(model, memo, max_memory={"cpu": 50_000})
    assert "set max_memory.cpu to" in str(small.misfits[0].cure)
    poor = replace(MACHINE, memory=150_000)
    [misfit] = forecast(model, memo, poor, max_memory={"cpu": "1GiB"}).misfits
    assert "on the CPU, which has 146.5 KiB: 58.1 KiB of weights, 32.0 KiB of KV cache" in misfit.cause
    assert forecast(model, memo, poor, max_memory=without_prefix(misfit.change)).misfits == ()


def without_prefix(change: Mapping[str, Any]) -> dict[str, Any]:
    return {option.removeprefix("max_memory."): value for option, value in change.items()}


def test_unknown_models_and_wrong_maps(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    ctx = forecast_context(memo, inputs={"model": (Forecast(),)}, base=TESTS, machine=MACHINE, memo=memo)
    assert "not known yet" in STAGE.forecast(DispatchParams(), ctx).unknown[0]
    model = models["opt"]
    with pytest.raises(UsageError, match=r"embed_tokens"):
        forecast(model, memo, device_map={"model.decoder.layers": "cpu"})
    for wrong in ({"max_memory": {"gpu": "1GiB"}}, {"device_map": {"": "gpu"}}):
        with pytest.raises(ValidationError, match="'gpu' is not a device; name a GPU"):
            DispatchParams(**wrong)
    with pytest.raises(ValidationError, match="at least 1 item"):
        DispatchParams(device_map={})


def test_the_key_holds_the_machine_only_where_it_decides() -> None:
    assert STAGE.planning.facts is not None
    assert STAGE.planning.facts(DispatchParams(), MACHINE) == {"gpus": [], "memory": MACHINE.memory}
    assert STAGE.planning.facts(DispatchParams(max_memory={"cpu": "1GiB"}), MACHINE) == {}
    assert STAGE.planning.facts(DispatchParams(device_map={"": "disk"}), MACHINE) == {}


def test_a_plan_does_not_import_torch(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    model = models["opt"]
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from support.launching import MACHINE
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.orchestrator.stage import Forecast, ForecastContext, Surroundings
from bigpipe.plugins.dispatch import STAGE, DispatchParams
wired = {{"model": (Forecast(output=describe_checkpoint({str(model)!r})),)}}
around = Surroundings(base=Path("."), machine=MACHINE, memo=Path({str(memo)!r}))
ctx = ForecastContext(surroundings=around, inputs=wired)
assert STAGE.forecast(DispatchParams(), ctx).output.device_map
assert not {{"torch", "transformers", "accelerate"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_trusted_code_is_asked_once_it_is_here(tmp_path: Path, memo: Path, models: dict[str, Path]) -> None:
    described = describe_checkpoint(models["opt"])
    config = {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "modeling.Homemade"}}
    wired = {"model": (Forecast(output=replace(described, config=config)),)}
    ctx = forecast_context(memo, inputs=wired, base=TESTS, machine=MACHINE, memo=memo)
    with pytest.raises(UsageError, match="brings its own code"):
        STAGE.forecast(DispatchParams(), ctx)
    trusting = ctx.within(trust=Trust(remote_code=("org/model@0123",)))
    assert "until the trusted code is here" in STAGE.forecast(DispatchParams(), trusting).unknown[0]
