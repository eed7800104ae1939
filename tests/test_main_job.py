"""The main job, end to end: a recipe from a Hub repository to saved results, as its users run it.

The repository has the layout of facebook/opt-13b, scaled down: pickled fp16 weights in three `.bin` shards, an index,
configs and a tokenizer, served by a loopback Hub to the real client.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.workshop import Workshop, environment

REPO = "facebook/opt-13b"
PROMPTS = ["Return the", "A module", "Raise an error", "Create", "The argument"]

RECIPE = """\
version: 1
name: scaled-down
params: {ranks: 2}
stages:
  download: {uses: download, with: {repo: facebook/opt-13b}}
  estimate:
    uses: estimate
    inputs: download
    with: {dtypes: [float16, int8, nf4], sequence_length: 64}
    gates: ["float16.weights <= 1GiB"]
  shard: {uses: shard, inputs: download, with: {max_shard_size: 200KB, dtype: float16}}
  quantize:
    uses: quantize
    matrix: {scheme: [int8, nf4]}
    inputs: shard
    with: {scheme: "${matrix.scheme}"}
  dispatch:
    uses: dispatch
    inputs: quantize
    with: {device_map: auto, max_memory: {cpu: 1GiB}, sequence_length: 64}
  offload:
    uses: dispatch
    inputs: shard
    with: {device_map: auto, max_memory: {cpu: 800KB, disk: 1GB}, sequence_length: 64}
  generate:
    uses: distributed-infer
    inputs: {model: quantize, placement: dispatch}
    with: {task: text-generation, prompts: PROMPTS, max_new_tokens: 6}
    launch: {num_processes: "${params.ranks}"}
  save:
    uses: save
    inputs: {model: quantize, results: generate}
    with: {to: "dist/${matrix.scheme}"}
""".replace("PROMPTS", json.dumps(PROMPTS))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The finished run; the repository it came from is still served."""
    folder = tmp_path_factory.mktemp("job")
    shape = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "num_hidden_layers": 3}
    source = make_checkpoint(folder / "source", "opt", format="bin", max_shard_size="500KB", dtype="float16", **shape)
    assert len(list(source.glob("*.bin"))) >= 3
    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as hub:
        hub.create(REPO, files_of(source))
        for name, value in {**environment(folder), **hub.environment(folder / "hf")}.items():
            patch.setenv(name, value)
        workshop = Workshop(folder)
        result = workshop.run(RECIPE)
        yield workshop, hub, result


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_node_succeeds(job):
    _, _, result = job
    assert result.exit_code == 0, [str(error) for error in result.errors]
    assert {str(state.status) for state in result.nodes.values()} == {"succeeded"}
    assert len(result.nodes) == 12


def test_nothing_was_copied_out_of_the_hub_cache(job):
    workshop, _, result = job
    path = result.path("download")
    for file in path.glob("*.bin"):
        assert str((workshop.folder / "hf").resolve()) in str(file.resolve())


def test_results_are_in_order_one_per_prompt(job):
    _, _, result = job
    for scheme in ("int8", "nf4"):
        found = rows(result.path(f"generate@scheme={scheme}"))
        assert [row["index"] for row in found] == [0, 1, 2, 3, 4]
        assert [row["prompt"] for row in found] == PROMPTS
        assert all(isinstance(row["text"], str) for row in found)


def test_plain_transformers_loads_what_was_saved(job):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workshop, _, result = job
    for scheme in ("int8", "nf4"):
        saved = workshop.folder / "dist" / scheme
        assert not any(path.is_symlink() for path in saved.rglob("*"))
        model = AutoModelForCausalLM.from_pretrained(saved)
        tokenizer = AutoTokenizer.from_pretrained(saved)
        with torch.inference_mode():
            logits = model(**tokenizer(PROMPTS[0], return_tensors="pt")).logits
        assert torch.isfinite(logits).all()
        assert rows(saved / "results") == rows(result.path(f"generate@scheme={scheme}"))


def test_the_offloaded_placement_uses_both_devices(job):
    _, _, result = job
    placement = json.loads((result.path("offload") / "placement.json").read_text())
    assert set(placement["device_map"].values()) == {"cpu", "disk"}
    assert result.nodes["offload"].record.metrics["streamed_bytes_per_token"] > 0


def test_one_rank_gives_what_two_gave(job):
    workshop, _, result = job
    before = rows(result.path("generate@scheme=int8"))
    again = workshop.run(params={"ranks": "1"}, nodes=["generate@scheme=int8"], force=["generate@scheme=int8"])
    assert rows(again.path("generate@scheme=int8")) == before


def test_a_rerun_is_all_cached_even_with_the_hub_gone(job):
    workshop, hub, _ = job
    sent = hub.bytes_sent()
    assert {str(state.status) for state in workshop.run().nodes.values()} == {"cached"}
    assert hub.bytes_sent() - sent < 20_000  # the branch was asked for, no file
    assert {str(state.status) for state in workshop.run(offline=True).nodes.values()} == {"cached"}


def test_a_moved_branch_reruns_what_it_changes(job):
    workshop, hub, _ = job
    hub.commit(REPO, {"README.md": b"a card that no stage reads"})
    result = workshop.run()
    assert str(result.nodes["download"].status) == "succeeded"
    assert str(result.nodes["quantize@scheme=int8"].status) in {"cached", "succeeded"}
