"""The model that ships, served by a loopback Hub to the real client: revisions, ranges, `.bin` and safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub import LoopbackHub
from support.hub_state import files_of

import bigpipe

MODEL = Path(__file__).parents[1] / "models/quickstart"
REPO = "bigpipe/quickstart"
RECIPE = """\
version: 1
name: served
params: {revision: main}
stages:
  download: {uses: download, with: {repo: bigpipe/quickstart, revision: "${params.revision}"}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 1MB}}
"""


@pytest.fixture
def served(workshop, monkeypatch):
    """The repository as safetensors at its first commit, as three `.bin` shards at its second."""
    pickled = workshop.folder / "pickled"
    bigpipe.save_checkpoint(MODEL, pickled, max_shard_size="1.2MB", format="bin")
    assert len(list(pickled.glob("pytorch_model-*.bin"))) == 3
    with LoopbackHub() as hub:
        first = hub.create(REPO, files_of(MODEL))
        hub.create("bigpipe/pickled", files_of(pickled))
        for name, value in hub.environment(workshop.folder / "hf").items():
            monkeypatch.setenv(name, value)
        yield workshop, hub, first


def tensors(path: Path) -> dict[str, bytes]:
    checkpoint = bigpipe.open_checkpoint(path)
    return {name: bytes(checkpoint.read(name)) for name in checkpoint.tensors}


def test_the_same_weights_from_both_formats(served):
    workshop, _, _ = served
    result = workshop.run(RECIPE)
    assert result.exit_code == 0, [str(error) for error in result.errors]
    pickled = workshop.run(RECIPE.replace("bigpipe/quickstart", "bigpipe/pickled"))
    assert pickled.exit_code == 0, [str(error) for error in pickled.errors]
    assert tensors(result.path("shard")) == tensors(pickled.path("shard")) == tensors(MODEL)


def test_a_pinned_revision_stays_when_the_branch_moves(served):
    workshop, hub, first = served
    hub.commit(REPO, {"generation_config.json": b'{"max_new_tokens": 7}'})
    pinned = workshop.run(RECIPE, params={"revision": first})
    assert pinned.nodes["download"].record.metrics["commit"] == first
    assert (pinned.path("download") / "generation_config.json").read_bytes() == (
        MODEL / "generation_config.json"
    ).read_bytes()
    moved = workshop.run(RECIPE)
    assert moved.nodes["download"].record.metrics["commit"] != first
    assert (moved.path("download") / "generation_config.json").read_bytes() == b'{"max_new_tokens": 7}'


@pytest.mark.parametrize("repo", [REPO, "bigpipe/pickled"])
def test_sizes_are_learnt_by_range(served, repo):
    workshop, hub, _ = served
    found = workshop.json("estimate", repo, "--dtypes", "float16")
    assert found["source"] == "headers"
    assert found["dtypes"]["float16"]["parameters"] == 1_616_128
    weights = hub.bytes_sent(".bin") + hub.bytes_sent(".safetensors")
    assert 0 < weights < 300_000  # of 3.2 MB
