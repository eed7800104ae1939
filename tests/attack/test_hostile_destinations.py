"""A file system of fsspec that answers nonsense, fails, or never ends: an error of ours, or a receipt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bigpipe.bigmodel.publishing import Contents, Provenance, Receipt, check_destination, is_present, publish
from bigpipe.bigmodel.publishing.destinations import BESIDE, WHOLE, FileSystem
from bigpipe.errors import BigpipeError, StageFailed, UsageError

SHOUT = "\x1b[2J\x1b]0;title\x07"
MINE = Provenance(recipe="r", node="save")
MODEL = {"config.json": "{}", "sub/a.txt": "a" * 999, "w.bin": "w" * 99_999}


class Endless:
    """A file that is read for ever."""

    def __enter__(self) -> Endless:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self, size: int = -1) -> bytes:
        return bytes(1 << 20)


class Odd(Exception):
    def __str__(self) -> str:
        return f"{SHOUT} no"


class Liar(MemoryFileSystem):
    """Right in all but the methods that a test replaces."""

    cachable = False
    protocol = "liar"

    def __init__(self, lies: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}  # type: ignore[misc]
        self.pseudo_dirs: list[str] = [""]  # type: ignore[misc]
        for name, lie in lies.items():
            setattr(self, name, lie)


class Bottomless(Liar):
    """Whatever is read never ends."""

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Endless() if mode == "rb" else super().open(path, mode, **options)


def fails(*_: object, **options: object) -> Any:
    raise Odd


def gives(value: Any) -> Callable[..., Any]:
    return lambda *_, **options: value


def file(**info: Any) -> dict[str, Any]:
    return {"/m/config.json": {"name": "/m/config.json", "type": "file", **info}}


VALUES = (None, 5, "x", [], {}, [None], [5], b"x", True)
FOUND: dict[str, Any] = {
    **{f"{value!r}": value for value in VALUES},
    "no size": file(),
    "size none": file(size=None),
    "size text": file(size="many"),
    "size below nothing": file(size=-5),
    "size huge": file(size=10**30),
    "size a list": file(size=[]),
    "infos none": {"/m/a": None},
    "infos lists": {"/m/a": []},
    "names numbers": {5: {"size": 1}},
    "a name above": {"/m/../x": {"size": 1}},
    "an absolute name": {"/etc/passwd": {"size": 1}},
    "escapes": {f"/m/{SHOUT}": {"size": 1}},
    "half a pair": {"/m/\ud800": {"size": 1}},
    "a mark of escapes": file(size=2, ETag=SHOUT),
    "a long mark": file(size=2, ETag="a" * 10**7),
    "a mark of a list": file(size=2, ETag=[{}]),
    "many": {f"/m/{i}": {"size": 1} for i in range(20_000)},
}
JSONS = {
    "nothing": b"",
    "a list": b"[1]",
    "a number": b"5",
    "deep": b"[" * 100_000,
    "a long number": b"9" * 5000,
    "no UTF-8": b"\xff",
    "sizes of text": b'{"a": "x"}',
    "a name above": b'{"../../x": 1}',
    "an absolute name": b'{"/x": 1}',
    "another transfer's": json.dumps({f"{BESIDE}x/a": 1}).encode(),
    "a file that is not there": b'{"nowhere": 5}',
    "files of a list": b'{"schema": "bigpipe.provenance/1", "files": [1]}',
    "files of numbers": b'{"schema": "bigpipe.provenance/1", "recipe": "r", "node": "save", '
    b'"files": {"config.json": 5}}',
    "digests of numbers": b'{"schema": "bigpipe.provenance/1", "recipe": "r", "node": "save", '
    b'"files": {"config.json": {"size": 2, "sha256": 5}}}',
}
READS = ("find", "ls", "cat_file", "open", "info", "size", "exists", "glob", "isdir", "isfile", "invalidate_cache")
WRITES = ("makedirs", "mkdir", "pipe_file", "cp_file", "rm", "rm_file", "mv", "touch")
LIES: dict[str, dict[str, Callable[..., Any]]] = {
    **{f"find gives {what}": {"find": gives(found)} for what, found in FOUND.items()},
    **{
        f"ls gives {value!r}": {"ls": gives(value)}
        for value in (*VALUES, [BESIDE], [BESIDE + SHOUT], [f"{BESIDE}/../.."])
    },
    **{f"cat_file gives {value!r}": {"cat_file": gives(value), "ls": gives([f"{BESIDE}1"])} for value in VALUES},
    **{f"open gives {value!r}": {"open": gives(value)} for value in VALUES},
    **{f"{name} fails": {name: fails} for name in (*READS, *WRITES)},
    **{f"{name} does nothing": {name: gives(None)} for name in WRITES},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, text in MODEL.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    (tmp_path / "scratch").mkdir()
    return tmp_path / "model"


def attempt(system: Liar, model: Path) -> Receipt | BigpipeError:
    target = FileSystem("liar://m", system, "/m")
    try:
        check_destination(target)
        receipt = publish(Contents(model=model), target, MINE, scratch=model.parent / "scratch")
        is_present(target, receipt)
    except (UsageError, StageFailed) as error:
        return error
    return receipt


def check(found: Receipt | BigpipeError) -> None:
    text = str(found) if isinstance(found, BigpipeError) else found.text()
    assert "\x1b" not in text
    assert len(text) < 100_000
    assert not isinstance(found, BigpipeError) or (found.cause and found.cure)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lie", LIES)
def test_a_file_system_that_lies(lie: str, model: Path) -> None:
    system = Liar(LIES[lie])
    found = attempt(system, model)
    check(found)
    if isinstance(found, Receipt):
        there = {name: bytes(file.getvalue()) for name, file in system.store.items()}
        assert all(there[f"/m/{name}"] == text.encode() for name, text in MODEL.items())


@pytest.mark.timeout(60)
def test_files_without_end(model: Path) -> None:
    assert isinstance(attempt(Bottomless({}), model), StageFailed)
    holding = Bottomless({})
    holding.pipe_file("/m/provenance.json", b"{}")
    assert isinstance(attempt(holding, model), UsageError)


@pytest.mark.parametrize("what", JSONS)
@pytest.mark.parametrize("name", ["provenance.json", f"{BESIDE}1/{WHOLE}"])
def test_a_record_of_somebody_else_lies_there(name: str, what: str, model: Path) -> None:
    system = Liar({})
    evil = {f"/m/{BESIDE}1/../../x": b"evil", f"/m/{BESIDE}1//x": b"evil"}
    kept = {f"/m/{name}": JSONS[what], "/m/config.json": b"{}", "/x": b"somebody else's"}
    for path, data in {**kept, **evil}.items():
        system.pipe_file(path, data)
    check(attempt(system, model))
    assert [path for path in system.store if ".." in path or "//" in path] in ([], [*evil])
    assert system.store["/x"].getvalue() == b"somebody else's"
    assert json.loads(system.store["/m/config.json"].getvalue()) == {}
