"""A double-quantized matrix stores a number of its data as text: sizes are an interval then, and it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.contexts import forecast_context
from support.models import make_checkpoint

from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.footprint import Estimate, estimate
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.quantize import STAGE, QuantizeParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "opt", "opt")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Estimate:
    return estimate(model, dtypes=["nf4", "int8"], double_quant=True, memo=tmp_path_factory.mktemp("memo"))


def written(model: Path, out: Path, found: Estimate, *, double: bool) -> int:
    quantize_checkpoint(
        model, out, scheme="nf4", bnb_4bit_use_double_quant=double, architecture=found.architecture
    )  # fmt: skip
    return sum(tensor.nbytes for tensor in open_checkpoint(out).tensors.values())


@pytest.mark.parametrize("scale", [0.0, 2.0**-12, 2.0**-7, 1.0, 3.7, 1000.0])
def test_what_is_written_lies_in_it(model: Path, found: Estimate, tmp_path: Path, scale: float) -> None:
    """All zeros give `0.0`, tiny weights an exponent or zeros before the digits, large ones fewer characters."""
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    (scaled / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = {name: (tensor.float() * scale).to(torch.float32) for name, tensor in
               load_file(model / "model.safetensors").items()}  # fmt: skip
    save_file(tensors, scaled / "model.safetensors", {"format": "pt"})
    term = found["nf4"].terms()["stored"]
    assert term.basis == "bound"
    assert term.low <= written(scaled, tmp_path / "out", found, double=True) <= term.high
    assert term.high - term.low == 19 * 12, "two layers of six matrices"


def test_without_a_second_quantization_it_is_exact(model: Path, found: Estimate, tmp_path: Path) -> None:
    term = found["int8"].terms()["stored"]
    assert (term.basis, term.low, term.high) == ("exact", term.bytes, term.bytes)
    single = estimate(model, dtypes=["nf4"], memo=tmp_path / "memo")["nf4"].terms()["stored"]
    assert (single.basis, single.bytes) == ("exact", written(model, tmp_path / "out", found, double=False))


def test_the_estimate_and_the_plan_say_so(model: Path, found: Estimate, tmp_path: Path) -> None:
    term = found.as_json()["dtypes"]["nf4"]["terms"]["stored"]
    assert term["low"] < term["bytes"] < term["high"]
    assert term["source"]
    inputs = {"model": (Forecast(output=describe_checkpoint(model)),)}
    context = forecast_context(tmp_path, inputs=inputs)
    twice = STAGE.forecast(QuantizeParams(scheme="nf4", bnb_4bit_use_double_quant=True), context)
    assert f"{term['low']:,} to {term['high']:,} bytes (bound" in "\n".join(twice.details)
    assert "bytes" not in twice.metrics, "a gate on it is decided by the run"
    assert "bytes (bound" not in "\n".join(STAGE.forecast(QuantizeParams(scheme="nf4"), context).details)
