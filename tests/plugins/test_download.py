"""The kind `download`, against a Hub on loopback through the real client."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save
from support.contexts import MACHINE, Recorder, check_context, forecast_context, stage_context
from support.hub import LoopbackHub

from bigpipe.bigmodel.architecture import class_source
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.hub import Choice, Hub
from bigpipe.bigmodel.hub.bringing import HubSource, Watch
from bigpipe.errors import DoesNotFit, GatedRepository, InvalidCheckpoint, Offline, Transient, UsageError
from bigpipe.orchestrator.planning.content import content_params
from bigpipe.orchestrator.stage import StageResult, Trust
from bigpipe.orchestrator.store import StatMemo
from bigpipe.plugins.download import STAGE, DownloadMetrics, DownloadParams

TENSORS = {"a.weight": np.arange(60_000, dtype=np.float16).reshape(300, 200), "b.weight": np.ones(50, np.float32)}
FILES = {
    "config.json": b'{"model_type": "opt", "architectures": ["OPTForCausalLM"]}',
    "model.safetensors": save(TENSORS, {"format": "pt"}),
    "tokenizer.json": b'{"version": "1.0"}',
    "pytorch_model.bin": b"the same weights again",
    "tf_model.h5": b"and again",
    "README.md": b"---\nlicense: mit\n---\n",
}
HEADER_READ = 64 * 1024
"""What a plan reads of a weight file without an index, to have its header."""
TAKEN = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.users["secret-token"] = "ada"
        hub.create("org/model", FILES)
        yield hub


@pytest.fixture
def environment(server: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    return server.environment(tmp_path / "hf")


def params(**given: Any) -> DownloadParams:
    return DownloadParams.model_validate(given)


def download(root: Path, environment: dict[str, str], given: dict[str, Any], **context: Any) -> StageResult:
    validated = params(**given)
    pinned = STAGE.planning.pin(validated, check_context(root, environment=environment)) if STAGE.planning.pin else None
    pins = pinned.values if pinned else {}
    return STAGE.run(validated, stage_context(root, environment=environment, pins=pins, **context))


def metrics(result: StageResult) -> DownloadMetrics:
    assert isinstance(result.metrics, DownloadMetrics)
    return result.metrics


def test_a_model_comes_as_links_to_blobs_that_are_never_copied_or_touched(
    environment: dict[str, str], tmp_path: Path
) -> None:
    recorder = Recorder()
    result = download(tmp_path, environment, {"repo": "org/model"}, reporter=recorder)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == TAKEN
    for name in TAKEN:
        target = Path(os.readlink(out / name))
        assert target.is_absolute()
        assert target.is_relative_to(tmp_path / "hf" / "hub" / "models--org--model" / "blobs")
        assert result.files[name] == (hashlib.sha256(FILES[name]).hexdigest(), len(FILES[name]))
        assert target.stat().st_nlink == 1
    assert open_checkpoint(out).tensors.keys() == TENSORS.keys()
    size = sum(len(FILES[name]) for name in TAKEN)
    found = metrics(result)
    assert (found.bytes, found.files, found.fetched_bytes) == (size, 4, size)
    assert found.commit is not None
    assert recorder.progress("download")[-1].done == size


def test_a_second_run_fetches_nothing(server: LoopbackHub, environment: dict[str, str], tmp_path: Path) -> None:
    download(tmp_path, environment, {"repo": "org/model"})
    asked = len(server.requests("/resolve/"))
    assert metrics(download(tmp_path / "again", environment, {"repo": "org/model"})).fetched_bytes == 0
    assert len(server.requests("/resolve/")) == asked


def test_a_branch_is_pinned_and_a_pinned_commit_stays_what_it_is(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    first = server.repositories["org/model"].branches["main"]
    assert STAGE.planning.pin is not None
    pinned = STAGE.planning.pin(params(repo="org/model"), check_context(tmp_path, environment=environment))
    assert pinned is not None
    assert pinned.values == {"revision": first}
    server.commit("org/model", {"config.json": b"{}"})
    context = stage_context(tmp_path, environment=environment, pins=pinned.values)
    result = STAGE.run(params(repo="org/model"), context)
    assert metrics(result).commit == first
    assert (tmp_path / "out" / "config.json").read_bytes() == FILES["config.json"]
    pinned = STAGE.planning.pin(params(repo="org/model", revision=first), check_context(tmp_path))
    assert pinned is not None
    assert pinned.values == {}


def test_bin_checkpoints_and_globs(server: LoopbackHub, environment: dict[str, str], tmp_path: Path) -> None:
    server.create("org/bin", {name: FILES[name] for name in ("config.json", "pytorch_model.bin", "tf_model.h5")})
    result = download(tmp_path / "1", environment, {"repo": "org/bin"})
    assert sorted(result.files) == ["config.json", "pytorch_model.bin"]
    result = download(tmp_path / "2", environment, {"repo": "org/model", "include": ["*.json"]})
    assert sorted(result.files) == ["config.json", "tokenizer.json"]
    result = download(tmp_path / "3", environment, {"repo": "org/model", "exclude": ["*.md"]})
    assert sorted(result.files) == TAKEN[1:]


def test_a_plan_knows_the_bytes_before_any_weight_moves(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    size = sum(len(FILES[name]) for name in TAKEN)
    context = forecast_context(tmp_path, environment=environment)
    found = STAGE.forecast(params(repo="org/model"), context)
    assert (found.download_bytes, found.metrics["bytes"], found.metrics["files"]) == (size, size, 4)
    assert found.write_bytes == 0
    assert not found.misfits
    assert found.output.tensors == {"a.weight": ("float16", (300, 200)), "b.weight": ("float32", (50,))}
    assert server.bytes_sent("/cdn/") <= HEADER_READ
    download(tmp_path, environment, {"repo": "org/model"})
    assert STAGE.forecast(params(repo="org/model"), context).download_bytes == 0


def test_a_disk_that_is_too_small_is_a_misfit_and_a_refusal(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=1))
    found = STAGE.forecast(params(repo="org/model"), forecast_context(tmp_path, environment=environment))
    assert "HF_HOME" in found.misfits[0].cure
    with pytest.raises(DoesNotFit, match="free for the Hub cache"):
        download(tmp_path, environment, {"repo": "org/model"})
    assert server.bytes_sent("/cdn/") <= HEADER_READ


def test_without_the_hub_a_plan_says_what_it_does_not_know(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    found = STAGE.forecast(params(repo="facebook/opt-13b"), forecast_context(tmp_path, environment=nowhere))
    assert found.unknown[0].startswith("size of facebook/opt-13b: the Hub at http://127.0.0.1:9 cannot be reached")
    away = forecast_context(tmp_path, environment=nowhere, offline=True)
    assert "switched off" in STAGE.forecast(params(repo="facebook/opt-13b"), away).unknown[0]
    assert STAGE.planning.pin is not None
    assert STAGE.planning.check is not None
    with pytest.raises(Offline):
        STAGE.planning.pin(params(repo="facebook/opt-13b"), check_context(tmp_path, environment=nowhere))
    STAGE.planning.check(params(repo="facebook/opt-13b"), check_context(tmp_path, environment=nowhere))
    away = check_context(tmp_path, environment=nowhere, offline=True)
    with pytest.raises(Offline):
        STAGE.planning.check(params(repo="facebook/opt-13b"), away)


def test_offline_the_cache_is_enough(server: LoopbackHub, environment: dict[str, str], tmp_path: Path) -> None:
    commit = metrics(download(tmp_path, environment, {"repo": "org/model"})).commit
    asked = len(server.log)
    given = {"repo": "org/model", "revision": commit}
    result = download(tmp_path / "elsewhere", environment, given, offline=True)
    assert sorted(result.files) == TAKEN
    assert len(server.log) == asked


@pytest.mark.parametrize("listed", [True, False])
def test_offline_a_plan_and_a_run_say_what_the_cache_does_not_have(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path, listed: bool
) -> None:
    two = Choice(include=("config.json", "model.safetensors"))
    HubSource("org/model", "main", two, Hub.from_environment(environment)).bring(tmp_path / "elsewhere", Watch())
    given = params(repo="org/model", revision=server.repositories["org/model"].branches["main"])
    context = forecast_context(tmp_path, environment=environment)
    assert STAGE.planning.only(given, context) == []
    if listed:
        STAGE.forecast(given, context)
    context = forecast_context(tmp_path, environment=environment, offline=True)
    told = "README.md, tokenizer.json" if listed else "whatever the Hub cache does not have"
    told = f"left out: {told} of org/model: asking the Hub is switched off"
    assert STAGE.forecast(given, context).unknown == (told,)
    assert STAGE.planning.only(given, context) == ["config.json", "model.safetensors"]
    recorder = Recorder()
    result = STAGE.run(given, stage_context(tmp_path, environment=environment, offline=True, reporter=recorder))
    assert sorted(result.files) == ["config.json", "model.safetensors"]
    assert told in recorder.lines


def test_a_gate_is_found_by_the_plan(server: LoopbackHub, environment: dict[str, str], tmp_path: Path) -> None:
    server.create("org/gated", FILES, gated="manual")
    assert STAGE.planning.check is not None
    with pytest.raises(GatedRepository):
        STAGE.planning.check(params(repo="org/gated"), check_context(tmp_path, environment=environment))
    server.repositories["org/gated"].members.add("ada")
    signed_in = {**environment, "HF_TOKEN": "secret-token"}
    STAGE.planning.check(params(repo="org/gated"), check_context(tmp_path, environment=signed_in))
    assert sorted(download(tmp_path, signed_in, {"repo": "org/gated"}).files) == TAKEN


def test_garbled_weights_never_become_an_artifact(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    server.fail("garbage", "model.safetensors", times=2, method="GET")
    with pytest.raises(Transient, match="came twice with other bytes"):
        download(tmp_path, environment, {"repo": "org/model"})
    assert not list((tmp_path / "out").iterdir())
    download(tmp_path, environment, {"repo": "org/model"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_unfinished_upload_is_refused(server: LoopbackHub, environment: dict[str, str], tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": json.dumps(index).encode()}
    server.create("org/half", files)
    with pytest.raises(InvalidCheckpoint, match=r"model-00002-of-00002\.safetensors, which is not there"):
        download(tmp_path, environment, {"repo": "org/half"})


def a_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(FILES[name])
    (folder / "training_args.bin").write_bytes(b"junk")
    return folder


def test_a_directory_is_copied_so_that_it_may_change(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path / "base" / "mine")
    given = params(path="mine")
    assert STAGE.planning.check is not None
    STAGE.planning.check(given, check_context(tmp_path))
    found = STAGE.forecast(given, forecast_context(tmp_path))
    assert found.output.tensors["a.weight"] == ("float16", (300, 200))
    result = STAGE.run(given, stage_context(tmp_path))
    assert {name: found.metrics[name] for name in ("bytes", "files", "commit")} == {
        name: result.metrics.model_dump()[name] for name in ("bytes", "files", "commit")
    }
    assert found.write_bytes == metrics(result).bytes
    (folder / "config.json").write_bytes(b"changed")
    for name, (sha256, size) in result.files.items():
        copy = tmp_path / "out" / name
        assert not copy.is_symlink()
        assert (hashlib.sha256(copy.read_bytes()).hexdigest(), copy.stat().st_size) == (sha256, size)
    assert sorted(result.files) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_damaged_directory_is_found_by_the_plan(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path / "base" / "mine")
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"][:-10])
    assert STAGE.planning.check is not None
    with pytest.raises(InvalidCheckpoint):
        STAGE.planning.check(params(path="mine"), check_context(tmp_path))
    with pytest.raises(UsageError, match="no directory"):
        STAGE.planning.check(params(path="yours"), check_context(tmp_path))


def test_a_class_of_ones_own_travels_inside_the_artifact(tmp_path: Path) -> None:
    a_checkpoint(tmp_path / "base" / "mine")
    (tmp_path / "base" / "mingpt.py").write_text("class GPT: ...\n")
    architecture = {"class": "mingpt:GPT", "config": {"model_type": "gpt2-xl"}, "no_split_module_classes": ["Block"]}
    given = params(path="mine", architecture=architecture)
    assert STAGE.planning.check is not None
    with pytest.raises(UsageError, match="not trusted") as caught:
        STAGE.planning.check(given, check_context(tmp_path))
    assert "trust: {modules: [mingpt]}" in caught.value.cure
    STAGE.planning.check(given, check_context(tmp_path, trust=Trust(modules=("mingpt",))))
    result = STAGE.run(given, stage_context(tmp_path))
    written = json.loads((tmp_path / "out" / "bigpipe_architecture.json").read_bytes())
    assert written == {**architecture, "source": f"sha256:{class_source('mingpt:GPT', tmp_path / 'base')}"}
    assert (
        result.files["bigpipe_architecture.json"][1] == (tmp_path / "out" / "bigpipe_architecture.json").stat().st_size
    )
    assert STAGE.forecast(given, forecast_context(tmp_path)).output.custom == written


def test_a_class_for_packed_weights_that_name_none_keeps_how_they_are_packed(tmp_path: Path) -> None:
    folder, packed = a_checkpoint(tmp_path / "base" / "mine"), {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "bigpipe_architecture.json").write_text(json.dumps({"quantization_config": packed}))
    (tmp_path / "base" / "mingpt.py").write_text("class GPT: ...\n")
    given = params(path="mine", architecture={"class": "mingpt:GPT"})
    STAGE.run(given, stage_context(tmp_path))
    written = json.loads((tmp_path / "out" / "bigpipe_architecture.json").read_bytes())
    assert (written["class"], written["quantization_config"]) == ("mingpt:GPT", packed)


def test_a_repositorys_own_class_file_is_replaced_not_written_through(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    server.create("org/custom", {**FILES, "bigpipe_architecture.json": b'{"class": "evil:Class"}'})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mingpt.py").write_text("class GPT: ...\n")
    download(tmp_path, environment, {"repo": "org/custom"})
    cached = next((tmp_path / "hf").rglob("snapshots/*/bigpipe_architecture.json"))
    assert (tmp_path / "out" / "bigpipe_architecture.json").samefile(cached)
    download(tmp_path, environment, {"repo": "org/custom", "architecture": {"class": "mingpt:GPT"}})
    assert json.loads((tmp_path / "out" / "bigpipe_architecture.json").read_bytes())["class"] == "mingpt:GPT"
    assert cached.read_bytes() == b'{"class": "evil:Class"}'


OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 32, "ffn_dim": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "vocab_size": 100,
    "max_position_embeddings": 64,
}  # fmt: skip


def test_weights_are_made_up_in_the_shape_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(OPT))
    given = params(synthetic={"config": "config.json", "format": "bin", "max_shard_size": "20KB", "seed": 7})
    found = STAGE.forecast(given, forecast_context(tmp_path))
    result = STAGE.run(given, stage_context(tmp_path))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(checkpoint.files) > 1
    assert found.write_bytes == sum(file.stat().st_size for file in checkpoint.files)
    assert found.output.tensors == {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    assert metrics(result).files == len(result.files) == len(list((tmp_path / "out").iterdir()))
    assert checkpoint.config is not None
    assert checkpoint.config["dtype"] == "float16"
    inline = params(synthetic={"config": OPT, "format": "bin", "max_shard_size": "20KB", "seed": 7})
    again = STAGE.run(inline, stage_context(tmp_path / "again", memo=tmp_path / "memo"))
    assert again.files == result.files
    assert STAGE.planning.facts is not None
    assert list(STAGE.planning.facts(given, MACHINE)) == ["transformers"]
    assert STAGE.planning.facts(params(repo="org/model"), MACHINE) == {}


def test_a_plan_knows_the_config_of_a_repository(environment: dict[str, str], tmp_path: Path) -> None:
    found = STAGE.forecast(params(repo="org/model"), forecast_context(tmp_path, environment=environment))
    assert found.output.config == json.loads(FILES["config.json"])
    assert found.output.format == "safetensors"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "found none"),
        ({"repo": "org/model", "path": "x"}, "found repo and path"),
        ({"path": "x", "revision": "main"}, "revision belongs to a repo"),
        ({"repo": "https://huggingface.co/org/model"}, "write org/model"),
        ({"synthetic": {"config": {}}, "include": ["*"]}, "synthetic makes all it needs"),
        ({"repo": "org/model", "library_name": "tensorflow"}, "diffusers"),
        ({"repo": "org/model", "revison": "main"}, "revison"),
    ],
)
def test_params_that_contradict_themselves_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        params(**given)


def test_paths_and_code_enter_the_key_by_content(tmp_path: Path) -> None:
    a_checkpoint(tmp_path / "mine")
    a_checkpoint(tmp_path / "yours")
    (tmp_path / "mingpt.py").write_text("class GPT: ...\n")
    memo = StatMemo(tmp_path / "memo")

    def key(**given: Any) -> dict[str, Any]:
        return content_params(params(**given), tmp_path, memo)

    assert key(path="mine") == key(path="yours")
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    assert key(synthetic={"config": "config.json"})["synthetic"]["config"].startswith("sha256:")
    assert key(synthetic={"config": {"model_type": "opt"}})["synthetic"]["config"] == {"model_type": "opt"}
    custom = key(path="mine", architecture={"class": "mingpt:GPT"})["architecture"]
    assert "@sha256:" in next(iter(custom.values()))
