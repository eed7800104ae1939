"""A locked recipe is planned without the Hub: the same to the byte, in a store and a Hub cache that know nothing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.workshop import Workshop

from bigpipe.errors import UsageError
from bigpipe.orchestrator.lock import read_answers

RECIPE = """\
version: 1
name: locked
params: {size: 60KB}
stages:
  known: {uses: estimate, with: {repo: org/model, dtypes: [float16, int8]}}
  download: {uses: download, with: {repo: org/model}}
  estimate:
    uses: estimate
    inputs: download
    with: {dtypes: [int8]}
    gates: ["int8.inference_high <= 100GiB"]
  shard: {uses: shard, inputs: download, with: {max_shard_size: "${params.size}"}}
  quantize: {uses: quantize, inputs: shard, with: {scheme: int8}}
  dispatch: {uses: dispatch, inputs: quantize, with: {device_map: auto, max_memory: {cpu: 100KB, disk: 1GB}}}
  save: {uses: save, inputs: {model: quantize}, with: {to: dist}}
"""
ANSWERS = "recipe.yaml.lock.answers.gz"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as served:
        yield served


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Path]:
    return files_of(make_checkpoint(tmp_path / "source", "llama", dtype="float16", max_shard_size="40KB"))


def planned(workshop: Workshop, *options: str, store: str, code: int = 0, **environ: str) -> Any:
    """What `plan --json` says, without what changes by itself: how much is free now."""
    done = workshop.command(
        "plan", "recipe.yaml", "--json", "--store", str(workshop.folder / store), *options, **environ
    )
    assert done.returncode == code, done.stderr
    plan = json.loads(done.stdout)
    plan["machine"] = None
    return plan


@pytest.fixture
def locked(hub: LoopbackHub, source: dict[str, Path], tmp_path: Path) -> Workshop:
    """The recipe, locked; its Hub cache and store are then empty again."""
    hub.create("org/model", source)
    workshop = Workshop(tmp_path)
    workshop.manifest.write_text(RECIPE)
    done = workshop.command(
        "lock", "recipe.yaml", "--store", str(tmp_path / "first"), **hub.environment(tmp_path / "hf")
    )
    assert done.returncode == 0, done.stderr
    return workshop


@pytest.mark.parametrize("way", ["--offline", "unreachable"])
def test_a_locked_recipe_plans_without_the_hub_to_the_byte(way: str, hub: LoopbackHub, locked: Workshop) -> None:
    wanted = planned(locked, store="store", **hub.environment(locked.folder / "hf"))
    assert {node["action"] for node in wanted["nodes"].values()} <= {"run", "maybe"}
    assert wanted["nodes"]["quantize"]["forecast"]["metrics"]["quantized"] == 14
    assert wanted["nodes"]["save"]["forecast"]["write_bytes"] > 0  # in a store that is not there yet, too
    if way == "unreachable":
        hub.__exit__()
    asked, options = len(hub.log), [way] if way == "--offline" else []
    assert planned(locked, *options, store="other", **hub.environment(locked.folder / "empty")) == wanted
    assert len(hub.log) == asked


def lock_again(workshop: Workshop, store: str, **environ: str) -> bytes:
    done = workshop.command("lock", "recipe.yaml", "--store", str(workshop.folder / store), **environ)
    assert done.returncode == 0, done.stderr
    return (workshop.folder / ANSWERS).read_bytes()


def answers(workshop: Workshop) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(gzip.decompress((workshop.folder / ANSWERS).read_bytes()))
    return found


def test_the_same_answers_are_the_same_bytes_and_not_written_twice(hub: LoopbackHub, locked: Workshop) -> None:
    file = locked.folder / ANSWERS
    before, written = file.read_bytes(), file.stat().st_mtime_ns
    assert before[4:8] == bytes(4)  # the time in gzip's header
    assert lock_again(locked, "another", **hub.environment(locked.folder / "empty")) == before
    offline = {**hub.environment(locked.folder / "nothing"), "HF_HUB_OFFLINE": "1"}
    assert lock_again(locked, "a third", **offline) == before
    assert file.stat().st_mtime_ns == written


def test_a_lock_that_is_written_anew_forgets_what_was(
    hub: LoopbackHub, locked: Workshop, source: dict[str, Path]
) -> None:
    (first,) = hub.repositories["org/model"].commits
    commit = hub.commit("org/model", {"config.json": source["config.json"].read_bytes() + b"\n"})
    lock_again(locked, "store", **hub.environment(locked.folder / "hf"))
    told = answers(locked)
    assert told.keys() == {"known", "download"}
    questions = [question for found in told.values() for question in found]
    assert all(commit in question and first not in question for question in questions)
    locked.manifest.write_text("version: 1\nname: locked\nstages:\n  copy: {uses: download, with: {path: source}}\n")
    done = locked.command("lock", "recipe.yaml", **hub.environment(locked.folder / "hf"))
    assert done.returncode == 0, done.stderr
    assert not (locked.folder / ANSWERS).exists()


def test_nothing_is_kept_that_a_plan_does_not_read(hub: LoopbackHub, locked: Workshop) -> None:
    listing = next(found for question, found in answers(locked)["download"].items() if "listing" in question)
    assert listing.keys() == {"sha", "siblings", "library_name", "safetensors"}
    kept = {"rfilename", "size", "blobId", "lfs"}
    assert all(sibling.keys() <= kept for sibling in listing["siblings"])


def test_a_hub_that_can_be_asked_is_believed_first(hub: LoopbackHub, locked: Workshop) -> None:
    told = answers(locked)
    for found in told.values():
        for question, answer in found.items():
            if "listing" in question:
                answer["siblings"] = answer["siblings"][:1]
    (locked.folder / ANSWERS).write_bytes(gzip.compress(json.dumps(told).encode()))
    plan = planned(locked, store="store", **hub.environment(locked.folder / "hf"))
    assert plan["nodes"]["download"]["forecast"]["metrics"]["files"] == 7


def test_a_lock_without_answers_is_a_lock(hub: LoopbackHub, locked: Workshop) -> None:
    (locked.folder / ANSWERS).unlink()
    away = hub.environment(locked.folder / "empty")
    plan = planned(locked, "--offline", store="store", code=75, **away)
    assert any("size of org/model" in text for text in plan["nodes"]["download"]["forecast"]["unknown"])
    ran = locked.command("run", "recipe.yaml", "--locked", **away)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("spoil", [
    lambda answer: answer.pop("sha"),
    lambda answer: answer.update(sha="0" * 40),
    lambda answer: answer["siblings"][0].update(size="many"),
    lambda answer: answer["siblings"][0].update(blobId="../../elsewhere"),
])  # fmt: skip
def test_a_listing_that_no_hub_gives_is_not_believed(hub: LoopbackHub, locked: Workshop, spoil: Any) -> None:
    told = answers(locked)
    for found in told.values():
        for question, answer in found.items():
            if "listing" in question:
                spoil(answer)
    (locked.folder / ANSWERS).write_bytes(gzip.compress(json.dumps(told).encode()))
    plan = planned(locked, "--offline", store="store", code=75, **hub.environment(locked.folder / "empty"))
    assert any("size of org/model" in text for text in plan["nodes"]["download"]["forecast"]["unknown"])


@pytest.mark.parametrize("content", [
    b"<<<<<<< HEAD", gzip.compress(b'{"download": {}}')[:-9], gzip.compress(b"[]"), gzip.compress(b'{"download": 1}'),
    gzip.compress(b'{"download": }'), gzip.compress(b"{}" + b" " * 257 * 2**20, 1),
], ids=["conflict", "cut", "list", "number", "no JSON", "bomb"])  # fmt: skip
def test_a_file_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ANSWERS).write_bytes(content)
    with pytest.raises(UsageError, match=f"{ANSWERS} is not what `bigpipe lock` wrote") as refused:
        read_answers(tmp_path / "recipe.yaml.lock")
    assert "bigpipe lock " in refused.value.cure
    assert refused.value.cure.endswith("/recipe.yaml")


def test_a_plan_stops_at_a_damaged_file(locked: Workshop) -> None:
    (locked.folder / ANSWERS).write_bytes(b"<<<<<<< HEAD")
    done = locked.command("plan", "recipe.yaml", "--offline")
    assert done.returncode == 2
    assert ANSWERS in done.stderr
