"""The `estimate` kind through the engine: gates decided before anything runs, the same numbers afterwards, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.contexts import Lineage, check_context, forecast_context, inputs, stage_context
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.workshop import statuses

import bigpipe
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.errors import GateFailed, UsageError
from bigpipe.orchestrator.report import report_runs
from bigpipe.orchestrator.report.rendering import nodes_table
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.estimate import STAGE, EstimateMetrics, EstimateParams
from bigpipe.plugins.estimating import _name as named
from bigpipe.plugins.finetuning import _origin as origin
from bigpipe.sizes import format_size

OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 96,
    "num_attention_heads": 4, "vocab_size": 160, "max_position_embeddings": 128, "word_embed_proj_dim": 64,
    "activation_function": "relu",
}  # fmt: skip
RECIPE = """\
version: 1
name: sizes
params: {limit: 400MiB}
stages:
  download: {uses: download, with: {path: model}}
  estimate:
    uses: estimate
    inputs: download
    with: {dtypes: [float16, int8], batch_size: 2, sequence_length: 64}
    gates: ["int8.inference_high <= ${params.limit}", "float16.weights > int8.weights"]
"""


TRAINING = """\
version: 1
name: training
stages:
  download: {uses: download, with: {path: model}}
  estimate:
    uses: estimate
    inputs: download
    with: {dtypes: [float16, nf4], sequence_length: 64, train: lora, lora_rank: RANK, lora_targets: [q_proj, v_proj],
      gradient_checkpointing: true, kv_dtype: float8}
    gates:
      - "float16.training_high < 400MiB"
      - "nf4.training_high < float16.training_high"
      - "float16.training.lora > LOW"
"""


@pytest.fixture
def model(workshop):
    return make_checkpoint(workshop.folder / "model", "opt")


def report(result) -> dict:
    return json.loads((result.path("estimate") / "report.json").read_text())


def test_a_gate_that_cannot_hold_fails_before_anything_runs(workshop, model):
    workshop.manifest.write_text(RECIPE)
    with pytest.raises(GateFailed, match=r"int8\.inference_high"):
        bigpipe.run(workshop.manifest, params={"limit": "1MiB"})
    assert not list((workshop.folder / "store" / "keys").glob("**/*.json"))


def test_the_plan_gives_the_numbers_of_the_run(workshop, model):
    workshop.manifest.write_text(RECIPE.replace("400MiB", "2GiB"))
    described = describe_checkpoint(model)
    inputs = {"model": (Forecast(output=described),)}
    context = forecast_context(workshop.folder, inputs=inputs, base=workshop.folder)
    params = EstimateParams(dtypes=("float16", "int8"), batch_size=2, sequence_length=64)
    expected = STAGE.forecast(params, context)
    result = bigpipe.run(workshop.manifest)
    assert statuses(result) == {"download": "succeeded", "estimate": "succeeded"}
    metrics = result.nodes["estimate"].record.metrics
    assert dict(expected.metrics) == metrics
    assert EstimateMetrics(**metrics).float16 is not None
    assert metrics["float32"] is None
    assert metrics["float16"]["stored"] * 2 == described.nbytes
    assert "float16" in expected.summary


@pytest.mark.parametrize(
    ("dtypes", "rest"),
    [(["int8"], ""), (["float16", "int8"], ""), (["float16", "int8", "nf4"], ", 1 more dtype"),
     (["float32", "float16", "int8", "nf4"], ", 2 more dtypes")],
)  # fmt: skip
def test_the_table_at_the_end_says_what_the_estimate_said(workshop, model, dtypes, rest):
    """Also where it is cached, and a report later."""
    text = RECIPE[: RECIPE.index("    gates:")].replace("[float16, int8]", f"[{', '.join(dtypes)}]")
    for _ in range(2):
        ran = workshop.run(text)
        metrics = ran.as_json()["nodes"]["estimate"]["metrics"]
        sizes = [f"{dtype} {format_size(metrics[dtype]['inference'])}" for dtype in dtypes[:2]]
        (row,) = [line for line in nodes_table(ran.ran()).splitlines() if line.startswith("estimate")]
        assert row.endswith(f"  {', '.join(sizes)} to infer{rest}")
        later = report_runs(["last"], form="markdown", store=workshop.folder / "store")
        assert f"{', '.join(sizes)} to infer{rest}" in later
    assert statuses(ran)["estimate"] == "cached"


def test_what_was_told_by_names_is_made_again_where_its_code_is_trusted_since(workshop, model):
    config = json.loads((model / "config.json").read_text())
    own = {**config, "model_type": "of-its-own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    (model / "config.json").write_text(json.dumps(own))
    text = (
        "version: 1\nname: own\nTRUST\nstages:\n  estimate: {uses: estimate, with: {path: model, dtypes: [float16]}}\n"
    )
    seen = [statuses(workshop.run(text.replace("TRUST", "trust: {}")))["estimate"] for _ in range(2)]
    trusting = f"trust: {{remote_code: [org/own@{'a' * 40}]}}"
    seen += [statuses(workshop.run(text.replace("TRUST", trusting)))["estimate"] for _ in range(2)]
    assert seen == ["succeeded", "cached", "succeeded", "cached"]


def test_gates_on_training_are_decided_by_the_plan(workshop, model):
    rank = 2**14  # adapters that weigh more than the limit
    workshop.manifest.write_text(TRAINING.replace("RANK", str(rank)).replace("LOW", "1MiB"))
    with pytest.raises(GateFailed, match=r"float16\.training_high"):
        bigpipe.run(workshop.manifest)
    assert not list((workshop.folder / "store" / "keys").glob("**/*.json"))


def test_training_fields_reach_the_numbers(workshop, model):
    workshop.manifest.write_text(TRAINING.replace("RANK", "4").replace("400MiB", "2GiB").replace("LOW", "10kB"))
    result = bigpipe.run(workshop.manifest)
    half = result.nodes["estimate"].record.metrics["float16"]
    assert half["training_high"] > half["training"]["lora"]
    assert half["quantizing"] is None
    assert result.nodes["estimate"].record.metrics["nf4"]["quantizing"] > 0
    data = report(result)
    lora = data["dtypes"]["float16"]["terms"]["training.lora"]
    config = json.loads((model / "config.json").read_text())
    square = 2 * config["hidden_size"]
    assert lora["inputs"]["rank"] == 4
    assert lora["inputs"]["adapter parameters"] == config["num_hidden_layers"] * 2 * 4 * square
    assert lora["inputs"]["gradient checkpointing"] == "yes"
    assert data["dtypes"]["float16"]["terms"]["kv_cache"]["inputs"]["bytes per element"] == 1


def test_the_report_names_the_model_and_is_the_same_wherever_it_was_made(workshop, model):
    workshop.manifest.write_text(RECIPE.replace("400MiB", "2GiB"))
    result = bigpipe.run(workshop.manifest)
    data = report(result)
    assert (data["schema"], data["model"], data["fetched_bytes"]) == ("bigpipe.estimate/1", "model", 0)
    assert data["dtypes"]["int8"]["weights"] == result.nodes["estimate"].record.metrics["int8"]["weights"]
    text = (result.path("estimate") / "report.txt").read_text()
    assert text.startswith("model: OPTForCausalLM")
    assert set(statuses(bigpipe.run(workshop.manifest)).values()) == {"cached"}


def test_a_repository_is_sized_without_downloading_it(workshop, monkeypatch):
    folder = make_checkpoint(workshop.folder / "opt", "opt", format="bin", max_shard_size="50KB")
    with LoopbackHub() as hub:
        commit = hub.create("org/opt", files_of(folder))
        for name, value in hub.environment(workshop.folder / "home").items():
            monkeypatch.setenv(name, value)
        text = "version: 1\nname: r\nstages:\n  estimate: {uses: estimate, with: {repo: org/opt, dtypes: [nf4]}}\n"
        workshop.manifest.write_text(text)
        result = bigpipe.run(workshop.manifest)
        assert report(result)["revision"] == commit
        assert result.nodes["estimate"].record.metrics["nf4"]["parameters"] > 0
        hub.commit("org/opt", {"README.md": b"new"})
        assert statuses(bigpipe.run(workshop.manifest)) == {"estimate": "succeeded"}
        assert statuses(bigpipe.run(workshop.manifest)) == {"estimate": "cached"}


def test_a_directory_with_a_config_only(workshop):
    (workshop.folder / "model").mkdir()
    (workshop.folder / "model" / "config.json").write_text(json.dumps(OPT))
    text = "version: 1\nname: r\nstages:\n  estimate: {uses: estimate, with: {path: model, dtypes: [float32]}}\n"
    workshop.manifest.write_text(text)
    result = bigpipe.run(workshop.manifest)
    assert report(result)["source"] == "config"


def test_its_version_is_of_the_numbers_that_it_gives(workshop):
    """A store that was made by another version had 4,096 tokens of MPT: its results are not these."""
    (workshop.folder / "model").mkdir()
    config = {"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 64, "n_heads": 4, "n_layers": 2,
              "vocab_size": 160, "max_seq_len": 2048}  # fmt: skip
    (workshop.folder / "model" / "config.json").write_text(json.dumps(config))
    context = forecast_context(workshop.folder, base=workshop.folder)
    params = EstimateParams(path="model", dtypes=("float32",), sequence_length=4096)
    assert STAGE.forecast(params, context).metrics["float32"]["kv_cache"] == 2 * 2 * 64 * 2048 * 4
    assert STAGE.version == 7


def test_what_is_not_known_yet_is_said(tmp_path):
    inputs = {"model": (Forecast(),)}
    context = forecast_context(tmp_path, inputs=inputs)
    found = STAGE.forecast(EstimateParams(), context)
    assert found.metrics == {}
    assert "config is not known" in found.unknown[0]


@pytest.mark.parametrize("params", [{}, {"repo": "a/b", "wired": True}])
def test_one_model_and_no_more(tmp_path, params):
    inputs = {"model": (Forecast(),)} if params.pop("wired", False) else {}
    context = check_context(tmp_path, inputs=inputs, offline=True)
    assert STAGE.planning.check is not None
    with pytest.raises(UsageError, match="looks at one model"):
        STAGE.planning.check(EstimateParams(**params), context)


@pytest.mark.parametrize(
    "params",
    [
        {"repo": "a/b", "path": "c"}, {"revision": "main"}, {"dtypes": []}, {"dtypes": ["int3"]}, {"batch_size": 0},
        {"head": "lm"}, {"sequence_length": "long"}, {"batchsize": 1},
    ],
)  # fmt: skip
def test_mistakes_in_the_manifest(params):
    with pytest.raises(ValidationError):
        EstimateParams(**params)


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_is_named_is_where_the_wired_model_came_from(tmp_path: Path, name: str) -> None:
    """By a report, and by the adapter that is trained on it."""
    folders = {each: tmp_path / "artifacts" / (each * 16) for each in ("one", "two")}
    lineage = tuple(
        Lineage(each, "download", "k", f"sha256:{folder.name}", {"repo": f"org/{each}"}, {"commit": each})
        for each, folder in folders.items()
    )
    context = stage_context(tmp_path, inputs=inputs(model=folders[name], baseline=tmp_path), lineage=lineage)
    assert named(context) == f"org/{name}"
    assert origin(context) == {"repo": f"org/{name}", "commit": name}
