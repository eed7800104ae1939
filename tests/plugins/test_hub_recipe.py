"""A whole recipe against a Hub on loopback: pinned, planned, run, cached, moved, offline, pushed back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.workshop import Workshop, statuses

from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.hub import Choice, Hub
from bigpipe.bigmodel.hub.bringing import HubSource, Watch
from bigpipe.bigmodel.writing import save_checkpoint

CANARY = "hf_canaryCANARYcanaryCANARYcanary"
RECIPE = """\
version: 1
name: round-trip
params: {repo: org/model, size: 250KB}
secrets: [HF_TOKEN]
stages:
  download: {uses: download, with: {repo: "${params.repo}"}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: "${params.size}"}}
  save: {uses: save, inputs: {model: shard}, with: {to: dist/model}}
  push: {uses: save, inputs: {model: shard}, with: {to: "hf://ada/model"}}
"""
TENSORS = {f"layer.{i}.weight": np.random.default_rng(i).random((100, 300), np.float32) for i in range(8)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One safetensors file of 960 kB, a config and a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(TENSORS, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "opt", "architectures": ["OPTForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def server(checkpoint: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.users[CANARY] = "ada"
        hub.create("org/model", files_of(checkpoint))
        yield hub


@pytest.fixture
def shop(server: LoopbackHub, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    for name, value in {**server.environment(tmp_path / "hf"), "HF_TOKEN": CANARY}.items():
        monkeypatch.setenv(name, value)
    workshop.manifest.write_text(RECIPE)
    return workshop


def nodes(done: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["nodes"]
    return found


def test_from_the_hub_and_back(server: LoopbackHub, shop: Workshop, checkpoint: Path, tmp_path: Path) -> None:
    planned = shop.command("plan", "recipe.yaml")
    assert planned.returncode == 0, planned.stderr
    assert "960.8 kB down" in planned.stdout
    assert "4 shards" in planned.stdout
    assert server.bytes_sent("/cdn/") <= 64 * 1024  # its header

    ran = shop.command("run", "recipe.yaml", "--json")
    assert ran.returncode == 0, ran.stderr
    found = nodes(ran)
    assert {node["status"] for node in found.values()} == {"succeeded"}
    first = server.repositories["org/model"].branches["main"]
    assert found["download"]["metrics"]["commit"] == first
    saved = open_checkpoint(shop.manifest.parent / "dist" / "model")
    assert len(saved.files) == 4
    for name, tensor in open_checkpoint(checkpoint).tensors.items():
        assert saved.read(name) == open_checkpoint(checkpoint).read(tensor.name)
    pushed = server.repositories["ada/model"]
    assert found["push"]["metrics"]["commit"] == pushed.branches["main"]
    assert pushed.private
    assert sum(name.endswith(".safetensors") for name in pushed.commits[pushed.branches["main"]]) == 4

    blob = Path(os.readlink(Path(found["download"]["path"]) / "model.safetensors"))
    assert blob.is_relative_to(tmp_path / "hf")
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == blob.stat().st_size]
    assert {path.resolve() for path in copies} == {blob}

    again = nodes(shop.command("run", "recipe.yaml", "--json"))
    assert {node["status"] for node in again.values()} == {"cached"}

    server.commit("org/model", {"tokenizer.json": b'{"version": 2}'})
    away = shop.command("run", "recipe.yaml", "--json", "--offline")
    assert {node["status"] for node in nodes(away).values()} == {"cached"}
    why = shop.command("why", "recipe.yaml", "download")
    assert f"params.revision {first}" in why.stdout
    moved = nodes(shop.command("run", "recipe.yaml", "--json"))
    assert moved["download"]["metrics"]["fetched_bytes"] == len(b'{"version": 2}')
    assert (shop.manifest.parent / "dist" / "model" / "tokenizer.json").read_bytes() == b'{"version": 2}'

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    assert CANARY not in "".join(done.stdout + done.stderr for done in (planned, ran, why, away))


def test_bin_shards_of_an_untrusted_repository(
    server: LoopbackHub, shop: Workshop, checkpoint: Path, tmp_path: Path
) -> None:
    save_checkpoint(checkpoint, tmp_path / "bin", max_shard_size="400KB", format="bin")
    server.create("org/bin", files_of(tmp_path / "bin"))
    ran = shop.command("run", "recipe.yaml", "save", "-p", "repo=org/bin", "--json")
    assert ran.returncode == 0, ran.stderr
    saved = open_checkpoint(shop.manifest.parent / "dist" / "model")
    assert saved.format == "safetensors"
    for name in TENSORS:
        assert saved.read(name) == TENSORS[name].tobytes()


@pytest.mark.parametrize("revision", ["main", "commit"])
def test_what_a_cache_does_not_have_comes_once_the_hub_may_be_asked(
    server: LoopbackHub, shop: Workshop, tmp_path: Path, revision: str
) -> None:
    """Whoever filled the cache took two files: what is made of these is not taken for what is made of all."""
    hub = Hub.from_environment(server.environment(tmp_path / "hf"))
    two = Choice(include=("config.json", "model.safetensors"))
    HubSource("org/model", "main", two, hub).bring(tmp_path / "elsewhere", Watch())
    commit = server.repositories["org/model"].branches["main"]
    (hub.folder("org/model") / "refs").mkdir()
    (hub.folder("org/model") / "refs" / "main").write_text(commit)
    pinned = commit if revision == "commit" else revision
    text = f"stages: {{download: {{uses: download, with: {{repo: org/model, revision: {pinned}}}}}}}\n"
    away = shop.run(f"version: 1\nname: away\n{text}", offline=True)
    assert away.nodes["download"].record.metrics["files"] == 2
    assert set(statuses(shop.run(offline=True)).values()) == {"cached"}
    near = shop.run()
    assert statuses(near) == {"download": "succeeded"}
    assert near.nodes["download"].record.metrics["files"] == 3
    assert set(statuses(shop.run(offline=True)).values()) == {"cached"}, "by now all is there"


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"gated": "manual"}, 5, "is gated"),
        ({"private": True}, 2, "has no model"),
    ],
)
def test_what_may_not_be_read_fails_before_anything_runs(
    server: LoopbackHub, shop: Workshop, settings: dict[str, Any], code: int, words: str
) -> None:
    server.create("org/kept", {"config.json": b"{}"}, **settings)
    ran = shop.command("run", "recipe.yaml", "-p", "repo=org/kept")
    assert ran.returncode == code
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert CANARY not in ran.stderr
