"""Artifacts are taken out into a directory that is not there, or into an empty one, which stays what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.stores import publish

from bigpipe.errors import StageFailed, UsageError
from bigpipe.orchestrator.store.artifacts import KeyRecord
from bigpipe.orchestrator.store.store import Store

FILES = {"a": b"12345", "deep/b": b"678"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def made(store: Store) -> KeyRecord:
    return publish(store, "shard", FILES)


def found(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_into_a_directory_that_is_not_there(store: Store, made: KeyRecord, tmp_path: Path) -> None:
    assert store.take_out(made.digest, tmp_path / "x" / "out") == {"a": 5, "deep/b": 3}
    assert found(tmp_path / "x") == {f"out/{name}": content for name, content in FILES.items()}


@pytest.mark.parametrize("name", [".", "", "absolute"])
def test_into_the_working_directory(
    store: Store, made: KeyRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    monkeypatch.chdir(out)
    before = os.stat(".")
    store.take_out(made.digest, Path.cwd() if name == "absolute" else Path(name))
    assert found(out) == FILES
    assert not any(path.name.startswith(".") for path in out.iterdir())
    assert (os.stat(out).st_ino, os.stat(".").st_ino, os.stat(out).st_mode) == (*[before.st_ino] * 2, before.st_mode)


def test_what_a_killed_one_left_is_not_in_the_way_and_goes(store: Store, made: KeyRecord, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".artifact.0123.part"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "b").write_bytes(b"6")
    store.take_out(made.digest, tmp_path / "out")
    assert found(tmp_path / "out") == FILES
    assert not left.exists()


def test_what_somebody_else_began_is_not_ours_to_remove(store: Store, made: KeyRecord, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".film.part").write_bytes(b"half")
    with pytest.raises(UsageError, match="is there already"):
        store.take_out(made.digest, tmp_path / "out")
    assert found(tmp_path / "out") == {".film.part": b"half"}


@pytest.mark.parametrize("there", ["file", "full", "link", "dangling"])
def test_what_is_there_already_stays(store: Store, made: KeyRecord, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("x")
    elif there == "full":
        out.mkdir()
        (out / "mine").write_text("x")
    else:
        out.symlink_to(tmp_path if there == "link" else tmp_path / "nothing")
    with pytest.raises(UsageError, match="is there already"):
        store.take_out(made.digest, out)


def test_damaged_bytes_leave_an_empty_directory_empty(store: Store, made: KeyRecord, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    damaged = store.artifact_path(made.digest) / "deep" / "b"
    path = damaged.resolve()
    path.chmod(0o644)
    path.write_bytes(b"67X")
    with pytest.raises(StageFailed, match="is damaged"):
        store.take_out(made.digest, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
