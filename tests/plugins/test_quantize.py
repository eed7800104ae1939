"""The `quantize` kind, run as the engine runs it: in a child process, after a forecast from headers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.contexts import check_context, forecast_context, inputs, stage_context
from support.launching import MACHINE, make_job
from support.models import make_checkpoint, tiny_config
from support.own_code import make_own_model
from support.tinygpt import GPT

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.quantization import Settings, understand
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import SyntheticModel
from bigpipe.errors import UsageError
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import Outcome
from bigpipe.orchestrator.stage import Forecast, Trust
from bigpipe.plugins.quantize import STAGE, QuantizeParams

TESTS = Path(__file__).parent.parent


def run_quantize(folder: Path, source: Path, environment: dict[str, str] | None = None, **params: Any) -> Outcome:
    """The outcome; the artifact is `folder / "work" / "out"`."""
    trust = params.pop("trust", Trust())
    job = make_job(
        folder, stage=STAGE, module="bigpipe.plugins.quantize:STAGE", trust=trust,
        params=params, memo=folder.parent / "memo", inputs={"model": (source,)}, base=TESTS,
        environment=environment or {},
    )  # fmt: skip
    return executor("process").start(job)


def forecast_of(folder: Path, source: Path, **params: Any) -> Forecast:
    trust = params.pop("trust", Trust())
    described = {"model": (Forecast(output=describe_checkpoint(source)),)}
    context = forecast_context(folder, inputs=described, trust=trust, memo=folder.parent / "memo", base=TESTS)
    return STAGE.forecast(QuantizeParams(**params), context)


def artifact_of(folder: Path, out: str = "work/out") -> Path:
    """What a store would make of the output: files in place of links to finished parts."""
    return Path(shutil.copytree(folder / out, folder / "artifact", dirs_exist_ok=True))


def out_of(folder: Path) -> Path:
    return folder / "work" / "out"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama", max_shard_size="60KB")


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_forecast_is_exact_to_the_byte(tmp_path: Path, source: Path, scheme: str) -> None:
    outcome = run_quantize(tmp_path, source, scheme=scheme)
    expected = forecast_of(tmp_path, source, scheme=scheme)
    assert dict(expected.metrics) == outcome.metrics
    described = describe_checkpoint(artifact_of(tmp_path))
    assert dict(expected.output.tensors) == dict(described.tensors)
    assert expected.output.nbytes == described.nbytes == outcome.metrics["bytes"]
    assert (expected.output.config, expected.output.quantization) == (described.config, described.quantization)
    assert outcome.metrics["quantized"] == 14
    assert outcome.metrics["skipped"] == 1


def test_double_quantization_is_forecast_within_a_few_bytes(tmp_path: Path, source: Path) -> None:
    outcome = run_quantize(tmp_path, source, scheme="nf4", bnb_4bit_use_double_quant=True)
    expected = forecast_of(tmp_path, source, scheme="nf4", bnb_4bit_use_double_quant=True)
    assert set(expected.metrics) == {"quantized", "skipped"}
    assert abs((expected.write_bytes or 0) - outcome.metrics["bytes"]) <= 4 * 14


def test_the_worker_never_imports_torch(tmp_path: Path, source: Path) -> None:
    describe_architecture(source, sources=Sources(memo=tmp_path.parent / "memo"))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    outcome = run_quantize(tmp_path, source, environment, scheme="nf4")
    assert outcome.peak_rss < 192 * 2**20


def test_side_files_are_references_and_digests_come_along(tmp_path: Path, source: Path) -> None:
    outcome = run_quantize(tmp_path, source, scheme="fp4")
    links = {file.name: os.readlink(file) for file in out_of(tmp_path).iterdir() if file.is_symlink()}
    assert links["tokenizer.json"] == str(source / "tokenizer.json")
    weights = [name for name in outcome.files if name.endswith(".safetensors")]
    assert len(weights) == outcome.metrics["quantized"] // 14 * len(describe_files(source))
    for name in weights:
        assert Path(links[name]).parent == tmp_path / "parts" / "quantize"


def describe_files(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("pasted", "plain"),
    [
        ({"load_in_8bit": True}, {"scheme": "int8"}),
        ({"load_in_8bit": True, "load_in_4bit": False}, {"scheme": "int8"}),
        ({"load_in_4bit": True}, {"scheme": "fp4"}),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"scheme": "nf4"}),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "torch.bfloat16"},
            {"scheme": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
        ),
        ({"scheme": "nf4", "load_in_4bit": True}, {"scheme": "nf4"}),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["a"]}, {"scheme": "int8", "skip_modules": ["a"]}),
    ],
)
def test_what_people_paste_means_the_same(pasted: dict[str, Any], plain: dict[str, Any]) -> None:
    assert QuantizeParams(**pasted) == QuantizeParams(**plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "nf4", "llm_int8_threshold": 6.0}, "llm_int8_threshold has no meaning for scheme nf4"),
        ({"scheme": "int8", "bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant has no meaning"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type has no meaning"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
        ({"scheme": "int8", "load_in_4bit": True}, "contradicts load_in_4bit"),
        ({"scheme": "fp4", "bnb_4bit_quant_type": "nf4"}, "contradicts bnb_4bit_quant_type nf4"),
        ({"scheme": "int8", "skip_modules": [], "llm_int8_skip_modules": []}, "are the same"),
        ({"load_in_8bit": "yes"}, "true or false"),
        ({}, "Field required"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeParams(**fields)


def test_a_quantized_input_is_refused_in_the_plan(tmp_path: Path, source: Path) -> None:
    run_quantize(tmp_path, source, scheme="int8")
    described = {"model": (Forecast(output=describe_checkpoint(artifact_of(tmp_path))),)}
    assert STAGE.planning.check is not None
    with pytest.raises(UsageError, match="quantized already"):
        STAGE.planning.check(QuantizeParams(scheme="nf4"), check_context(tmp_path, inputs=described))


def test_unknown_inputs_are_said_to_be_unknown(tmp_path: Path, source: Path) -> None:
    params = QuantizeParams(scheme="nf4")
    unknown = STAGE.forecast(params, forecast_context(tmp_path, inputs={"model": (Forecast(),)}))
    assert unknown.unknown == ("size after quantization, and memory: the tensors of the input are not known yet",)
    nameless = replace(describe_checkpoint(source), config=None)
    context = forecast_context(tmp_path, inputs={"model": (Forecast(output=nameless),)})
    assert "no config" in STAGE.forecast(params, context).unknown[0]


def test_trusted_code_that_came_with_a_model_says_what_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = make_own_model(tmp_path / "model")
    described, settings = describe_checkpoint(model), Settings(scheme="int8", skip_modules=["two"])
    outlined, _ = understand(described, settings, sources=Sources(trust_remote_code=True))
    assert (outlined.quantized, outlined.skipped) == (("one",), ("two",))
    wired = {"model": (Forecast(output=replace(described, path=None)),)}
    planned = forecast_context(tmp_path, inputs=wired, trust=Trust(remote_code=("org/model@0123",)))
    found = STAGE.forecast(QuantizeParams(scheme="int8"), planned)
    assert "its trusted code is asked once it is here" in found.unknown[0]


def test_threads_are_a_fact_of_double_quantization_alone() -> None:
    assert STAGE.planning.facts is not None
    assert STAGE.planning.facts(QuantizeParams(scheme="nf4"), MACHINE) == {}
    assert STAGE.planning.facts(QuantizeParams(scheme="nf4", bnb_4bit_use_double_quant=True), MACHINE) == {"cpus": 2}


def written(parts: Path) -> dict[str, int]:
    """Finished files by name, with a mark that changes when one is written anew."""
    return {file.name: file.stat().st_ino for file in parts.rglob("*.safetensors")}


def run_here(folder: Path, source: Path, **params: Any) -> Any:
    """In this process, which is quicker where only the result matters."""
    context = stage_context(folder, inputs=inputs(model=source), memo=folder.parent / "memo", base=TESTS)
    return STAGE.run(QuantizeParams(**params), context)


def test_an_edit_redoes_only_the_files_it_concerns(tmp_path: Path, source: Path) -> None:
    run_here(tmp_path, source, scheme="int8")
    before = written(tmp_path / "parts")
    run_here(tmp_path, source, scheme="int8", llm_int8_threshold=5.0)
    assert written(tmp_path / "parts") == before
    run_here(tmp_path, source, scheme="int8", skip_modules=["lm_head", "model.layers.1.mlp.down_proj"])
    after = written(tmp_path / "parts")
    assert before.items() < after.items()
    assert len(after) == len(before) + 1


def test_a_damaged_part_is_made_again(tmp_path: Path, source: Path) -> None:
    run_here(tmp_path, source, scheme="int8")
    parts = sorted((tmp_path / "parts").rglob("*.safetensors"))
    good = parts[0].read_bytes()
    parts[0].write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    run_here(tmp_path, source, scheme="int8")
    assert parts[0].read_bytes() == good


def test_a_part_that_became_a_link_into_a_store_is_used(tmp_path: Path, source: Path) -> None:
    """What publishing does with them: the file becomes an object named by its sha256."""
    first = run_here(tmp_path, source, scheme="int8")
    by_sha = {sha256: name for name, (sha256, _) in first.files.items()}
    objects = tmp_path / "objects"
    objects.mkdir()
    for sha256, name in by_sha.items():
        link = tmp_path / "out" / name
        if link.is_symlink():
            part = Path(os.readlink(link))
            part.rename(objects / sha256)
            part.symlink_to(objects / sha256)
    state = {file.name: file.stat().st_mtime_ns for file in objects.iterdir()}
    assert run_here(tmp_path, source, scheme="int8").files == first.files
    assert {file.name: file.stat().st_mtime_ns for file in objects.iterdir()} == state


def custom_checkpoint(out: Path) -> Path:
    torch.manual_seed(0)
    config = GPT.get_default_config()
    config.vocab_size, config.block_size = 256, 64
    out.mkdir()
    save_file(GPT(config).state_dict(), out / "model.safetensors")
    described = {"class": "support.tinygpt:GPT", "config": {"vocab_size": 256, "block_size": 64}}
    (out / "bigpipe_architecture.json").write_text(json.dumps(described))
    return out


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    """Its block multiplies by the weight of `narrow` itself, which must therefore stay."""
    source, trust = custom_checkpoint(tmp_path / "gpt"), Trust(modules=("support.tinygpt",))
    options: dict[str, Any] = {"scheme": "int8", "skip_modules": ["head", "narrow"], "dtype": "float32"}
    context = stage_context(tmp_path, inputs=inputs(model=source), trust=trust, base=TESTS)
    result = STAGE.run(QuantizeParams(**options), context)
    assert result.metrics.model_dump() == dict(forecast_of(tmp_path, source, trust=trust, **options).metrics)
    artifact = artifact_of(tmp_path, "out")
    described = describe_checkpoint(artifact)
    assert described.quantization is not None
    assert described.quantization["load_in_8bit"] is True
    assert described.custom is not None
    assert described.custom["class"] == "support.tinygpt:GPT"
    assert load_file(artifact / "model.safetensors")["blocks.0.widen.weight"].dtype == torch.int8
    tokens = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        before = load(source, trust=["support.tinygpt"])(tokens)
        after = load(artifact, trust=["support.tinygpt"], dtype="float32")(tokens)
    assert torch.allclose(before, after, atol=0.05)
    assert not torch.equal(before, after)


RECIPE = """
version: 1
name: edited
stages:
  download: {uses: download, with: {path: model}}
  quantize: {uses: quantize, inputs: download, with: {scheme: nf4, skip_modules: SKIPPED}}
"""


def test_a_recipe_that_is_edited_makes_only_the_changed_file_anew(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "model")
    store = tmp_path / "store"

    def run(skipped: str) -> dict[str, Any]:
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SKIPPED", skipped))
        command = [
            sys.executable,
            "-m",
            "bigpipe",
            "run",
            str(tmp_path / "recipe.yaml"),
            "--store",
            str(store),
            "--json",
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        return json.loads(done.stdout.splitlines()[-1])["nodes"]["quantize"]

    first = run("null")
    objects = {file.name for file in (store / "objects").iterdir()}
    parts = [part for part in (store / "parts" / "quantize").iterdir() if part.suffix == ".safetensors"]
    assert all(part.is_symlink() and part.resolve().name in objects for part in parts)
    second = run("[lm_head, model.layers.1.mlp.down_proj]")
    assert (first["status"], second["status"]) == ("succeeded", "succeeded")
    added = {file.name for file in (store / "objects").iterdir()} - objects
    assert len(added) == 3  # one weight file, the index, the config
    transformers.AutoModelForCausalLM.from_pretrained(second["path"])


KILLED = """
import sys
from pathlib import Path
from support.contexts import inputs, stage_context
from bigpipe.plugins.quantize import STAGE, QuantizeParams
folder, source = map(Path, sys.argv[1:])
STAGE.run(QuantizeParams(scheme="int8"), stage_context(folder, inputs=inputs(model=source)))
"""


@pytest.mark.fault
def test_killed_at_random_points_it_repeats_one_file_at_most(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 1024, "num_hidden_layers": 10}
    tiny_config("opt", architectures=["OPTForCausalLM"], **sizes).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    architecture = describe_architecture(tmp_path, sources=Sources(memo=tmp_path / "memo"))
    SyntheticModel(config, architecture, max_shard_size="13MB").write(tmp_path / "opt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(TESTS)])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "opt")]
    started = time.monotonic()
    subprocess.run(command, check=True, env=environment)
    whole = time.monotonic() - started
    expected = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert len(expected) > 20
    for index in range(20):
        for part in (tmp_path / "parts").rglob("*.*"):
            part.unlink()
        process = subprocess.Popen(command, env=environment)
        time.sleep(whole * (index + 0.5) / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = {name: mark for name, mark in written(tmp_path / "parts").items() if name.count(".") == 1}
        subprocess.run(command, check=True, env=environment)
        assert finished.items() <= written(tmp_path / "parts").items()
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == expected
