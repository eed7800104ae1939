"""The `shard` kind, run as the engine runs it: in a child process, after a forecast from headers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.contexts import check_context, forecast_context
from support.launching import make_job
from support.models import forward, make_checkpoint, tiny_model

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.errors import UsageError
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import Outcome
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.shard import STAGE, ShardParams


def run_shard(folder: Path, source: Path, environment: dict[str, str] | None = None, **params) -> tuple[Path, Outcome]:
    """The folder where a store would let the stage work, and what came of it."""
    work = folder / "work" / ("0" * 64)
    job = make_job(
        folder, stage=STAGE, module="bigpipe.plugins.shard:STAGE", params=params, inputs={"model": (source,)},
        out=work / "out", scratch=work / "scratch", environment=environment or {},
    )  # fmt: skip
    return job.out, executor("process").start(job)


def forecast_shard(source: Path, **params) -> Forecast:
    inputs = {"model": (Forecast(output=describe_checkpoint(source)),)}
    context = forecast_context(source, inputs=inputs, base=source, memo=source)
    return STAGE.forecast(ShardParams(**params), context)


@pytest.mark.parametrize(
    "params",
    [{"max_shard_size": "20KB"}, {"format": "bin", "max_shard_size": "30KB"}, {"dtype": "float16"}, {}],
    ids=["split", "bin", "cast", "plain"],
)
def test_the_forecast_is_exact_and_the_artifact_loads(tmp_path, params):
    import transformers

    source = make_checkpoint(tmp_path / "source", "opt", format="bin", max_shard_size="50KB")
    out, outcome = run_shard(tmp_path, source, **params)
    expected = forecast_shard(source, **params)
    weights = [file for file in out.iterdir() if file.suffix in (".bin", ".safetensors")]
    assert outcome.metrics == dict(expected.metrics)
    assert outcome.metrics == {"shards": len(weights), "bytes": sum(file.stat().st_size for file in weights)}
    described = describe_checkpoint(out)
    assert dict(expected.output.tensors) == dict(described.tensors)
    assert (expected.output.format, dict(expected.output.tied)) == (described.format, dict(described.tied))
    assert expected.output.config == described.config
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    wanted = tiny_model("opt").half() if params.get("dtype") else tiny_model("opt")
    assert torch.equal(forward(model), forward(wanted))
    assert transformers.AutoTokenizer.from_pretrained(out)("hi").input_ids


def test_written_files_come_with_their_digests_and_side_files_are_references(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    (source / "bigpipe_architecture.json").write_text(json.dumps({"class": "mingpt.model:GPT"}))
    out, outcome = run_shard(tmp_path, source, max_shard_size="40KB", dtype="bfloat16")
    for file in out.iterdir():
        if file.is_symlink():
            assert os.readlink(file) == str(source / file.name)
        else:
            content = file.read_bytes()
            assert outcome.files[file.name] == (hashlib.sha256(content).hexdigest(), len(content))
    assert {"tokenizer.json", "bigpipe_architecture.json"} <= {file.name for file in out.iterdir() if file.is_symlink()}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert describe_checkpoint(out).custom == {"class": "mingpt.model:GPT"}


def test_the_worker_never_imports_torch(tmp_path):
    source = make_checkpoint(tmp_path / "source", "opt")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    _, outcome = run_shard(tmp_path, source, environment, dtype="float16")
    assert outcome.metrics["shards"] == 1
    assert outcome.peak_rss < 160 * 2**20


def test_casting_quantized_weights_is_refused_before_anything_runs(tmp_path):
    quantize_checkpoint(make_checkpoint(tmp_path / "plain", "opt"), source := tmp_path / "source", scheme="nf4")
    inputs = {"model": (Forecast(output=describe_checkpoint(source)),)}
    context = check_context(tmp_path, inputs=inputs)
    with pytest.raises(UsageError, match="let quantize come after shard"):
        STAGE.planning.check(ShardParams(dtype="float16"), context)
    STAGE.planning.check(ShardParams(), context)


@pytest.mark.parametrize(("dtype", "named"), [("bfloat16", True), ("float16", True), ("float32", False), (None, False)])
def test_a_plan_names_what_is_stored_wider_than_the_rest_and_rounded(tmp_path, dtype, named):
    """As DeepSeek's biases by which experts are chosen, which its class keeps in float32."""
    bias, weight = "mlp.gate.e_score_correction_bias", torch.ones(8, 8, dtype=torch.bfloat16)
    save_file({"mlp.gate.weight": weight, bias: torch.ones(8)}, tmp_path / "model.safetensors")
    details = forecast_shard(tmp_path, dtype=dtype).details
    assert [told.split("; ")[0] for told in details] == (
        [f"stored wider than the rest, and rounded to {dtype}: {bias}"] if named else []
    )


def test_an_unknown_input_is_said_to_be_unknown(tmp_path):
    context = forecast_context(tmp_path, inputs={"model": (Forecast(),)})
    assert STAGE.forecast(ShardParams(), context).unknown == (
        "number and size of shards: the tensors of the input are not known yet",
    )
