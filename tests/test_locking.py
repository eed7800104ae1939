"""The lock file of a Hub recipe, by the command: written before anything is downloaded, held to afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.hub import LoopbackHub
from support.hub_state import files_of, git_blob_id
from support.models import make_checkpoint
from support.workshop import Workshop

RECIPE = """\
version: 1
name: locked
stages:
  download: {uses: download, with: {repo: org/model%s}}
  shard: {uses: shard, inputs: download}
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as served:
        yield served


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Path]:
    return files_of(make_checkpoint(tmp_path / "source", "llama", dtype="float16"))


@pytest.mark.parametrize("pinned", [False, True], ids=["branch", "commit"])
def test_a_lock_lists_what_the_hub_says_and_a_run_is_held_to_it(
    pinned: bool, hub: LoopbackHub, source: dict[str, Path], tmp_path: Path
) -> None:
    commit = hub.create("org/model", source)
    workshop, environ = Workshop(tmp_path), hub.environment(tmp_path / "hf")
    workshop.manifest.write_text(RECIPE % (f", revision: {commit}" if pinned else ""))

    locked = workshop.command("lock", "recipe.yaml", **environ)
    assert locked.returncode == 0, locked.stderr
    weights = source["model.safetensors"].read_bytes()
    assert hub.bytes_sent() < len(weights)
    node = yaml.safe_load((tmp_path / "recipe.yaml.lock").read_text())["inputs"]["download"]
    assert commit in (node.get("pins", {}).get("revision"), node["params"]["revision"])
    assert node["files"]["model.safetensors"] == {
        "size": len(weights), "sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    config = source["config.json"].read_bytes()
    assert node["files"]["config.json"] == {"size": len(config), "git_blob": git_blob_id(config)}

    ran = workshop.command("run", "recipe.yaml", "--locked", **environ)
    assert ran.returncode == 0, ran.stderr
    assert workshop.command("lock", "recipe.yaml", "--check", **environ).returncode == 0

    hub.commit("org/model", {"config.json": config + b"\n"})
    moved = workshop.command("lock", "recipe.yaml", "--check", **environ)
    assert moved.returncode == (0 if pinned else 10), moved.stderr
    again = workshop.command("run", "recipe.yaml", "--locked", **environ)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("cached") == 2
