"""Whatever `from_pretrained` loads offline is enough, and whatever `snapshot_download` can fetch from is a Hub."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.forking import TOLD, forked
from support.hub import LoopbackHub
from support.hub_answers import as_json
from support.stores import in_memory

from bigpipe.bigmodel.hub import Choice, HubSource, Watch, describe_repository
from bigpipe.bigmodel.hub.access import check_access
from bigpipe.bigmodel.hub.repository import Hub, describe, resolve_commit
from bigpipe.errors import BigpipeError, GatedRepository, InvalidCheckpoint, Offline, Transient, UsageError
from bigpipe.files import hash_file

FILES = {"config.json": b'{"model_type": "opt"}', "model.safetensors": b"\x02\0\0\0\0\0\0\0{}", "1_a/b.json": b"{}"}


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.create("org/model", FILES)
        yield hub


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub.from_environment(server.environment(tmp_path / "hf"))


@pytest.fixture
def filled(hub: Hub) -> Hub:
    """Its cache as the client itself leaves it; nobody can be asked."""
    from huggingface_hub import snapshot_download

    snapshot_download("org/model", cache_dir=hub.cache, endpoint=hub.endpoint)
    return replace(hub, endpoint="http://127.0.0.1:9", offline=True)


def as_it_is(cache: Path, elsewhere: Path) -> None:
    pass


def copied_without_links(cache: Path, elsewhere: Path) -> None:
    """`cp -rL`"""
    shutil.copytree(cache, elsewhere, symlinks=False)
    shutil.rmtree(cache)
    shutil.move(elsewhere, cache)
    shutil.rmtree(cache / "models--org--model/blobs")


def linked(place: str) -> Callable[[Path, Path], None]:
    def move(cache: Path, elsewhere: Path) -> None:
        shutil.move(cache / place, elsewhere)
        (cache / place).symlink_to(elsewhere)

    return move


def each_blob_linked(cache: Path, elsewhere: Path) -> None:
    elsewhere.mkdir()
    for blob in (cache / "models--org--model/blobs").iterdir():
        shutil.move(blob, elsewhere / blob.name)
        blob.symlink_to(elsewhere / blob.name)


CHANGES = {
    "as it is": as_it_is,
    "copied without links": copied_without_links,
    "linked to another disk": linked("."),
    "a repository linked to another disk": linked("models--org--model"),
    "its blobs linked to another disk": linked("models--org--model/blobs"),
    "each blob linked to another disk": each_blob_linked,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("revision", ["main", "commit"])
def test_what_lies_in_the_cache_is_enough(filled: Hub, tmp_path: Path, change: str, revision: str) -> None:
    commit = (filled.folder("org/model") / "refs/main").read_text()
    if change == "linked to another disk":
        shutil.move(filled.cache, tmp_path / "disk")
        filled.cache.symlink_to(tmp_path / "disk")
    else:
        CHANGES[change](filled.cache, tmp_path / "disk")
    if revision == "commit":
        shutil.rmtree(filled.folder("org/model") / "refs")
    source = HubSource("org/model", commit if revision == "commit" else revision, Choice(), filled)
    assert resolve_commit("org/model", source.revision, hub=filled) == commit
    source.check()
    expected = source.expect()
    brought = source.bring(tmp_path / "out", Watch())
    assert (expected.missing, brought.fetched_bytes, brought.commit) == (0, 0, commit)
    assert set(brought.files) == {"config.json", "model.safetensors"} == set(expected.sizes)
    for name, (sha256, size) in brought.files.items():
        assert (tmp_path / "out" / name).read_bytes() == FILES[name]
        assert (sha256, size) == (hash_file(tmp_path / "out" / name), expected.sizes[name])


def test_a_cache_that_was_filled_without_the_licence_is_enough(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    """The listing of an earlier plan knows all files, `from_pretrained` brought those that it reads."""
    from huggingface_hub import hf_hub_download

    server.create("org/model", {**FILES, "LICENSE": b"MIT"})
    asked = replace(hub, memo=tmp_path / "memo")
    expected = HubSource("org/model", "main", Choice(), asked).expect()
    assert set(expected.sizes) == {"LICENSE", "config.json", "model.safetensors"}
    hf_hub_download("org/model", "config.json", cache_dir=hub.cache, endpoint=hub.endpoint)
    away = HubSource("org/model", "main", Choice(), replace(asked, offline=True))
    with pytest.raises(Offline, match="not whole in the Hub cache"):
        away.bring(tmp_path / "none", Watch())
    hf_hub_download("org/model", "model.safetensors", cache_dir=hub.cache, endpoint=hub.endpoint)
    assert set(away.bring(tmp_path / "out", Watch()).files) == set(away.expect().sizes) == {
        "config.json", "model.safetensors",
    }  # fmt: skip


def test_a_cache_that_holds_no_weights_is_told_of(filled: Hub) -> None:
    for weights in filled.cache.rglob("model.safetensors"):
        weights.unlink()
    with pytest.raises(Offline, match="no weights of org/model in the Hub cache"):
        HubSource("org/model", "main", Choice(), filled).check()
    with pytest.raises(Offline, match="not known here"):
        describe("org/other", hub=filled)


def shortened(server: LoopbackHub, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it list files without these facts, as mirrors do."""
    from support.hub_state import Repository

    whole = Repository._sibling

    def sibling(name: str, item: Any, blobs: bool) -> dict[str, Any]:
        return {key: value for key, value in whole(name, item, blobs).items() if key not in names}

    monkeypatch.setattr(Repository, "_sibling", staticmethod(sibling))


@pytest.mark.parametrize("names", [("blobId",), ("blobId", "lfs"), ("blobId", "lfs", "size")])
def test_a_mirror_that_tells_less(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    shortened(server, names, monkeypatch)
    described = describe("org/model", hub=replace(hub, memo=tmp_path / "memo"))
    assert {file.path: file.size for file in described.files} == {name: len(text) for name, text in FILES.items()}
    brought = HubSource("org/model", "main", Choice(), hub).bring(tmp_path / "out", Watch())
    assert {name: (tmp_path / "out" / name).read_bytes() for name in brought.files} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize("garbled", [False, True])
def test_a_mirror_may_name_files_by_the_sha1_of_their_content(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, garbled: bool
) -> None:
    """As Artifactory does. It proves as much as git's, and a lock does not take it for git's."""
    from support.hub_state import Blob

    shortened(server, ("blobId", "lfs", "size"), monkeypatch)
    named = property(lambda item: hashlib.sha1(item.content, usedforsecurity=False).hexdigest())
    monkeypatch.setattr(Blob, "etag", named)
    if garbled:
        server.fail("garbage", "config.json", method="GET")
    source = HubSource("org/model", "main", Choice(), replace(hub, memo=tmp_path / "memo"))
    with pytest.raises(Transient, match="came with other bytes") if garbled else nullcontext():
        assert describe_repository("org/model", hub=source.hub).description.config == {"model_type": "opt"}
    if garbled:
        server.fail("garbage", "config.json", method="GET", times=2)
    with pytest.raises(Transient, match="came twice with other bytes") if garbled else nullcontext():
        assert set(source.bring(tmp_path / "out", Watch()).files) == {"config.json", "model.safetensors"}
    assert {(file.blob_id, file.sha256) for file in source.chosen()} == {("", None)}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody whom permissions bind")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_cache_that_may_not_be_read(
    filled: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A cache that several users share: the plan says whose fault it is, and so does the run."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")  # else the client looks for one where this user may not
    with in_memory(tmp_path) as place:
        place.chmod(0o777)
        hub = replace(filled, cache=shutil.copytree(filled.cache, place / "cache", symlinks=True))
        next(hub.cache.glob(f"*/snapshots/*/{name}")).resolve().chmod(0)
        for act in (
            lambda: describe_repository("org/model", hub=hub),
            lambda: HubSource("org/model", "main", Choice(), hub).bring(place / "out", Watch()),
        ):
            ending = forked(act, user=65534)
            assert ending.code == TOLD, ending
            assert "the Hub cache may not be used" in ending.said
            assert "HF_HOME" in ending.said


def test_a_mirror_that_does_not_know_who_may_read(server: LoopbackHub, hub: Hub) -> None:
    server.fail("status", "/auth-check", status=404, times=3)
    check_access("org/model", hub=hub)
    with pytest.raises(UsageError, match="has no model"):
        check_access("org/none", hub=hub)
    server.repositories["org/model"].gated = "auto"
    server.faults.clear()
    with pytest.raises(GatedRepository):
        check_access("org/model", hub=hub)


def test_a_colon_in_a_name_that_is_not_wanted(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.create("org/photos", {**FILES, "at 12:30.png": b"png", "assets/a:b.json": b"{}"})
    brought = HubSource("org/photos", "main", Choice(), hub).bring(tmp_path / "out", Watch())
    assert set(brought.files) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("X-Repo-Commit", "touch PWNED"),
        ("X-Repo-Commit", "../../x"),
        ("ETag", '"../../../x"'),
        ("X-Linked-Etag", '"/etc/passwd"'),
        ("ETag", '".."'),
    ],
)
def test_a_server_names_no_other_file(
    server: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: str
) -> None:
    from support import hub as support

    whole = support._Handler._resolve

    def resolve(self: Any, repo: str, revision: str, name: str) -> Any:
        answer = whole(self, repo, revision, name)
        return replace(answer, headers={**answer.headers, place: value})

    monkeypatch.setattr(support._Handler, "_resolve", resolve)
    before = {path for path in tmp_path.rglob("*") if hub.cache not in path.parents}
    with pytest.raises(Transient, match="which no Hub does"):
        HubSource("org/model", "main", Choice(), hub).bring(tmp_path / "out", Watch())
    after = {path for path in tmp_path.rglob("*") if hub.cache not in path.parents}
    assert {path.name for path in after - before} <= {"hub", "hf", "out"}
    assert not list(hub.cache.rglob("*/blobs/*"))


@pytest.mark.parametrize(
    "change",
    [
        {"sha": None}, {"sha": 5}, {"sha": "../../x"}, {"sha": "a" * 39}, {"siblings": None}, {"siblings": [1]},
        {"siblings": [{"rfilename": "", "size": 3, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a", "size": "3", "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a", "size": -3, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a", "size": 3, "blobId": "../x"}]},
        {"siblings": [{"rfilename": 3, "size": 3, "blobId": "0" * 40}]},
    ],
)  # fmt: skip
def test_a_listing_that_is_malformed(
    server: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    from support import hub as support

    told = {**server.repositories["org/model"].info(resolve_commit("org/model", "main", hub=hub), blobs=True), **change}
    monkeypatch.setattr(support._Handler, "_info", lambda self, repo, revision="main": as_json(told))
    with pytest.raises((Transient, InvalidCheckpoint)):
        describe("org/model", hub=hub)


def test_what_a_server_says_moves_nothing_on_a_terminal() -> None:
    error = BigpipeError("it said \x1b[2J\x1b]0;title\x07 hi\nand \u202ethat", "cure\r")
    assert str(error) == "it said \\x1b[2J\\x1b]0;title\\x07 hi\nand \\u202ethat\n  cure\\r"


def test_an_answer_that_trickles_is_given_up(server: LoopbackHub, hub: Hub) -> None:
    server.fail("slow", "/revision/", rate=5, times=9)
    with pytest.raises(Transient, match="too slowly"):
        describe("org/model", hub=replace(hub, timeout=1.5))
