"""Repositories as they are, from the Hub and from a directory: what the plan says comes, comes; or the plan refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.contexts import check_context, forecast_context, stage_context
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import POINTER, make_checkpoint, tiny_model, tiny_tokenizer
from support.workshop import Workshop

import bigpipe
from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, find_task
from bigpipe.bigmodel.writing import save_checkpoint
from bigpipe.errors import BigpipeError, InvalidCheckpoint, NoWeights, UsageError
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.download import STAGE, DownloadParams
from bigpipe.plugins.estimate import STAGE as ESTIMATE, EstimateParams
from bigpipe.plugins.quantize import STAGE as QUANTIZE, QuantizeParams
from bigpipe.plugins.save import STAGE as SAVE, SaveParams

SOURCES = ["repo", "path"]


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def bring(server: LoopbackHub, tmp_path: Path) -> Any:
    """Return what a plan says of a folder's files, and the artifact; both by way of the source named."""

    def go(source: str, folder: Path, **given: Any) -> tuple[dict[str, int], ModelDescription, Path]:
        environment = server.environment(tmp_path / f"hf-{len(list(tmp_path.iterdir()))}")
        server.create("org/model", files_of(folder))
        where = {"repo": "org/model"} if source == "repo" else {"path": str(folder)}
        params = DownloadParams.model_validate({**where, **given})
        pinned = STAGE.planning.pin(params, check_context(tmp_path, environment=environment))  # type: ignore[misc]
        pins = pinned.values if pinned else {}
        planned = forecast_context(tmp_path, environment=environment, pins=pins)
        forecast = STAGE.forecast(params, planned)
        assert STAGE.planning.check is not None
        STAGE.planning.check(params, planned)
        root = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        result = STAGE.run(params, stage_context(root, environment=environment, pins=pins))
        out = root / "out"
        there = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}
        assert result.files is not None
        assert set(result.files) == set(there)
        assert {name: forecast.metrics[name] for name in ("bytes", "files")} == {
            "bytes": sum(there.values()), "files": len(there),
        }  # fmt: skip
        return there, forecast.output, out

    return go


def assert_planned(planned: ModelDescription | None, out: Path) -> None:
    """What the next step was told is what it gets."""
    found = open_checkpoint(out)
    assert planned is not None
    assert planned.tensors == {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()}
    assert planned.config == found.config


@pytest.mark.parametrize("source", SOURCES)
def test_of_several_indexes_only_that_of_the_weights_counts(bring: Any, source: str, tmp_path: Path) -> None:
    """`*.json` takes the index of another format, and whatever else is called index.json."""
    folder = make_checkpoint(tmp_path / "both", "llama", max_shard_size="60KB")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    other = {"metadata": {}, "weight_map": {f"w{at}": f"pytorch_model-0000{at}-of-00002.bin" for at in (1, 2)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(other))
    (folder / "index.json").write_text('{"pages": 3}')
    there, planned, out = bring(source, folder, include=["*.safetensors", "*.json"])
    assert {*shards, "pytorch_model.bin.index.json", "index.json"} < set(there)
    assert_planned(planned, out)


@pytest.mark.parametrize("source", SOURCES)
def test_an_index_may_be_accelerates_bare_one(bring: Any, source: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "bare", "llama", max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text())["weight_map"]))
    _, planned, out = bring(source, folder)
    assert_planned(planned, out)


def variants(folder: Path) -> Path:
    """Plain in one file, fp16 in shards, bf16 in one file; a copy of it all below `text_model`."""
    make_checkpoint(folder, "llama")
    tiny_model("llama", dtype="float16").save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    tiny_model("llama", dtype="bfloat16").save_pretrained(folder, variant="bf16")
    shutil.copytree(folder, folder / "text_model")
    return folder


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("subfolder", [None, "text_model", "text_model/"])
@pytest.mark.parametrize(("variant", "dtype"), [(None, "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_variant_and_a_subfolder(
    bring: Any, tmp_path: Path, source: str, subfolder: str | None, variant: str | None, dtype: str
) -> None:
    there, planned, out = bring(source, variants(tmp_path / "model"), subfolder=subfolder, variant=variant)
    assert_planned(planned, out)
    assert {tensor.dtype for tensor in open_checkpoint(out).tensors.values()} == {dtype}
    assert not [name for name in there if "/" in name]
    index = "model.safetensors.index.fp16.json"
    assert (index in there) == (variant == "fp16")
    save_checkpoint(out, tmp_path / "anew")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "anew").tensors.values()} == {dtype}


@pytest.mark.parametrize(("subfolder", "variant"), [("text_model", "fp16"), (None, "bf16"), ("text_model/", None)])
def test_an_estimate_of_a_repository_takes_a_variant_and_a_subfolder(
    server: LoopbackHub, workshop: Workshop, subfolder: str | None, variant: str | None
) -> None:
    folder, environment = variants(workshop.folder / "model"), server.environment(workshop.folder / "hf")
    server.create("org/model", files_of(folder))
    choice = {name: value for name, value in (("subfolder", subfolder), ("variant", variant)) if value}
    wanted = bigpipe.estimate(folder, dtypes=["float16"], **choice)  # type: ignore[arg-type]
    told = bigpipe.estimate("org/model", dtypes=["float16"], environment=environment, **choice)  # type: ignore[arg-type]
    assert told.metrics() == wanted.metrics()
    assert told.checkpoint is not None
    assert wanted.checkpoint is not None
    assert told.checkpoint["bytes"] == wanted.checkpoint["bytes"]
    assert server.bytes_sent(".safetensors") < 150_000, "of weights only headers"
    params = EstimateParams.model_validate({"repo": "org/model", "dtypes": ["float16"], **choice})
    context = forecast_context(workshop.folder, environment=environment)
    foreseen = ESTIMATE.forecast(params, context).metrics["float16"]
    assert foreseen["stored"] == wanted.metrics()["float16"]["stored"]
    options = [part for name, value in choice.items() for part in (f"--{name}", value)]
    done = workshop.command("estimate", "org/model", "--dtypes", "float16", *options, "--json", **environment)
    assert json.loads(done.stdout)["checkpoint"] == told.checkpoint, done.stderr


@pytest.mark.parametrize(
    ("choice", "told"), [({"subfolder": "txt"}, "text_model"), ({"variant": "fp61"}, "bf16, fp16")]
)
def test_an_estimate_of_a_repository_says_which_there_are(
    server: LoopbackHub, tmp_path: Path, choice: dict[str, str], told: str
) -> None:
    server.create("org/model", files_of(variants(tmp_path / "model")))
    context = forecast_context(tmp_path, environment=server.environment(tmp_path / "hf"))
    with pytest.raises(UsageError) as error:
        ESTIMATE.forecast(EstimateParams.model_validate({"repo": "org/model", **choice}), context)
    assert told in error.value.cure
    assert error.value.field == next(iter(choice))


def test_two_choices_of_one_commit_are_remembered_apart(bring: Any, tmp_path: Path) -> None:
    folder = variants(tmp_path / "model")
    for given in ({}, {"variant": "fp16"}, {"subfolder": "text_model", "variant": "bf16"}, {}):
        _, planned, out = bring("repo", folder, **given)
        assert_planned(planned, out)


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_with_an_adapter_beside_it_is_one_of_two(bring: Any, tmp_path: Path, source: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    for given in ({}, {"include": ["*.json", "model.safetensors"]}):
        with pytest.raises(InvalidCheckpoint, match="a model and an adapter"):
            bring(source, folder, **given)
    for read in (open_checkpoint, bigpipe.load, bigpipe.place):
        with pytest.raises(InvalidCheckpoint, match="a model and an adapter"):
            read(folder)
    there, planned, out = bring(source, folder, exclude=["adapter*"])
    assert_planned(planned, out)
    assert not [name for name in there if "adapter" in name]
    assert open_checkpoint(folder / "model.safetensors").tensors


GLOBS: list[dict[str, Any]] = [
    {"include": ["config.json", "model.bf16.safetensors"]},
    {"exclude": ["tokenizer*"]},
    {"include": ["config.json", "model*"], "exclude": ["*fp16*", "*bf16*"]},
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("globs", GLOBS, ids=str)
def test_what_globs_leave_is_described_by_the_plan(bring: Any, tmp_path: Path, source: str, globs: Any) -> None:
    _, planned, out = bring(source, variants(tmp_path / "model"), **globs)
    assert_planned(planned, out)


@pytest.mark.parametrize("source", SOURCES)
def test_what_does_not_come_along_is_missed_by_the_plan(bring: Any, tmp_path: Path, source: str) -> None:
    folder, generate = make_checkpoint(tmp_path / "model", "llama"), find_task("text-generation", Sources())
    texts = [Row(0, "a", {"prompt": "a"})]
    chats = [Row(0, [{"role": "user", "content": "a"}], {})]
    _, planned, _ = bring(source, folder)
    list(generate.checked({}, texts, planned))
    _, planned, out = bring(source, folder, exclude=["tokenizer*"])
    for described in (planned, describe_checkpoint(out)):
        with pytest.raises(UsageError, match="needs a tokenizer"):
            list(generate.checked({}, texts, described))
    _, planned, _ = bring(source, folder, exclude=["tokenizer_config.json"])
    with pytest.raises(UsageError, match="has no chat template"):
        list(generate.checked({}, chats, planned))
    _, planned, _ = bring(source, folder, include=["*.safetensors"])
    wired = {"model": (Forecast(output=planned),)}
    context = forecast_context(tmp_path, inputs=wired)
    assert QUANTIZE.planning.check is not None
    with pytest.raises(UsageError, match=r"no config\.json, so nobody knows the class"):
        QUANTIZE.planning.check(QUANTIZE.params.model_validate({"scheme": "int8"}), context)


def test_a_shard_that_a_glob_leaves_out_is_missed_by_the_plan(bring: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", max_shard_size="20KB")
    for source in SOURCES:
        with pytest.raises(InvalidCheckpoint, match=r"model-00002-of-\d+.safetensors, which is not there"):
            bring(source, folder, exclude=["model-00002*"])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("given", "said", "cure"),
    [
        ({"subfolder": "text"}, "text", "text_model"),
        ({"variant": "int8"}, "no weights of 'int8'", "bf16, fp16"),
    ],
)
def test_one_that_is_missing_is_refused_with_those_that_are_there(
    bring: Any, tmp_path: Path, source: str, given: Mapping[str, Any], said: str, cure: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        bring(source, variants(tmp_path / "model"), **given)
    assert cure in caught.value.cure


def test_a_model_in_a_folder_of_its_own_is_told_of_before_it_is_downloaded(server: LoopbackHub, tmp_path: Path) -> None:
    """As sentence-transformers kept them. `save` alone takes them as they are."""
    model = files_of(make_checkpoint(tmp_path / "model", "bert"))
    server.create("org/old", {"modules.json": b"[]", **{f"0_Transformer/{name}": model[name] for name in model}})
    context = forecast_context(tmp_path, environment=server.environment(tmp_path / "hf"))
    old = DownloadParams(repo="org/old")
    assert STAGE.planning.check is not None
    STAGE.planning.check(old, context)
    foreseen = STAGE.forecast(old, context)
    assert QUANTIZE.planning.check is not None
    with pytest.raises(NoWeights, match="org/old: no weights were found") as refused:
        QUANTIZE.planning.check(QuantizeParams(scheme="int8"), check_context(tmp_path, inputs={"model": (foreseen,)}))
    assert "it has weights in 0_Transformer; open one of these (a download: `subfolder`)" in refused.value.cure
    SAVE.forecast(SaveParams(to="dist"), forecast_context(tmp_path, inputs={"model": (foreseen,)}))
    assert server.bytes_sent(".safetensors") == 0
    server.create("org/parts", {f"text_model/{name}": model[name] for name in model})
    with pytest.raises(NoWeights, match="no weights were found") as refused:
        STAGE.forecast(DownloadParams(repo="org/parts"), context)
    assert "weights in text_model" in refused.value.cure


@pytest.mark.parametrize("subfolder", ["..", "/etc", "a/../b", "a//b", "", "."])
def test_a_subfolder_lies_below(subfolder: str) -> None:
    with pytest.raises(ValidationError, match="is not the path of a folder in it"):
        DownloadParams.model_validate({"repo": "org/model", "subfolder": subfolder})


def test_a_subfolder_that_is_a_link_is_refused(bring: Any, tmp_path: Path) -> None:
    folder = variants(tmp_path / "model")
    (folder / "linked").symlink_to("text_model")
    with pytest.raises(UsageError, match="is a link"):
        bring("path", folder, subfolder="linked")


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        DownloadParams.model_validate({"repo": "org/model", "variant": "fp16", "include": ["*"]})
    with pytest.raises(ValidationError, match="synthetic makes all it needs"):
        DownloadParams.model_validate({"synthetic": {"config": {}}, "subfolder": "a"})


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shards_without_an_index(bring: Any, tmp_path: Path, source: str, format: str) -> None:
    make_checkpoint(tmp_path / "model", "llama", format=format, max_shard_size="20KB")
    for index in (tmp_path / "model").glob("*.index.json"):
        index.unlink()
    _, planned, out = bring(source, tmp_path / "model")
    assert_planned(planned, out)
    assert open_checkpoint(out).tensors.keys() == tiny_model("llama").state_dict().keys()
    next((tmp_path / "model").glob("*-00002-of-*")).unlink()
    shutil.rmtree(tmp_path / "hf-1", ignore_errors=True)
    with pytest.raises(InvalidCheckpoint, match=r"shards \("):
        bring(source, tmp_path / "model")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_model.safetensors", "holds an adapter"),
        ("model-Q4_K_M.gguf", "are GGUF"),
        ("consolidated.safetensors", "Mistral's or Meta's own program"),
        ("tf_model.h5", "of a kind that is not read here"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_fetched(
    bring: Any, server: LoopbackHub, tmp_path: Path, source: str, file: str, said: str
) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model" / file)
    with pytest.raises(NoWeights, match=said):
        bring(source, tmp_path / "model")
    assert not list(tmp_path.glob("run-*"))
    assert not [request for request in server.requests("/resolve/", "GET") if "config.json" not in request.path]


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_of_sentence_transformers_keeps_its_parts(bring: Any, tmp_path: Path, source: str) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder, "bert")
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"in_features": 32}))
    make_checkpoint(tmp_path / "dense", "llama")
    (tmp_path / "dense/model.safetensors").rename(folder / "2_Dense/model.safetensors")
    (folder / "modules.json").write_text("[]")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"not wanted")
    there, planned, out = bring(source, folder)
    parts = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"}
    assert parts <= set(there)
    assert "onnx/model.onnx" not in there
    assert_planned(planned, out)
    save_checkpoint(out, tmp_path / "anew", max_shard_size="20KB")
    for name in parts:
        assert (tmp_path / "anew" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("source", SOURCES)
def test_a_config_with_a_key_twice_is_read_as_json_reads_it(bring: Any, tmp_path: Path, source: str) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace("{", '{"num_hidden_layers": 7,', 1))
    _, planned, out = bring(source, tmp_path / "model")
    assert_planned(planned, out)
    assert planned.config == json.loads(config.read_text())


@pytest.mark.parametrize("source", SOURCES)
def test_excluded_weights_are_not_planned_with(bring: Any, tmp_path: Path, source: str) -> None:
    """Of two sets of weights the other one is left."""
    make_checkpoint(tmp_path / "model", "llama")
    make_checkpoint(tmp_path / "half", "llama", dtype="float16", format="bin")
    (tmp_path / "half/pytorch_model.bin").rename(tmp_path / "model/pytorch_model.bin")
    _, planned, out = bring(source, tmp_path / "model", include=["*.bin", "*.json"])
    assert {tensor.dtype for tensor in open_checkpoint(out).tensors.values()} == {"float16"}
    if planned is not None:
        assert_planned(planned, out)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(bring: Any, tmp_path: Path, file: str) -> None:
    make_checkpoint(tmp_path / "model", "llama", format="bin" if file.endswith(".bin") else "safetensors")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / file).write_text(POINTER)
    with pytest.raises(BigpipeError, match=f"{file}: is a pointer of git-lfs") as caught:
        bring("path", tmp_path / "model")
    assert "git lfs pull" in caught.value.cure
