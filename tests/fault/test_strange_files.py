"""Something else in place of a file or folder of the store: the run takes it for lost, or names the cure that works."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forking import TOLD, Ending, forked
from support.stores import contents, fill, in_memory, publish, record

import bigpipe
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.files import read_sealed, write_sealed
from bigpipe.orchestrator.report.inspection import list_store, show_run, verify_store
from bigpipe.orchestrator.store.store import Store

ROOT = Path(__file__).parents[2]
RECIPE = """\
version: 1
name: strange
stages:
  download: {uses: download, with: {path: model}}
  quantize: {uses: quantize, inputs: download, with: {scheme: int8}}
  dispatch: {uses: dispatch, inputs: quantize, with: {max_memory: {cpu: 1GiB}, sequence_length: 16}}
"""
HARMS = ("directory", "fifo", "dangling link", "link to itself", "file", "unreadable", "garbage", "elsewhere")
NOBODY = 65534
"""A user who is not root, whom permissions bind."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Iterator[Path]:
    """A folder with a recipe and the store of its run, for everybody to use."""
    with in_memory(tmp_path_factory.mktemp("strange")) as place:
        place.chmod(0o755)
        shutil.copytree(ROOT / "models" / "quickstart", place / "before" / "model")
        (place / "before" / "recipe.yaml").write_text(RECIPE)
        the_run(place / "before")
        yield place / "before"


def run(folder: Path, user: int = 0):
    return forked(lambda: the_run(folder), user=user)


def the_run(folder: Path) -> None:
    os.environ["HOME"] = str(folder)
    done = bigpipe.run(folder / "recipe.yaml", store=folder / "store", check=True)
    tensors = sorted(done.path("quantize").glob("*.safetensors"))
    right = (folder / "right").read_bytes() if (folder / "right").exists() else None
    told = b"".join(path.read_bytes() for path in tensors) + (done.path("dispatch") / "placement.json").read_bytes()
    if right is None:
        (folder / "right").write_bytes(told)
    assert right in (None, told)
    assert (done.path("download") / "config.json").read_bytes() == (folder / "model" / "config.json").read_bytes()


def places(store: Path) -> Iterator[Path]:
    """Everything in a store."""
    for place, folders, names in os.walk(store):
        yield from (Path(place) / name for name in sorted((*folders, *names)))


def harm(path: Path, how: str) -> None:
    if how == "unreadable":
        path.chmod(0)
        return
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    match how:
        case "directory":
            path.mkdir()
            (path / "inside").write_bytes(b"")
        case "fifo":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to("nowhere")
        case "link to itself":
            path.symlink_to(path.name)
        case "elsewhere":
            path.symlink_to("/etc/hostname")
        case "file":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b'{"sha256": "' + bytes(range(256)))
    shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()


def look_back(folder: Path) -> None:
    list_store(store=folder / "store")
    show_run("last", store=folder / "store")


def repair(folder: Path) -> None:
    verify_store(True, store=folder / "store")


def mended(folder: Path, user: int) -> None:
    """See the module. A reader of runs must not wait for ever either."""
    assert forked(lambda: look_back(folder), user=user).in_order
    first = run(folder, user)
    assert first.code in (0, TOLD), first
    if first.code:
        assert "bigpipe verify --repair" in first.said, first
    done = forked(lambda: repair(folder), user=user)
    assert done.code in (0, TOLD), done
    again = run(folder, user)
    assert again.code == 0, (first, done, again)
    left = forked(lambda: clean(folder), user=user)
    assert left.code == 0, (first, left)


def clean(folder: Path) -> None:
    with Store(folder / "store") as store:
        assert store.verify().findings == ()


@pytest.mark.parametrize("number", [4, pytest.param(0, marks=[pytest.mark.fault, pytest.mark.timeout(3600)])])
def test_something_else_in_place_of_anything(ran, seed, number):
    """number: so many places, each with one of the harms; 0: every place with every harm."""
    dice = random.Random(seed)  # noqa: S311
    names = [path.relative_to(ran) for path in places(ran / "store")]
    cases = [(name, how) for name in names for how in HARMS if how != "unreadable" or os.geteuid() == 0]
    assert wrongs(ran, dice.sample(cases, number) if number else cases) == []


@pytest.mark.parametrize("how", ["directory", "link to itself"])
def test_something_else_in_place_of_a_lock(ran, how):
    """What has no content to be damaged."""
    assert wrongs(ran, [(Path("store/locks") / name, how) for name in ("gc", "roots")]) == []


def wrongs(ran: Path, cases: list[tuple[Path, str]]) -> list[str]:
    wrong = []
    for name, how in cases:
        folder = ran.with_name("now")
        shutil.copytree(ran, folder, symlinks=True)
        user = NOBODY if how == "unreadable" else 0
        if user:
            give(folder, user)
        if how != "unreadable" or not (folder / name).is_symlink():
            harm(folder / name, how)
        try:
            mended(folder, user)
        except AssertionError as error:
            wrong.append(f"{how} at {name}: {error}")
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)
    return wrong


def give(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


@pytest.mark.parametrize("how", ["file", "dangling link"])
def test_a_store_that_is_none_is_named(workshop, how):
    (workshop.folder / "store").mkdir()
    harm(workshop.folder / "store", how)
    with pytest.raises(UsageError, match=r"the store (is no directory|cannot be where)") as told:
        workshop.run("version: 1\nname: none\nstages:\n  write: {uses: write}\n", check=True)
    assert "--store DIR" in told.value.cure


@pytest.mark.parametrize("how", [how for how in HARMS if how != "unreadable"])
def test_a_record_that_is_none_is_read_at_once(tmp_path, how):
    """Nobody waits for a FIFO, and no link is followed: a record is a file."""
    path = tmp_path / "record.json"
    write_sealed(path, {"value": 1})
    harm(path, how)
    ending = forked(lambda: read_sealed(path), seconds=5)
    assert ending.code is not None
    assert "Damaged" in ending.said


@pytest.mark.parametrize(
    ("name", "how"),
    [("objects", "file"), ("keys", "fifo"), ("memo", "dangling link"), ("quarantine", "file"), ("work", "fifo")],
)
def test_a_folder_that_is_none_is_named_before_work_is_done(workshop, name, how):
    """And after `verify --repair` it is one again."""
    workshop.run("version: 1\nname: folders\nstages:\n  write: {uses: write}\n")
    folder = workshop.folder / "store" / name
    folder.mkdir(exist_ok=True)
    harm(folder, how)
    with pytest.raises(BigpipeError) as told:
        workshop.run(force=["write"], check=True)
    assert str(folder) in told.value.cause
    assert "bigpipe verify --repair" in told.value.cure
    assert workshop.ran == []
    assert forked(lambda: repair(workshop.folder)).code in (0, TOLD)
    assert workshop.run(force=["write"]).status == "succeeded"
    assert workshop.ran == ["write"]
    with Store(workshop.folder / "store") as store:
        assert store.verify().clean


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody whom permissions bind")
@pytest.mark.parametrize(
    "name", ["artifacts/*", "artifacts/*.json", "keys/*", "objects/*", "locks/gc", "memo", "runs/*"]
)
def test_what_its_owner_may_not_read_is_opened_again(tmp_path, name):
    with in_memory(tmp_path) as place:
        place.chmod(0o755)
        with Store(place / "store") as store:
            publish(store, "a", {"x": b"made", "w/y": b"this too"})
            fill(store.root, {"memo/files.jsonl": b"", "runs/20260101-000000-aaaaaa/events.jsonl": b""})
        give(place / "store", NOBODY)
        for path in (place / "store").glob(name):
            path.chmod(0)

        def look() -> None:
            with Store(place / "store") as again:
                assert again.verify(repair=True).findings
                assert again.verify().findings == ()
                done = again.find(record("a").key)
                assert again.intact(done)
                assert contents(again, done) == {"x": b"made", "w/y": b"this too"}
                publish(again, "b", {"z": b"and more"})

        assert forked(look, user=NOBODY) == Ending(0, "")
