"""Models on a loopback Hub, known from headers by range: exact, few bytes, and nothing hostile gets far."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.enemy import Enemy
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.shells import sharded, shell

from bigpipe.bigmodel.architecture import known_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.hub import Hub, describe
from bigpipe.bigmodel.hub.remote import RemoteModel, describe_repository
from bigpipe.errors import GatedRepository, InvalidCheckpoint, NotAuthorised, Offline, Transient, UsageError

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
    "max_position_embeddings": 128, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
MODEL = "org/model"


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.users["secret-token"] = "ada"
        yield hub


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub.from_environment(server.environment(tmp_path / "home"))


def tensors_of(config: dict[str, Any], dtype: str = "bfloat16") -> list[tuple[str, str, tuple[int, ...]]]:
    architecture = known_architecture(config)
    assert architecture is not None
    return [(tensor.name, dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent]


def create(server: LoopbackHub, files: dict[str, bytes | Path], **settings: Any) -> str:
    return server.create(MODEL, {"config.json": json.dumps(LLAMA).encode(), **files}, **settings)


def look(hub: Hub, revision: str = "main", **options: Any) -> RemoteModel:
    return describe_repository(MODEL, revision, hub=hub, **options)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", ["50KB", "5GB"])
def test_headers_over_http_say_what_the_files_say(
    server: LoopbackHub, hub: Hub, tmp_path: Path, format: Any, limit: str
) -> None:
    folder = make_checkpoint(tmp_path / "opt", "opt", format=format, max_shard_size=limit)
    server.create(MODEL, files_of(folder))
    found, local = look(hub), describe_checkpoint(folder)
    assert dict(found.description.tensors or {}) == dict(local.tensors or {})
    assert list(found.description.tensors or {}) == list(local.tensors or {})
    assert (found.description.format, dict(found.description.tied)) == (local.format, dict(local.tied))
    assert found.description.config == local.config
    assert found.source == "headers"
    assert found.fetched_bytes == server.bytes_sent()


def test_weights_are_not_downloaded(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    create(
        server, {"model.safetensors": shell(tmp_path / "model.safetensors", tensors_of({**LLAMA, "hidden_size": 2048}))}
    )
    found = look(hub)
    assert (found.description.nbytes or 0) > 20_000_000
    assert server.bytes_sent("/cdn/") < 70_000


def test_the_index_alone_suffices_where_it_agrees_with_the_config(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    create(server, dict(sharded(tmp_path, tensors_of(LLAMA), 60_000)))
    found = look(hub, need="sizes")
    assert found.source == "index"
    assert not server.requests("/cdn/")
    assert found.description.tensors == look(hub, need="layout").description.tensors
    assert server.requests("/cdn/")


@pytest.mark.parametrize("change", [{"vocab_size": 161}, {"torch_dtype": "float32"}, {"tie_word_embeddings": True}])
def test_an_index_that_disagrees_is_not_believed(
    server: LoopbackHub, hub: Hub, tmp_path: Path, change: dict[str, Any]
) -> None:
    files = dict(sharded(tmp_path, tensors_of(LLAMA), 60_000))
    create(server, {**files, "config.json": json.dumps({**LLAMA, **change}).encode()})
    found = look(hub, need="sizes")
    assert found.source == "headers"
    assert (found.description.tensors or {})["lm_head.weight"] == ("bfloat16", (160, 64))


def test_what_was_learnt_of_a_commit_is_kept(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    commit = create(server, dict(sharded(tmp_path, tensors_of(LLAMA), 60_000)))
    remembering = replace(hub, memo=tmp_path / "memo")
    first = look(remembering)
    server.log.clear()
    second = look(remembering, commit)
    assert second.description == first.description
    assert (second.fetched_bytes, server.log) == (0, [])


def test_a_damaged_memory_is_asked_anew(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    create(server, {"model.safetensors": shell(tmp_path / "model.safetensors", tensors_of(LLAMA))})
    remembering = replace(hub, memo=tmp_path / "memo")
    first = look(remembering)
    for file in (tmp_path / "memo").rglob("*.json"):
        file.write_text('{"tensors": [["a"]]}')
    assert look(remembering).description == first.description


def test_files_in_the_hub_cache_are_read_there(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    file = shell(tmp_path / "model.safetensors", tensors_of(LLAMA))
    commit = create(server, {"model.safetensors": file})
    snapshot = hub.folder(MODEL) / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(file)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    assert look(hub).source == "headers"
    assert not server.requests("/resolve/")


def test_a_config_without_weights(server: LoopbackHub, hub: Hub) -> None:
    create(server, {})
    found = look(hub)
    assert (found.source, found.description.tensors, found.description.config) == ("config", None, LLAMA)


def test_a_repository_without_a_model(server: LoopbackHub, hub: Hub) -> None:
    server.create(MODEL, {"README.md": b"hello"})
    with pytest.raises(UsageError, match=r"neither weights .* nor a config\.json"):
        look(hub)


def test_a_pipeline_is_read_component_by_component(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    unet = shell(tmp_path / "unet" / "w.safetensors", [("conv.weight", "float16", (8, 4, 3, 3))])
    index = {"_class_name": "SomePipeline", "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["d", "S"]}
    server.create(
        MODEL,
        {
            "model_index.json": json.dumps(index).encode(),
            "unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
            "unet/diffusion_pytorch_model.safetensors": unet,
            "scheduler/scheduler_config.json": b"{}",
        },
    )
    found = look(hub)
    assert found.library == "diffusers"
    assert found.description.tensors == {"unet.conv.weight": ("float16", (8, 4, 3, 3))}
    assert list(found.components["components"]) == ["unet"]


class TestErrors:
    """Four that differ, each with its own cure."""

    def test_offline(self, server: LoopbackHub, tmp_path: Path) -> None:
        hub = Hub.from_environment(server.environment(tmp_path), offline=True)
        with pytest.raises(Offline, match="switched off") as caught:
            look(hub)
        assert "HF_HUB_OFFLINE" in caught.value.cure

    def test_private_or_missing(self, hub: Hub) -> None:
        with pytest.raises(NotAuthorised) as caught:
            look(hub)
        assert "HF_TOKEN" in caught.value.cure

    def test_gated(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        create(server, {"model.safetensors": shell(tmp_path / "w", tensors_of(LLAMA))}, gated="manual")
        with pytest.raises(GatedRepository) as caught:
            look(hub)
        assert caught.value.exit_code == 5

    def test_missing(self, server: LoopbackHub, tmp_path: Path) -> None:
        hub = Hub.from_environment({**server.environment(tmp_path), "HF_TOKEN": "secret-token"})
        with pytest.raises(UsageError, match="has no model"):
            look(hub)


class TestHostile:
    def refused(self, server: LoopbackHub, hub: Hub, files: dict[str, bytes | Path], match: str) -> None:
        create(server, files)
        with pytest.raises(InvalidCheckpoint, match=match):
            look(hub)
        assert server.bytes_sent() < 1_000_000

    def test_a_truncated_header(self, server: LoopbackHub, hub: Hub) -> None:
        self.refused(
            server, hub, {"model.safetensors": (500).to_bytes(8, "little") + b'{"a": {'}, "says its header has"
        )

    def test_a_file_too_short_for_a_header(self, server: LoopbackHub, hub: Hub) -> None:
        self.refused(server, hub, {"model.safetensors": b"short"}, "too few")

    def test_a_header_that_claims_to_be_huge(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        path = tmp_path / "huge"
        with path.open("wb") as file:
            file.write((2**40).to_bytes(8, "little"))
            file.truncate(2**27)
        self.refused(server, hub, {"model.safetensors": path}, "a header at most")

    def test_a_header_of_a_hundred_megabytes(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        with path.open("wb") as file:
            file.write((10**8).to_bytes(8, "little") + b'{"a": {')
            file.truncate(10**8 + 8)
        self.refused(server, hub, {"model.safetensors": path}, "says its header has 100000000 bytes")
        with pytest.raises(InvalidCheckpoint, match="says its header has 100000000 bytes"):
            describe_checkpoint(tmp_path)

    def test_a_flood_of_tensors_is_refused_within_bounded_memory(
        self, server: LoopbackHub, hub: Hub, tmp_path: Path
    ) -> None:
        entries = ",".join(
            f'"{number:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(400_000)
        )
        header = f"{{{entries}}}".encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        # The loopback Hub would parse the header for its own counts, and time out on a busy machine
        create(server, {"model.safetensors": tmp_path / "model.safetensors"}, told_counts={})
        environment = {**os.environ, **server.environment(tmp_path / "home")}
        for model in (MODEL, str(tmp_path)):
            command = [sys.executable, "-m", "bigpipe", "estimate", model, "--store", str(tmp_path / "store")]
            limited = ["/bin/sh", "-c", 'ulimit -d 307200 && exec "$@"', "sh", *command]
            done = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 6, done.stderr
            assert "model.safetensors" in done.stderr
            assert "describes more than 250000 tensors" in done.stderr

    def test_a_tensor_that_stands_in_two_files(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        whole = make_checkpoint(tmp_path / "opt", "opt") / "model.safetensors"
        files: dict[str, bytes | Path] = {f"model-0000{part}-of-00002.safetensors": whole for part in (1, 2)}
        self.refused(server, hub, files, "stands in another file of this model")

    def test_a_bin_that_would_unpack_to_much_more(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        path = tmp_path / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**8))
        assert path.stat().st_size < 200_000
        self.refused(server, hub, {"pytorch_model.bin": path}, "is compressed")
        with pytest.raises(InvalidCheckpoint, match="is compressed"):
            describe_checkpoint(tmp_path)

    def test_a_bin_that_is_cut_short(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        whole = make_checkpoint(tmp_path / "opt", "opt", format="bin") / "pytorch_model.bin"
        (tmp_path / "half").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        self.refused(server, hub, {"pytorch_model.bin": tmp_path / "half"}, "not a zip|zip")

    def test_an_index_with_a_total_that_is_no_number(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        """It is not believed, and the headers tell the truth."""
        files = dict(sharded(tmp_path, tensors_of(LLAMA), 60_000))
        index = json.loads(files["model.safetensors.index.json"].read_text())
        for total in (1e308, -1, "lots", None, [1]):
            lying = json.dumps({**index, "metadata": {"total_size": total}}).encode()
            create(server, {**files, "model.safetensors.index.json": lying})
            found = look(hub, need="sizes")
            assert found.source == "headers"
            assert found.description.nbytes == index["metadata"]["total_size"]

    def test_an_index_that_is_none(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        files = dict(sharded(tmp_path, tensors_of(LLAMA), 60_000))
        for content in (b"[" * 100_000, b"[1]", b'{"weight_map": 7}', b'{"weight_map": {"a": 7}}', b"{}", b"\xff"):
            create(server, {**files, "model.safetensors.index.json": content})
            with pytest.raises(InvalidCheckpoint):
                look(hub)

    def test_a_header_cut_short_by_its_data(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        path = shell(tmp_path / "w", tensors_of(LLAMA))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        self.refused(server, hub, {"model.safetensors": path}, "is cut short")

    def test_a_bin_that_is_no_zip(self, server: LoopbackHub, hub: Hub) -> None:
        self.refused(server, hub, {"pytorch_model.bin": pickle.dumps({"a": 1}) + bytes(70_000)}, "is not a zip")

    def test_a_pickle_with_a_foreign_global_runs_nothing(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        import torch

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "was-run",))

        torch.save({"weight": torch.zeros(2), "evil": Evil()}, tmp_path / "evil.bin")
        self.refused(server, hub, {"pytorch_model.bin": tmp_path / "evil.bin"}, "never runs it")
        assert not (tmp_path / "was-run").exists()

    def test_an_index_that_leads_out(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        files = dict(sharded(tmp_path, tensors_of(LLAMA), 60_000))
        index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
        self.refused(
            server, hub, {**files, "model.safetensors.index.json": json.dumps(index).encode()}, "which is not there"
        )

    def test_an_index_that_lies(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        files = dict(sharded(tmp_path, tensors_of(LLAMA), 60_000))
        index = json.loads(files["model.safetensors.index.json"].read_text())
        index["weight_map"]["model.norm.weight"] = next(name for name in files if name.startswith("model-00001"))
        content: dict[str, bytes | Path] = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
        create(server, content)
        with pytest.raises(InvalidCheckpoint, match="but it is in model-0000"):
            look(hub)

    @pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b"\xff\xfe"])
    def test_a_config_that_is_none(self, server: LoopbackHub, hub: Hub, content: bytes) -> None:
        server.create(MODEL, {"config.json": content})
        with pytest.raises(InvalidCheckpoint, match="is not"):
            look(hub)

    def test_a_server_that_sends_the_whole_file(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        create(server, {"model.safetensors": shell(tmp_path / "w", tensors_of(LLAMA))})
        server.fail("html", "model.safetensors", times=9)
        with pytest.raises((Transient, InvalidCheckpoint)):
            look(hub)

    def test_a_server_that_cuts_is_transient(self, server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
        create(server, {"model.safetensors": shell(tmp_path / "w", tensors_of(LLAMA))})
        server.fail("cut", "/cdn/", times=9)
        with pytest.raises(Transient):
            look(hub)


def test_a_config_that_is_not_what_the_listing_promises(tmp_path: Path) -> None:
    files = {"config.json": b'{"model_type": "llama", "hidden_size": 8}', "README.md": b"# m"}
    with Enemy(files) as enemy:
        hub = Hub(endpoint=enemy.url, cache=tmp_path / "cache", memo=tmp_path / "memo")
        enemy.change = lambda asked, said: (
            replace(said, body=said.body.replace(b"8", b"9")) if asked.kind == "get" else said
        )
        with pytest.raises(Transient, match="other bytes than its digest"):
            describe_repository("org/model", enemy.commit, hub=hub)
        enemy.reset()
        told = describe_repository("org/model", enemy.commit, hub=hub).description.config
    assert told == json.loads(files["config.json"])


@pytest.mark.parametrize("told", ["\x1b[2J", ["timm"], {}, 5, "a" * 1000])
def test_an_odd_library_is_none(told: object, tmp_path: Path) -> None:
    with Enemy({"config.json": b"{}"}) as enemy:
        enemy.listing = lambda listing: {**listing, "library_name": told}
        assert describe("org/model", hub=Hub(endpoint=enemy.url, cache=tmp_path)).library is None
