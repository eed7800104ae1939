"""Against a Hub on loopback, through the real `huggingface_hub` client."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.hub import LoopbackHub

from bigpipe.bigmodel.hub import Hub, Repository, describe, snapshot as snapshot_module
from bigpipe.bigmodel.hub.snapshot import Snapshot, fetch, missing_bytes
from bigpipe.errors import GatedRepository, InvalidCheckpoint, Offline, Transient

FILES: dict[str, bytes] = {
    "config.json": b'{"model_type": "opt"}',
    "model.safetensors": os.urandom(300_000),
    "pytorch_model.bin": os.urandom(200_000),
    "unet/config.json": b"{}",
}
TOTAL = sum(map(len, FILES.values()))


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.create("org/model", FILES)
        yield hub


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub.from_environment(server.environment(tmp_path / "hf"))


def fetch_all(
    hub: Hub, memo: Path, repository: Repository | None = None, reported: list[tuple[str, int]] | None = None
) -> Snapshot:
    repository = replace(repository or describe("org/model", "main", hub=hub), hub=replace(hub, memo=memo))

    def report(done: int, total: int, task: str) -> None:
        if reported is not None:
            reported.append((task, done))

    return fetch(repository, repository.files, report=report)


def test_files_come_whole_with_their_digests_and_stay_in_the_hub_cache(hub: Hub, tmp_path: Path) -> None:
    reported: list[tuple[str, int]] = []
    snapshot = fetch_all(hub, tmp_path / "memo", reported=reported)
    assert {name: file.path.read_bytes() for name, file in snapshot.files.items()} == FILES
    for name, file in snapshot.files.items():
        assert (file.sha256, file.size) == (hashlib.sha256(FILES[name]).hexdigest(), len(FILES[name]))
        assert file.path.is_relative_to(hub.folder("org/model") / "blobs")
    assert snapshot.fetched_bytes == TOTAL
    for task in ("download", "verify"):
        done = [size for told, size in reported if told == task]
        assert done == sorted(done)
        assert done[-1] == TOTAL


def test_a_second_time_nothing_is_asked_fetched_or_read(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    memo = tmp_path / "memo"
    repository = describe("org/model", "main", hub=hub)
    first = fetch_all(hub, memo, repository)
    asked = len(server.log)
    assert missing_bytes(repository, repository.files) == 0
    reported: list[tuple[str, int]] = []
    second = fetch_all(hub, memo, repository, reported)
    assert second == Snapshot(first.files, 0)
    assert reported == []  # what is read to be verified is reported
    assert len(server.log) == asked


def test_a_commit_is_what_it_was_when_the_branch_has_moved(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    before = describe("org/model", "main", hub=hub)
    server.commit("org/model", {"model.safetensors": b"other weights", "new.json": b"{}"})
    snapshot = fetch_all(hub, tmp_path / "memo", before)
    assert snapshot.files["model.safetensors"].path.read_bytes() == FILES["model.safetensors"]
    assert "new.json" not in snapshot.files
    after = describe("org/model", "main", hub=hub)
    assert fetch_all(hub, tmp_path / "memo", after).files["model.safetensors"].path.read_bytes() == b"other weights"


def test_only_what_is_missing_is_fetched(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repository = describe("org/model", "main", hub=hub)
    weights = repository.file("model.safetensors")
    assert weights is not None
    fetch(repository, [weights])
    assert missing_bytes(repository, repository.files) == TOTAL - 300_000
    assert fetch_all(hub, tmp_path / "memo", repository).fetched_bytes == TOTAL - 300_000


@pytest.mark.parametrize("path", ["/cdn/", "config.json"])
def test_garbage_of_the_same_size_is_fetched_again(server: LoopbackHub, hub: Hub, tmp_path: Path, path: str) -> None:
    server.fail("garbage", path, method="GET")
    snapshot = fetch_all(hub, tmp_path / "memo")
    assert {name: file.path.read_bytes() for name, file in snapshot.files.items()} == FILES


def test_garbage_twice_is_refused(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.fail("garbage", "model.safetensors", times=99, method="GET")
    with pytest.raises(Transient, match=r"model\.safetensors of org/model came twice with other bytes"):
        fetch_all(hub, tmp_path / "memo")


def test_a_blob_that_rotted_is_noticed_and_fetched_again(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    """Although its size and its mtime are what they were."""
    memo = tmp_path / "memo"
    blob = fetch_all(hub, memo).files["model.safetensors"].path
    facts = blob.stat()
    with blob.open("r+b") as file:
        file.write(b"\0\0\0\0\0\0\0\0")
    os.utime(blob, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    away = Hub(endpoint=hub.endpoint, cache=hub.cache, offline=True)
    repository = describe("org/model", "main", hub=hub)
    with pytest.raises(InvalidCheckpoint, match="is damaged"):
        fetch_all(away, memo, repository)
    assert fetch_all(hub, memo, repository).files["model.safetensors"].path.read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("status", {"status": 503, "method": "HEAD"}),
        ("status", {"status": 429, "headers": {"Retry-After": "0"}, "method": "GET"}),
        ("cut", {"method": "GET"}),
        ("html", {"method": "HEAD"}),
        ("etag", {"method": "HEAD"}),
    ],
)
def test_one_fault_on_the_way_does_no_harm(
    server: LoopbackHub, hub: Hub, tmp_path: Path, kind: str, settings: dict[str, object]
) -> None:
    server.fail(kind, "model.safetensors", **settings)  # type: ignore[arg-type]
    try:
        snapshot = fetch_all(hub, tmp_path / "memo")
    except Transient:
        snapshot = fetch_all(hub, tmp_path / "memo")
    assert {name: file.path.read_bytes() for name, file in snapshot.files.items()} == FILES


def test_a_login_page_instead_of_a_file_is_refused(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.fail("html", "/cdn/", times=99, method="GET")
    with pytest.raises(Transient):
        fetch_all(hub, tmp_path / "memo")
    assert not list((hub.folder("org/model") / "snapshots").rglob("model.safetensors"))


def test_a_gate_met_while_downloading(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repository = describe("org/model", "main", hub=hub)
    server.repositories["org/model"].gated = "auto"
    with pytest.raises(GatedRepository):
        fetch_all(hub, tmp_path / "memo", repository)


def test_offline_the_cache_is_enough_or_says_what_is_missing(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    repository = describe("org/model", "main", hub=hub)
    away = Hub(endpoint=hub.endpoint, cache=hub.cache, offline=True)
    with pytest.raises(Offline, match="not whole in the Hub cache"):
        fetch_all(away, tmp_path / "memo", repository)
    fetch_all(hub, tmp_path / "memo", repository)
    asked = len(server.log)
    assert fetch_all(away, tmp_path / "memo", repository).fetched_bytes == 0
    assert describe("org/model", repository.commit, hub=away).commit == repository.commit
    assert len(server.log) == asked


def test_a_link_out_of_the_cache_is_refused(hub: Hub, tmp_path: Path) -> None:
    repository = describe("org/model", "main", hub=hub)
    fetch_all(hub, tmp_path / "memo", repository)
    secret = tmp_path / "secret"
    secret.write_bytes(FILES["config.json"])
    link = hub.folder("org/model") / "snapshots" / repository.commit / "config.json"
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(InvalidCheckpoint, match="outside of the Hub cache"):
        fetch_all(hub, tmp_path / "memo", repository)


def test_bytes_that_xet_brings_are_counted_once() -> None:
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    told: list[tuple[int, int, str]] = []
    count = snapshot_module._Count("download", 100, lambda *told_now: told.append(told_now))
    stop = threading.Event()
    bar = snapshot_module._bar(count, stop)
    with XetDownloadProgressReporter(
        reconstruction_desc="", transfer_desc="", total=100, log_level=20, tqdm_class=bar
    ) as progress:
        for written, transferred in ((0, 30), (40, 50), (100, 55)):
            progress.update_progress(
                SimpleNamespace(
                    total_bytes=100, total_bytes_completed=written, total_transfer_bytes_completed=transferred,
                    total_bytes_completion_rate=1.0, total_transfer_bytes_completion_rate=None,
                )
            )  # fmt: skip
    assert told == [(40, 100, "download"), (100, 100, "download")]
